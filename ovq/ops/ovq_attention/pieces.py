"""How the torch backend divides a call among the cores: each processes some heads and rows of the batch on its own.

Shapes: B batch, T queries, S tokens, L chunk, H query heads, G key/value heads, R = H / G, K key width, V value width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ovq.ops.ovq_attention.spec import Dictionary
from ovq.ops.ovq_attention.table import Chunk

# Thresholds on a CPU, counted in attention probabilities: the size of a call up to which a single core is faster, and
# the size of a chunk of one piece, which should stay in a core's caches from matmul to softmax to matmul.
SMALL_CALL = 2**18
PIECE = 2**19


@dataclass
class Outputs:
    """What a forward pass writes; the optional fields are for the backward pass.

    top: [B, T, H, 1], the highest logit, in base 2. count_BGS: the count of each token's centroid after its chunk.
    overwritten: [B, whole chunks, G, L, V + K + 1], the sums before each chunk, since constant steps cannot be undone.
    """

    o_BTHV: Tensor
    a_BGS: Tensor
    new: Dictionary
    top: Tensor | None = None
    count_BGS: Tensor | None = None
    overwritten: Tensor | None = None


class Piece(NamedTuple):
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

    def outputs(self, out: Outputs) -> Outputs:
        return Outputs(
            self.tokens(out.o_BTHV, queries=True),
            self.heads(out.a_BGS),
            self.dictionary(out.new),
            None if out.top is None else self.tokens(out.top, queries=True),
            None if out.count_BGS is None else self.heads(out.count_BGS),
            None if out.overwritten is None else self.tokens(out.overwritten),
        )

    def _query_heads(self) -> slice:
        return slice(self.groups.start * self.R, self.groups.stop * self.R)


def pieces_of(q: Tensor, G: int, chunks: list[Chunk]) -> list[Piece]:
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
        Piece(slice(b, min(b + entries, B)), slice(g, min(g + heads, G)), R)
        for b in range(0, B, entries)
        for g in range(0, G, heads)
    ]
