"""Time and memory of the attention operators on this machine, compared with torch's own attention (SDPA).

    python -m eval.bench.ops                                        OVQ, sliding window, reference and SDPA, 2k to 64k
    python -m eval.bench.ops lengths=[32768] repeats=5 num_centroids=2048 out=runs/ops.json
    python -m eval.bench.ops dtype=bfloat16 batch=4 heads=8         on a GPU, the Triton kernels as well

The forward pass is timed as in training (it saves what the backward pass needs); forward + backward includes the
gradients of q, k, v and beta. Operators are interleaved within each repeat, so that other load on the machine affects
all of them alike. The table shows medians; the JSON has all times. Every operator is warmed up once at each length.
Extra memory is the peak of forward + backward beyond the inputs, with outputs and gradients included: on a CPU the
high-water mark of a fresh process, on a GPU that of torch's allocator. If an operator fails at some length, the table
shows its error, the other measurements go on, and the exit status is 1.

SDPA is skipped beyond `peer_limit` tokens because its time is quadratic in the length, and the reference beyond
`reference_limit` because it also keeps a copy of the dictionary for every chunk.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from eval.bench.rivals import RIVALS, Case, forward_backward, make_inputs, missing
from eval.bench.stopwatch import Marked, Stopwatch, Timing
from ovq.cli import command
from ovq.errors import ConfigError
from ovq.files import write_whole
from ovq.machine import current_rss, describe_machine, peak_rss
from ovq.schema import one_of, setting

PEER = "sdpa"
OPERATORS = ("ovq_torch", "ovq_triton", "ovq_reference", "sliding_window", PEER)  # from eval.bench.rivals


@dataclass
class Options:
    lengths: list[int] = setting([2048, 8192, 16384, 32768, 65536], "sequence lengths in tokens", at_least=1)
    ops: list[str] = setting([], f"operators, from {', '.join(OPERATORS)}; empty: all that can run here")
    batch: int = setting(1, "sequences in a batch", at_least=1)
    heads: int = setting(4, "attention heads", at_least=1)
    head_dim: int = setting(64, "head dimension", at_least=1)
    num_centroids: int = setting(1024, "dictionary capacity", at_least=1)
    chunk_size: int = setting(128, "tokens in a chunk", at_least=1)
    window: int = setting(256, "length of the sliding window in tokens", at_least=1)
    dtype: str = one_of("float32", "float64", "bfloat16", "float16", help="dtype of queries, keys and values")
    device: str = one_of("auto", "cpu", "cuda", help="device to measure on")
    threads: int | None = setting(None, "CPU threads; null: torch's default", at_least=1)
    repeats: int = setting(3, "timed repetitions", at_least=1)
    peer_limit: int = setting(32768, "longest sequence to measure SDPA at", at_least=1)
    reference_limit: int = setting(2048, "longest sequence to measure the reference at", at_least=1)
    memory: bool = setting(True, "measure peak memory as well")
    out: str = setting("runs/bench_ops.json", "JSON file to write", writes="file")


@dataclass(frozen=True)
class Measurement:
    """One operator at one length: milliseconds of every repeat, and extra memory in bytes."""

    op: str
    tokens: int
    forward_ms: list[float]
    total_ms: list[float]  # forward + backward
    extra_bytes: int | None = None

    @property
    def forward(self) -> float:
        return statistics.median(self.forward_ms)

    @property
    def total(self) -> float:
        return statistics.median(self.total_ms)


def case_of(tokens: int, settings: dict[str, Any]) -> Case:
    """The problem of this length that the settings (`Options` as a dictionary) describe."""
    return Case(
        settings["batch"],
        tokens,
        settings["heads"],
        settings["head_dim"],
        settings["num_centroids"],
        settings["chunk_size"],
        settings["window"],
    )


def call_of(op: str, tokens: int, settings: dict[str, Any]) -> Marked:
    """A forward and backward pass of an operator, marked in between, on its own random inputs."""
    case = case_of(tokens, settings)
    device, dtype = torch.device(settings["device"]), getattr(torch, settings["dtype"])
    return forward_backward(RIVALS[op], make_inputs(case, device, dtype, heads_first=op == PEER), case)


def peak_in_fresh_process(op: str, tokens: int, settings: dict[str, Any]) -> int:
    """Peak bytes of one forward + backward on the CPU, beyond what is resident before it.

    The high-water mark of a process never falls, so every measurement needs a process of its own.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_here, (op, tokens, settings))


def _peak_here(op: str, tokens: int, settings: dict[str, Any]) -> int:
    torch.set_num_threads(settings["threads"])
    call_of(op, 256, settings)(lambda: None)  # so that one-time allocations of libraries are not counted
    call = call_of(op, tokens, settings)
    before = current_rss()
    call(lambda: None)
    return max(0, peak_rss() - before)


def extra_memory(timing: Timing, op: str, tokens: int, settings: dict[str, Any]) -> int:
    """Peak bytes of a forward + backward beyond its inputs; includes the output's gradient, which is made before it."""
    peak = timing.peak_bytes if timing.peak_bytes is not None else peak_in_fresh_process(op, tokens, settings)
    itemsize = getattr(torch, settings["dtype"]).itemsize
    return peak + settings["batch"] * tokens * settings["heads"] * settings["head_dim"] * itemsize


def measure(settings: dict[str, Any], say: Callable[[str], None] = print) -> tuple[list[Measurement], int]:
    """Measure all operators at all lengths, passing each row of the table to `say`; also returns how many failed."""
    results, failed = [], 0
    say(HEADER)
    stopwatch = Stopwatch(torch.device(settings["device"]))
    repeats = settings["repeats"]
    for tokens in sorted(settings["lengths"]):
        calls = {op: call_of(op, tokens, settings) for op in settings["ops"] if tokens <= _limit(op, settings)}
        timings = stopwatch.turns(calls, seconds=0, least=repeats, most=repeats)
        del calls  # and the inputs with them
        for op, timing in timings.items():
            if timing.error is not None:
                failed += 1
                say(f"{tokens:>8,} {op:<16} {timing.error}")
        here = [
            Measurement(
                op,
                tokens,
                timing.first_ms,
                timing.whole_ms,
                extra_memory(timing, op, tokens, settings) if settings["memory"] else None,
            )
            for op, timing in timings.items()
            if timing.error is None
        ]
        peer = next((m for m in here if m.op == PEER), None)
        for measured in here:
            say(_row(measured, peer))
        results += here
    return results, failed


def _limit(op: str, settings: dict[str, Any]) -> float:
    return {PEER: settings["peer_limit"], "ovq_reference": settings["reference_limit"]}.get(op, float("inf"))


HEADER = (
    f"{'tokens':>8} {'operator':<16} {'forward':>12} {'fwd + bwd':>12} {'tokens/s':>12} {'vs SDPA':>9} {'extra':>10}"
)


def _row(m: Measurement, peer: Measurement | None) -> str:
    ratio = f"{peer.total / m.total:.2f}x" if peer else "-"
    extra = f"{m.extra_bytes / 2**20:,.0f} MiB" if m.extra_bytes is not None else "-"
    rate = m.tokens / m.total * 1e3
    return f"{m.tokens:>8,} {m.op:<16} {m.forward:>9,.1f} ms {m.total:>9,.1f} ms {rate:>12,.0f} {ratio:>9} {extra:>10}"


def summary(results: list[Measurement]) -> dict[str, Any]:
    """For each operator, its speedup over SDPA by length, and the growth of its time for 4 times the tokens."""
    total = {(m.op, m.tokens): m.total for m in results}
    speedup, growth = {}, {}
    for op in dict.fromkeys(m.op for m in results):
        lengths = sorted(tokens for name, tokens in total if name == op)
        speedup[op] = {t: round(total[PEER, t] / total[op, t], 3) for t in lengths if (PEER, t) in total}
        growth[op] = {
            f"{a}->{b}": round(total[op, b] / total[op, a], 3) for a in lengths for b in lengths if b == 4 * a
        }
    return {"speedup_over_sdpa": speedup, "growth": growth}


def fill_in(options: Options) -> dict[str, Any]:
    """The options as a dictionary, with "auto", null and the empty list resolved; also sets torch's thread count.

    Raises:
        ConfigError: an operator does not exist or cannot run on the device.
    """
    settings = asdict(options)
    if settings["device"] == "auto":
        settings["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    can_run = [op for op in OPERATORS if missing(op, torch.device(settings["device"])) is None]
    settings["ops"] = settings["ops"] or can_run
    for op in settings["ops"]:
        if op not in can_run:
            raise ConfigError(f"ops={op} cannot run on {settings['device']}; legal: {', '.join(can_run)}")
    settings["threads"] = settings["threads"] or torch.get_num_threads()
    torch.set_num_threads(settings["threads"])
    return settings


@command(Options)
def main(options: Options) -> int:
    """The command line described in the module's docstring."""
    settings = fill_in(options)
    torch.manual_seed(0)
    machine = describe_machine()
    print(f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, {settings['device']}")
    results, failed = measure(settings)
    report: dict[str, Any] = {
        "machine": machine,
        "settings": settings,
        "summary": summary(results),
        "results": [{**asdict(m), "forward_median_ms": m.forward, "total_median_ms": m.total} for m in results],
    }
    out = Path(settings["out"])
    write_whole(out, json.dumps(report, indent=2) + "\n")
    for op, growth in report["summary"]["growth"].items():
        print(f"{op}: time by length " + (", ".join(f"{k} {v}x" for k, v in growth.items()) or "-"))
    print(f"written: {out}")
    if failed:
        print(f"error: {failed} of {failed + len(results)} measurements failed, see above", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
