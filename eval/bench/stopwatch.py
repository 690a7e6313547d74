"""Time and memory of calls on a device, measured so that they can be compared.

On a GPU, CUDA events bracket each call and the L2 cache is flushed before it; on a CPU, the wall clock is read. Calls
are warmed up first and then interleaved, so that a change in clock speed or load affects all of them alike.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ovq.errors import one_line

FLUSH_BYTES = 256 << 20  # several times the L2 of any chip
Marked = Callable[[Callable[[], None]], object]  # calls its argument when its first half (the forward pass) is done


@dataclass
class Timing:
    """One call's measurements.

    `first_ms`, `whole_ms`: milliseconds of every repeat, up to the mark and in total. `peak_bytes`: peak allocation
    beyond what was allocated before the call, None on a CPU. `error`: why the call failed, if it did.
    """

    first_ms: list[float] = field(default_factory=list)
    whole_ms: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    error: str | None = None

    @property
    def first(self) -> float:
        return statistics.median(self.first_ms)

    @property
    def whole(self) -> float:
        return statistics.median(self.whole_ms)


class Stopwatch:
    """Times calls on `device`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self._flush: Tensor | None = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if self.cuda else None

    def once(self, call: Marked) -> tuple[float, float]:
        """Milliseconds until `call` marks its first half, and in total (equal if it never does)."""
        if self._flush is None:
            marks = [time.perf_counter()]
            call(lambda: marks.append(time.perf_counter()))
            marks.append(time.perf_counter())
            return (marks[1] - marks[0]) * 1e3, (marks[-1] - marks[0]) * 1e3
        events = [torch.cuda.Event(enable_timing=True)]

        def mark() -> None:
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()

        self._flush.zero_()
        events[0].record()
        call(mark)
        mark()
        events[-1].synchronize()
        return events[0].elapsed_time(events[1]), events[0].elapsed_time(events[-1])

    def peak(self, call: Marked) -> int | None:
        """Peak bytes that a call allocates, beyond what is allocated before it; None on a CPU."""
        if not self.cuda:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(lambda: None)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def turns(
        self,
        calls: Mapping[str, Marked],
        *,
        seconds: float,
        least: int = 3,
        most: int = 20,
        fewer: Mapping[str, int] | None = None,
    ) -> dict[str, Timing]:
        """Time all calls in turns, at least `least` and at most `most` times each, until `seconds` have passed.

        A call named in `fewer` is timed at most that often. A call that raises is not repeated; its timing holds the
        error.
        """
        timings = {name: Timing() for name in calls}

        def attempt(name: str, work: Callable[[], None]) -> None:
            if timings[name].error is None:
                try:
                    work()
                except Exception as error:  # an unsupported shape, or out of memory: a result like any other
                    timings[name].error = f"{type(error).__name__}: {one_line(error)}"[:300]
                    if isinstance(error, torch.OutOfMemoryError):
                        torch.cuda.empty_cache()

        def warm_up(name: str) -> None:
            calls[name](lambda: None)  # compiles
            timings[name].peak_bytes = self.peak(calls[name])

        def repeat(name: str) -> None:
            first, whole = self.once(calls[name])
            timings[name].first_ms.append(first)
            timings[name].whole_ms.append(whole)

        for name in calls:
            attempt(name, functools.partial(warm_up, name))
        began = time.monotonic()
        for done in range(most):
            if done >= least and time.monotonic() - began > seconds:
                break
            for name in calls:
                if done < (fewer or {}).get(name, most):
                    attempt(name, functools.partial(repeat, name))
        return timings


def ratio_in_turns(over_ms: Sequence[float], under_ms: Sequence[float]) -> float | None:
    """Median over repeats of the ratio of two calls' times, so that load on both cancels; None without repeats.

    The repeats must have been taken in turns; those that only one call has are left out.
    """
    ratios = [over / under for over, under in zip(over_ms, under_ms)]
    return statistics.median(ratios) if ratios else None


def shown(value: float | None, form: str, unit: str = "") -> str:
    """A number in a table, in Python's format language; "-" if there is none."""
    return "-" if value is None else f"{value:{form}}{unit}"


def matmul_rate(stopwatch: Stopwatch, size: int = 8192, dtype: torch.dtype = torch.bfloat16) -> float:
    """FLOP/s of a product of two random square matrices of `size` rows."""
    a, b = (torch.randn(size, size, device=stopwatch.device, dtype=dtype) for _ in range(2))
    timing = stopwatch.turns({"matmul": lambda mark: torch.mm(a, b)}, seconds=1.0, most=30)["matmul"]
    return 2 * size**3 / (timing.whole * 1e-3)


def copy_rate(stopwatch: Stopwatch, size: int = 4 << 30) -> float:
    """Bytes/s, read plus written, of a copy of `size` / 4 float32 values in the device's memory."""
    source = torch.empty(size // 4, device=stopwatch.device).normal_()
    target = torch.empty_like(source)
    timing = stopwatch.turns({"copy": lambda mark: target.copy_(source)}, seconds=1.0, most=30)["copy"]
    return 2 * size / (timing.whole * 1e-3)
