"""The torch backend's assignment of a chunk's tokens to centroids (arXiv 2602.03922, eqs. 17 and 18).

Shapes: L chunk, K key width, V value width, P batch x key/value heads, n centroids in use.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ovq.ops.common import first_max
from ovq.ops.ovq_attention.spec import OVQSpec
from ovq.ops.ovq_attention.table import Chunk, Scratch, Table, whole_grains


class Assignment:
    """Assigns the tokens in the table to its centroids, as `reference.assign` does."""

    def __init__(self, table: Table, spec: OVQSpec, scratch: Scratch) -> None:
        self.table, self.spec = table, spec
        self.columns = slice(table.V, None) if spec.assign_on == "key" else slice(None)
        self.own = table.means[:, : table.L, self.columns]
        self.memory = scratch.take("p", table.P * table.L * table.N)  # a chunk's probabilities are not needed any more
        self.views = dict[int, tuple[Tensor, Tensor]]()

    def __call__(self, chunk: Chunk, start: int) -> Tensor:
        """int64 [P, L]: the centroid of each token of a whole chunk that begins at token `start` of the sequence."""
        n, own, spec = chunk.before, self.own, self.spec
        best_PL, a_PL = self._nearest(n) if n else self._first()
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
            keys = self.table.means[:, : self.table.L, self.table.V :]
            a_PL = (keys @ keys.gather(1, founders[..., None].expand(-1, -1, self.table.K)).mT).argmax(-1)
        return a_PL.scatter_(1, founders, torch.arange(n, chunk.after, device=own.device).expand_as(founders))

    def _nearest(self, n: int) -> tuple[Tensor, Tensor]:
        """The highest similarity of each token to one of n centroids, and which one has it, [P, L] each."""
        wide = whole_grains(n)
        if wide not in self.views:
            P, L = self.own.shape[:2]
            similarity = self.memory[: P * L * wide].view(P, L, wide)
            self.views[wide] = self.table.means[:, L : L + wide, self.columns], similarity
        held, similarity = self.views[wide]
        torch.bmm(self.own, held.mT, out=similarity)
        if self.spec.assign_on == "key_value":
            similarity -= held.square().sum(-1)[:, None, :] / 2
        if n < wide:
            similarity[..., n:] = -torch.inf
        return first_max(similarity)

    def _first(self) -> tuple[Tensor, Tensor]:
        """As `_nearest` for an empty dictionary: the first token is centroid 0."""
        best_PL = (self.own @ self.own[:, :1].mT)[..., 0]
        if self.spec.assign_on == "key_value":
            best_PL = best_PL - self.own[:, :1].square().sum(-1) / 2
        return best_PL, torch.zeros_like(best_PL, dtype=torch.int64)
