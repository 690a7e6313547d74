"""Which tiles every kernel runs with: one small table, no autotuning.

Tiles depend on the stage, the chip, the width and the dtype, never on the number of tokens, centroids or heads: a new
sequence length compiles and tunes nothing. The figures behind the choice: `python -m ovq.ops.aot_report`.
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
    """Rows (tokens) and columns (centroids, or keys) of a tile, warps a program, and stages of the load pipeline."""

    rows: int
    columns: int
    warps: int
    stages: int


# (stage, padded width) -> tile, in bfloat16 and float16; float32 operands take half the columns.
TILES = {
    ("assign", 64): Tile(128, 64, 8, 3),
    ("assign", 128): Tile(128, 64, 8, 3),
    ("predict", 64): Tile(128, 64, 4, 3),
    ("predict", 128): Tile(128, 64, 8, 3),
    ("query_grad", 64): Tile(128, 64, 8, 2),
    ("query_grad", 128): Tile(128, 64, 8, 2),
    ("dictionary_grad", 64): Tile(128, 64, 8, 2),
    ("dictionary_grad", 128): Tile(64, 64, 8, 2),
    ("chunk_grad", 64): Tile(64, 64, 4, 2),
    ("chunk_grad", 128): Tile(64, 64, 8, 2),
    ("decode", 64): Tile(16, 64, 4, 2),
    ("decode", 128): Tile(16, 64, 4, 2),
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
    tile = TILES[stage, 64 if max(K, V) <= 64 else 128]
    if dtype == torch.float32:
        tile = Tile(min(tile.rows, 64), max(tile.columns // 2, 16), tile.warps, 2)
    return tile


def precision(dtype: torch.dtype, arch: str) -> str:
    """How float32 products are taken: to float32's accuracy, on the tensor cores where the chip can."""
    if dtype != torch.float32 or arch == "interpreter":
        return "ieee"
    return "tf32x3" if arch.startswith("sm_") else "bf16x6"


def constants(stage: str, arch: str, dtype: torch.dtype, K: int, V: int, chunk_size: int, **flags: Any) -> dict:
    """The compile-time arguments of a stage's kernel, and how it is launched (num_warps, num_stages)."""
    tile = tile_of(stage, arch, dtype, K, V)
    # A chunk shorter than the tile has a tile of its own size.
    rows = min(tile.rows, padded(chunk_size))
    names = {"assign": ("BLOCK_L", "BLOCK_N"), "decode": ("BLOCK_R", "BLOCK_N")}.get(stage, ("BLOCK_M", "BLOCK_N"))
    return {
        "K": K,
        "V": V,
        "BLOCK_K": padded(K),
        "BLOCK_V": padded(V),
        names[0]: rows,
        **({"BLOCK_C": min(rows, 64)} if stage == "assign" else {}),
        names[1]: tile.columns,
        "PRECISION": precision(dtype, arch),
        "STAGES": tile.stages,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        **flags,
    }
