"""OVQ-attention against SDPA on the CPU: time, GFLOP/s, growth with length and memory, all lengths timed in turns.

FLOPs are those of the matrix products that define the operator, two for each multiplication with its addition; what a
backend recomputes beyond them is not counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from eval import style
from eval.bench import ops
from eval.bench.rivals import Case
from eval.bench.stopwatch import Stopwatch, Timing, ratio_in_turns, shown
from ovq.ops.ovq_attention import OVQSpec

OVQ, PEER = "ovq_torch", ops.PEER
SLOW_PEER = 16384  # beyond this many tokens a repeat of SDPA takes seconds
SLOW_REPEATS = 3
Row = dict[str, Any]


def ovq_flops(case: Case) -> tuple[int, int]:
    """(forward, forward + backward) FLOPs of OVQ-attention from the start of a sequence.

    In a chunk that finds n centroids, the forward pass makes one product of each key with the n (if the chunk is
    whole: an unfinished one is not assigned) and two of each query with the n and with the keys of the chunk up to its
    own; the backward pass makes five with the same (it recomputes the probabilities).
    """
    spec = OVQSpec(case.num_centroids, case.chunk_size)
    forward = backward = 0
    for start in range(0, case.tokens, case.chunk_size):
        length, held = min(case.chunk_size, case.tokens - start), spec.size_at(start)
        assigned = length * held if length == case.chunk_size else 0
        pairs = length * held + length * (length + 1) // 2
        forward += assigned + 2 * pairs
        backward += 5 * pairs
    each = 2 * case.batch * case.heads * case.width
    return each * forward, each * (forward + backward)


def sdpa_flops(case: Case) -> tuple[int, int]:
    """(forward, forward + backward) FLOPs of causal attention: two products over the triangle, then five."""
    triangle = 2 * case.batch * case.heads * case.width * case.tokens * (case.tokens + 1) // 2
    return 2 * triangle, 7 * triangle


FLOPS = {OVQ: ovq_flops, PEER: sdpa_flops}


def rows(given: ops.Options, peak: float | None) -> Iterator[Row | str]:
    """A row per operator and length, after notes on what was left out.

    Args:
        given: the lengths, sizes, repeats and limits; its operators are ignored.
        peak: FLOP/s of a large float32 product, or None if it is unknown.
    """
    settings = ops.fill_in(given)
    lengths, limit, repeats = sorted(set(settings["lengths"])), settings["peer_limit"], settings["repeats"]
    cells = [(op, tokens) for tokens in lengths for op in (OVQ, PEER) if op == OVQ or tokens <= limit]
    if skipped := [style.short(tokens) for tokens in lengths if tokens > limit]:
        yield f"{PEER} is not measured at {', '.join(skipped)} (peer_limit={limit})"
    slow = {_key(op, tokens): SLOW_REPEATS for op, tokens in cells if op == PEER and tokens > SLOW_PEER}
    if slow and repeats > SLOW_REPEATS:
        yield f"{PEER} beyond {style.short(SLOW_PEER)} has {SLOW_REPEATS} repeats instead of {repeats}"
    calls = {_key(op, tokens): ops.call_of(op, tokens, settings) for op, tokens in cells}
    timings = Stopwatch(torch.device("cpu")).turns(calls, seconds=0, least=repeats, most=repeats, fewer=slow)
    del calls  # and the inputs with them
    for op, tokens in cells:
        yield _row(op, tokens, timings, settings, peak)


def _key(op: str, tokens: int) -> str:
    return f"{op} {tokens}"


def _row(op: str, tokens: int, timings: dict[str, Timing], settings: dict[str, Any], peak: float | None) -> Row:
    row: Row = {"op": op, "tokens": tokens}
    timing, none = timings[_key(op, tokens)], Timing()
    if timing.error is not None:
        return row | {"error": timing.error}
    peer, quarter = timings.get(_key(PEER, tokens), none), timings.get(_key(op, tokens // 4), none)
    forward, total = FLOPS[op](ops.case_of(tokens, settings))
    return row | {
        "forward_ms": timing.first_ms,
        "total_ms": timing.whole_ms,
        "forward_median_ms": timing.first,
        "total_median_ms": timing.whole,
        "forward_flops": forward,
        "total_flops": total,
        "forward_gflops": forward / timing.first / 1e6,
        "total_gflops": total / timing.whole / 1e6,
        "of_peak": total / timing.whole * 1e3 / peak if peak else None,
        "forward_speedup": ratio_in_turns(peer.first_ms, timing.first_ms),
        "total_speedup": ratio_in_turns(peer.whole_ms, timing.whole_ms),
        "forward_growth": ratio_in_turns(timing.first_ms, quarter.first_ms),
        "total_growth": ratio_in_turns(timing.whole_ms, quarter.whole_ms),
        "extra_bytes": ops.extra_memory(timing, op, tokens, settings) if settings["memory"] else None,
    }


HEAD = (
    f"{'operator':<10} {'tokens':>6} {'forward ms':>11} {'f + b ms':>10} {'f vs SDPA':>10} {'f+b vs SDPA':>12} "
    f"{'f GFLOP/s':>10} {'f+b GFLOP/s':>12} {'of peak':>8} {'4x tokens':>10} {'extra MiB':>10}"
)


def line(row: Row) -> str:
    """A row of the table; "4x tokens" is the time of forward + backward relative to a quarter of the length."""
    head = f"{row['op']:<10} {style.short(row['tokens']):>6}"
    if "error" in row:
        return f"{head} {row['error']}"
    extra = None if row["extra_bytes"] is None else row["extra_bytes"] / 2**20
    return (
        f"{head} {row['forward_median_ms']:>11,.1f} {row['total_median_ms']:>10,.1f} "
        f"{shown(row['forward_speedup'], '.2f', 'x'):>10} {shown(row['total_speedup'], '.2f', 'x'):>12} "
        f"{row['forward_gflops']:>10,.1f} {row['total_gflops']:>12,.1f} {shown(row['of_peak'], '.0%'):>8} "
        f"{shown(row['total_growth'], '.2f', 'x'):>10} {shown(extra, ',.0f'):>10}"
    )
