"""OVQ-attention with a reversible backward pass: fast on a CPU, and runs on any device.

What makes it fast:
- The chunk's tokens and the centroids lie side by side as rows [value | key | log count] of one table. Prediction is a
  matmul (a column of ones in the queries adds the log counts), a fused softmax and another matmul. Only the rows that a
  chunk touches are rewritten, and the matmuls run over the centroids in use, not over the capacity.
- The backward pass walks the chunks in reverse and undoes their updates, so that only q, k, v and one integer per token
  are saved. Sums are undone in float64, where the rounding errors of long sums are negligible. A constant step cannot
  be undone by division, so the rows that it overwrites, at most one per token, are saved instead.
- The gradient of a centroid's mean is accumulated by the matmul itself (`baddbmm_`) as long as its count does not
  change, and divided by the count only when the walk reaches a chunk that touched it.
- Each core walks some of the heads and rows of the batch on its own (see `ovq.ops.parallel` for why).

Shapes: B batch, T queries, S tokens, L chunk, l tokens and t queries of one chunk, H query heads, G key/value heads,
R = H / G, P = B G, N capacity, n centroids in use, K key width, V value width, W = V + K + 1 (width of a row).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ovq.ops.common import work_dtype
from ovq.ops.ovq_attention.spec import Dictionary, OVQSpec
from ovq.ops.ovq_attention.table import Chunk, Table, chunks_of
from ovq.ops.parallel import run_pieces

# Thresholds on a CPU, counted in attention probabilities: the size of a call up to which one core alone is faster, and
# the size of a chunk of one piece, which should stay in a core's caches from matmul to softmax to matmul.
SMALL_CALL = 2**18
PIECE = 2**19


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
    sums = dictionary.key_sum, dictionary.value_sum, dictionary.count
    place = dictionary.size, dictionary.position
    return _OVQ.apply(q_BTHK, k_BSGK, v_BSGV, beta_H, *(x.detach() for x in sums), place, spec, assignment)


class _OVQ(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, beta, key_sum, value_sum, count, place, spec, assignment):  # type: ignore[no-untyped-def]
        dictionary = Dictionary(key_sum, value_sum, count, *place)
        (B, T, H, _), (S, G), V = q.shape, k.shape[1:3], v.shape[3]
        chunks = chunks_of(S, T, spec, dictionary)
        whole = S // spec.chunk_size
        new = dictionary
        if whole:
            position = dictionary.position + whole * spec.chunk_size
            new = replace(dictionary.map(torch.empty_like), size=chunks[-1].after, position=position)
        out = _Outputs(q.new_empty(B, T, H, V), torch.full((B, G, S), -1, dtype=torch.int32, device=q.device), new)
        if spec.rate is not None and any(ctx.needs_input_grad):
            out.overwritten = count.new_empty(B, whole, G, spec.chunk_size, k.shape[3] + V + 1)

        def walk(piece: _Piece) -> None:
            forced = None if assignment is None else piece.heads(assignment)
            _walk_forward(
                *piece.inputs(q, k, v, beta), spec, piece.dictionary(dictionary), forced, piece.outputs(out), chunks
            )

        run_pieces(walk, _pieces(q, G, chunks))
        kept = () if out.overwritten is None else (out.overwritten, new.key_sum, new.value_sum, new.count)
        ctx.save_for_backward(q, k, v, beta, key_sum, value_sum, count, out.a_BGS, *kept)
        ctx.spec, ctx.place = spec, place
        ctx.mark_non_differentiable(out.a_BGS)
        return out.o_BTHV, new, out.a_BGS

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        q, k, v, beta, key_sum, value_sum, count, a_BGS, *kept = ctx.saved_tensors
        dictionary = Dictionary(key_sum, value_sum, count, *ctx.place)
        chunks = chunks_of(k.shape[1], q.shape[1], ctx.spec, dictionary)
        last = Dictionary(kept[1], kept[2], kept[3], chunks[-1].after, 0) if kept else None
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        dbeta_BH = torch.zeros(q.shape[0], q.shape[2], dtype=work_dtype(q), device=q.device)

        def walk(piece: _Piece) -> None:
            overwritten = kept[0][piece.batch, :, piece.groups] if kept else None
            _walk_backward(
                piece.tokens(do, queries=True),
                *piece.inputs(q, k, v, beta),
                ctx.spec,
                piece.dictionary(dictionary),
                piece.heads(a_BGS),
                piece.dictionary(last) if last else None,
                overwritten,
                (piece.tokens(dq, queries=True), piece.tokens(dk), piece.tokens(dv), piece.queries(dbeta_BH)),
                chunks,
            )

        run_pieces(walk, _pieces(q, k.shape[2], chunks))
        return dq, dk, dv, dbeta_BH.sum(0).to(beta.dtype), *[None] * 6


@dataclass
class _Outputs:
    o_BTHV: Tensor
    a_BGS: Tensor
    new: Dictionary
    overwritten: Tensor | None = None  # [B, whole chunks, G, L, W]: sums before each chunk, for a constant step


class _Piece(NamedTuple):
    """Some rows of the batch and some key/value heads, with their R query heads each: the work of one core."""

    batch: slice
    groups: slice
    R: int

    def tokens(self, x_BSGK: Tensor, *, queries: bool = False) -> Tensor:
        return x_BSGK[self.batch, :, self._query_heads() if queries else self.groups]

    def heads(self, x_BG: Tensor) -> Tensor:
        return x_BG[self.batch, self.groups]

    def queries(self, x_BH: Tensor) -> Tensor:
        return x_BH[self.batch, self._query_heads()]

    def inputs(self, q: Tensor, k: Tensor, v: Tensor, beta_H: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.tokens(q, queries=True), self.tokens(k), self.tokens(v), beta_H[self._query_heads()]

    def dictionary(self, d: Dictionary) -> Dictionary:
        return d.map(self.heads)

    def outputs(self, out: _Outputs) -> _Outputs:
        rows = None if out.overwritten is None else out.overwritten[self.batch, :, self.groups]
        return _Outputs(self.tokens(out.o_BTHV, queries=True), self.heads(out.a_BGS), self.dictionary(out.new), rows)

    def _query_heads(self) -> slice:
        return slice(self.groups.start * self.R, self.groups.stop * self.R)


def _pieces(q: Tensor, G: int, chunks: list[Chunk]) -> list[_Piece]:
    """At least one piece per core if there is enough work, each small enough for a core's own cache."""
    B, H = q.shape[0], q.shape[2]
    rows, R = B * G, H // G
    probabilities = max(c.length * R * (c.length + c.before) for c in chunks)  # attention probabilities of one row
    if q.device.type == "cpu" and len(chunks) * rows * probabilities > SMALL_CALL:
        cores = min(rows, torch.get_num_threads())
        rounds = -(-rows * probabilities // (PIECE * cores))  # pieces per core
        rows = -(-rows // (rounds * cores))
    heads, entries = (rows, 1) if rows < G else (G, rows // G)
    return [
        _Piece(slice(b, min(b + entries, B)), slice(g, min(g + heads, G)), R)
        for b in range(0, B, entries)
        for g in range(0, G, heads)
    ]


def _walk_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta_H: Tensor,
    spec: OVQSpec,
    dictionary: Dictionary,
    forced: Tensor | None,
    out: _Outputs,
    chunks: list[Chunk],
) -> None:
    """Predict and update, chunk by chunk; all results are written into `out`."""
    (B, H), G, V, L = q.shape[::2], k.shape[2], v.shape[3], spec.chunk_size
    work = work_dtype(q)
    table = Table(dictionary, L, q.dtype, work)
    if chunks[0].whole:
        table.hold_sums(dictionary, work)
    scratch = _scratch(chunks, q, B * G)
    for number, chunk in enumerate(chunks):
        table.load(k[:, chunk.tokens], v[:, chunk.tokens])
        if chunk.queries.stop > chunk.queries.start:
            p, span = _attention(_queries(q[:, chunk.queries], beta_H, G, work), table, chunk, scratch)
            out.o_BTHV[:, chunk.queries] = _from_rows(p @ span[..., :V], B, H)
        if chunk.whole:
            if forced is None:
                a_PL = _assign(table, chunk, dictionary.position + chunk.tokens.start, spec, scratch)
            else:
                a_PL = forced[:, :, chunk.tokens].flatten(0, 1).long()
            out.a_BGS[:, :, chunk.tokens] = a_PL.unflatten(0, (B, G))
            _commit(table, a_PL, spec, None if out.overwritten is None else out.overwritten[:, number])
    if chunks[0].whole:
        table.write_sums(out.new)


def _walk_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta_H: Tensor,
    spec: OVQSpec,
    dictionary: Dictionary,
    a_BGS: Tensor,
    last: Dictionary | None,
    overwritten: Tensor | None,
    grads: tuple[Tensor, Tensor, Tensor, Tensor],
    chunks: list[Chunk],
) -> None:
    """Write the gradients of q, k, v and beta (a sum per row of the batch) into `grads`, last chunk first.

    Let dS be the gradient of the sums and A what the matmuls have accumulated for each mean since its count last
    changed. The tokens of a chunk receive dS + A / c; then the chunk's update is undone, and its prediction is
    differentiated.
    """
    (B, H), (G, K), V, L = q.shape[::2], k.shape[2:], v.shape[3], spec.chunk_size
    work = work_dtype(q)
    table = _final_table(k, v, spec, dictionary, a_BGS, last, chunks, work)
    p_scratch, s_scratch = _scratch(chunks, q, B * G), _scratch(chunks, q, B * G)
    dmean = torch.zeros_like(table.rows[..., :-1])  # A; the rows of tokens hold the tokens' own gradients
    dsum = torch.zeros_like(dmean)
    flat_dmean, flat_dsum = dmean.view(-1, V + K), dsum.view(-1, V + K)
    dq, dk, dv, dbeta_BH = grads
    for number, chunk in reversed(list(enumerate(chunks))):
        own = dmean[:, L - chunk.length : L].zero_()
        table.load(k[:, chunk.tokens], v[:, chunk.tokens])
        reached: Tensor | None = None
        if chunk.whole:
            index = table.index(a_BGS[:, :, chunk.tokens].flatten(0, 1).long())
            count = table.sums.view(-1, V + K + 1).index_select(0, index)[:, -1:].to(work)
            reached = flat_dmean.index_select(0, index).div_(count).add_(flat_dsum.index_select(0, index))
            before, reached = _undo(
                table, index, reached, spec, None if overwritten is None else overwritten[:, number]
            )
            flat_dsum.index_copy_(0, index, before)
            flat_dmean.index_fill_(0, index, 0)
        if chunk.queries.stop > chunk.queries.start:
            x = _queries(q[:, chunk.queries], beta_H, G, work)
            p, span = _attention(x, table, chunk, p_scratch)
            g = _to_rows(do[:, chunk.queries].to(work), G)
            ds = _view(s_scratch, p.shape)
            torch.bmm(g, span[..., :V].transpose(1, 2), out=ds)
            torch.ops.aten._softmax_backward_data.out(ds, p, -1, work, grad_input=ds)
            dx_BtHK = _from_rows(ds @ span[..., V:-1], B, H)  # gradient of beta q
            dbeta_BH += (dx_BtHK * q[:, chunk.queries]).sum((1, 3))
            dq[:, chunk.queries] = dx_BtHK * beta_H.to(work)[:, None]
            into = dmean[:, L - chunk.length : L + chunk.before]
            into[..., :V].baddbmm_(p.transpose(1, 2), g)
            into[..., V:].baddbmm_(ds.transpose(1, 2), x[..., :-1])
        if reached is not None:
            own += reached.view_as(own)
        dv_chunk, dk_chunk = own.unflatten(0, (B, G)).transpose(1, 2).split([V, K], dim=-1)
        dv[:, chunk.tokens], dk[:, chunk.tokens] = dv_chunk, dk_chunk


def _attention(x_PrX: Tensor, table: Table, chunk: Chunk, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """softmax([beta q.k_s for s <= t, beta q.mu^k + log c]), as [P, R t, l + n], and the table rows that it weights."""
    span = table.rows[:, table.L - chunk.length : table.L + chunk.before]
    logits = _view(scratch, (*x_PrX.shape[:2], span.shape[1]))
    torch.bmm(x_PrX, span[..., table.V :].transpose(1, 2), out=logits)
    t = chunk.queries.stop - chunk.queries.start
    future_tl = table.future_LL[chunk.length - t : chunk.length, : chunk.length]
    logits.unflatten(1, (-1, t))[..., : chunk.length].masked_fill_(future_tl, -torch.inf)
    return torch.softmax(logits, -1, out=logits), span


def _assign(table: Table, chunk: Chunk, start: int, spec: OVQSpec, scratch: Tensor) -> Tensor:
    """int64 [P, L]: the centroid of each token of a whole chunk, as in `reference.assign`."""
    L, n, V = table.L, chunk.before, table.V
    own = table.rows[:, :L, V:-1] if spec.assign_on == "key" else table.rows[:, :L, :-1]
    held = table.rows[:, L : L + n] if n else table.rows[:, :1]  # empty: the first token is centroid 0
    held = held[..., V:-1] if spec.assign_on == "key" else held[..., :-1]
    similarity = torch.bmm(own, held.transpose(1, 2), out=_view(scratch, (len(own), L, held.shape[1])))
    if spec.assign_on == "key_value":
        similarity -= held.square().sum(-1)[:, None, :] / 2
    best_PL, a_PL = similarity.max(-1)
    founded = chunk.after - n
    if founded == 0:
        return a_PL
    if spec.seeding == "random":
        order = spec.hash_order(start, own.device).expand_as(a_PL)
    else:
        if spec.assign_on == "key_value":
            best_PL = best_PL - own.square().sum(-1) / 2  # half the negative squared distance
        order = best_PL.argsort(dim=-1, stable=True)
    if n == 0:  # the first token always founds centroid 0
        order = torch.cat([torch.zeros_like(order[:, :1]), order[order != 0].view(len(order), -1)], dim=1)
    founders = order[:, :founded].sort(-1).values
    if n == 0 and spec.first_chunk == "nearest":
        keys = table.rows[:, :L, V:-1]
        a_PL = (keys @ keys.gather(1, founders[..., None].expand(-1, -1, table.K)).transpose(1, 2)).argmax(-1)
    return a_PL.scatter(1, founders, torch.arange(n, chunk.after, device=own.device).expand_as(founders))


def _commit(table: Table, a_PL: Tensor, spec: OVQSpec, keep: Tensor | None) -> None:
    """Add a whole chunk to the sums and update its centroids' means; `keep` first gets the old sums."""
    index, tokens = table.index(a_PL), table.tokens()
    if spec.rate is not None:
        sums = table.sums.view(-1, tokens.shape[1])
        rows = sums.index_select(0, index)
        if keep is not None:
            keep.copy_(rows.view(keep.shape))
        old, new = _step_weights(table, index, rows[:, -1:], spec.rate)
        rows[:, :-1] *= old
        tokens[:, :-1] *= new
        sums.index_copy_(0, index, rows)
    table.add(index, tokens)
    table.refresh(index)


def _undo(
    table: Table, index: Tensor, reached: Tensor, spec: OVQSpec, overwritten: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Remove a chunk from the dictionary; returns the gradients of the sums before the chunk, and of its tokens."""
    before, tokens = reached, table.tokens()
    if spec.rate is None:
        table.add(index, tokens, sign=-1)
    else:
        assert overwritten is not None
        overwritten = overwritten.flatten(0, 2)
        table.sums.view(-1, tokens.shape[1]).index_copy_(0, index, overwritten)
        old, new = _step_weights(table, index, overwritten[:, -1:], spec.rate)
        before, reached = reached * old, reached * new
    table.refresh(index)
    return before, reached


def _step_weights(table: Table, index: Tensor, count: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """The factors of a constant step for a centroid's old sum and for each of its m new tokens, [P L, 1] each.

    mu <- (1-rate)^m mu + (1 - (1-rate)^m) mean(tokens), and a sum is count x mean; a new centroid starts as the mean.
    """
    ones = torch.ones_like(index, dtype=count.dtype)
    m = count.new_zeros(table.rows.shape[0] * table.rows.shape[1]).index_add_(0, index, ones)[index][:, None]
    left = torch.where(count > 0, (1 - rate) ** m, 0)
    return left * (count + m) / count.clamp_min(1), (1 - left) * (count + m) / m


def _final_table(
    k: Tensor,
    v: Tensor,
    spec: OVQSpec,
    dictionary: Dictionary,
    a_BGS: Tensor,
    last: Dictionary | None,
    chunks: list[Chunk],
    work: torch.dtype,
) -> Table:
    """The table after the last whole chunk: from the saved sums, or by summing again in float64."""
    if last is not None:
        table = Table(last, spec.chunk_size, k.dtype, work)
        table.hold_sums(last, work)
        return table
    table = Table(dictionary, spec.chunk_size, k.dtype, work)
    table.hold_sums(dictionary, torch.float64)
    for chunk in chunks:
        if chunk.whole:
            table.load(k[:, chunk.tokens], v[:, chunk.tokens])
            table.add(table.index(a_BGS[:, :, chunk.tokens].flatten(0, 1).long()), table.tokens())
    used = torch.arange(chunks[-1].after, device=k.device).expand(len(table.rows), -1)
    table.refresh(table.index(used))
    return table


def _scratch(chunks: list[Chunk], q: Tensor, P: int) -> Tensor:
    """A buffer for the largest [P, R t, l + n] or [P, L, n] of this call, reused for every chunk."""
    R = q.shape[0] * q.shape[2] // P
    largest = max(c.length * R * (c.length + c.before) for c in chunks)
    return q.new_empty(P * largest, dtype=work_dtype(q))


def _view(scratch: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    return scratch[: torch.Size(shape).numel()].view(shape)


def _queries(q_BtHK: Tensor, beta_H: Tensor, G: int, work: torch.dtype) -> Tensor:
    """[P, R t, K + 1]: beta q, and a 1 that adds the log count to each logit."""
    B, t, H, K = q_BtHK.shape
    x = q_BtHK.new_ones(B, G, H // G, t, K + 1, dtype=work)
    torch.mul(
        q_BtHK.to(work).unflatten(2, (G, -1)).permute(0, 2, 3, 1, 4),
        beta_H.to(work).view(G, -1, 1, 1),
        out=x[..., :-1],
    )
    return x.view(B * G, -1, K + 1)


def _to_rows(x_BtHV: Tensor, G: int) -> Tensor:
    """[B, t, H, V] as [P, R t, V]."""
    return x_BtHV.unflatten(2, (G, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1).flatten(1, 2)


def _from_rows(x_PrV: Tensor, B: int, H: int) -> Tensor:
    """[P, R t, V] as [B, t, H, V]."""
    return x_PrV.view(B, H, -1, x_PrV.shape[-1]).transpose(1, 2)
