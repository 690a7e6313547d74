"""How a call is cut into chunks: what the host knows before any kernel runs.

The number of centroids before every chunk depends on the settings and the position alone, so the table of version rows
has one ragged row a chunk and no bigger than needed, and nothing is ever read back from the device.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ovq.ops.ovq_attention.spec import OVQSpec

TABLE_ALIGNMENT = 16  # entries; 64 bytes


@dataclass(frozen=True)
class Plan:
    """sizes[i]: centroids before chunk i, up to the one after all whole chunks; offsets[i]: its start in the table."""

    spec: OVQSpec
    position: int
    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    table_size: int

    @property
    def chunks(self) -> int:
        """Whole chunks; an unfinished one may follow them."""
        return len(self.sizes) - 1

    @property
    def initial(self) -> int:
        """Centroids of the dictionary at the start; they have the first version rows."""
        return self.sizes[0]

    @property
    def rows(self) -> int:
        return max(self.initial + self.chunks * self.spec.chunk_size, 1)


@functools.lru_cache(maxsize=64)
def make_plan(spec: OVQSpec, size: int, position: int, tokens: int) -> Plan:
    """The plan for `tokens` tokens after a dictionary of `size` centroids at `position`."""
    ends = range(spec.chunk_size, tokens + 1, spec.chunk_size)
    sizes = (size, *(spec.size_at(position + end) for end in ends))
    offsets = [0]
    for n in sizes:
        offsets.append(offsets[-1] + -(-n // TABLE_ALIGNMENT) * TABLE_ALIGNMENT)
    return Plan(spec, position, sizes, tuple(offsets[:-1]), max(offsets[-1], 1))


@functools.lru_cache(maxsize=64)
def plan_tensors(plan: Plan, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """sizes [chunks + 1] int32, offsets [chunks + 1] int64, and the keys' ranks of random seeding [chunks, L]."""
    spec = plan.spec
    ranks = torch.zeros(1, 1, dtype=torch.int32)
    if spec.seeding == "random" and plan.chunks:
        starts = range(plan.position, plan.position + plan.chunks * spec.chunk_size, spec.chunk_size)
        # A key's rank is its place in the order: the inverse permutation.
        ranks = torch.stack([spec.hash_order(start, torch.device("cpu")).argsort() for start in starts]).to(torch.int32)
        if plan.initial == 0:  # the first key of all founds centroid 0
            ranks[0] += ranks[0] < ranks[0, 0].clone()
            ranks[0, 0] = 0
    sizes = torch.tensor(plan.sizes, dtype=torch.int32)
    return sizes.to(device), torch.tensor(plan.offsets, dtype=torch.int64).to(device), ranks.to(device)
