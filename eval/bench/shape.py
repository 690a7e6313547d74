"""The shape of a call of OVQ-attention, and the numbers of pairs and centroids that follow from it.

Shapes: B batch, T tokens, L chunk, H query heads, G key/value heads, K and V widths.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from ovq.ops.ovq_attention.spec import OVQSpec


@dataclass(frozen=True)
class Shape:
    """One call that starts from an empty dictionary. `itemsize`: bytes per element of q, k and v."""

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    K: int
    V: int
    spec: OVQSpec
    itemsize: int = 2

    @functools.cached_property
    def chunks(self) -> tuple[tuple[int, int], ...]:
        """(centroids before it, tokens) of every chunk, including an incomplete last one."""
        L = self.spec.chunk_size
        return tuple((self.spec.size_at(at), min(L, self.tokens - at)) for at in range(0, self.tokens, L))

    @property
    def before_whole_chunks(self) -> list[int]:
        """Centroids before each complete chunk (only complete chunks are assigned)."""
        return [n for n, tokens in self.chunks if tokens == self.spec.chunk_size]

    @functools.cached_property
    def dictionary_pairs(self) -> int:
        """Pairs of a token and a centroid that it attends to, per head."""
        return sum(n * tokens for n, tokens in self.chunks)

    @functools.cached_property
    def own_pairs(self) -> int:
        """Pairs of a token and a key of its own chunk that it attends to (its own key included), per head."""
        return sum(tokens * (tokens + 1) // 2 for _, tokens in self.chunks)

    @property
    def table(self) -> int:
        """Entries of the table of version rows, per head."""
        L = self.spec.chunk_size
        return sum(self.spec.size_at(at) for at in range(0, self.tokens + 1, L))
