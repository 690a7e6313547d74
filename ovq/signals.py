"""The signals that end a job, and handlers that last for a `with` block."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

# What schedulers, launchers, terminals and people send to end a job; SLURM's --signal=USR1@90 warns of the end.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@contextlib.contextmanager
def handled(
    handler: Callable[[int, FrameType | None], Any], numbers: Iterable[signal.Signals] = SIGNALS
) -> Iterator[None]:
    """Within the `with` block, `handler` receives these signals; afterwards their handlers are as before.

    A SIGHUP that the parent set to be ignored (nohup) stays ignored.
    """
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        for number, earlier in before.items():
            if number != signal.SIGHUP or earlier is not signal.SIG_IGN:
                signal.signal(number, handler)
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
