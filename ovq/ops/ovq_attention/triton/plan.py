"""How a call is cut into chunks: what the host knows before any kernel runs.

The number of centroids before every chunk depends on the settings and the position alone, so nothing is ever read back
from the device but the bounds of packed documents.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ovq.ops.ovq_attention.spec import OVQSpec

ALIGNMENT = 16  # entries of a table between starts of its rows: 64 bytes
TABLE_SHARE = 1 / 6  # of the bytes of q, k and v that a table may have (docs/kernels.md, "Memory")


def most_entries(tokens: int, group: int, K: int, V: int, itemsize: int) -> int:
    """Entries that a table may have for each key/value head, of `group` query heads."""
    return int(TABLE_SHARE * tokens * (group * K + K + V) * itemsize / 4)


@dataclass(frozen=True, eq=False)
class Plan:
    """The chunks of all documents, one after the other in the text's order.

    Every document ends with one chunk more than are committed, of 0 to L - 1 tokens: it has the dictionary at the end.
    Only a single document may have a dictionary at the start, of `initial` centroids.

    Attributes:
        starts, ends: token bounds of chunk c in the packed text (in a row of the batch).
        sizes: centroids before chunk c.
        documents: (first, last) chunk of each document, the last one being the one that is not committed.
        sum_starts: where a document's centroids begin in the sums, and their number in all.
    """

    spec: OVQSpec
    position: int
    initial: int
    starts: np.ndarray
    ends: np.ndarray
    sizes: np.ndarray
    documents: tuple[tuple[int, int], ...]
    sum_starts: tuple[int, ...]
    _tensors: dict = field(default_factory=dict)

    @property
    def chunks(self) -> int:
        return len(self.starts)

    @property
    def committed(self) -> int:
        """Chunks that change a dictionary."""
        return self.chunks - len(self.documents)

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        """starts, ends and sizes, int32 [chunks]; documents, int32 [documents, 3]: first and last chunk, start of the
        sums; ranks, int32 [chunks, L]: the keys' places in the order of random seeding (else [1, 1])."""
        if device not in self._tensors:
            documents = [(*chunks, start) for chunks, start in zip(self.documents, self.sum_starts)]
            arrays = {"starts": self.starts, "ends": self.ends, "sizes": self.sizes, "documents": documents}
            made = {name: torch.tensor(np.asarray(x), dtype=torch.int32) for name, x in arrays.items()}
            made["ranks"] = self._ranks()
            self._tensors[device] = {name: x.to(device) for name, x in made.items()}
        return self._tensors[device]

    def _ranks(self) -> Tensor:
        spec = self.spec
        ranks = torch.zeros(1, 1, dtype=torch.int32)
        if spec.seeding != "random":
            return ranks
        ranks = torch.zeros(self.chunks, spec.chunk_size, dtype=torch.int32)
        for first, last in self.documents:
            for c in range(first, last):
                start = self.position + int(self.starts[c] - self.starts[first])
                # A key's rank is its place in the order: the inverse permutation.
                ranks[c] = spec.hash_order(start, torch.device("cpu")).argsort()
            if last > first and self.sizes[first] == 0:  # the first key of all founds centroid 0
                ranks[first] += ranks[first] < ranks[first, 0].clone()
                ranks[first, 0] = 0
        return ranks

    def layout(self, chunks: tuple[int, int], centroids: tuple[int, int]) -> tuple[np.ndarray, int]:
        """Where the rows of a table of these chunks and centroids start, and its size."""
        low, high = centroids
        widths = np.clip(self.sizes[chunks[0] : chunks[1]] - low, 0, high - low)
        ends = np.cumsum(-(-widths // ALIGNMENT) * ALIGNMENT)
        return np.concatenate([[0], ends[:-1]]), max(int(ends[-1]), 1)

    def offsets(self, chunks: tuple[int, int], centroids: tuple[int, int], device: torch.device) -> tuple[Tensor, int]:
        """The same on a device: int32 [chunks of the table]."""
        key = (device, chunks, centroids)
        if key not in self._tensors:
            starts, size = self.layout(chunks, centroids)
            self._tensors[key] = torch.tensor(starts, dtype=torch.int32).to(device), size
        return self._tensors[key]

    def document_ranges(self, chunks: tuple[int, int], device: torch.device) -> Tensor:
        """int32 [documents of these chunks, 2]: first and last of these chunks that are a document's."""
        key = (device, chunks, "documents")
        if key not in self._tensors:
            parts = ((max(first, chunks[0]), min(last, chunks[1] - 1)) for first, last in self.documents)
            made = torch.tensor([part for part in parts if part[0] <= part[1]], dtype=torch.int32)
            self._tensors[key] = made.to(device)
        return self._tensors[key]

    @property
    def all_chunks(self) -> tuple[int, int]:
        return 0, self.chunks

    @property
    def all_centroids(self) -> tuple[int, int]:
        return 0, int(self.sizes.max())

    def chunk_ranges(self, entries: int) -> list[tuple[int, int]]:
        """All chunks, cut so that a table has at most so many entries a head (or one chunk)."""
        widths = -(-self.sizes // ALIGNMENT) * ALIGNMENT
        ranges, first, held = [], 0, 0
        for c, width in enumerate(widths.tolist()):
            if c > first and held + width > entries:
                ranges.append((first, c))
                first, held = c, 0
            held += width
        return [*ranges, (first, self.chunks)]

    def centroid_ranges(self, entries: int, block: int) -> list[tuple[int, int]]:
        """All centroids, cut likewise into whole blocks."""
        most = self.all_centroids[1]
        width = most
        while width > block and self.layout(self.all_chunks, (0, width))[1] > entries:
            width = -(-width // (2 * block)) * block
        return [(n, min(n + width, most)) for n in range(0, most, max(width, 1))]

    def blocks(self, block: int, centroids: tuple[int, int], device: torch.device) -> Tensor:
        """int32 [blocks, 5]: the first centroid of a block, the chunk that founds it, the last of its document and
        that one's token bounds; the longest walks first."""
        key = (device, block, centroids)
        if key not in self._tensors:
            made = []
            for first, last in self.documents:
                sizes = self.sizes[first : last + 1]
                for n in range(centroids[0], min(centroids[1], int(sizes[-1])), block):
                    born = first + max(int(np.searchsorted(sizes, n, side="right")) - 1, 0)
                    made.append((n, born, last, int(self.starts[last]), int(self.ends[last])))
            made.sort(key=lambda walk: walk[1] - walk[2])
            self._tensors[key] = torch.tensor(made, dtype=torch.int32).reshape(-1, 5).to(device)
        return self._tensors[key]


@functools.lru_cache(maxsize=64)
def make_plan(spec: OVQSpec, size: int, position: int, bounds: tuple[int, ...]) -> Plan:
    """The plan for documents with these bounds in tokens, (0, S) for one, the first after a dictionary of `size`
    centroids at `position`."""
    L = spec.chunk_size
    starts: list[int] = []
    ends: list[int] = []
    sizes: list[int] = []
    documents, sum_starts = [], [0]
    for begin, end in zip(bounds, bounds[1:]):
        if end == begin:
            continue
        first = len(starts)
        for start in range(begin, end + 1, L):
            starts.append(start)
            ends.append(min(start + L, end))
            sizes.append(spec.size_at(position + start - begin) if start > begin else size)
        documents.append((first, len(starts) - 1))
        sum_starts.append(sum_starts[-1] + sizes[-1])
    return Plan(
        spec, position, size, np.array(starts), np.array(ends), np.array(sizes), tuple(documents), tuple(sum_starts)
    )
