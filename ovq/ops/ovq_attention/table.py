"""The torch backend's working storage: a chunk's tokens and the centroids side by side, as rows of one table.

Shapes: B batch, S tokens, T queries, L chunk, l tokens of one chunk, G key/value heads, P = B G, N capacity,
n centroids in use, K key width, V value width, W = V + K + 1 (width of a row).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ovq.ops.ovq_attention.spec import Dictionary, OVQSpec


class Chunk(NamedTuple):
    """A chunk's tokens (a slice of S), its queries (a slice of T), whether it is whole, and the number of centroids in
    use before and after it."""

    tokens: slice
    queries: slice
    whole: bool
    before: int
    after: int

    @property
    def length(self) -> int:
        return self.tokens.stop - self.tokens.start


def chunks_of(S: int, T: int, spec: OVQSpec, dictionary: Dictionary) -> list[Chunk]:
    """The chunks of S tokens that start at the dictionary's position, of which the last T have queries."""
    L, first, n, chunks = spec.chunk_size, S - T, dictionary.size, []
    for start in range(0, S, L):
        stop = min(start + L, S)
        whole = stop - start == L
        after = spec.size_at(dictionary.position + stop) if whole else n
        queries = slice(max(start - first, 0), max(stop - first, 0))
        chunks.append(Chunk(slice(start, stop), queries, whole, n, after))
        n = after
    return chunks


class Table:
    """Rows [value | key | log count] of the current chunk's tokens, then of the centroids, and the sums behind them.

    A chunk of l tokens lies in rows L - l .. L - 1 and centroid j in row L + j, so that the tokens and the centroids in
    use always form one slice. `sums` has rows [value sum | key sum | count] in the same layout. Index tensors address
    the flattened rows of all batch entries and heads.
    """

    def __init__(self, dictionary: Dictionary, L: int, dtype: torch.dtype, work: torch.dtype) -> None:
        B, G, N, K = dictionary.key_sum.shape
        self.B, self.G, self.N, self.K, self.V = B, G, N, K, dictionary.value_sum.shape[3]
        self.L, self.dtype, self.work = L, dtype, work
        n = dictionary.size
        self.rows = dictionary.count.new_empty(B * G, L + N, self.V + K + 1, dtype=work)
        count = dictionary.count[:, :, :n].to(work).flatten(0, 1)[..., None]
        held = self.rows[:, L : L + n]
        torch.div(dictionary.value_sum[:, :, :n].flatten(0, 1), count, out=held[..., : self.V])
        torch.div(dictionary.key_sum[:, :, :n].flatten(0, 1), count, out=held[..., self.V : -1])
        torch.log(count, out=held[..., -1:])
        held[..., :-1] = self._rounded(held[..., :-1])
        self.future_LL = torch.ones(L, L, dtype=torch.bool, device=held.device).triu_(1)  # key after query
        self.base_P1 = torch.arange(B * G, device=held.device)[:, None] * (L + N) + L

    def hold_sums(self, dictionary: Dictionary, dtype: torch.dtype) -> None:
        """Copy the dictionary's sums, which this table will update."""
        self.sums = torch.zeros_like(self.rows, dtype=dtype)
        held = self.sums[:, self.L :].unflatten(0, (self.B, self.G))
        held[..., : self.V], held[..., self.V : -1] = dictionary.value_sum, dictionary.key_sum
        held[..., -1] = dictionary.count

    def write_sums(self, into: Dictionary) -> None:
        held = self.sums[:, self.L :].unflatten(0, (self.B, self.G))
        value_sum, key_sum, count = held.split([self.V, self.K, 1], dim=-1)
        into.key_sum.copy_(key_sum)
        into.value_sum.copy_(value_sum)
        into.count.copy_(count[..., 0])

    def load(self, k_BlGK: Tensor, v_BlGV: Tensor) -> None:
        """Write the tokens of a chunk into the table."""
        own = self.rows[:, self.L - k_BlGK.shape[1] : self.L].unflatten(0, (self.B, self.G))
        own[..., : self.V], own[..., self.V : -1] = v_BlGV.transpose(1, 2), k_BlGK.transpose(1, 2)
        own[..., -1] = 0  # log of a count of 1

    def index(self, a_PL: Tensor) -> Tensor:
        """The flat row index of each token's centroid, over all batch entries and heads."""
        return (a_PL + self.base_P1).flatten()

    def tokens(self) -> Tensor:
        """[P L, W]: the rows that a whole chunk adds to the sums."""
        rows = self.rows[:, : self.L].clone().view(-1, self.rows.shape[2])
        rows[:, -1] = 1
        return rows

    def refresh(self, index: Tensor) -> None:
        """Recompute the means of these centroids."""
        rows = self.sums.view(-1, self.sums.shape[-1]).index_select(0, index)
        means, count = rows[:, :-1], rows[:, -1:]
        means /= count
        count.log_()
        if self.dtype != self.work:
            means.copy_(self._rounded(means))
        self.rows.view(-1, rows.shape[1]).index_copy_(0, index, rows.to(self.work))

    def add(self, index: Tensor, tokens: Tensor, sign: int = 1) -> None:
        self.sums.view(-1, tokens.shape[1]).index_add_(0, index, tokens.to(self.sums.dtype), alpha=sign)

    def _rounded(self, means: Tensor) -> Tensor:
        """Means rounded to the inputs' dtype, as a low-precision matmul would read them."""
        return means if self.dtype == self.work else means.to(self.dtype).to(means.dtype)
