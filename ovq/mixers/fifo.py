"""The last N key/value pairs as a memory."""

from __future__ import annotations

from ovq.mixers.base import MixerShape
from ovq.mixers.memory_layer import MemoryLayer


class FIFO(MemoryLayer):
    """The last N pairs before the chunk: a window without positions."""

    def __init__(
        self,
        shape: MixerShape,
        *,
        capacity: int = 2048,
        chunk_size: int = 128,
        beta_init: float = 1.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(shape, capacity=capacity, chunk_size=chunk_size, beta_init=beta_init, backend=backend)
