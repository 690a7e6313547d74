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

# Multiplications in a product from which it is computed on its own: below, extra calls cost more than copies.
LARGE = 2**20


def whole_grains(centroids: int, grain: int = GRAIN) -> int:
    """How many centroids the matmuls run over: rounded up to whole vector registers, and so to few shapes, as libraries
    may generate code for each. Those not in use have a log count of -inf, and hence a probability of 0."""
    return -(-centroids // grain) * grain


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
    """The chunks of S tokens that start at the dictionary's position, the last T of which have queries."""
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

    def of_whole(self, x: Tensor | None, L: int) -> Tensor | None:
        """[B, m, ...]: the block's part of a tensor [B, whole chunks, ...], in chunks of L tokens; None stays None."""
        first = self.chunks[0].tokens.start // L
        return None if x is None else x[:, first : first + len(self.chunks)]


def blocks_of(chunks: list[Chunk], G: int, most: int) -> Iterator[Block]:
    """The chunks, grouped into blocks of at most `most`."""
    block: list[Chunk] = []
    for chunk in chunks:
        fits = block and (chunk.length, chunk.num_queries) == (block[0].length, block[0].num_queries)
        if block and (len(block) == most or not fits):
            yield Block(block, G)
            block = []
        block.append(chunk)
    yield Block(block, G)


class Scratch:
    """Named buffers that are reused from chunk to chunk, because allocating them anew takes long."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self.like, self.dtype, self.held = like, dtype, dict[str, Tensor]()

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised tensor in the buffer of this name; ask for the largest one first."""
        size = torch.Size(shape).numel()
        held = self.held.get(name)
        if held is None or held.numel() < size:
            held = self.held[name] = self.like.new_empty(size, dtype=dtype or self.dtype)
        return held[:size].view(shape)


class Rows(NamedTuple):
    """The tensors of a `Table`, in the form that the loops take.

    Row L - l + s is token s of a chunk of l, and row L + j is centroid j, so that the tokens and the centroids in use
    always form one slice. Index tensors address the flattened rows of all batch entries and heads.

    Attributes:
        L, V: tokens before the centroids, and the width of values.
        means: [P, L + N, W], rows [value | key]; N is rounded up to whole grains.
        log_count: [P, 1, L + N], in base 2: 0 for tokens, -inf for centroids that are not in use.
        flat_means, flat_log_count: the same memory, [P (L + N), W] and [P (L + N)].
        future: [L, L], -inf where a token comes after the query.
        base: [P, 1], the index of centroid 0.
        sums: [P (L + N), W + 1], rows [value sum | key sum | count]; empty if no chunk is whole.
        picked, step, new_means, rounded, new_log_count: scratch for the P L rows of a chunk.
    """

    L: int
    V: int
    means: Tensor
    log_count: Tensor
    flat_means: Tensor
    flat_log_count: Tensor
    future: Tensor
    base: Tensor
    sums: Tensor
    picked: Tensor
    step: Tensor
    new_means: Tensor
    rounded: Tensor
    new_log_count: Tensor


def product(a: Tensor, b: Tensor, out: Tensor, add: bool = False, large: int = LARGE) -> None:
    """out = a @ b of [P, ., .], or out += a @ b, in TorchScript's subset of Python.

    Large products are computed one by one, on views: given a batch, libraries copy it to make it contiguous.
    """
    if a.size(1) * a.size(2) * b.size(2) < large:
        if add:
            out.baddbmm_(a, b)
        else:
            torch.bmm(a, b, out=out)
        return
    for i in range(a.size(0)):
        if add:
            out[i].addmm_(a[i], b[i])
        else:
            torch.mm(a[i], b[i], out=out[i])


class Table:
    """A call's dictionary, and the sums behind it, as the rows that its loops read and write.

    Args:
        capacity: centroids in use at the end.
        dtype, work: the dtype of the inputs, to which means are rounded, and that of the computation.
    """

    def __init__(self, dictionary: Dictionary, L: int, capacity: int, dtype: torch.dtype, work: torch.dtype) -> None:
        B, G, _, K = dictionary.key_sum.shape
        self.P, self.K, self.V = B * G, K, dictionary.value_sum.shape[3]
        self.L, self.N, self.dtype, self.work = L, whole_grains(capacity), dtype, work
        count, W = dictionary.count, self.V + K
        means = count.new_zeros(self.P, L + self.N, W, dtype=work)
        log_count = count.new_full((self.P, 1, L + self.N), -torch.inf, dtype=work)
        log_count[..., :L] = 0
        if n := dictionary.size:
            count_Pn1 = count[:, :, :n].to(work).flatten(0, 1)[..., None]
            held, inverse = means[:, L : L + n], count_Pn1.reciprocal()
            torch.mul(dictionary.value_sum[:, :, :n].flatten(0, 1), inverse, out=held[..., : self.V])
            torch.mul(dictionary.key_sum[:, :, :n].flatten(0, 1), inverse, out=held[..., self.V :])
            torch.log2(count_Pn1[..., 0], out=log_count[:, 0, L : L + n])
            held.copy_(held.to(dtype))
        none = means.new_empty(0)
        self.rows = Rows(
            L=L,
            V=self.V,
            means=means,
            log_count=log_count,
            flat_means=means.view(-1, W),
            flat_log_count=log_count.view(-1),
            future=means.new_full((L, L), -torch.inf).triu_(1),
            base=torch.arange(self.P, device=count.device)[:, None] * (L + self.N) + L,
            sums=none,
            picked=none,
            step=none,
            new_means=none,
            rounded=none,
            new_log_count=none,
        )

    def hold_sums(self, dictionary: Dictionary, dtype: torch.dtype) -> None:
        """Copy the dictionary's sums, which the loops will update."""
        means, W = self.rows.means, self.V + self.K
        self.sums = torch.zeros(self.P, self.L + self.N, W + 1, dtype=dtype, device=means.device)
        for held, x in zip(self._held_sums(dictionary), (dictionary.value_sum, dictionary.key_sum, dictionary.count)):
            held.copy_(x[:, :, : held.shape[2]].view(held.shape))
        chunk = self.P * self.L
        self.rows = self.rows._replace(
            sums=self.sums.view(-1, W + 1),
            picked=self.sums.new_empty(chunk, W + 1),
            step=self.sums.new_empty(chunk, W + 1),
            new_means=means.new_empty(chunk, W),
            rounded=means.new_empty(chunk, W, dtype=self.dtype),
            new_log_count=means.new_empty(chunk),
        )

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
        return (a_PL + self.rows.base).flatten()

    def add(self, index: Tensor, tokens: Tensor) -> None:
        """Add rows [value | key | 1] to the sums of these centroids."""
        self.rows.sums.index_add_(0, index, tokens.to(self.sums.dtype))

    def set_means(self, index: Tensor) -> None:
        """Compute the means and log counts of centroids in use from their sums."""
        sums = self.rows.sums.index_select(0, index)
        means = (sums[:, :-1] * sums[:, -1:].reciprocal()).to(self.work)
        self.rows.flat_means.index_copy_(0, index, means.to(self.dtype).to(self.work))
        self.rows.flat_log_count.index_copy_(0, index, sums[:, -1].log2().to(self.work))
