"""The tile sizes of every kernel: one small table, no autotuning.

Tiles depend on the stage, the chip, the width and the dtype, never on the number of tokens, centroids or heads, so a
new sequence length needs no compilation or tuning. (`assign` has three builds, by how many programs may share a walk.)
The figures behind these choices: `python -m eval.bench.aot`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

MAX_WIDTH = 128
BUILDS = (1, 4, 16)  # of `assign`: the most programs per walk that each build is for
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Tile:
    """The work of one program: rows (tokens) and columns (centroids or keys) of a tile, warps, and stages of the load
    pipeline; for `assign` also the rows of a commit tile."""

    rows: int
    columns: int
    warps: int
    stages: int
    commit: int = 0


# Chip family -> operands ("half": bfloat16 and float16) and padded width -> stage. No attention kernel spills in the
# default variant.
TILES = {
    "sm_90": {
        ("half", 64): {
            "assign": Tile(128, 64, 8, 3, 128),
            "predict": Tile(128, 64, 4, 3),
            "query_grad": Tile(128, 128, 8, 3),
            "dictionary_grad": Tile(128, 128, 8, 3),
            "chunk_grad": Tile(32, 64, 4, 2),
            "decode": Tile(16, 64, 4, 2),
        },
        ("half", 128): {
            "assign": Tile(128, 64, 8, 3, 128),
            "predict": Tile(128, 64, 8, 3),
            "query_grad": Tile(128, 64, 8, 3),
            "dictionary_grad": Tile(64, 128, 8, 2),
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
            "query_grad": Tile(16, 32, 8, 1),
            "dictionary_grad": Tile(16, 16, 8, 2),
            "chunk_grad": Tile(16, 16, 8, 2),
            "decode": Tile(16, 32, 4, 2),
        },
    },
    "sm_80": {
        ("half", 64): {
            "assign": Tile(128, 64, 8, 3, 128),
            "predict": Tile(128, 64, 8, 3),
            "query_grad": Tile(64, 32, 4, 2),
            "dictionary_grad": Tile(32, 128, 8, 2),
            "chunk_grad": Tile(32, 64, 4, 1),
            "decode": Tile(16, 64, 4, 2),
        },
        ("half", 128): {
            "assign": Tile(128, 64, 8, 3, 128),
            "predict": Tile(128, 32, 8, 3),
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


# Replacements for tiles that would spill. On sm_80, with values wider than keys:
WIDE_VALUES = {"query_grad": Tile(64, 32, 8, 3), "chunk_grad": Tile(32, 32, 8, 2)}
# On chips with 99 KiB of shared memory (RTX 30 and 40, A10, A40, L4, L40S), where sm_80's do not fit or spill:
LITTLE_SHARED = ("sm_86", "sm_89")
# Keys and values that are compared together must fit, too, with one program per walk.
KEY_VALUE_WIDTHS = {  # half precision, float32
    "sm_80": (MAX_WIDTH, 64),
    "sm_86": (64, 32),
    "sm_87": (MAX_WIDTH, 64),
    "sm_89": (64, 32),
}
SMALLER = {
    "predict": Tile(128, 32, 8, 2),
    "query_grad": Tile(64, 32, 8, 2),
    "dictionary_grad": Tile(64, 32, 8, 2),
}
# On sm_90, with the counts that a constant rate needs; on sm_100, which holds accumulators elsewhere, always:
DICTIONARY_GRAD = {64: Tile(64, 128, 8, 3), 128: Tile(64, 64, 8, 2)}


@functools.cache
def arch_of(device: torch.device) -> str:
    """The architecture, such as "sm_90" or "gfx942"; "interpreter" for a device that is not a GPU."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def padded(width: int) -> int:
    """The power of two that a width is padded to; tensor cores need at least 16."""
    return max(16, 1 << (width - 1).bit_length())


def tile_of(stage: str, arch: str, dtype: torch.dtype, K: int, V: int, rate: bool = False) -> Tile:
    """The tile of a stage's program; `rate`: with a constant rate."""
    if arch == "interpreter":  # its time depends on the number of tiles: use the largest
        return TILES["sm_90"]["half", 64][stage]
    wgmma = arch in ("sm_90", "sm_100", "sm_103")
    family = "gfx" if arch.startswith("gfx") else "sm_90" if wgmma else "sm_80"
    operands, width = "float" if dtype == torch.float32 else "half", 64 if max(K, V) <= 64 else 128
    if (operands, width) == ("half", 128) and arch in LITTLE_SHARED and stage in SMALLER:
        return SMALLER[stage]
    if (family, operands, width) == ("sm_80", "half", 128) and padded(K) < padded(V) and stage in WIDE_VALUES:
        return WIDE_VALUES[stage]
    if (family, operands, stage) == ("sm_90", "half", "dictionary_grad") and (rate or arch != "sm_90"):
        return DICTIONARY_GRAD[width]
    return TILES[family][operands, width][stage]


def precision(dtype: torch.dtype, arch: str) -> str:
    """How float32 products are computed: to float32 accuracy, on tensor cores where the chip can do so."""
    if dtype != torch.float32 or arch == "interpreter":
        return "ieee"
    return "tf32x3" if arch.startswith("sm_") else "bf16x6"


def constants(stage: str, arch: str, dtype: torch.dtype, K: int, V: int, rows: int, **flags: Any) -> dict:
    """The compile-time arguments of a stage's kernel, and its launch options (num_warps, num_stages).

    `rows` is the chunk size or, for decode, the number of query heads per group.
    """
    tile, longest = tile_of(stage, arch, dtype, K, V, flags.get("RATE", False)), padded(rows)
    rows = min(tile.rows, longest)  # a chunk shorter than the tile gets a tile of its own size
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
        # With several programs, each owns some of the centroids that a chunk changes, which are at most one per key.
        shared = settings.get("MOST", 1) > 1 and commit == longest
        writes = min(max(commit // settings["MOST"], 16), commit) if shared else commit
        return settings | {"BLOCK_L": rows, "BLOCK_C": commit, "BLOCK_W": writes, "ONE": commit == longest}
    if stage == "decode":
        return settings | {"BLOCK_R": longest}
    return settings | {"BLOCK_M": rows}
