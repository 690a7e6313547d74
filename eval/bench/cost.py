"""What OVQ-attention must cost: operations, bytes and waiting of every stage, and the least time they take on a chip.

    python -m eval.bench.cost chip=h200 tokens=65536 num_centroids=2048

Two times are given for a stage. Its *floor* is the larger of arithmetic at the chip's matmul rate and bytes at its copy
rate (each input read once, each output written once): nothing runs faster. Its *prediction* is a range: from the
largest of its terms (all else hidden behind it) to their sum (nothing hidden). The terms are products, exponentials,
other arithmetic of a pair, device memory, and L2 (tiles that are read again and again).

The assignment, the only sequential stage, is bound by waiting instead: T / L steps one after the other, each a chain of
dependent trips to L2, barriers and small products. `Waits` has what one of each takes: estimates of the order
commonly reported for this kind of chip, not taken from these kernels, which nobody has timed yet (`make
bench-gpu` will); so its prediction is the chain of waits times `UNSURE`.

Shapes: B batch, T tokens, L chunk, n_i centroids before chunk i, H query heads, G key/value heads, K and V widths.
"""

from __future__ import annotations

import functools
import math
import sys
from dataclasses import dataclass
from typing import Any

import torch

from ovq.cli import command
from ovq.ops.ovq_attention.spec import OVQSpec
from ovq.schema import setting


@dataclass(frozen=True)
class Shape:
    """One call from an empty dictionary. `itemsize`: bytes of a number of q, k and v."""

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    K: int
    V: int
    spec: OVQSpec
    itemsize: int = 2

    @functools.cached_property
    def chunks(self) -> tuple[tuple[int, int], ...]:
        """(centroids before it, tokens) of every chunk, an unfinished one too."""
        L = self.spec.chunk_size
        return tuple((self.spec.size_at(at), min(L, self.tokens - at)) for at in range(0, self.tokens, L))

    @property
    def before_whole_chunks(self) -> list[int]:
        """Centroids before each whole chunk; only those are assigned."""
        return [n for n, tokens in self.chunks if tokens == self.spec.chunk_size]

    @functools.cached_property
    def dictionary_pairs(self) -> int:
        """Pairs of a token and a centroid that it attends to, of one head."""
        return sum(n * tokens for n, tokens in self.chunks)

    @functools.cached_property
    def own_pairs(self) -> int:
        """Pairs of a token and a key of its own chunk, itself among them, of one head."""
        return sum(tokens * (tokens + 1) // 2 for _, tokens in self.chunks)

    @property
    def table(self) -> int:
        """Entries of the table of version rows, of one head."""
        L = self.spec.chunk_size
        return sum(self.spec.size_at(at) for at in range(0, self.tokens + 1, L))


@dataclass(frozen=True)
class Waits:
    """Microseconds, on a Hopper chip at about 1.75 GHz: estimates, nothing measured here.

    trip: a dependent load from L2 (some 270 cycles near, 500 far). barrier: programs of a head meet: a fence, an atomic
    add, polling until the slowest has come. sync: the warps of a program meet. product: a small product whose operands
    pass through shared memory, until its result is there. reduce: a sum or maximum across a tile's threads.
    """

    trip: float = 0.22
    barrier: float = 1.3
    sync: float = 0.03
    product: float = 0.35
    reduce: float = 0.12


UNSURE = (0.7, 1.5)


@dataclass(frozen=True)
class Chip:
    """Rates a second: bf16 products of dense matrices (FLOP), device memory and L2 (bytes), exponentials, and other
    float32 instructions (lanes). `processors` are its multiprocessors."""

    name: str
    arch: str
    matmul: float
    copy: float
    l2: float
    exps: float
    alu: float
    processors: int
    waits: Waits = Waits()


def _chip(
    name: str, arch: str, matmul: float, copy: float, l2: float, processors: int, clock: float, lanes: int
) -> Chip:
    # 16 exponentials a clock and multiprocessor: CUDA's programming guide, compute capability 8.0 and 9.0.
    return Chip(name, arch, matmul, copy, l2, processors * 16 * clock, processors * lanes * clock, processors)


# Matmul and copy rates of H200 and H100 measured on random data by others; the A100's are 85% of its data sheet's.
# L2 rates are estimates of the order commonly reported.
CHIPS = {
    "h200": _chip("NVIDIA H200", "sm_90", 790e12, 4.3e12, 5.5e12, 132, 1.75e9, 128),
    "h100": _chip("NVIDIA H100 SXM", "sm_90", 790e12, 3.0e12, 5.5e12, 132, 1.75e9, 128),
    "a100": _chip("NVIDIA A100 SXM 80 GB", "sm_80", 265e12, 1.7e12, 4.0e12, 108, 1.41e9, 64),
}


@dataclass(frozen=True)
class Work:
    """What a stage does. `flops` are products of pairs that count (not a tile's masked half); `waiting` in us."""

    flops: int = 0
    bytes: int = 0
    exps: int = 0
    alu: int = 0
    l2_bytes: int = 0
    waiting: float = 0.0

    def floor_ms(self, chip: Chip) -> float:
        return 1e3 * max(self.flops / chip.matmul, self.bytes / chip.copy)

    def terms_ms(self, chip: Chip) -> dict[str, float]:
        if self.waiting:
            return {"waiting": 1e-3 * self.waiting}
        return {
            "products": 1e3 * self.flops / chip.matmul,
            "exponentials": 1e3 * self.exps / chip.exps,
            "other arithmetic": 1e3 * self.alu / chip.alu,
            "device memory": 1e3 * self.bytes / chip.copy,
            "L2": 1e3 * self.l2_bytes / chip.l2,
        }

    def predicted_ms(self, chip: Chip) -> tuple[float, float]:
        """With everything hidden behind the largest term, and with nothing hidden."""
        terms = self.terms_ms(chip).values()
        if self.waiting:
            return max(UNSURE[0] * sum(terms), self.floor_ms(chip)), UNSURE[1] * sum(terms)
        return max(terms), sum(terms)


# What shares one read of a key and a value: a tile of queries; or, where a program owns centroids or keys, those.
SHARED = {"predict": "BLOCK_M", "query_grad": "BLOCK_M", "dictionary_grad": "BLOCK_N", "chunk_grad": "BLOCK_N"}
FORWARD = ("assign", "tabulate", "predict")
BACKWARD = ("tabulate", "query_grad", "dictionary_grad", "chunk_grad")


def stages(shape: Shape, chip: Chip = CHIPS["h200"]) -> dict[str, Work]:
    """The work of every stage of a forward and backward pass, as the kernels share it out."""
    own, old, all_pairs = shape.own_pairs, shape.dictionary_pairs, shape.own_pairs + shape.dictionary_pairs
    K, V, size = shape.K, shape.V, shape.itemsize
    heads, kv_heads = shape.batch * shape.heads, shape.batch * shape.kv_heads
    query, output = heads * shape.tokens * K * size, heads * shape.tokens * V * size
    key, value = kv_heads * shape.tokens * K * size, kv_heads * shape.tokens * V * size
    row_counts, table, per_query = kv_heads * shape.tokens * 4, kv_heads * shape.table * 4, heads * shape.tokens * 4
    rows = key + value + row_counts  # at most one a token
    tiles = {stage: _tile(shape, chip, stage)[row] for stage, row in SHARED.items()}

    def again(pairs: int, block: int) -> int:
        """Bytes read from L2 when each tile of `block` tokens, or centroids, reads all of the other side."""
        return heads * pairs // block * (K + V) * size

    return {
        "assign": Work(
            flops=_assign_flops(shape),
            bytes=2 * (key + value) + row_counts + kv_heads * shape.tokens * 4,
            waiting=sum(sum(step_parts_us(shape, n, chip).values()) for n in shape.before_whole_chunks),
        ),
        # Cleared, then read and written by the running maximum; every token's row is an atomic in L2, a sector each.
        "tabulate": Work(
            bytes=3 * table + kv_heads * shape.tokens * 4,
            alu=kv_heads * shape.table * 10,
            l2_bytes=kv_heads * shape.tokens * 32,
        ),
        "predict": Work(
            flops=heads * 2 * (K + V) * all_pairs,
            bytes=query + key + value + rows + table + output + per_query,
            exps=heads * all_pairs,
            alu=heads * 6 * all_pairs,  # scale and bias, maximum, subtract, sum, half a conversion, rescale
            l2_bytes=again(all_pairs, tiles["predict"]),
        ),
        "query_grad": Work(
            flops=heads * (4 * K + 2 * V) * all_pairs,
            bytes=2 * query + 2 * output + key + value + rows + table + 2 * per_query,
            exps=heads * all_pairs,
            alu=heads * 5 * all_pairs,
            l2_bytes=again(all_pairs, tiles["query_grad"]),
        ),
        "dictionary_grad": Work(
            flops=heads * (4 * K + 4 * V) * old,
            bytes=query + output + rows + table + 2 * per_query + key + value,
            exps=heads * old,
            alu=heads * 6 * old,
            l2_bytes=again(old, tiles["dictionary_grad"]),
        ),
        "chunk_grad": Work(
            flops=heads * (4 * K + 4 * V) * own,
            bytes=query + output + 3 * (key + value) + 2 * per_query,
            exps=heads * own,
            alu=heads * 8 * own,
            l2_bytes=again(own, tiles["chunk_grad"]),
        ),
    }


def needed_flops(shape: Shape, *, backward: bool) -> int:
    """The fewest operations of a forward, or forward and backward pass: the count that speed is held against.

    The convention of FlashAttention: the backward pass takes logits, dp, dq, dk and dv, each once. (The kernels take
    logits and dp twice, for queries and for keys, and are given no credit for that.)
    """
    return _assign_flops(shape) + _softmax_flops(shape, shape.dictionary_pairs + shape.own_pairs, backward)


def attention_flops(shape: Shape, *, backward: bool) -> int:
    """The same of causal softmax attention over all tokens."""
    return _softmax_flops(shape, shape.tokens * (shape.tokens + 1) // 2, backward)


def _softmax_flops(shape: Shape, pairs: int, backward: bool) -> int:
    """Softmax attention over `pairs` of a query and a key in each head."""
    a_pair = 2 * (shape.K + shape.V) + (6 * shape.K + 4 * shape.V if backward else 0)
    return shape.batch * shape.heads * pairs * a_pair


def memory(shape: Shape) -> dict[str, int]:
    """Bytes beside q, k and v at the peak of a forward and backward pass, by what they are for."""
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
    """Entries a head of the table of version rows; a larger one is made in parts."""
    from ovq.ops.ovq_attention.kernels.plan import make_plan, most_entries

    plan = make_plan(shape.spec, 0, 0, (0, shape.tokens))
    _, whole = plan.layout(plan.all_chunks, plan.all_centroids)
    group, N = shape.heads // shape.kv_heads, shape.spec.num_centroids
    return min(whole, most_entries(shape.tokens, group, shape.K, shape.V, shape.itemsize, N))


def memory_ratio(shape: Shape) -> float:
    """Peak memory beside q, k and v over their size; the bar is 3 at 64k tokens."""
    heads, kv_heads = shape.batch * shape.heads, shape.batch * shape.kv_heads
    qkv = shape.tokens * (heads * shape.K + kv_heads * (shape.K + shape.V)) * shape.itemsize
    return sum(memory(shape).values()) / qkv


# --- the sequential stage --------------------------------------------------------------------------------------------


def splits(heads: int, processors: int) -> int:
    """Programs a head is walked by: as `triton.assign.splits`, for a chip that is not here."""
    return 1 << min(max(processors // heads, 1).bit_length() - 1, 4)


def step_parts_us(shape: Shape, n: int, chip: Chip) -> dict[str, float]:
    """The least time between two chunks of one head with n centroids, by the parts of assign_kernel.

    What is counted is what cannot overlap: trips, meetings and products that need each other's results.
    """
    waits, programs = chip.waits, splits(shape.batch * shape.kv_heads, chip.processors)
    L, block = shape.spec.chunk_size, _tile(shape, chip, "assign")
    tiles, columns = math.ceil(L / block["BLOCK_C"]), math.ceil(n / (block["BLOCK_N"] * programs))
    # A tile of similarities on one multiprocessor: the product, then compare and select, two instructions each.
    pairs = L * block["BLOCK_N"]
    one = 1e6 * chip.processors * (2 * pairs * shape.K / chip.matmul + 4 * pairs / chip.alu)
    compare = waits.sync + waits.reduce  # all keys of a tile with all of another
    if not block["ONE"]:
        compare += waits.trip  # which lies in memory
    return {
        "propose": 2 * waits.trip + max(one, waits.trip / 3) * columns + waits.product + 2 * waits.reduce,
        "meet": waits.barrier if programs > 1 else waits.sync,
        "choose": tiles * (waits.trip + waits.reduce),
        "found": 2 * tiles * tiles * compare + (0 if block["ONE"] else tiles * waits.trip + 3 * waits.sync),
        "commit": tiles
        * (
            waits.trip  # counts
            + tiles * compare  # how many went to the same centroid
            + 2 * (waits.trip + tiles * waits.product)  # keys, then values: sums and the one-hot products
        )
        + 2 * waits.sync,
    }


def _assign_flops(shape: Shape) -> int:
    """Similarities of every key of a whole chunk with every centroid before it, and a sum of every key and value."""
    # An empty dictionary stands for one key.
    similarities = sum(max(n, 1) * shape.spec.chunk_size for n in shape.before_whole_chunks)
    return shape.batch * shape.kv_heads * (2 * similarities * shape.K + shape.tokens * (shape.K + shape.V))


def _tile(shape: Shape, chip: Chip, stage: str) -> dict[str, Any]:
    """The shipped configuration of a stage's kernel (which needs the triton package)."""
    from ovq.ops.ovq_attention.kernels.configs import constants

    dtype = {2: torch.bfloat16, 4: torch.float32}[shape.itemsize]
    return constants(stage, chip.arch, dtype, shape.K, shape.V, shape.spec.chunk_size)


# --- the command -----------------------------------------------------------------------------------------------------


@dataclass
class Options:
    chip: str = setting("h200", "chip to predict for", choices=tuple(CHIPS))
    batch: int = setting(4, "sequences", at_least=1)
    tokens: int = setting(65536, "tokens a sequence", at_least=1)
    heads: int = setting(8, "query heads", at_least=1)
    kv_heads: int = setting(8, "key/value heads", at_least=1)
    width: int = setting(64, "width of a head", at_least=1)
    num_centroids: int = setting(2048, "dictionary capacity", at_least=1)
    chunk_size: int = setting(128, "tokens a chunk", at_least=1)


def table(shape: Shape, chip: Chip) -> str:
    """Every stage's work and times, and their sums, as text."""
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
    """The prediction of stages that run one after the other."""
    work = stages(shape, chip)
    lows, highs = zip(*(work[name].predicted_ms(chip) for name in names))
    return sum(lows), sum(highs)


@command(Options)
def main(o: Options) -> int:
    """The command line in the module's docstring."""
    chip, spec = CHIPS[o.chip], OVQSpec(o.num_centroids, o.chunk_size)
    shape = Shape(o.batch, o.tokens, o.heads, o.kv_heads, o.width, o.width, spec)
    print(f"{chip.name}: predicted, not measured")
    print(table(shape, chip))
    step = step_parts_us(shape, spec.size_at(shape.tokens), chip)
    parts = ", ".join(f"{name} {us:.1f}" for name, us in step.items())
    programs = splits(shape.batch * shape.kv_heads, chip.processors)
    print(f"a chunk of the assignment at the end: {sum(step.values()):.1f} us ({programs} programs a head): {parts}")
    print(f"memory beside q, k and v: {memory_ratio(shape):.2f} times their size")
    return 0


if __name__ == "__main__":
    sys.exit(main())
