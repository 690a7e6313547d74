"""The least time that the compiled loops need: the cost of an iteration times the number of iterations for a shape.

An iteration's instructions and fixed stall cycles are those of `eval.bench.sass` in docs/results/aot/aot.json. Each of
the four schedulers of a multiprocessor issues one instruction per cycle, and a warp waits out its stalls, which other
programs on the same multiprocessor can fill. Per iteration of a program:

    cycles = max(instructions x warps / 4, stalls / programs that fit a multiprocessor).

Latencies of memory, barriers and tensor cores come on top. How much they add is taken from a kernel whose rate is
published: FlashAttention-2's forward loop (`eval.bench.plain_fa2`), compiled here like the others.

Shapes: B batch, L chunk, n_i centroids before chunk i, H query heads, G key/value heads.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

from eval.bench.shape import Shape
from ovq.errors import ConfigError

REPORT = Path(__file__).resolve().parents[2] / "docs" / "results" / "aot" / "aot.json"
REGISTERS, SHARED, SCHEDULERS, MOST_WARPS = 65536, 228 * 1024, 4, 64  # of a multiprocessor of sm_80 (164 KiB) and sm_90
# Triton's FlashAttention-2 on an H100 (width 64, forward, long texts), in FLOP/s: about 400, from published plots.
PUBLISHED_FA2 = 400e12
DTYPES = {2: "bfloat16", 4: "float32"}
# Tiles of centroids that the slowest of so many programs commits per chunk of 128 keys: the mean over 64k random keys
# with N = 2048, simulated. Clustered keys differ by at most 0.14.
COMMIT_TILES = {1: 1.0, 2: 2.54, 3: 2.01, 4: 1.95, 8: 2.08, 16: 1.21}


@functools.cache
def builds() -> dict[tuple[Any, ...], dict[str, Any]]:
    """The builds of the committed report by (target, stage, dtype, width of keys, of values, chunk, flags).

    Raises:
        ConfigError: there is no report.
    """
    try:
        found = json.loads(REPORT.read_text())["builds"]
    except OSError:
        raise ConfigError(f"{REPORT} is missing; make it: python -m eval.bench.aot out={REPORT.parent}") from None
    return {
        (*(b[name] for name in ("target", "stage", "dtype", "K", "V", "chunk_size")), json.dumps(b["flags"])): b
        for b in found
    }


def build_of(stage: str, arch: str, shape: Shape, **flags: Any) -> dict[str, Any]:
    """A stage's build for a shape; if there is none, that of the next larger width and the longest chunks."""
    width, dtype = 64 if max(shape.K, shape.V) <= 64 else 128, DTYPES[shape.itemsize]
    L = shape.spec.chunk_size
    candidates = [(shape.K, shape.V, L, flags), (width, width, L, flags), (width, width, 128, flags)]
    for K, V, chunk, wanted in (*candidates, (width, width, 128, {})):
        found = builds().get((arch, stage, dtype, K, V, chunk, json.dumps(wanted)))
        if found is not None:
            return found
    raise ConfigError(f"{REPORT} has no {stage} in {dtype} for {arch}; make it again: python -m eval.bench.aot")


def resident(build: dict[str, Any]) -> int:
    """Programs of a kernel that fit on a multiprocessor at once."""
    registers = -(-build["registers"] // 8) * 8 * 32 * build["warps"]
    shared = 164 * 1024 if build["target"] == "sm_80" else SHARED
    fitting = min(REGISTERS // registers, shared // (build["shared"] + 1024), MOST_WARPS // build["warps"])
    return max(1, fitting)


def cycles(build: dict[str, Any], instructions: float, stalls: float) -> float:
    """Cycles of a multiprocessor per program, given a warp's `instructions` and the program's stall cycles."""
    return max(instructions * build["warps"] / SCHEDULERS, stalls / resident(build))


def iterations(stage: str, shape: Shape, tile: dict[str, int]) -> tuple[list[int], list[int]]:
    """How often each of a stage's loops runs, in program order: in all programs together, and in the longest one.

    predict, query_grad: over the dictionary, and over the chunk's own keys. dictionary_grad: over query tiles, of every
    chunk that has the program's centroids. chunk_grad: over the chunk's keys, and over the query tiles after them.
    """
    M, N, heads = tile["BLOCK_M"], tile["BLOCK_N"], shape.batch * shape.heads
    group = shape.heads // shape.kv_heads
    tiles_of = [(math.ceil(n / N), math.ceil(tokens / M), tokens) for n, tokens in shape.chunks]
    if stage in ("predict", "query_grad"):
        own = [math.ceil(min((m + 1) * M, tokens) / N) for _, tiles, tokens in tiles_of for m in range(tiles)]
        old = [columns for columns, tiles, _ in tiles_of for _ in range(tiles)]
        return [heads * sum(old), heads * sum(own)], [max(old), max(own)]
    if stage == "dictionary_grad":
        all_tiles = sum(columns * tiles for columns, tiles, _ in tiles_of)
        return [heads * all_tiles], [group * sum(tiles for columns, tiles, _ in tiles_of if columns)]
    outer = [math.ceil(tokens / N) for _, _, tokens in tiles_of]
    inner = [sum(math.ceil((tokens - s) / M) for s in range(0, tokens, N)) for _, _, tokens in tiles_of]
    all_heads = shape.batch * shape.kv_heads
    return [all_heads * sum(outer), heads * sum(inner)], [max(outer), group * max(inner)]


def loops_ms(stage: str, arch: str, shape: Shape, processors: int, clock: float) -> tuple[float, float]:
    """Milliseconds of a parallel stage's loops, divided evenly over the multiprocessors; and of its longest program."""
    build = build_of(stage, arch, shape)
    code, counts = build["code"], iterations(stage, shape, build["tile"])
    if stage == "chunk_grad":  # only the outer loop's stalls are known, including one inner iteration
        outer = max(0, code["step"] - sum(code["stalls"]))
        costs = [cycles(build, 0, outer), cycles(build, code["instructions"][-1], code["stalls"][-1])]
    else:
        costs = [cycles(build, *pair) for pair in zip(code["instructions"], code["stalls"])]
    whole, longest = (sum(c * n for c, n in zip(costs, count)) for count in counts)
    return 1e3 * whole / processors / clock, 1e3 * longest * resident(build) / clock


def step_cycles(arch: str, shape: Shape, columns: int, programs: int) -> float:
    """Stall cycles of one chunk's assignment: proposals from `columns` blocks of centroids, the commit, the rest."""
    from ovq.ops.ovq_attention.kernels.configs import BUILDS

    most = next(most for most in BUILDS if programs <= most)
    build = build_of("assign", arch, shape, **({} if most == 4 else {"MOST": most}))
    code, tile = build["code"], build["tile"]
    cycles = code["step"] + (columns - 1) * code["stalls"][0]
    if tile["BLOCK_W"] < tile["BLOCK_C"]:  # else one tile holds all, and there is no loop
        cycles += (next(tiles for of, tiles in COMMIT_TILES.items() if programs <= of) - 1) * code["stalls"][1]
    return float(cycles)


@functools.cache
def calibration(processors: int, clock: float) -> float:
    """FlashAttention-2's time on an H100, by its published rate, relative to the time of its loop's instructions."""
    build = next(b for key, b in builds().items() if key[:2] == ("sm_90", "fa2"))
    tile, code = build["tile"], build["code"]
    flops = 4 * tile["BLOCK_M"] * tile["BLOCK_N"] * build["K"]
    return flops / cycles(build, code["instructions"][0], code["stalls"][0]) * processors * clock / PUBLISHED_FA2
