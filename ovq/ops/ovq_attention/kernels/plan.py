"""How a call is cut into chunks: everything that the host knows before any kernel runs.

The number of centroids before every chunk depends only on the settings and the position, so nothing is ever read back
from the device except the bounds of packed documents.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ovq.ops.ovq_attention.kernels.copies import Copies
from ovq.ops.ovq_attention.spec import OVQSpec

ALIGNMENT = 16  # entries to which the start of a table row is aligned: 64 bytes
MIN_CHUNKS = 16  # chunks that a table always has room for
TABLE_SHARE = 1 / 6  # the limit on a table's size, relative to the bytes of q, k and v (docs/kernels.md, "Memory")


def most_entries(tokens: int, group: int, K: int, V: int, itemsize: int, num_centroids: int) -> int:
    """The limit on a table's entries per key/value head with `group` query heads: a share of the size of its q, k and v
    or, in a short piece, whose sums are larger than its tokens, enough for a few chunks."""
    return max(int(TABLE_SHARE * tokens * (group * K + K + V) * itemsize / 4), MIN_CHUNKS * num_centroids)


@dataclass(frozen=True, eq=False)
class Plan:
    """The chunks of all documents, in text order.

    Every document ends with one chunk that is not committed, of 0 to L - 1 tokens: it sees the final dictionary. Only
    if there is a single document may it start with a dictionary, of `initial` centroids.

    Attributes:
        starts, ends: token bounds of chunk c in a row of the batch, which holds the packed documents.
        sizes: centroids before chunk c.
        documents: (first, last) chunk of each document; the last one is not committed.
        walks: (first chunk, last chunk, offset in the sums) of each document that commits at least one chunk.
        sums: total centroids of all documents.
    """

    spec: OVQSpec
    position: int
    initial: int
    starts: np.ndarray
    ends: np.ndarray
    sizes: np.ndarray
    documents: tuple[tuple[int, int], ...]
    walks: tuple[tuple[int, int, int], ...]
    sums: int
    _layouts: dict[tuple, tuple[np.ndarray, int]] = field(default_factory=dict)
    _copies: Copies = field(default_factory=Copies)

    @property
    def chunks(self) -> int:
        return len(self.starts)

    @property
    def committed(self) -> int:
        """Number of chunks that change a dictionary."""
        return self.chunks - len(self.documents)

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        """starts, ends and sizes, int32 [chunks]; walks, int32 [walks, 3]; ranks, int32 [chunks, L]: the keys' ranks in
        the order of random seeding ([1, 1] without it)."""

        def make() -> dict[str, np.ndarray]:
            arrays = {"starts": self.starts, "ends": self.ends, "sizes": self.sizes, "walks": np.array(self.walks)}
            return arrays | {"ranks": self._ranks()}

        return self._copies.get("tensors", device, make)

    def _ranks(self) -> np.ndarray:
        spec, L = self.spec, self.spec.chunk_size
        if spec.seeding != "random":
            return np.zeros((1, 1))
        begin = np.concatenate([np.full(last + 1 - first, self.starts[first]) for first, last in self.documents])
        position = torch.from_numpy(self.position + self.starts - begin)[:, None] + torch.arange(L)
        # A key's rank is its position in the order: the inverse permutation.
        ranks = spec.hash_order_at(position).argsort()
        for first, _ in self.documents:
            if self.sizes[first] == 0:  # the document's first key founds centroid 0
                ranks[first] += ranks[first] < ranks[first, 0].clone()
                ranks[first, 0] = 0
        return ranks.numpy()

    def layout(self, chunks: tuple[int, int], centroids: tuple[int, int]) -> tuple[np.ndarray, int]:
        """The row starts of a table of these chunks and centroids, and its size, both in entries."""
        low, high = centroids
        widths = np.clip(self.sizes[chunks[0] : chunks[1]] - low, 0, high - low)
        ends = np.cumsum(-(-widths // ALIGNMENT) * ALIGNMENT)
        return np.concatenate([[0], ends[:-1]]), max(int(ends[-1]), 1)

    def offsets(self, chunks: tuple[int, int], centroids: tuple[int, int], device: torch.device) -> tuple[Tensor, int]:
        """`layout` with the row starts on a device, int32 [chunks of the table]."""
        key = (chunks, centroids)
        if key not in self._layouts:
            self._layouts[key] = self.layout(chunks, centroids)
        starts, size = self._layouts[key]
        return self._copies.get(("offsets", *key), device, lambda: {"starts": starts})["starts"], size

    def document_ranges(self, chunks: tuple[int, int], device: torch.device) -> Tensor:
        """int32 [documents of these chunks, 2]: the first and last of these chunks in each document."""

        def make() -> dict[str, np.ndarray]:
            parts = ((max(first, chunks[0]), min(last, chunks[1] - 1)) for first, last in self.documents)
            return {"ranges": np.array([part for part in parts if part[0] <= part[1]])}

        return self._copies.get(("documents", chunks), device, make)["ranges"]

    @property
    def all_chunks(self) -> tuple[int, int]:
        return 0, self.chunks

    @property
    def all_centroids(self) -> tuple[int, int]:
        return 0, int(self.sizes.max())

    def chunk_ranges(self, entries: int) -> list[tuple[int, int]]:
        """All chunks, cut into ranges whose tables have at most `entries` entries per head (or a single chunk)."""
        ends = np.cumsum(-(-self.sizes // ALIGNMENT) * ALIGNMENT)
        ranges, first, before = [], 0, 0
        while first < self.chunks:
            last = max(int(np.searchsorted(ends, before + entries, side="right")), first + 1)
            ranges.append((first, last))
            first, before = last, int(ends[last - 1])
        return ranges

    def centroid_ranges(self, entries: int, block: int) -> list[tuple[int, int]]:
        """All centroids, cut by the same limit into ranges of whole blocks."""
        most = self.all_centroids[1]
        width = most
        while width > block and self.layout(self.all_chunks, (0, width))[1] > entries:
            width = -(-width // (2 * block)) * block
        return [(n, min(n + width, most)) for n in range(0, most, max(width, 1))]

    def blocks(self, block: int, centroids: tuple[int, int], device: torch.device) -> Tensor:
        """int32 [blocks, 5]: the first centroid of a block, the chunk that founds it, its document's last chunk and the
        token bounds of that chunk; the longest walks come first."""

        def make() -> dict[str, np.ndarray]:
            made = []
            for first, last in self.documents:
                sizes = self.sizes[first : last + 1]
                for n in range(centroids[0], min(centroids[1], int(sizes[-1])), block):
                    born = first + max(int(np.searchsorted(sizes, n, side="right")) - 1, 0)
                    made.append((n, born, last, int(self.starts[last]), int(self.ends[last])))
            made.sort(key=lambda walk: walk[1] - walk[2])
            return {"blocks": np.array(made).reshape(-1, 5)}

        return self._copies.get(("blocks", block, centroids), device, make)["blocks"]


@functools.lru_cache(maxsize=64)
def make_plan(spec: OVQSpec, size: int, position: int, bounds: tuple[int, ...]) -> Plan:
    """The plan for documents with these token bounds, (0, S) for a single one, the first of which starts with a
    dictionary of `size` centroids at `position`."""
    L = spec.chunk_size
    starts: list[int] = []
    ends: list[int] = []
    sizes: list[int] = []
    documents, walks, sums = [], [], 0
    for begin, end in zip(bounds, bounds[1:]):
        if end == begin:
            continue
        first = len(starts)
        for start in range(begin, end + 1, L):
            starts.append(start)
            ends.append(min(start + L, end))
            sizes.append(spec.size_at(position + start - begin) if start > begin else size)
        documents.append((first, len(starts) - 1))
        if first < len(starts) - 1:
            walks.append((*documents[-1], sums))
            sums += sizes[-1]
    chunks = np.array(starts), np.array(ends), np.array(sizes)
    return Plan(spec, position, size, *chunks, tuple(documents), tuple(walks), sums)
