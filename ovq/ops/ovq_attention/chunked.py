"""OVQ-attention with a reversible backward pass: fast on a CPU, and runs on any device.

What makes it fast:
- The chunk's tokens and the centroids lie side by side as rows [value | key] of one table. Prediction is a matmul, a
  softmax and another matmul. Only the rows that a chunk touches are rewritten, and the matmuls run over the centroids
  in use, not over the capacity.
- The backward pass walks the chunks in reverse and undoes their updates, so that only q, k, v and, per token, a few
  numbers are saved. Sums are undone in float64, where the rounding errors of long sums are negligible. A constant step
  cannot be undone by division, so the rows that it overwrites, at most one per token, are saved instead.
- The gradient of a centroid's mean is accumulated by the matmul itself (`baddbmm_`) as long as its count does not
  change, and divided by the count only when the walk reaches a chunk that touched it.
- Each core handles some of the heads and rows of the batch on its own, and the loops over chunks (`loops.py`) run
  without the GIL (see `ovq.ops.parallel` for why). Inputs and outputs are rearranged for a block of chunks at once.
- Probabilities are powers of 2 (the logits are scaled by log2 e), which torch computes faster than powers of e. The
  backward pass recomputes them from the saved maximum and sums them again: divided by a saved sum, or taken from a
  log-sum-exp, they would not add up to exactly 1, and the gradients of q and beta would be several times less accurate.

Shapes: B batch, T queries, S tokens, L chunk, l tokens and t queries of one chunk, m chunks of a block, H query heads,
G key/value heads, R = H / G, P = B G, N capacity, n centroids in use, K key width, V value width, W = V + K.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ovq.ops.common import work_dtype
from ovq.ops.ovq_attention import decode
from ovq.ops.ovq_attention.loops import backward_chunks, forward_chunks
from ovq.ops.ovq_attention.pieces import Outputs, Piece, pieces_of
from ovq.ops.ovq_attention.spec import Dictionary, OVQSpec
from ovq.ops.ovq_attention.table import Block, Chunk, Scratch, Table, blocks_of, chunks_of, whole_grains
from ovq.ops.parallel import run_pieces

BLOCK = 2**18  # elements of the tokens [m, P, l, W] of a block: they should stay in a core's caches as well
DECODED = 8  # queries up to which multiplying them by the sums is faster than copying the dictionary
LOG2_E = math.log2(math.e)
STATE_GRADIENT = True  # the sums passed in and those returned carry gradients


@torch.compiler.disable
def forward(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    beta_H: Tensor,
    spec: OVQSpec,
    dictionary: Dictionary,
    assignment: Tensor | None = None,
) -> tuple[Tensor, Dictionary, Tensor]:
    """As `reference.forward`."""
    T, S = q_BTHK.shape[1], k_BSGK.shape[1]
    sums = dictionary.key_sum, dictionary.value_sum
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q_BTHK, k_BSGK, v_BSGV, beta_H, *sums))
    if spec.chunk_size > S and T <= DECODED and not trained and q_BTHK.dtype == dictionary.count.dtype:
        a_BGS = torch.full((len(k_BSGK), k_BSGK.shape[2], S), -1, dtype=torch.int32, device=q_BTHK.device)
        return decode.predict(q_BTHK, k_BSGK, v_BSGV, beta_H, dictionary), dictionary, a_BGS
    place = dictionary.size, dictionary.position
    o_BTHV, key_sum, value_sum, count, a_BGS, after = _OVQ.apply(
        q_BTHK, k_BSGK, v_BSGV, beta_H, *sums, dictionary.count.detach(), place, spec, assignment
    )
    return o_BTHV, Dictionary(key_sum, value_sum, count, *after), a_BGS


class _OVQ(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, beta, key_sum, value_sum, count, place, spec, assignment):  # type: ignore[no-untyped-def]
        dictionary = Dictionary(key_sum, value_sum, count, *place)
        (B, T, H, _), (S, G), V = q.shape, k.shape[1:3], v.shape[3]
        chunks = chunks_of(S, T, spec, dictionary)
        whole, trained = S // spec.chunk_size, any(ctx.needs_input_grad)
        new = dictionary
        if whole:
            position = dictionary.position + whole * spec.chunk_size
            new = replace(dictionary.map(torch.empty_like), size=chunks[-1].after, position=position)
        out = Outputs(q.new_empty(B, T, H, V), torch.full((B, G, S), -1, dtype=torch.int32, device=q.device), new)
        if trained:
            out.top, out.count_BGS = count.new_empty(B, T, H, 1), count.new_ones(B, G, S)
            if spec.rate is not None:
                out.overwritten = count.new_empty(B, whole, G, spec.chunk_size, k.shape[3] + V + 1)

        def walk(piece: Piece) -> None:
            forced = None if assignment is None else piece.heads(assignment)
            _walk_forward(
                *piece.inputs(q, k, v, beta), spec, piece.dictionary(dictionary), forced, piece.outputs(out), chunks
            )

        run_pieces(walk, pieces_of(q, G, chunks))
        if trained:
            last = (out.overwritten, new.key_sum, new.value_sum, new.count) if out.overwritten is not None else ()
            kept = out.a_BGS, out.top, out.count_BGS
            ctx.save_for_backward(q, k, v, beta, key_sum, value_sum, count, *kept, *last)
        ctx.spec, ctx.place = spec, place
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(new.count, out.a_BGS)
        return out.o_BTHV, new.key_sum, new.value_sum, new.count, out.a_BGS, (new.size, new.position)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, do: Tensor | None, dkey_sum: Tensor | None, dvalue_sum: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        q, k, v, beta, key_sum, value_sum, count, a_BGS, top, count_BGS, *kept = ctx.saved_tensors
        dictionary = Dictionary(key_sum, value_sum, count, *ctx.place)
        chunks = chunks_of(k.shape[1], q.shape[1], ctx.spec, dictionary)
        last = Dictionary(kept[1], kept[2], kept[3], chunks[-1].after, 0) if kept else None
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        dbeta_BH = torch.zeros(q.shape[0], q.shape[2], dtype=work_dtype(q), device=q.device)
        if do is None:
            do = q.new_zeros(*q.shape[:3], v.shape[3])
        saved = Outputs(do, a_BGS, dictionary, top, count_BGS, kept[0] if kept else None)
        of_sums = None
        if dkey_sum is not None or dvalue_sum is not None or any(ctx.needs_input_grad[4:6]):
            of_keys = torch.zeros_like(key_sum) if dkey_sum is None else dkey_sum.clone()
            of_values = torch.zeros_like(value_sum) if dvalue_sum is None else dvalue_sum.clone()
            of_sums = Dictionary(of_keys, of_values, count, *ctx.place)

        def walk(piece: Piece) -> None:
            _walk_backward(
                *piece.inputs(q, k, v, beta),
                ctx.spec,
                piece.outputs(saved),
                piece.dictionary(last) if last else None,
                (piece.tokens(dq, queries=True), piece.tokens(dk), piece.tokens(dv), piece.queries(dbeta_BH)),
                piece.dictionary(of_sums) if of_sums else None,
                chunks,
            )

        run_pieces(walk, pieces_of(q, k.shape[2], chunks))
        dkey_sum, dvalue_sum = (of_sums.key_sum, of_sums.value_sum) if of_sums else (None, None)
        return dq, dk, dv, dbeta_BH.sum(0).to(beta.dtype), dkey_sum, dvalue_sum, *[None] * 4


def _walk_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta_H: Tensor,
    spec: OVQSpec,
    dictionary: Dictionary,
    forced: Tensor | None,
    out: Outputs,
    chunks: list[Chunk],
) -> None:
    """Predict and update, chunk by chunk; all results are written into `out`."""
    G, V, work = k.shape[2], v.shape[3], work_dtype(q)
    table = Table(dictionary, _longest(chunks), chunks[-1].after, q.dtype, work)
    if chunks[0].whole:
        table.hold_sums(dictionary, work)
    scratch = Scratch(q, work)
    memory = scratch.take("p", _largest(chunks, table, q.shape[2] // G))
    for block in blocks_of(chunks, G, _chunks_at_once(chunks, table)):
        m, first, t, l = len(block.chunks), block.chunks[0], block.chunks[0].num_queries, block.chunks[0].length
        x = _queries(block, q, beta_H, table, scratch).mul_(LOG2_E)
        o, top, total = (scratch.take(name, *x.shape[:-1], n) for name, n in (("o", V), ("top", 1), ("total", 1)))
        whole = m if first.whole else 0
        a = q.new_empty(whole, table.P, l, dtype=torch.int64)
        count = scratch.take("count", whole, table.P * l, 1)
        forward_chunks(
            table.rows,
            rate=spec.rate or 0.0,
            key_value=spec.assign_on == "key_value",
            nearest_first=spec.first_chunk == "nearest",
            t=t,
            before=[chunk.before for chunk in block.chunks],
            after=[chunk.after for chunk in block.chunks],
            tokens=_tokens(block, k, v, table, scratch),
            x=x,
            o=o,
            top=top,
            total=total,
            a=a,
            count=count,
            memory=memory,
            order=_random_order(block, spec, dictionary.position, q.device) if whole else None,
            forced=None if forced is None or not whole else block.of_heads(forced).flatten(1, 2),
            overwritten=block.of_whole(out.overwritten, spec.chunk_size) if whole else None,
        )
        if t:
            view = block.of_queries(out.o_BTHV)
            view.copy_(o.div_(total).view(view.shape))
            if out.top is not None:
                view = block.of_queries(out.top)
                view.copy_(top.view(view.shape))
        if whole:
            view = block.of_heads(out.a_BGS)
            view.copy_(a.view(view.shape))
            if out.count_BGS is not None:
                block.of_heads(out.count_BGS).copy_(count.view(view.shape))
    if chunks[0].whole:
        table.write_sums(out.new)


def _walk_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta_H: Tensor,
    spec: OVQSpec,
    saved: Outputs,
    last: Dictionary | None,
    grads: tuple[Tensor, Tensor, Tensor, Tensor],
    of_sums: Dictionary | None,
    chunks: list[Chunk],
) -> None:
    """Write the gradients of q, k, v and beta (a sum per row of the batch) into `grads`, last chunk first.

    `of_sums` holds the gradients of the sums after the last chunk and is overwritten with those of the sums before the
    first; None if there are none.

    `saved` is what the forward pass wrote, except that it has the gradient of the output in place of the output, and
    the dictionary before the first chunk; `last` is the one after the last chunk, needed for a constant step.
    """
    G, V, W, work = k.shape[2], v.shape[3], v.shape[3] + k.shape[3], work_dtype(q)
    assert saved.top is not None and saved.count_BGS is not None
    table, scratch = _final_table(k, v, spec, saved, last, chunks, work), Scratch(q, work)
    means, largest = table.rows.means, _largest(chunks, table, q.shape[2] // G)
    gradient = means.new_zeros(*means.shape[:2], 2 * W)
    earlier = means.new_zeros(table.P * table.L, 2 * W)
    picked = torch.empty_like(earlier)
    if of_sums:
        n = chunks[-1].after
        gradient[:, table.L : table.L + n, W : W + V] = of_sums.value_sum[:, :, :n].flatten(0, 1)
        gradient[:, table.L : table.L + n, W + V :] = of_sums.key_sum[:, :, :n].flatten(0, 1)
    memory, memory_ds = scratch.take("p", largest), scratch.take("ds", largest)
    dq, dk, dv, dbeta_BH = grads
    for block in reversed(list(blocks_of(chunks, G, _chunks_at_once(chunks, table)))):
        m, whole, t = len(block.chunks), block.chunks[0].whole, block.chunks[0].num_queries
        tokens = _tokens(block, k, v, table, scratch)
        x = _queries(block, q, beta_H, table, scratch)
        x2 = torch.mul(x, LOG2_E, out=scratch.take("x2", *x.shape))
        backward_chunks(
            table.rows,
            rate=spec.rate or 0.0,
            t=t,
            before=[chunk.before for chunk in block.chunks],
            tokens=tokens,
            x=x,
            x2=x2,
            do=_rows(block, saved.o_BTHV, "do", scratch),
            top=_rows(block, saved.top, "top", scratch),
            index=_index(block, saved.a_BGS, table) if whole else picked.new_empty(0, dtype=torch.int64),
            count=block.of_heads(saved.count_BGS).to(work).reshape(m, -1, 1),
            gradient=gradient,
            picked=picked,
            earlier=earlier,
            memory=memory,
            memory_ds=memory_ds,
            overwritten=block.of_whole(saved.overwritten, spec.chunk_size) if whole else None,
        )
        if t:
            q_block = block.of_queries(q)
            dx_block = x2.view(q_block.shape)
            dbeta_BH += (dx_block * q_block).sum((0, 4, 5)).flatten(1)
            block.of_queries(dq).copy_(dx_block.mul_(beta_H.to(work).view(G, -1, 1, 1)))
        dk_block, dv_block = block.of_tokens(dk), block.of_tokens(dv)
        dv_rows, dk_rows = tokens[..., :-1].unflatten(1, dk_block.shape[1:3]).split([V, W - V], dim=-1)
        dv_block.copy_(dv_rows)
        dk_block.copy_(dk_rows)
    if of_sums:
        n = chunks[0].before
        A_n, dS_n = gradient[:, table.L : table.L + n].split(W, dim=-1)
        dS_n.addcdiv_(A_n, saved.new.count[:, :, :n].flatten(0, 1)[..., None])
        for x, d in zip((of_sums.value_sum, of_sums.key_sum), dS_n.split([V, W - V], dim=-1)):
            x.zero_()[:, :, :n] = d.unflatten(0, x.shape[:2])


def _final_table(
    k: Tensor,
    v: Tensor,
    spec: OVQSpec,
    saved: Outputs,
    last: Dictionary | None,
    chunks: list[Chunk],
    work: torch.dtype,
) -> Table:
    """The table after the last whole chunk: from the saved sums, or by summing again in float64."""
    dictionary = saved.new if last is None else last
    table = Table(dictionary, _longest(chunks), chunks[-1].after, k.dtype, work)
    if not chunks[0].whole:
        return table
    table.hold_sums(dictionary, torch.float64 if last is None else work)
    if last is None:
        scratch = Scratch(k, work)
        for block in blocks_of(chunks, k.shape[2], _chunks_at_once(chunks, table)):
            if block.chunks[0].whole:
                tokens = _tokens(block, k, v, table, scratch)
                table.add(_index(block, saved.a_BGS, table).flatten(), tokens.view(-1, tokens.shape[-1]))
        used = torch.arange(chunks[-1].after, device=k.device).expand(table.P, -1)
        table.set_means(table.index(used))
    return table


def _longest(chunks: list[Chunk]) -> int:
    return max(chunk.length for chunk in chunks)


def _largest(chunks: list[Chunk], table: Table, R: int) -> int:
    """Elements of a chunk's largest matrix: queries, or tokens, times the tokens and centroids that they see."""
    rows = max(max(R * c.num_queries, c.length) * (c.length + whole_grains(c.before)) for c in chunks)
    return table.P * rows


def _random_order(block: Block, spec: OVQSpec, position: int, device: torch.device) -> Tensor | None:
    """[m, l]: indices of the chunks' tokens in the order of random seeding; None if seeding is spread."""
    if spec.seeding != "random":
        return None
    tokens = torch.arange(block.tokens.start, block.tokens.stop, device=device) + position
    return spec.hash_order_at(tokens.view(len(block.chunks), -1))


def _chunks_at_once(chunks: list[Chunk], table: Table) -> int:
    return max(1, BLOCK // (table.P * _longest(chunks) * (table.V + table.K + 1)))


def _tokens(block: Block, k: Tensor, v: Tensor, table: Table, scratch: Scratch) -> Tensor:
    """[m, P, l, W + 1]: rows [value | key | 1]."""
    k_mBGlK, v_mBGlV = block.of_tokens(k), block.of_tokens(v)
    rows = scratch.take("tokens", *k_mBGlK.shape[:-1], table.V + table.K + 1)
    rows[..., : table.V].copy_(v_mBGlV)
    rows[..., table.V : -1].copy_(k_mBGlK)
    rows[..., -1] = 1
    return rows.flatten(1, 2)


def _queries(block: Block, q: Tensor, beta_H: Tensor, table: Table, scratch: Scratch) -> Tensor:
    """[m, P, R t, K]: beta q."""
    q_mBGRtK = block.of_queries(q)
    x = scratch.take("x", *q_mBGRtK.shape)
    torch.mul(q_mBGRtK, beta_H.to(table.work).view(block.G, -1, 1, 1), out=x)
    return x.flatten(1, 2).flatten(2, 3)


def _rows(block: Block, x_BTHK: Tensor, name: str, scratch: Scratch) -> Tensor:
    """[m, P, R t, K]: the block's rows of x."""
    x_mBGRtK = block.of_queries(x_BTHK)
    return scratch.take(name, *x_mBGRtK.shape).copy_(x_mBGRtK).flatten(1, 2).flatten(2, 3)


def _index(block: Block, a_BGS: Tensor, table: Table) -> Tensor:
    """[m, P l]: the flat row index of each token's centroid."""
    a_mPl = block.of_heads(a_BGS).long().flatten(1, 2)
    return (a_mPl + table.rows.base).flatten(1)
