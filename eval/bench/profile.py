"""Where the time of a training step goes, by kind of operation, on one core, for `sw_ovq` and the plain GPT.

The time of a kind is the sum of its operations' self times in torch's profiler. Profiling slows short operations down,
so the sum over kinds can exceed the step's own time. The rest is Python, views and call overhead.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from eval import style
from eval.bench.steps import PEER, PEERS_WIDTHS, PRECISE, Plan, config_of, our_step, plain_step, worlds
from eval.bench.stopwatch import Marked, Stopwatch

REPEATS = 3
REST = "the rest"
# An operation is of the first kind with a word that its name begins with, after aten:: and underscores.
KINDS = {
    "products": ("mm", "bmm", "addmm", "addbmm", "baddbmm", "mkldnn", "linear", "mv", "dot"),
    "SDPA": ("scaled_dot_product",),
    "exp and max": ("softmax", "log_softmax", "exp", "max", "amax", "argmax", "logsumexp", "log"),
    "optimizer": ("fused_adam", "foreach"),
    "element-wise": ("add", "sub", "mul", "div", "neg", "silu", "sigmoid", "sqrt", "rsqrt", "pow", "softplus"),
    "sums and norms": ("sum", "mean", "norm", "linalg", "cumsum", "rms_norm"),
    "rows": ("index", "gather", "scatter", "embedding", "sort", "topk", "where", "masked"),
    "copies": ("copy", "cat", "clone", "contiguous", "stack", "fill", "zero", "empty", "resize"),
    REST: ("",),
}
Row = dict[str, Any]
HEAD = f"{'step of':<10} {'context':>7} {'ms':>9} " + " ".join(f"{kind:>15}" for kind in KINDS)


def kind_of(operation: str) -> str:
    """The kind of an operation, from its name in the profiler."""
    name = operation.removeprefix("aten::").lstrip("_")
    if name.startswith("expand"):  # a view, and no exponential
        return REST
    return next(kind for kind, words in KINDS.items() if any(name.startswith(word) for word in words))


def by_kind(events: Iterable[Any], whole_ms: float) -> dict[str, float]:
    """Milliseconds of each kind; the rest includes the part of `whole_ms` that no operation accounts for.

    Args:
        events: averages of `torch.profiler`, by operation.
        whole_ms: what the same call takes without the profiler.
    """
    found = dict.fromkeys(KINDS, 0.0)
    for event in events:
        found[kind_of(event.key)] += event.self_cpu_time_total / 1e3
    found[REST] += max(0.0, whole_ms - sum(found.values()))
    return found


def profiled(call: Marked) -> Row:
    """Milliseconds of a call (the median of three), and of each kind of operation in another one; or why it failed."""
    timing = Stopwatch(torch.device("cpu")).turns({"": call}, seconds=0, least=REPEATS, most=REPEATS)[""]
    if timing.error is not None:
        return {"error": timing.error}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        call(lambda: None)
    return {"step_ms": timing.whole, "parts_ms": by_kind(profiler.key_averages(), timing.whole)}


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Run operations on one thread: the times of several threads would add up to more than the step takes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def rows(contexts: list[int], plan: Plan) -> Iterator[Row]:
    """A row per context and model, the plain GPT first, with `step_ms` and its division by kind, `parts_ms`."""
    for context in contexts:
        cfg = config_of(PRECISE, context, plan)
        with worlds(cfg.trainer) as (world,), tempfile.TemporaryDirectory() as folder, one_core():
            for name in (PEER, PRECISE):
                ours = name == PRECISE
                step = our_step(cfg, world, folder) if ours else plain_step(config_of(PEERS_WIDTHS, context, plan))
                yield {"model": name, "context": context} | profiled(step.call)


def line(row: Row) -> str:
    """A row of the table."""
    start = f"{row['model']:<10} {style.short(row['context']):>7}"
    if "error" in row:
        return f"{start} {row['error']}"
    return " ".join([start, f"{row['step_ms']:>9,.1f}", *(f"{part:>15,.1f}" for part in row["parts_ms"].values())])
