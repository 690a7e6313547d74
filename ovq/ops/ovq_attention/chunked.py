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
- Each core walks some of the heads and rows of the batch on its own (see `ovq.ops.parallel` for why). The walks share
  Python's one lock, so they make few and large calls: inputs and outputs are rearranged for a block of chunks at once.
- Probabilities are powers of 2 (the logits are scaled by log2 e), which torch computes faster than powers of e. The
  backward pass takes them from the saved maximum and sums them again: divided by a saved sum, or by a log-sum-exp, they
  would not add up to 1 to the last bit, and the gradients of q and beta would be several times less exact.

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
from ovq.ops.ovq_attention.assign import Assignment
from ovq.ops.ovq_attention.pieces import Outputs, Piece, pieces_of
from ovq.ops.ovq_attention.spec import Dictionary, OVQSpec
from ovq.ops.ovq_attention.table import Block, Chunk, Scratch, Table, blocks_of, chunks_of
from ovq.ops.ovq_attention.views import Seen
from ovq.ops.parallel import run_pieces

BLOCK = 2**18  # elements of the tokens [m, P, l, W] of a block: they should stay in a core's caches as well
DECODED = 8  # queries up to which their products with the sums are faster than copying the dictionary
LOG2_E = math.log2(math.e)


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
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q_BTHK, k_BSGK, v_BSGV, beta_H))
    if spec.chunk_size > S and T <= DECODED and not trained and q_BTHK.dtype == dictionary.count.dtype:
        a_BGS = torch.full((len(k_BSGK), k_BSGK.shape[2], S), -1, dtype=torch.int32, device=q_BTHK.device)
        return decode.predict(q_BTHK, k_BSGK, v_BSGV, beta_H, dictionary), dictionary, a_BGS
    sums = dictionary.key_sum, dictionary.value_sum, dictionary.count
    place = dictionary.size, dictionary.position
    return _OVQ.apply(q_BTHK, k_BSGK, v_BSGV, beta_H, *(x.detach() for x in sums), place, spec, assignment)


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
        ctx.mark_non_differentiable(out.a_BGS)
        return out.o_BTHV, new, out.a_BGS

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        q, k, v, beta, key_sum, value_sum, count, a_BGS, top, count_BGS, *kept = ctx.saved_tensors
        dictionary = Dictionary(key_sum, value_sum, count, *ctx.place)
        chunks = chunks_of(k.shape[1], q.shape[1], ctx.spec, dictionary)
        last = Dictionary(kept[1], kept[2], kept[3], chunks[-1].after, 0) if kept else None
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        dbeta_BH = torch.zeros(q.shape[0], q.shape[2], dtype=work_dtype(q), device=q.device)
        saved = Outputs(do, a_BGS, dictionary, top, count_BGS, kept[0] if kept else None)

        def walk(piece: Piece) -> None:
            _walk_backward(
                *piece.inputs(q, k, v, beta),
                ctx.spec,
                piece.outputs(saved),
                piece.dictionary(last) if last else None,
                (piece.tokens(dq, queries=True), piece.tokens(dk), piece.tokens(dv), piece.queries(dbeta_BH)),
                chunks,
            )

        run_pieces(walk, pieces_of(q, k.shape[2], chunks))
        return dq, dk, dv, dbeta_BH.sum(0).to(beta.dtype), *[None] * 6


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
    V, work = v.shape[3], work_dtype(q)
    table = Table(dictionary, _longest(chunks), chunks[-1].after, q.dtype, work)
    if chunks[0].whole:
        table.hold_sums(dictionary, work)
    scratch = Scratch(q, work)
    seen = Seen(table, scratch, chunks, R=q.shape[2] // k.shape[2])
    assigned = Assignment(table, spec, scratch)
    for block in blocks_of(chunks, k.shape[2], _chunks_at_once(chunks, table)):
        m, first, t, l = len(block.chunks), block.chunks[0], block.chunks[0].num_queries, block.chunks[0].length
        tokens = _tokens(block, k, v, table, scratch)
        means, sums = tokens[..., :-1].unbind(), tokens.flatten(1, 2).unbind()
        own = table.means[:, table.L - l : table.L]
        if t:
            x = _queries(block, q, beta_H, table, scratch).mul_(LOG2_E)
            o, top, total = (scratch.take(name, *x.shape[:-1], n) for name, n in (("o", V), ("top", 1), ("total", 1)))
            rows = list(zip(x.unbind(), o.unbind(), top.unbind(), total.unbind()))
        a, count = q.new_empty(m, table.P, l, dtype=torch.int64), scratch.take("count", m, table.P * l, 1)
        for i, chunk in enumerate(block.chunks):
            own.copy_(means[i])
            if t:
                x_i, o_i, top_i, total_i = rows[i]
                s = seen(chunk)
                torch.bmm(x_i, s.keys_T, out=s.p)
                s.p.add_(s.log_count)
                s.p_own.add_(s.future)
                torch.amax(s.p, -1, keepdim=True, out=top_i)
                s.p.sub_(top_i).exp2_()
                torch.sum(s.p, -1, keepdim=True, out=total_i)
                torch.bmm(s.p, s.values, out=o_i)
            if chunk.whole:
                if forced is None:
                    a[i] = assigned(chunk, dictionary.position + chunk.tokens.start)
                else:
                    a[i] = forced[:, :, chunk.tokens].flatten(0, 1)
                number = chunk.tokens.start // spec.chunk_size
                _commit(table, a[i], sums[i], spec, None if out.overwritten is None else out.overwritten[:, number])
                count[i] = table.picked_count
        if t:
            view = block.of_queries(out.o_BTHV)
            view.copy_(o.div_(total).view(view.shape))
            if out.top is not None:
                view = block.of_queries(out.top)
                view.copy_(top.view(view.shape))
        if first.whole:
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
    chunks: list[Chunk],
) -> None:
    """Write the gradients of q, k, v and beta (a sum per row of the batch) into `grads`, last chunk first.

    `saved` is what the forward pass wrote, but with the output's gradient for the output and the dictionary before the
    first chunk; `last` is the dictionary after the last one, for a constant step.

    Let dS be the gradient of the sums and A what the matmuls have accumulated for each mean since its count last
    changed. The tokens of a chunk receive dS + A / c; then the chunk's update is undone, and its prediction is
    differentiated.
    """
    G, V, W, work = k.shape[2], v.shape[3], v.shape[3] + k.shape[3], work_dtype(q)
    assert saved.top is not None and saved.count_BGS is not None
    table, scratch = _final_table(k, v, spec, saved, last, chunks, work), Scratch(q, work)
    gradient = table.means.new_zeros(*table.means.shape[:2], 2 * W)  # rows [A | dS]; those of tokens hold their own
    before = table.means.new_zeros(table.P * table.L, 2 * W)  # rows [0 | dS]
    picked, flat = torch.empty_like(before), gradient.view(-1, 2 * W)
    A_picked, dS_picked, dS_before = picked[:, :W], picked[:, W:], before[:, W:]
    seen = Seen(table, scratch, chunks, R=q.shape[2] // G, gradient=gradient)
    dq, dk, dv, dbeta_BH = grads
    for block in reversed(list(blocks_of(chunks, G, _chunks_at_once(chunks, table)))):
        m, first, t, l = len(block.chunks), block.chunks[0], block.chunks[0].num_queries, block.chunks[0].length
        tokens = _tokens(block, k, v, table, scratch)
        means, sums = tokens[..., :-1].unbind(), tokens.flatten(1, 2).unbind()
        place = slice(table.L - l, table.L)
        own, down = table.means[:, place], gradient[:, place, :W]
        if t:
            x = _queries(block, q, beta_H, table, scratch)
            x2 = torch.mul(x, LOG2_E, out=scratch.take("x2", *x.shape))
            do, top = _rows(block, saved.o_BTHV, "do", scratch), _rows(block, saved.top, "top", scratch)
            rows, total = list(zip(*(y.unbind() for y in (x, x2, do, top)))), torch.empty_like(top[0])
        if first.whole:
            index = _index(block, saved.a_BGS, table).unbind()
            count = block.of_heads(saved.count_BGS).to(work).reshape(m, -1, 1).unbind()
        for i in reversed(range(m)):
            chunk, reached = block.chunks[i], None
            down.zero_()
            own.copy_(means[i])
            if chunk.whole:
                torch.index_select(flat, 0, index[i], out=picked)
                reached = torch.addcdiv(dS_picked, A_picked, count[i], out=dS_before)
                number = chunk.tokens.start // spec.chunk_size
                kept = None if saved.overwritten is None else saved.overwritten[:, number]
                reached = _undo(table, index[i], sums[i], reached, spec, kept)
                flat.index_copy_(0, index[i], before)
            if t:
                x_i, x2_i, do_i, top_i = rows[i]
                s = seen(chunk)
                assert s.dvalues is not None and s.dkeys is not None
                torch.bmm(x2_i, s.keys_T, out=s.p)
                s.p.add_(s.log_count).sub_(top_i)
                s.p_own.add_(s.future)
                torch.sum(s.p.exp2_(), -1, keepdim=True, out=total)
                s.p.div_(total)
                torch.bmm(do_i, s.values_T, out=s.ds)
                torch.ops.aten._softmax_backward_data.out(s.ds, s.p, -1, work, grad_input=s.ds)
                torch.bmm(s.ds, s.keys, out=x2_i)  # from here on the gradient of x
                s.dvalues.baddbmm_(s.p_T, do_i)
                s.dkeys.baddbmm_(s.ds_T, x_i)
            # From here on the gradients of the chunk's tokens.
            if reached is None:
                means[i].copy_(down)
            else:
                torch.add(down, reached.view(down.shape), out=means[i])
        if t:
            q_block = block.of_queries(q)
            dx_block = x2.view(q_block.shape)
            dbeta_BH += (dx_block * q_block).sum((0, 4, 5)).flatten(1)
            block.of_queries(dq).copy_(dx_block.mul_(beta_H.to(work).view(G, -1, 1, 1)))
        dk_block, dv_block = block.of_tokens(dk), block.of_tokens(dv)
        dv_rows, dk_rows = tokens[..., :-1].unflatten(1, dk_block.shape[1:3]).split([V, W - V], dim=-1)
        dv_block.copy_(dv_rows)
        dk_block.copy_(dk_rows)


def _commit(table: Table, a_PL: Tensor, rows: Tensor, spec: OVQSpec, keep: Tensor | None) -> None:
    """Add a whole chunk to the sums and update its centroids' means; `keep` first gets the old sums."""
    index = table.index(a_PL)
    if spec.rate is not None:
        sums = table.flat_sums.index_select(0, index)
        if keep is not None:
            keep.copy_(sums.view(keep.shape))
        old, new = _step_weights(table, index, sums[:, -1:], spec.rate)
        sums[:, :-1] *= old
        table.flat_sums.index_copy_(0, index, sums)
        rows[:, :-1] *= new
    table.add(index, rows)
    table.refresh(index)


def _undo(
    table: Table, index: Tensor, rows: Tensor, reached: Tensor, spec: OVQSpec, overwritten: Tensor | None
) -> Tensor:
    """Remove a chunk from the dictionary. `reached`, the gradient of its centroids' sums, becomes that of the sums
    before the chunk; returns the gradient of its tokens."""
    if spec.rate is None:
        table.add(index, rows, sign=-1)
        table.refresh(index)
        return reached
    assert overwritten is not None
    overwritten = overwritten.flatten(0, 2)
    table.flat_sums.index_copy_(0, index, overwritten)
    old, new = _step_weights(table, index, overwritten[:, -1:], spec.rate)
    table.refresh(index)
    of_tokens = reached * new
    reached *= old
    return of_tokens


def _step_weights(table: Table, index: Tensor, count: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """The factors of a constant step for a centroid's old sum and for each of its m new tokens, [P L, 1] each.

    mu <- (1-rate)^m mu + (1 - (1-rate)^m) mean(tokens), and a sum is count x mean; a new centroid starts as the mean.
    """
    ones = torch.ones_like(index, dtype=count.dtype)
    m = count.new_zeros(len(table.flat_sums)).index_add_(0, index, ones)[index][:, None]
    left = torch.where(count > 0, (1 - rate) ** m, 0)
    return left * (count + m) / count.clamp_min(1), (1 - left) * (count + m) / m


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
    return (a_mPl + table.base_P1).flatten(1)
