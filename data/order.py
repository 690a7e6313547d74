"""Pure functions that decide and identify the tokens of a step: a seeded permutation and a hash of rows."""

from __future__ import annotations

import numpy as np

_MASK = (1 << 64) - 1


def permute(index: int, size: int, seed: int) -> int:
    """The image of `index` under a seeded permutation of range(size).

    A six-round Feistel network over the next power of four, applied until the result is below `size`. It takes O(1)
    memory for any number of documents and, unlike a library's shuffle, never changes between versions.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for key in range(6):
            left, right = right, left ^ (mix(right, seed, key) & mask)
        index = left << half | right
        if index < size:
            return index


def mix(value: int, seed: int, key: int) -> int:
    """SplitMix64's finaliser over value, seed and round."""
    x = (value + 0x9E3779B97F4A7C15 * (6 * seed + key + 1)) & _MASK
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & _MASK
    return x ^ x >> 31


def token_hash(lanes: list[int], inputs: np.ndarray, targets: np.ndarray) -> int:
    """64-bit hash of rows of tokens [m, T] and their lanes, identifying the data of a step. It is a sum over rows, so
    however these are divided among ranks and micro-batches, the hashes add up to the same value modulo 2^64."""
    with np.errstate(over="ignore"):
        position = np.arange(inputs.shape[1], dtype=np.uint64)
        pairs = inputs.astype(np.uint64) * np.uint64(2**32) + (targets.astype(np.int64) & 0xFFFFFFFF).astype(np.uint64)
        rows = _mix_array(pairs + _mix_array(position)).sum(axis=1, dtype=np.uint64)
        return int(_mix_array(rows + _mix_array(np.array(lanes, dtype=np.uint64) + np.uint64(1))).sum(dtype=np.uint64))


def _mix_array(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser over an array."""
    x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
