"""The torch backend's assignment of a chunk's tokens to centroids (arXiv 2602.03922, eqs. 17 and 18).

Written in the subset of Python that TorchScript compiles (see `unlocked` in `ovq.ops.parallel`).

Shapes: L chunk, K key width, V value width, P batch x key/value heads, n centroids in use.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ovq.ops.common import first_max
from ovq.ops.ovq_attention.table import Rows, product, whole_grains


def assign(
    rows: Rows,
    own: Tensor,
    n: int,
    after: int,
    order: Tensor | None,
    key_value: bool,
    nearest_first: bool,
    memory: Tensor,
) -> Tensor:
    """int64 [P, L]: the centroid of each token of a whole chunk, as `reference.assign` chooses it.

    Args:
        own: [P, L, V + K], the chunk's tokens.
        n, after: centroids before and after it.
        order: [L], the indices of the tokens in the order of random seeding; None: spread.
        key_value: a token goes to the nearest [value | key], instead of the most similar key.
        nearest_first: the tokens of the first chunk go to the most similar of its founders.
        memory: scratch for P L similarities to all centroids.
    """
    mine = own if key_value else own[..., rows.V :]
    best_PL, a_PL = _nearest(rows, mine, n, key_value, memory) if n > 0 else _first(mine, key_value)
    founded = after - n
    if founded == 0:
        return a_PL
    if order is None:
        if key_value:
            best_PL = best_PL - own.square().sum(-1) / 2  # half the negative squared distance
        order_PL = best_PL.argsort(dim=-1, stable=True)
    else:
        order_PL = order.expand_as(a_PL)
    if n == 0:  # the first token always founds centroid 0
        later = order_PL[order_PL != 0].view(order_PL.size(0), -1)
        order_PL = torch.cat([torch.zeros_like(order_PL[:, :1]), later], dim=1)
    founders = order_PL[:, :founded].sort(-1)[0]
    if n == 0 and nearest_first:
        keys = own[..., rows.V :]
        a_PL = (keys @ keys.gather(1, founders[..., None].expand(-1, -1, keys.size(2))).mT).argmax(-1)
    return a_PL.scatter_(1, founders, torch.arange(n, after, device=own.device).expand_as(founders))


def _nearest(rows: Rows, mine: Tensor, n: int, key_value: bool, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's highest similarity to any of the n centroids, and the index of that centroid, [P, L] each."""
    P, L, w = mine.size(0), mine.size(1), whole_grains(n)
    similarity = memory[: P * L * w].view(P, L, w)
    held = rows.means[:, rows.L : rows.L + w]
    if not key_value:
        held = held[..., rows.V :]
    product(mine, held.mT, similarity)
    if key_value:
        similarity.sub_(held.square().sum(-1)[:, None, :] / 2)
    if n < w:
        similarity[..., n:].fill_(-torch.inf)
    return first_max(similarity)


def _first(mine: Tensor, key_value: bool) -> tuple[Tensor, Tensor]:
    """As `_nearest` for an empty dictionary: the first token is centroid 0."""
    best_PL = (mine @ mine[:, :1].mT)[..., 0]
    if key_value:
        best_PL = best_PL - mine[:, :1].square().sum(-1) / 2
    return best_PL, torch.zeros_like(best_PL, dtype=torch.int64)
