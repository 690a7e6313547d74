"""Which tiles every kernel runs with: one small table, no autotuning.

Tiles depend on the stage, the chip, the width and the dtype, never on the number of tokens, centroids or heads: a new
sequence length compiles and tunes nothing. (`assign` alone is built for each number of programs that share a walk.)
The figures behind the choice: `python -m eval.bench.aot`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

MAX_WIDTH = 128
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Tile:
    """How a program works: rows (tokens) and columns (centroids, or keys) of a tile, warps, and stages of the load
    pipeline; of `assign`, the rows of a tile that commits."""

    rows: int
    columns: int
    warps: int
    stages: int
    commit: int = 0


# Chip family -> operands ("half": bfloat16 and float16) and padded width -> stage. No attention kernel spills, in
# the default variant.
TILES = {
    "sm_90": {
        ("half", 64): {
            "assign": Tile(128, 64, 8, 3, 128),
            "predict": Tile(128, 64, 4, 3),
            "query_grad": Tile(128, 64, 8, 3),
            "dictionary_grad": Tile(64, 128, 8, 3),
            "chunk_grad": Tile(32, 64, 4, 2),
            "decode": Tile(16, 64, 4, 2),
        },
        ("half", 128): {
            "assign": Tile(128, 64, 8, 3, 128),
            "predict": Tile(128, 64, 8, 3),
            "query_grad": Tile(128, 64, 8, 3),
            "dictionary_grad": Tile(64, 64, 8, 3),
            "chunk_grad": Tile(32, 64, 8, 2),
            "decode": Tile(16, 32, 4, 2),
        },
        ("float", 64): {
            "assign": Tile(64, 32, 8, 2, 32),
            "predict": Tile(64, 32, 8, 2),
            "query_grad": Tile(32, 32, 8, 2),
            "dictionary_grad": Tile(16, 32, 8, 2),
            "chunk_grad": Tile(32, 32, 8, 2),
            "decode": Tile(16, 32, 4, 2),
        },
        ("float", 128): {
            "assign": Tile(64, 32, 8, 2, 32),
            "predict": Tile(16, 32, 8, 2),
            "query_grad": Tile(16, 32, 8, 2),
            "dictionary_grad": Tile(16, 16, 8, 2),
            "chunk_grad": Tile(16, 16, 8, 2),
            "decode": Tile(16, 32, 4, 2),
        },
    },
    "sm_80": {
        ("half", 64): {
            "assign": Tile(128, 64, 8, 3, 128),
            "predict": Tile(128, 64, 4, 3),
            "query_grad": Tile(64, 32, 4, 2),
            "dictionary_grad": Tile(32, 128, 8, 3),
            "chunk_grad": Tile(32, 64, 4, 1),
            "decode": Tile(16, 64, 4, 2),
        },
        ("half", 128): {
            "assign": Tile(128, 64, 8, 3, 128),
            "predict": Tile(128, 64, 8, 3),
            "query_grad": Tile(64, 64, 8, 3),
            "dictionary_grad": Tile(64, 32, 8, 3),
            "chunk_grad": Tile(32, 64, 8, 2),
            "decode": Tile(16, 32, 4, 2),
        },
        ("float", 64): {
            "assign": Tile(64, 32, 8, 2, 32),
            "predict": Tile(32, 32, 8, 2),
            "query_grad": Tile(32, 32, 8, 2),
            "dictionary_grad": Tile(32, 32, 8, 2),
            "chunk_grad": Tile(16, 32, 8, 2),
            "decode": Tile(16, 32, 4, 2),
        },
        ("float", 128): {
            "assign": Tile(64, 32, 8, 2, 32),
            "predict": Tile(16, 32, 8, 2),
            "query_grad": Tile(16, 32, 8, 2),
            "dictionary_grad": Tile(16, 16, 8, 2),
            "chunk_grad": Tile(16, 16, 8, 2),
            "decode": Tile(16, 32, 4, 2),
        },
    },
    "gfx": {
        ("half", 64): {
            "assign": Tile(128, 64, 8, 2, 128),
            "predict": Tile(128, 64, 4, 2),
            "query_grad": Tile(64, 64, 4, 2),
            "dictionary_grad": Tile(32, 64, 4, 2),
            "chunk_grad": Tile(32, 64, 4, 2),
            "decode": Tile(16, 64, 4, 2),
        },
        ("half", 128): {
            "assign": Tile(64, 64, 8, 2, 128),
            "predict": Tile(64, 32, 4, 2),
            "query_grad": Tile(64, 32, 4, 2),
            "dictionary_grad": Tile(32, 32, 4, 2),
            "chunk_grad": Tile(32, 32, 4, 1),
            "decode": Tile(16, 32, 4, 2),
        },
        ("float", 64): {
            "assign": Tile(64, 32, 8, 2, 32),
            "predict": Tile(32, 32, 4, 2),
            "query_grad": Tile(32, 32, 4, 2),
            "dictionary_grad": Tile(32, 32, 4, 1),
            "chunk_grad": Tile(32, 32, 4, 1),
            "decode": Tile(16, 32, 4, 2),
        },
        ("float", 128): {
            "assign": Tile(32, 32, 8, 2, 32),
            "predict": Tile(32, 16, 4, 1),
            "query_grad": Tile(32, 16, 4, 1),
            "dictionary_grad": Tile(16, 32, 4, 1),
            "chunk_grad": Tile(16, 32, 4, 1),
            "decode": Tile(16, 32, 4, 1),
        },
    },
}


@functools.cache
def arch_of(device: torch.device) -> str:
    """ "sm_90", "gfx942", ...; "interpreter" where there is no GPU."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def padded(width: int) -> int:
    """The power of two that a width is padded to; tensor cores take no less than 16."""
    return max(16, 1 << (width - 1).bit_length())


def tile_of(stage: str, arch: str, dtype: torch.dtype, K: int, V: int) -> Tile:
    if arch == "interpreter":  # its time goes by the number of tiles: the largest
        return TILES["sm_90"]["half", 64][stage]
    wgmma = arch in ("sm_90", "sm_100", "sm_103")
    family = "gfx" if arch.startswith("gfx") else "sm_90" if wgmma else "sm_80"
    operands = "float" if dtype == torch.float32 else "half"
    return TILES[family][operands, 64 if max(K, V) <= 64 else 128][stage]


def precision(dtype: torch.dtype, arch: str) -> str:
    """How float32 products are taken: to float32's accuracy, on the tensor cores where the chip can."""
    if dtype != torch.float32 or arch == "interpreter":
        return "ieee"
    return "tf32x3" if arch.startswith("sm_") else "bf16x6"


def constants(stage: str, arch: str, dtype: torch.dtype, K: int, V: int, rows: int, **flags: Any) -> dict:
    """The compile-time arguments of a stage's kernel, and how it is launched (num_warps, num_stages).

    `rows` is the chunk size; of decode, the query heads of a group.
    """
    tile, longest = tile_of(stage, arch, dtype, K, V), padded(rows)
    rows = min(tile.rows, longest)  # a chunk shorter than the tile has a tile of its own size
    settings = {
        "K": K,
        "V": V,
        "BLOCK_K": padded(K),
        "BLOCK_V": padded(V),
        "BLOCK_N": tile.columns,
        "PRECISION": precision(dtype, arch),
        "STAGES": tile.stages,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        **flags,
    }
    if stage == "assign":
        commit = min(tile.commit, longest)
        return settings | {"BLOCK_L": rows, "BLOCK_C": commit, "ONE": commit == longest}
    if stage == "decode":
        return settings | {"BLOCK_R": longest}
    return settings | {"BLOCK_M": rows}
