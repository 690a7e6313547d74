"""Time and memory of calls on a device, taken so that they can be compared.

On a GPU: events around the call, L2 flushed before it, everything warmed up. Calls that are compared take turns, so
that whatever the card or its neighbours do meets all of them. On a CPU (to test the harness): the wall clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

FLUSH_BYTES = 256 << 20  # several times the L2 of any chip
Marked = Callable[[Callable[[], None]], object]  # a call that says when its first half is done


@dataclass
class Timing:
    """Milliseconds of every repeat, of the first half (forward) and the whole; bytes at the peak beyond before."""

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
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self._flush: Tensor | None = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if self.cuda else None

    def once(self, call: Marked) -> tuple[float, float]:
        """Milliseconds until `call` marks its half, and of all of it (both the same if it does not mark)."""
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
        """Bytes that a call takes at its peak, beyond what is held before it; None on a CPU."""
        if not self.cuda:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(lambda: None)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def turns(
        self, calls: Mapping[str, Marked], *, seconds: float, least: int = 3, most: int = 20
    ) -> dict[str, Timing]:
        """Every call's times, taken in turns until `seconds` are over. One that raises is out, with what it said."""
        timings = {name: Timing() for name in calls}

        def attempt(name: str, work: Callable[[], None]) -> None:
            if timings[name].error is None:
                try:
                    work()
                except Exception as error:  # a rival that cannot do a shape, or has no memory for it, says so
                    timings[name].error = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
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
            attempt(name, lambda name=name: warm_up(name))  # type: ignore[misc]
        began = time.monotonic()
        for done in range(most):
            if done >= least and time.monotonic() - began > seconds:
                break
            for name in calls:
                attempt(name, lambda name=name: repeat(name))  # type: ignore[misc]
        return timings


def matmul_rate(stopwatch: Stopwatch, size: int = 8192) -> float:
    """FLOP a second of a large bfloat16 product of random matrices."""
    a, b = (torch.randn(size, size, device=stopwatch.device, dtype=torch.bfloat16) for _ in range(2))
    timing = stopwatch.turns({"matmul": lambda mark: torch.mm(a, b)}, seconds=1.0, most=30)["matmul"]
    return 2 * size**3 / (timing.whole * 1e-3)


def copy_rate(stopwatch: Stopwatch, size: int = 4 << 30) -> float:
    """Bytes a second, read and written, of a large copy within the device's memory."""
    source = torch.empty(size // 4, device=stopwatch.device).normal_()
    target = torch.empty_like(source)
    timing = stopwatch.turns({"copy": lambda mark: target.copy_(source)}, seconds=1.0, most=30)["copy"]
    return 2 * size / (timing.whole * 1e-3)
