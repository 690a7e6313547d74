"""Run a program, and everything it starts, under a time limit; only the standard library is imported.

For work that may hang where nothing can interrupt it, such as a GPU kernel: it then hangs in a separate process.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

PATIENCE_S = 5.0  # to wait for a killed process to exit; one that is blocked in a driver may never do so
# Removed from the environment: the program runs as a single process, whichever rank of a job starts it.
JOB = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ended:
    """`status`: the return code, as in `subprocess`; None: killed at the time limit. `out`, `err`: output so far."""

    status: int | None
    out: str = ""
    err: str = ""


def run_bounded(command: Sequence[str], seconds: float, env: Mapping[str, str] | None = None) -> Ended:
    """Run a command; after `seconds`, or if this process is interrupted, kill its whole process group.

    The command gets `env`, or else this process's environment, without the variables of a distributed job.
    """
    process = _start(command, env, stderr=subprocess.PIPE)
    try:
        out, err = process.communicate(timeout=seconds)
        return Ended(process.returncode, out, err)
    except subprocess.TimeoutExpired:
        _kill(process)
        try:
            out, err = process.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired as late:
            out, err = _text(late.stdout), _text(late.stderr)
        return Ended(None, out, err)
    finally:
        if process.poll() is None:
            _kill(process)


def _start(command: Sequence[str], env: Mapping[str, str] | None, stderr: int | None = None) -> subprocess.Popen[str]:
    """Start a command in a process group of its own, without the variables of a distributed job."""
    kept = {name: value for name, value in (os.environ if env is None else env).items() if name not in JOB}
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        errors="replace",
        env=kept,
        start_new_session=True,
    )


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _text(written: bytes | str | None) -> str:
    return written.decode(errors="replace") if isinstance(written, bytes) else written or ""


def end_with_parent() -> None:
    """For a program started this way: exit within a second or two of the end of the process that waits for it."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def how(status: int) -> str:
    """'exit status 3', or 'signal SIGSEGV' for a process that was killed by a signal."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"signal {signal.Signals(-status).name}"
    except ValueError:
        return f"signal {-status}"


def stream_bounded(
    command: Sequence[str], seconds: float, line: Callable[[str], None], env: Mapping[str, str] | None = None
) -> int | None:
    """Like `run_bounded`, but call `line` with each line of the command's stdout as it arrives; returns the status.

    Its stderr goes to this process's stderr. An unfinished last line is lost.
    """
    process = _start(command, env)
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        assert process.stdout is not None
        for text in process.stdout:
            lines.put(text)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    end, over = time.monotonic() + seconds, False
    try:
        while (text := _next(lines, end - time.monotonic())) is not None:
            if text.endswith("\n"):
                line(text.rstrip("\n"))
        try:
            return process.wait(timeout=max(end - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            over = True
    finally:
        if over or process.poll() is None:
            _kill(process)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=PATIENCE_S)
    while (text := _next(lines, 0.5)) is not None:  # what it wrote before it was killed
        if text.endswith("\n"):
            line(text.rstrip("\n"))
    return None


def _next(lines: queue.SimpleQueue[str | None], seconds: float) -> str | None:
    """The next line; None at the end of the output, or when the time is up."""
    try:
        return lines.get(timeout=max(seconds, 0))
    except queue.Empty:
        return None
