"""The torch backend's working storage: a chunk's tokens and the centroids side by side, as rows of one table.

Shapes: B batch, S tokens, T queries, L chunk, l tokens and t queries of one chunk, m chunks of a block, H query heads,
G key/value heads, R = H / G, P = B G, N capacity, n centroids in use, K key width, V value width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ovq.ops.common import GRAIN
from ovq.ops.ovq_attention.spec import Dictionary, OVQSpec


def whole_grains(centroids: int) -> int:
    """How many centroids the matmuls run over: whole vector registers, and few shapes for libraries that generate code
    for each one. Those that are not in use have a log count of -inf, and so a probability of 0."""
    return -(-centroids // GRAIN) * GRAIN


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

    @property
    def num_queries(self) -> int:
        return self.queries.stop - self.queries.start


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


class Block(NamedTuple):
    """Consecutive chunks with l tokens and t queries each, whose inputs and outputs are rearranged together."""

    chunks: list[Chunk]
    G: int

    @property
    def tokens(self) -> slice:
        return slice(self.chunks[0].tokens.start, self.chunks[-1].tokens.stop)

    @property
    def queries(self) -> slice:
        return slice(self.chunks[0].queries.start, self.chunks[-1].queries.stop)

    def of_tokens(self, x_BSGK: Tensor) -> Tensor:
        """[m, B, G, l, K]: a view of the block's part of a tensor with a row per token."""
        x = x_BSGK[:, self.tokens].unflatten(1, (len(self.chunks), -1))
        return x.permute(1, 0, 3, 2, 4)

    def of_queries(self, x_BTHK: Tensor) -> Tensor:
        """[m, B, G, R, t, K]: a view of the block's part of a tensor with a row per query."""
        x = x_BTHK[:, self.queries].unflatten(1, (len(self.chunks), -1)).unflatten(3, (self.G, -1))
        return x.permute(1, 0, 3, 4, 2, 5)

    def of_heads(self, x_BGS: Tensor) -> Tensor:
        """[m, B, G, l]: a view of the block's part of a tensor with a number per token."""
        return x_BGS[:, :, self.tokens].unflatten(2, (len(self.chunks), -1)).permute(2, 0, 1, 3)


def blocks_of(chunks: list[Chunk], G: int, most: int) -> Iterator[Block]:
    """The chunks in blocks of at most `most`."""
    block: list[Chunk] = []
    for chunk in chunks:
        fits = block and (chunk.length, chunk.num_queries) == (block[0].length, block[0].num_queries)
        if block and (len(block) == most or not fits):
            yield Block(block, G)
            block = []
        block.append(chunk)
    yield Block(block, G)


class Scratch:
    """Named pieces of memory that are reused from chunk to chunk: allocating them anew would double a chunk's time."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self.like, self.dtype, self.held = like, dtype, dict[str, Tensor]()

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised tensor, in the memory of this name; ask for the largest first."""
        size = torch.Size(shape).numel()
        held = self.held.get(name)
        if held is None or held.numel() < size:
            held = self.held[name] = self.like.new_empty(size, dtype=dtype or self.dtype)
        return held[:size].view(shape)


class Table:
    """Means and log counts of the current chunk's tokens and of the centroids, and the sums behind them.

    Row L - l + s is token s of a chunk of l, and row L + j is centroid j, so that the tokens and the centroids in use
    always form one slice. Index tensors address the flattened rows of all batch entries and heads.

    Attributes:
        means: [P, L + N, V + K], rows [value | key]; N is rounded up to whole grains.
        log_count: [P, 1, L + N], to base 2: 0 for tokens, -inf for centroids that are not in use.
        sums: [P, L + N, V + K + 1], rows [value sum | key sum | count], once `hold_sums` was called.
    """

    def __init__(self, dictionary: Dictionary, L: int, capacity: int, dtype: torch.dtype, work: torch.dtype) -> None:
        B, G, _, K = dictionary.key_sum.shape
        self.P, self.K, self.V = B * G, K, dictionary.value_sum.shape[3]
        self.L, self.N, self.dtype, self.work = L, whole_grains(capacity), dtype, work
        count, W = dictionary.count, self.V + K
        self.means = count.new_zeros(self.P, L + self.N, W, dtype=work)
        self.log_count = count.new_full((self.P, 1, L + self.N), -torch.inf, dtype=work)
        self.log_count[..., :L] = 0
        if n := dictionary.size:
            count_Pn1 = count[:, :, :n].to(work).flatten(0, 1)[..., None]
            held = self.means[:, L : L + n]
            inverse = count_Pn1.reciprocal()
            torch.mul(dictionary.value_sum[:, :, :n].flatten(0, 1), inverse, out=held[..., : self.V])
            torch.mul(dictionary.key_sum[:, :, :n].flatten(0, 1), inverse, out=held[..., self.V :])
            torch.log2(count_Pn1[..., 0], out=self.log_count[:, 0, L : L + n])
            self._round(held)
        self.flat_means, self.flat_log_count = self.means.view(-1, W), self.log_count.view(-1)
        self.future_LL = self.means.new_full((L, L), -torch.inf).triu_(1)  # added to the logits of keys after a query
        self.base_P1 = torch.arange(self.P, device=count.device)[:, None] * (L + self.N) + L

    def hold_sums(self, dictionary: Dictionary, dtype: torch.dtype) -> None:
        """Copy the dictionary's sums, which this table will update."""
        self.sums = torch.zeros(self.P, self.L + self.N, self.V + self.K + 1, dtype=dtype, device=self.means.device)
        for held, x in zip(self._held_sums(dictionary), (dictionary.value_sum, dictionary.key_sum, dictionary.count)):
            held.copy_(x[:, :, : held.shape[2]].view(held.shape))
        self.flat_sums = self.sums.view(-1, self.sums.shape[2])
        rows, W = self.P * self.L, self.V + self.K
        self._picked, self._step = (self.sums.new_empty(rows, W + 1) for _ in range(2))
        self.picked_count, self._picked_sums = self._picked[:, -1:], self._picked[:, :-1]
        self._inverse = torch.empty_like(self.picked_count)
        self._means, self._log_count = self.means.new_empty(rows, W), self.means.new_empty(rows)

    def write_sums(self, into: Dictionary) -> None:
        for x, held in zip((into.value_sum, into.key_sum, into.count), self._held_sums(into)):
            x[:, :, : held.shape[2]].view(held.shape).copy_(held)
            x[:, :, held.shape[2] :] = 0

    def _held_sums(self, dictionary: Dictionary) -> list[Tensor]:
        """Value sums, key sums [B, G, N, V or K] and counts [B, G, N, 1] of this table, as views."""
        B, G, capacity = dictionary.count.shape
        held = self.sums[:, self.L :][:, :capacity].unflatten(0, (B, G))
        return list(held.split([self.V, self.K, 1], dim=-1))

    def index(self, a_PL: Tensor) -> Tensor:
        """The flat row index of each token's centroid."""
        return (a_PL + self.base_P1).flatten()

    def add(self, index: Tensor, rows: Tensor, sign: int = 1) -> None:
        """Add rows [value | key | 1] to the sums of these centroids, or subtract them."""
        if rows.dtype != self.sums.dtype:
            rows = self._step.copy_(rows) if len(rows) == len(self._step) else rows.to(self.sums.dtype)
        self.flat_sums.index_add_(0, index, rows, alpha=sign)

    def refresh(self, index: Tensor) -> None:
        """Compute the means and log counts of a chunk's centroids anew; `picked_count` [P L, 1] is then their counts.

        A centroid whose count is 0, because the chunk that founded it was undone, gets a mean of 0.
        """
        torch.index_select(self.flat_sums, 0, index, out=self._picked)
        torch.log2(self.picked_count.squeeze(1), out=self._log_count)
        torch.clamp_min(self.picked_count, 1, out=self._inverse).reciprocal_()
        torch.mul(self._picked_sums, self._inverse, out=self._means)
        self._round(self._means)
        self.flat_means.index_copy_(0, index, self._means)
        self.flat_log_count.index_copy_(0, index, self._log_count)

    def set_means(self, index: Tensor) -> None:
        """As `refresh`, for any number of centroids in use."""
        rows = self.flat_sums.index_select(0, index)
        means = (rows[:, :-1] * rows[:, -1:].reciprocal()).to(self.work)
        self._round(means)
        self.flat_means.index_copy_(0, index, means)
        self.flat_log_count.index_copy_(0, index, rows[:, -1].log2().to(self.work))

    def _round(self, means: Tensor) -> None:
        """Round means to the inputs' dtype, as a low-precision matmul would read them."""
        if self.dtype != self.work:
            means.copy_(means.to(self.dtype))
