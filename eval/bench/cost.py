"""A cost model of OVQ-attention: operations, bytes and latency of every stage, and the time they take on a chip.

    python -m eval.bench.cost chip=h200 tokens=65536 num_centroids=2048

Two times are given for a stage. Its *floor*, which nothing can beat, is the larger of its arithmetic at the chip's
matmul rate and its bytes (every input read once, every output written once) at the chip's copy rate. Its *prediction*
is a range. The lower end is the largest of its terms, with the others hidden behind it: matrix products, the
instructions of the compiled loops (`eval.bench.compiled`), device memory, and L2 (tiles that are read repeatedly). The
upper end is the time of these instructions if latency costs as much as in FlashAttention-2's forward loop, whose rate
is published, plus the longest program, which may start last.

The assignment, the only sequential stage, takes T / L steps one after another. Each takes the stall cycles that the
compiler has set, and the latency of a chain of loads from L2 and a barrier (`Waits`): estimates of the order commonly
reported for such chips. Nothing here has been measured on a GPU; `make bench-gpu` will time the stages.

Shapes: B batch, T tokens, L chunk, n_i centroids before chunk i, H query heads, G key/value heads, K and V widths.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import torch

from eval.bench import compiled
from eval.bench.shape import Shape
from ovq.cli import command
from ovq.ops.ovq_attention.spec import OVQSpec
from ovq.schema import setting


@dataclass(frozen=True)
class Waits:
    """Latencies in microseconds on a Hopper chip at about 1.75 GHz: estimates, not measurements.

    trip: a dependent load from L2 (about 270 cycles for the near partition, 500 for the far one). barrier: all programs
    of a head synchronize: a fence, an atomic add, and polling until the slowest has arrived.
    """

    trip: float = 0.22
    barrier: float = 1.3


# Dependent loads of a step: the chunk's bounds, its keys, the proposals, counts, sums of keys, sums of values.
TRIPS = 6
UNSURE = (1.0, 1.5)  # factors on a step of the assignment, for a range
HOST_MS = 0.47  # of a forward and backward pass on a CPU of 2026, before anything is launched (a review, 25 November)


@dataclass(frozen=True)
class Chip:
    """Rates per second: FLOPs of dense bf16 matrix products, bytes of device memory and of L2, cycles. `processors`:
    number of multiprocessors."""

    name: str
    arch: str
    matmul: float
    copy: float
    l2: float
    processors: int
    clock: float
    waits: Waits = Waits()


# Matmul and copy rates of H200 and H100 are published measurements on random data, those of the A100 85% of its data
# sheet. L2 rates are estimates of the order commonly reported.
CHIPS = {
    "h200": Chip("NVIDIA H200", "sm_90", 790e12, 4.3e12, 5.5e12, 132, 1.75e9),
    "h100": Chip("NVIDIA H100 SXM", "sm_90", 790e12, 3.0e12, 5.5e12, 132, 1.75e9),
    "a100": Chip("NVIDIA A100 SXM 80 GB", "sm_80", 265e12, 1.7e12, 4.0e12, 108, 1.41e9),
}


@dataclass(frozen=True)
class Work:
    """The work of a stage. `flops`: of matrix products, without a tile's masked half. `loops_ms`: time of its loops'
    instructions, in total and of the longest program. `waiting`: microseconds of a sequential stage's latencies."""

    flops: int = 0
    bytes: int = 0
    l2_bytes: int = 0
    loops_ms: tuple[float, float] = (0.0, 0.0)
    waiting: float = 0.0

    def floor_ms(self, chip: Chip) -> float:
        """Lower bound on the stage's time."""
        return 1e3 * max(self.flops / chip.matmul, self.bytes / chip.copy)

    def terms_ms(self, chip: Chip) -> dict[str, float]:
        """Time of each term alone; those of a sequential stage add up."""
        if self.waiting:
            return {"instructions": self.loops_ms[0], "waiting": 1e-3 * self.waiting}
        return {
            "instructions": self.loops_ms[0],
            "products": 1e3 * self.flops / chip.matmul,
            "device memory": 1e3 * self.bytes / chip.copy,
            "L2": 1e3 * self.l2_bytes / chip.l2,
        }

    def predicted_ms(self, chip: Chip) -> tuple[float, float]:
        """Range of the stage's time, see the module's docstring."""
        terms = self.terms_ms(chip)
        if self.waiting:
            return UNSURE[0] * sum(terms.values()), UNSURE[1] * sum(terms.values())
        slowed = compiled.calibration(CHIPS["h100"].processors, CHIPS["h100"].clock)
        largest = max(terms.values())
        return largest, max(slowed * self.loops_ms[0], largest) + slowed * self.loops_ms[1]


# The tile that shares one read of the other side: queries, or the centroids or keys that a program owns.
SHARED = {"predict": "BLOCK_M", "query_grad": "BLOCK_M", "dictionary_grad": "BLOCK_N", "chunk_grad": "BLOCK_N"}
FORWARD = ("assign", "tabulate", "predict")
BACKWARD = ("tabulate", "query_grad", "dictionary_grad", "chunk_grad")


def stages(shape: Shape, chip: Chip = CHIPS["h200"]) -> dict[str, Work]:
    """The work of every stage of a forward and backward pass, as the kernels divide it."""
    own, old, all_pairs = shape.own_pairs, shape.dictionary_pairs, shape.own_pairs + shape.dictionary_pairs
    K, V, size = shape.K, shape.V, shape.itemsize
    heads, kv_heads = shape.batch * shape.heads, shape.batch * shape.kv_heads
    query, output = heads * shape.tokens * K * size, heads * shape.tokens * V * size
    key, value = kv_heads * shape.tokens * K * size, kv_heads * shape.tokens * V * size
    row_counts, table, per_query = kv_heads * shape.tokens * 4, kv_heads * shape.table * 4, heads * shape.tokens * 4
    rows = key + value + row_counts  # at most one per token
    tiles = {stage: _tile(shape, chip, stage)[row] for stage, row in SHARED.items()}

    def again(pairs: int, block: int) -> int:
        """Bytes read from L2 if every tile of `block` tokens or centroids reads all of the other side."""
        return heads * pairs // block * (K + V) * size

    def loops(stage: str) -> tuple[float, float]:
        return compiled.loops_ms(stage, chip.arch, shape, chip.processors, chip.clock)

    steps = [step_parts_us(shape, n, chip) for n in shape.before_whole_chunks]
    return {
        "assign": Work(
            flops=_assign_flops(shape),
            bytes=2 * (key + value) + row_counts + kv_heads * shape.tokens * 4,
            loops_ms=(1e-3 * sum(part["instructions"] for part in steps), 0.0),
            waiting=sum(part["trips"] + part["barrier"] for part in steps),
        ),
        # The table is cleared, then read and written by the running maximum; every token's row is one atomic operation
        # on one L2 sector.
        "tabulate": Work(
            bytes=3 * table + kv_heads * shape.tokens * 4,
            l2_bytes=kv_heads * shape.tokens * 32,
        ),
        "predict": Work(
            flops=heads * 2 * (K + V) * all_pairs,
            bytes=query + key + value + rows + table + output + per_query,
            l2_bytes=again(all_pairs, tiles["predict"]),
            loops_ms=loops("predict"),
        ),
        "query_grad": Work(
            flops=heads * (4 * K + 2 * V) * all_pairs,
            bytes=2 * query + 2 * output + key + value + rows + table + 2 * per_query,
            l2_bytes=again(all_pairs, tiles["query_grad"]),
            loops_ms=loops("query_grad"),
        ),
        "dictionary_grad": Work(
            flops=heads * (4 * K + 4 * V) * old,
            bytes=query + output + rows + table + 2 * per_query + key + value,
            l2_bytes=again(old, tiles["dictionary_grad"]),
            loops_ms=loops("dictionary_grad"),
        ),
        "chunk_grad": Work(
            flops=heads * (4 * K + 4 * V) * own,
            bytes=query + output + 3 * (key + value) + 2 * per_query,
            l2_bytes=again(own, tiles["chunk_grad"]),
            loops_ms=loops("chunk_grad"),
        ),
    }


def needed_flops(shape: Shape, *, backward: bool) -> int:
    """FLOPs that a forward (or forward and backward) pass needs at least: the count that utilization refers to.

    As in FlashAttention, the backward pass computes logits, dp, dq, dk and dv once each. (The kernels compute logits
    and dp twice, for queries and for keys; the repetition does not count.)
    """
    return _assign_flops(shape) + _softmax_flops(shape, shape.dictionary_pairs + shape.own_pairs, backward)


def attention_flops(shape: Shape, *, backward: bool) -> int:
    """The same count for causal softmax attention over all tokens."""
    return _softmax_flops(shape, shape.tokens * (shape.tokens + 1) // 2, backward)


def _softmax_flops(shape: Shape, pairs: int, backward: bool) -> int:
    """FLOPs of softmax attention over `pairs` of a query and a key per head."""
    per_pair = 2 * (shape.K + shape.V) + (6 * shape.K + 4 * shape.V if backward else 0)
    return shape.batch * shape.heads * pairs * per_pair


def memory(shape: Shape) -> dict[str, int]:
    """Peak bytes of a forward and backward pass beyond q, k and v, by purpose."""
    N, K, V, size, T = shape.spec.num_centroids, shape.K, shape.V, shape.itemsize, shape.tokens
    heads, kv_heads = shape.batch * shape.heads, shape.batch * shape.kv_heads
    output, sums = heads * T * V * size, kv_heads * N * (K + V + 1) * 4
    both = {
        "version rows": kv_heads * T * ((K + V) * size + 4),
        "table of rows": kv_heads * 4 * table_entries(shape),
        "log-sum-exp and assignment": heads * T * 4 + kv_heads * T * 4,
    }
    forward = {"output": output, "sums and counts, before and after": 2 * sums, "means": kv_heads * N * K * size}
    backward = {
        "output and its gradient": 2 * output,
        "gradients of q, k and v": (heads * T * K + kv_heads * T * (K + V)) * size,
        "delta": heads * T * 4,
    }
    return max(forward | both, backward | both, key=lambda held: sum(held.values()))


def table_entries(shape: Shape) -> int:
    """Entries per head of the table of version rows that exist at once; a larger table is built in parts."""
    from ovq.ops.ovq_attention.kernels.plan import make_plan, most_entries

    plan = make_plan(shape.spec, 0, 0, (0, shape.tokens))
    _, whole = plan.layout(plan.all_chunks, plan.all_centroids)
    group, N = shape.heads // shape.kv_heads, shape.spec.num_centroids
    return min(whole, most_entries(shape.tokens, group, shape.K, shape.V, shape.itemsize, N))


def memory_ratio(shape: Shape) -> float:
    """Peak memory beyond q, k and v, relative to their size; required to be at most 3 at 64k tokens."""
    heads, kv_heads = shape.batch * shape.heads, shape.batch * shape.kv_heads
    qkv = shape.tokens * (heads * shape.K + kv_heads * (shape.K + shape.V)) * shape.itemsize
    return sum(memory(shape).values()) / qkv


# --- the sequential stage --------------------------------------------------------------------------------------------


def splits(shape: Shape, chip: Chip) -> int:
    """Programs that share a head: as `kernels.assign.splits`, but for a chip that need not be present."""
    from ovq.ops.ovq_attention.kernels.configs import BUILDS

    blocks = math.ceil(shape.spec.size_at(shape.tokens) / _tile(shape, chip, "assign")["BLOCK_N"])
    return min(max(chip.processors // (shape.batch * shape.kv_heads), 1), max(blocks, 1), BUILDS[-1])


def step_parts_us(shape: Shape, n: int, chip: Chip) -> dict[str, float]:
    """Microseconds of one chunk of one head at n centroids: its instructions' stalls, trips to L2, and the barrier."""
    programs = splits(shape, chip)
    columns = max(1, math.ceil(n / (_tile(shape, chip, "assign")["BLOCK_N"] * programs)))
    return {
        "instructions": 1e6 * compiled.step_cycles(chip.arch, shape, columns, programs) / chip.clock,
        "trips": TRIPS * chip.waits.trip,
        "barrier": chip.waits.barrier if programs > 1 else 0.0,
    }


def _assign_flops(shape: Shape) -> int:
    """FLOPs to compare the keys of every complete chunk with the centroids before it, and to sum keys and values."""
    # An empty dictionary counts as one centroid.
    similarities = sum(max(n, 1) * shape.spec.chunk_size for n in shape.before_whole_chunks)
    return shape.batch * shape.kv_heads * (2 * similarities * shape.K + shape.tokens * (shape.K + shape.V))


def _tile(shape: Shape, chip: Chip, stage: str) -> dict[str, Any]:
    """The shipped configuration of a stage's kernel; needs the triton package."""
    from ovq.ops.ovq_attention.kernels.configs import constants

    dtype = {2: torch.bfloat16, 4: torch.float32}[shape.itemsize]
    return constants(stage, chip.arch, dtype, shape.K, shape.V, shape.spec.chunk_size)


# --- the command -----------------------------------------------------------------------------------------------------


@dataclass
class Options:
    chip: str = setting("h200", "chip to model", choices=tuple(CHIPS))
    batch: int = setting(4, "sequences in a batch", at_least=1)
    tokens: int = setting(65536, "sequence length in tokens", at_least=1)
    heads: int = setting(8, "query heads", at_least=1)
    kv_heads: int = setting(8, "key/value heads", at_least=1)
    width: int = setting(64, "head dimension", at_least=1)
    num_centroids: int = setting(2048, "dictionary capacity", at_least=1)
    chunk_size: int = setting(128, "tokens in a chunk", at_least=1)


def table(shape: Shape, chip: Chip) -> str:
    """Work and times of every stage and of whole passes, as text."""
    work = stages(shape, chip)
    lines = [f"{'':16}{'TFLOP':>8}{'GB':>8}{'floor ms':>10}{'predicted ms':>16}   largest terms, ms"]
    for name, stage in work.items():
        terms = sorted(stage.terms_ms(chip).items(), key=lambda term: -term[1])[:3]
        low, high = stage.predicted_ms(chip)
        why = ", ".join(f"{what} {ms:.2f}" for what, ms in terms)
        lines.append(
            f"{name:16}{stage.flops / 1e12:8.3f}{stage.bytes / 1e9:8.2f}{stage.floor_ms(chip):10.2f}"
            f"{f'{low:.1f} to {high:.1f}':>16}   {why}"
        )
    for name, names in (("forward", FORWARD), ("forward+backward", FORWARD + BACKWARD)):
        low, high = total_ms(shape, chip, names)
        flops = needed_flops(shape, backward=names != FORWARD)
        lines.append(
            f"{name:16}{flops / 1e12:8.3f}{sum(work[n].bytes for n in names) / 1e9:8.2f}"
            f"{sum(work[n].floor_ms(chip) for n in names):10.2f}{f'{low:.1f} to {high:.1f}':>16}"
            f"   full attention: {attention_flops(shape, backward=names != FORWARD) / 1e12:.1f} TFLOP"
        )
    return "\n".join(lines)


def total_ms(shape: Shape, chip: Chip, names: tuple[str, ...]) -> tuple[float, float]:
    """Predicted range for the named stages run one after another; at least the time the host takes to launch them."""
    work = stages(shape, chip)
    lows, highs = zip(*(work[name].predicted_ms(chip) for name in names))
    host = HOST_MS if set(BACKWARD) <= set(names) else HOST_MS / 2
    return max(sum(lows), host), max(sum(highs), host)


@command(Options)
def main(o: Options) -> int:
    """The command line described in the module's docstring."""
    chip, spec = CHIPS[o.chip], OVQSpec(o.num_centroids, o.chunk_size)
    shape = Shape(o.batch, o.tokens, o.heads, o.kv_heads, o.width, o.width, spec)
    print(f"{chip.name}: predicted, not measured")
    print(table(shape, chip))
    step = step_parts_us(shape, spec.size_at(shape.tokens), chip)
    parts = ", ".join(f"{name} {us:.1f}" for name, us in step.items())
    programs = splits(shape, chip)
    print(f"the last chunk's assignment: {sum(step.values()):.1f} us ({programs} programs per head): {parts}")
    print(f"memory beyond q, k and v: {memory_ratio(shape):.2f} times their size")
    return 0


if __name__ == "__main__":
    sys.exit(main())
