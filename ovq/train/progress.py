"""The progress of a run on a terminal or in a log."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

PROGRESS_LINE_S = 10.0  # between progress lines if stderr is not a terminal


class Progress:
    """A bar on a terminal; elsewhere a line at the first and last step and every ten seconds between.

    Args:
        steps: number of steps in the whole run.
        start: steps done before this process began.
        enabled: show progress; `say` writes its line either way.
        stream: where to write; None: sys.stderr.
    """

    def __init__(self, steps: int, start: int, enabled: bool, stream: TextIO | None = None) -> None:
        self.steps, self.start = steps, start
        self.stream = stream or sys.stderr
        self.enabled = enabled
        self._bar: Any = None
        self._began = time.monotonic()
        self._last_line = 0.0
        if enabled and self.stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=steps, initial=start, file=self.stream, dynamic_ncols=True, desc="train", unit="step"
            )

    def update(self, step: int, facts: dict[str, str]) -> None:
        """Show that `step` steps are done, with facts that have already been formatted (loss, tokens/s, ...)."""
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix(facts)
            return
        now = time.monotonic()
        if step in (self.start + 1, self.steps) or now - self._last_line >= PROGRESS_LINE_S:
            self._last_line = now
            eta = (now - self._began) / max(1, step - self.start) * (self.steps - step)
            text = "  ".join(f"{key} {value}" for key, value in facts.items())
            self.say(f"step {step}/{self.steps}  {text}  ETA {duration(eta)}")

    def say(self, text: str) -> None:
        """Write a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def shown(loss: float, speed: dict[str, float], peak_source: str) -> dict[str, str]:
    """The facts shown with the progress: loss, tokens/s, share of the peak (MFU if from a data sheet), memory."""
    facts = {"loss": f"{loss:.4f}", "tok/s": f"{speed['tokens_per_s']:,.0f}"}
    if "mfu" in speed:
        facts["MFU" if "sheet" in peak_source else "of peak"] = f"{100 * speed['mfu']:.1f}%"
    return facts | {"mem": f"{speed['memory_gib']:.2f}G"}


def duration(seconds: float) -> str:
    """95 -> '1:35', 3700 -> '1:01:40'."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
