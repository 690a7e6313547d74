"""The torch backend's loops over the chunks of a block, forward and backward.

They are written in the subset of Python that TorchScript compiles (see `unlocked` in `ovq.ops.parallel`).

Shapes: as in `chunked`; r = R t are the queries of a group's heads, and w the centroids in use, in whole grains.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ovq.ops.ovq_attention.assign import assign
from ovq.ops.ovq_attention.table import Rows, product, whole_grains
from ovq.ops.parallel import unlocked


@unlocked
def forward_chunks(
    rows: Rows,
    rate: float,
    key_value: bool,
    nearest_first: bool,
    t: int,
    before: list[int],
    after: list[int],
    tokens: Tensor,
    x: Tensor,
    o: Tensor,
    top: Tensor,
    total: Tensor,
    a: Tensor,
    count: Tensor,
    memory: Tensor,
    order: Tensor | None,
    forced: Tensor | None,
    overwritten: Tensor | None,
) -> None:
    """Predict, and then update the dictionary if the chunks are whole.

    Args:
        rate: the constant step size; 0 stands for steps of 1 / count.
        key_value, nearest_first: see `assign`.
        before, after: numbers of centroids in use before and after each chunk.
        tokens: [m, P, l, W + 1], rows [value | key | 1]; a constant step scales them in place.
        x: [m, P, r, K], the queries times beta log2 e.
        o, top, total: outputs: o [m, P, r, V], not yet divided by the sums; highest logits and sums, [m, P, r, 1] each.
        a, count: outputs [m, P, l] and [m, P l, 1], centroids and their counts after the chunk; m = 0 if not whole.
        memory: scratch that holds P r (l + w) probabilities or, later, P l w similarities.
        order: [m, l], the indices of the tokens in the order of random seeding; None: spread.
        forced: [m, P, l], given assignments to use instead of choosing any.
        overwritten: output [B, m, G, l, W + 1], the sums before the chunk, in the order of its tokens.
    """
    l = tokens.size(2)
    own = rows.means[:, rows.L - l : rows.L]
    for i in range(len(before)):
        own.copy_(tokens[i, :, :, :-1])
        if t > 0:
            w = whole_grains(before[i])
            seen, p = rows.means[:, rows.L - l : rows.L + w], _matrix(memory, x[i], l + w)
            product(x[i], seen[..., rows.V :].mT, p)
            p.add_(rows.log_count[..., rows.L - l : rows.L + w])
            p.unflatten(1, (-1, t))[..., :l].add_(rows.future[l - t : l, :l])
            torch.amax(p, -1, keepdim=True, out=top[i])
            p.sub_(top[i]).exp2_()
            torch.sum(p, -1, keepdim=True, out=total[i])
            product(p, seen[..., : rows.V], o[i])
        if len(a) > 0:
            if forced is not None:
                a[i].copy_(forced[i])
            else:
                chosen = order[i] if order is not None else None
                a[i].copy_(assign(rows, own, before[i], after[i], chosen, key_value, nearest_first, memory))
            index = (a[i] + rows.base).flatten()
            _commit(rows, index, tokens[i].flatten(0, 1), rate, overwritten[:, i] if overwritten is not None else None)
            count[i].copy_(rows.picked[:, -1:])


@unlocked
def backward_chunks(
    rows: Rows,
    rate: float,
    t: int,
    before: list[int],
    tokens: Tensor,
    x: Tensor,
    x2: Tensor,
    do: Tensor,
    top: Tensor,
    index: Tensor,
    count: Tensor,
    gradient: Tensor,
    picked: Tensor,
    earlier: Tensor,
    memory: Tensor,
    memory_ds: Tensor,
    overwritten: Tensor | None,
) -> None:
    """Undo the chunks' updates and differentiate their predictions, last chunk first.

    Let dS be the gradient of the sums and A what the matmuls have accumulated for each mean since its count last
    changed. The tokens of a chunk receive dS + A / c.

    Args:
        tokens: [m, P, l, W + 1], rows [value | key | 1]; replaced by their gradients, except for the last column.
        x, x2: [m, P, r, K], the queries times beta, and times log2 e as well; x2 is replaced by the gradient of x.
        do, top: [m, P, r, V] and [m, P, r, 1], the gradients of the outputs, and the highest logits.
        index, count: [m, P l] and [m, P l, 1], rows of the tokens' centroids, and their counts after the chunk.
            m = 0 if not whole.
        gradient: [P, L + N, 2 W], rows [A | dS]; the tokens' rows hold the tokens' own gradients.
        picked, earlier: scratch [P l, 2 W], the left half of `earlier` is 0.
        memory, memory_ds: scratch for P r (l + w) probabilities, and for their gradients.
        overwritten: [B, m, G, l, W + 1], the sums before the chunk, for a constant step.
    """
    l, V, W = tokens.size(2), rows.V, rows.means.size(2)
    own, down = rows.means[:, rows.L - l : rows.L], gradient[:, rows.L - l : rows.L, :W]
    flat = gradient.view(-1, 2 * W)
    for i in range(len(before) - 1, -1, -1):
        down.zero_()
        own.copy_(tokens[i, :, :, :-1])
        of_tokens = down
        if len(index) > 0:
            torch.index_select(flat, 0, index[i], out=picked)
            reached = torch.addcdiv(picked[:, W:], picked[:, :W], count[i], out=earlier[:, W:])
            kept = overwritten[:, i] if overwritten is not None else None
            of_tokens = _undo(rows, index[i], tokens[i].flatten(0, 1), reached, rate, kept)
            flat.index_copy_(0, index[i], earlier)
        if t > 0:
            w = whole_grains(before[i])
            first, last = rows.L - l, rows.L + w
            seen, p, ds = rows.means[:, first:last], _matrix(memory, x[i], l + w), _matrix(memory_ds, x[i], l + w)
            product(x2[i], seen[..., V:].mT, p)
            p.add_(rows.log_count[..., first:last]).sub_(top[i])
            p.unflatten(1, (-1, t))[..., :l].add_(rows.future[l - t : l, :l])
            p.exp2_()
            p.div_(p.sum(-1, keepdim=True))
            product(do[i], seen[..., :V].mT, ds)
            torch._softmax_backward_data(ds, p, -1, ds.dtype, grad_input=ds)
            product(ds, seen[..., V:], x2[i])  # x2 is the gradient of x from here on
            product(p.mT, do[i], gradient[:, first:last, :V], add=True)
            product(ds.mT, x[i], gradient[:, first:last, V:W], add=True)
        # From here on, `tokens` becomes the gradients of the chunk's tokens.
        if len(index) > 0:
            torch.add(down, of_tokens.view(down.shape), out=tokens[i, :, :, :-1])
        else:
            tokens[i, :, :, :-1].copy_(down)


def _matrix(memory: Tensor, x: Tensor, columns: int) -> Tensor:
    """[P, r, columns], in scratch memory, for x [P, r, K]."""
    return memory[: x.size(0) * x.size(1) * columns].view(x.size(0), x.size(1), columns)


def _commit(rows: Rows, index: Tensor, tokens: Tensor, rate: float, keep: Tensor | None) -> None:
    """Add a whole chunk to the sums and update its centroids' means; the old sums are first copied to `keep`."""
    if rate > 0:
        sums = rows.sums.index_select(0, index)
        if keep is not None:
            keep.copy_(sums.view(keep.shape))
        old, new = _step_weights(rows, index, sums[:, -1:], rate)
        sums[:, :-1].mul_(old)
        rows.sums.index_copy_(0, index, sums)
        tokens[:, :-1].mul_(new)
    _add(rows, index, tokens, 1)
    _refresh(rows, index)


def _undo(
    rows: Rows, index: Tensor, tokens: Tensor, reached: Tensor, rate: float, overwritten: Tensor | None
) -> Tensor:
    """Remove a chunk from the dictionary. `reached`, the gradient of its centroids' sums, becomes that of the sums
    before the chunk; returns the gradient of its tokens."""
    if overwritten is None:
        _add(rows, index, tokens, -1)
        _refresh(rows, index)
        return reached
    sums = overwritten.reshape(index.size(0), -1)
    rows.sums.index_copy_(0, index, sums)
    old, new = _step_weights(rows, index, sums[:, -1:], rate)
    _refresh(rows, index)
    of_tokens = reached * new
    reached.mul_(old)
    return of_tokens


def _step_weights(rows: Rows, index: Tensor, count: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """The factors of a constant step for a centroid's old sum and for each of its m new tokens, [P l, 1] each.

    mu <- (1-rate)^m mu + (1 - (1-rate)^m) mean(tokens), and a sum is count x mean; a new centroid starts as the mean.
    """
    ones = torch.ones_like(count[:, 0])
    m = torch.zeros_like(rows.sums[:, 0]).index_add_(0, index, ones)[index][:, None]
    left = torch.where(count > 0, torch.pow(1 - rate, m), torch.zeros_like(m))
    return left * (count + m) / count.clamp_min(1), (1 - left) * (count + m) / m


def _add(rows: Rows, index: Tensor, tokens: Tensor, sign: int) -> None:
    """Add rows [value | key | 1] to the sums of these centroids, or subtract them."""
    if tokens.dtype != rows.sums.dtype:
        tokens = rows.step.copy_(tokens)
    rows.sums.index_add_(0, index, tokens, alpha=sign)


def _refresh(rows: Rows, index: Tensor) -> None:
    """Recompute the means and log counts of a chunk's centroids; `rows.picked` [P l, W + 1] then holds their sums.

    A centroid whose count is 0, because the chunk that founded it was undone, gets a mean of 0.
    """
    torch.index_select(rows.sums, 0, index, out=rows.picked)
    count = rows.picked[:, -1:]
    torch.log2(count[:, 0], out=rows.new_log_count)
    torch.mul(rows.picked[:, :-1], count.clamp_min(1).reciprocal_(), out=rows.new_means)
    if rows.rounded.dtype != rows.new_means.dtype:  # as a low-precision matmul would read them
        rows.new_means.copy_(rows.rounded.copy_(rows.new_means))
    rows.flat_means.index_copy_(0, index, rows.new_means)
    rows.flat_log_count.index_copy_(0, index, rows.new_log_count)
