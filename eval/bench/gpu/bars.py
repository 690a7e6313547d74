"""The targets for the measurements (bf16, D = 64, N = 2048, L = 128, B x H = 32, one H200), and their verdicts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from eval.bench import cost
from eval.bench.gpu.stages import shape_of
from eval.bench.rivals import SDPA, Case

Results = dict[str, Any]
K64, K128 = 65536, 131072
BATCH = {"batch": 4, "heads": 8, "width": 64, "num_centroids": 2048}
SMALL = BATCH | {"batch": 1}


def evaluate(results: Results) -> list[dict[str, Any]]:
    """Every bar with the value found and a verdict: PASS, FAIL, or "not measured"."""
    judged = []
    for name, (wanted, goal, measure, holds) in BARS.items():
        value = measure(results)
        verdict = "not measured" if value is None else "PASS" if holds(value) else "FAIL"
        judged.append({"bar": name, "wanted": wanted, "goal": goal, "found": value, "verdict": verdict})
    return judged


def total_ms(results: Results, op: str, tokens: int, shape: dict[str, int] = BATCH) -> float | None:
    """Median milliseconds of forward + backward; None if not measured."""
    found = _find(results, op, tokens, shape)
    return found["total_median_ms"] if found else None


def best_sdpa_ms(results: Results, tokens: int, shape: dict[str, int] = BATCH) -> float | None:
    """The same for the fastest of torch's own kernels, which have no dictionary, so its size is ignored."""
    anyone = {key: value for key, value in shape.items() if key != "num_centroids"}
    times = [ms for op in SDPA if (ms := total_ms(results, op, tokens, anyone)) is not None]
    return min(times, default=None)


def _find(results: Results, op: str, tokens: int, shape: dict[str, int]) -> dict[str, Any] | None:
    for row in results["measurements"]:
        same = row["op"] == op and row["tokens"] == tokens and all(row[key] == value for key, value in shape.items())
        if same and row["total_median_ms"] is not None:
            return row
    return None


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else round(above / below, 3)


def _speedup(results: Results, tokens: int, shape: dict[str, int] = BATCH) -> float | None:
    return _ratio(best_sdpa_ms(results, tokens, shape), total_ms(results, "ovq", tokens, shape))


def _break_even(results: Results) -> int | None:
    """The shortest length from which on OVQ is never slower than the best SDPA; 0 if there is none."""
    lengths = sorted({row["tokens"] for row in results["measurements"]})
    speedups = [(tokens, _speedup(results, tokens)) for tokens in lengths]
    known = [(tokens, speedup) for tokens, speedup in speedups if speedup is not None]
    if not known:
        return None
    first = 0
    for tokens, speedup in reversed(known):
        if speedup < 1:
            break
        first = tokens
    return first


def _matmul_share(results: Results) -> float | None:
    """Needed FLOP/s relative to the rate of a large matrix product on this card."""
    ms, rate = total_ms(results, "ovq", K64), results["rates"].get("matmul_flops")
    row = _find(results, "ovq", K64, BATCH)
    if ms is None or rate is None or row is None:
        return None
    flops = cost.needed_flops(shape_of(case_of(row)), backward=True)
    return round(flops / (ms * 1e-3) / rate, 3)


def case_of(row: dict[str, Any]) -> Case:
    """The case that a row of the measurements belongs to."""
    return Case(**{key: row[key] for key in ("batch", "tokens", "heads", "width", "num_centroids", "chunk_size")})


def _memory(results: Results) -> float | None:
    row = _find(results, "ovq", K64, BATCH)
    if row is None or row["peak_bytes"] is None:
        return None
    qkv = 3 * row["batch"] * row["tokens"] * row["heads"] * row["width"] * 2
    # The gradient of the output is allocated before the measured call, so its size is added.
    return round((row["peak_bytes"] + qkv / 3) / qkv, 3)


def _decode_spread(results: Results) -> float | None:
    rows = [row for row in results["decode"] if row["op"] == "ovq"]
    # Steps launched kernel by kernel wait for the host, whose time is flat: judge the kernels' own time if known.
    replayed = rows and all(row.get("replay_us_per_token") is not None for row in rows)
    times = {row["position"]: row["replay_us_per_token" if replayed else "us_per_token"] for row in rows}
    if not {4096, 1 << 20} <= set(times):
        return None
    return round(max(times.values()) / min(times.values()), 3)


def _checks(results: Results) -> int | None:
    """Number of failed checks."""
    return sum(not check["passed"] for check in results["checks"]) if results["checks"] else None


Bar = tuple[str, str, Callable[[Results], Any], Callable[[Any], bool]]
BARS: dict[str, Bar] = {
    "failed checks": ("0", "0", _checks, lambda x: x == 0),
    "forward+backward at 64k, times faster than the best SDPA": (
        "at least 8",
        "12",
        lambda results: _speedup(results, K64),
        lambda x: x >= 8,
    ),
    "break-even with the best SDPA, tokens": ("at most 8192", "", _break_even, lambda x: 0 < x <= 8192),
    "needed FLOP/s over the measured matmul rate": ("at least 0.40", "0.60", _matmul_share, lambda x: x >= 0.40),
    "time of 128k over that of 64k": (
        "at most 2.1",
        "",
        lambda results: _ratio(total_ms(results, "ovq", K128), total_ms(results, "ovq", K64)),
        lambda x: x <= 2.1,
    ),
    "B=1, H=8 at 64k, times faster than the best SDPA": (
        "at least 3",
        "",
        lambda results: _speedup(results, K64, SMALL),
        lambda x: x >= 3,
    ),
    "peak memory beyond q, k, v at 64k over their size": ("at most 3", "", _memory, lambda x: x <= 3),
    "slowest over fastest decoding, 4k to 1M tokens": ("at most 1.10", "", _decode_spread, lambda x: x <= 1.10),
}


def lines(judged: Iterable[dict[str, Any]]) -> list[str]:
    """The verdicts as text, one line per bar."""
    return [f"{bar['verdict']:12} {bar['bar']}: {bar['found']} (wanted: {bar['wanted']})" for bar in judged]
