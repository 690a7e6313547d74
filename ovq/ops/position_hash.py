"""A random order of tokens as a pure function of (seed, position): the same for all heads, devices and pieces."""

from __future__ import annotations

from torch import Tensor


def position_hash(seed: int, position: Tensor) -> Tensor:
    """A 32-bit hash (lowbias32, Wellons 2018) of seed and position, as int64 in [0, 2^32)."""
    mask = 0xFFFFFFFF
    x = (position + (seed * 0x9E3779B9 & mask)) & mask
    x = ((x ^ x >> 16) * 0x7FEB352D) & mask
    x = ((x ^ x >> 15) * 0x846CA68B) & mask
    return x ^ x >> 16
