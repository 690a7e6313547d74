"""Stopping on a signal: a flag that the loop polls between steps, so that it can save first."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

SAME_SIGNAL_S = 2.0  # a launcher passes on what the terminal also sent


class StopSignal:
    """SIGTERM and SIGINT raise a flag that the loop polls; a second one ends the process at once.

    A context manager: the handlers before it are put back at the end. `announce`: say so on stderr. A torchrun that
    gets the signal passes it on, waits 30 s for its processes, and itself ends with status 1 though theirs is 0.
    """

    def __init__(self, announce: bool = False) -> None:
        self.name: str | None = None
        self.announce = announce
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.name is not None:
            if time.monotonic() - self._since > SAME_SIGNAL_S:
                os._exit(128 + number)
            return
        self.name, self._since = signal.Signals(number).name, time.monotonic()
        if self.announce:  # print() may be what was interrupted, and must not be entered twice
            os.write(2, f"\n{self.name}: saving after this step (a second signal quits at once)\n".encode())
