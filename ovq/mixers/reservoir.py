"""A uniform sample of N key/value pairs as a memory.

Shapes: B batch, L chunk, M entries held, G key/value heads, K head width.
"""

from __future__ import annotations

import math

from torch import Tensor

from ovq.mixers.base import MixerShape
from ovq.mixers.memory_layer import MemoryLayer
from ovq.ops.position_hash import position_hash


class Reservoir(MemoryLayer):
    """A uniform sample of N of the pairs before the chunk, each standing for t / N tokens.

    The sample consists of the positions with the N lowest hashes of (seed, position). It is at any time uniform without
    replacement, and a pure function of the positions, hence the same for all heads, batches, devices and ways of
    streaming in pieces.
    """

    def __init__(
        self,
        shape: MixerShape,
        *,
        capacity: int = 2048,
        chunk_size: int = 128,
        seed: int = 0,
        beta_init: float = 1.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(shape, capacity=capacity, chunk_size=chunk_size, beta_init=beta_init, backend=backend)
        self.seed = seed

    def kept(self, position_M: Tensor) -> Tensor:
        order = position_hash(self.seed, position_M).argsort(stable=True)
        return order[: self.capacity].sort().values

    def log_weight(self, held: int, position: int) -> float:
        return math.log(position / held) if held else 0.0
