"""The last N key/value pairs as a memory."""

from __future__ import annotations

from ovq.mixers.memory_layer import MemoryLayer


class FIFO(MemoryLayer):
    """The last N pairs before the chunk: a window without positions."""
