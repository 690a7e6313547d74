"""Stopping on a signal: a flag that the loop polls between steps, so that it can save first."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from types import FrameType

from ovq.report import write_error
from ovq.signals import handled

SAME_SIGNAL_S = 2.0  # a launcher may pass on a signal that the terminal has also sent to this process


class StopSignal:
    """Any of SIGNALS raises a flag that the loop polls; another one more than SAME_SIGNAL_S later ends the process
    immediately.

    A reentrant context manager: leaving the outermost block restores the previous handlers. A SIGHUP that the parent
    set to be ignored (nohup) stays ignored. In forked children, which inherit the handler, it does nothing: loader
    workers are needed until the last batch.

    A torchrun that receives SIGTERM, SIGINT or SIGHUP passes it on, waits 30 s for its processes and exits with status
    1, though theirs is 0. SIGUSR1 and SIGUSR2 end torchrun itself unless it is given --signals-to-handle.
    `python -m launch run` passes any of SIGNALS on to its ranks, waits without a limit, and exits with their status.

    Args:
        announce: write a line to stderr when the flag is raised.
    """

    def __init__(self, announce: bool = False) -> None:
        self.name: str | None = None
        self.announce = announce
        self._since = 0.0
        self._depth = self._pid = 0
        self._handled = contextlib.ExitStack()

    def __enter__(self) -> StopSignal:
        self._depth += 1
        if self._depth == 1:
            self._pid = os.getpid()
            self._handled.enter_context(handled(self._handle))
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._handled.close()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return
        if self.name is not None:
            if time.monotonic() - self._since > SAME_SIGNAL_S:
                os._exit(128 + number)
            return
        self.name, self._since = signal.Signals(number).name, time.monotonic()
        if self.announce:
            write_error(f"\n{self.name}: saving after this step (a second signal quits at once)\n")
