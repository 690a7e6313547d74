"""Run a program for at most so many seconds, with everything it starts; only the standard library is imported.

For what may hang where nothing can interrupt it, such as a kernel on a GPU: it hangs in a process of its own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PATIENCE_S = 5.0  # for a killed process to be gone; one that waits for a driver may never be
# A lone process is to run, whichever rank of a job starts it.
JOB = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ended:
    """`status`: as of `subprocess`; None: killed, because its time was over. `out` and `err`: what it wrote so far."""

    status: int | None
    out: str = ""
    err: str = ""


def run_bounded(command: Sequence[str], seconds: float, env: Mapping[str, str] | None = None) -> Ended:
    """Run a command; after `seconds`, or if this process is interrupted, kill its whole process group.

    The command has `env`, or this process's environment, without the variables of a distributed job.
    """
    kept = {name: value for name, value in (os.environ if env is None else env).items() if name not in JOB}
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=kept,
        start_new_session=True,
    )
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


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _text(written: bytes | str | None) -> str:
    return written.decode(errors="replace") if isinstance(written, bytes) else written or ""


def how(status: int) -> str:
    """'exit status 3', or 'signal SIGSEGV' for a process that a signal ended."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"signal {signal.Signals(-status).name}"
    except ValueError:
        return f"signal {-status}"
