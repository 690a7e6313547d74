"""What each rank of a job is doing when one of them no longer answers: stack traces, in the run folder.

    run_dir/stacks/rank_00003.txt    written when rank 3 gets SIGQUIT, when it or a rank it waits for is lost, and
                                     when any rank of the job is slow

SIGQUIT to a rank of a job appends the stacks of all its threads and does nothing else, whatever the rank is doing: the
handler does not need the interpreter. It therefore reads the frames of other threads without the GIL, and may rarely
crash a process while one of these runs Python code: send it to a rank that no longer answers. A rank that has lost
another writes its own stacks and requests those of the lost ranks on its machine. A stopped process cannot answer; its
file then says that it is stopped.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import os
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

ANSWER_S = 2.0  # for a rank to write its stacks


@dataclass(frozen=True)
class Member:
    """One rank of the job: its machine, process id, and the time its process was created (seconds since 1970)."""

    host: str
    pid: int
    created: float


@dataclass
class Register:
    """The ranks of this process's job, and the file that its own stacks go to."""

    folder: Path
    rank: int
    members: list[Member]
    file: IO[str]


_register: Register | None = None  # the handler needs the file for as long as the process lives


def register(run_dir: Path) -> None:
    """On SIGQUIT from now on, write this rank's stacks to the run folder. A collective; no-op in a single process."""
    global _register
    from ovq import processes

    if not processes.distributed():
        return
    folder, rank = run_dir / "stacks", processes.rank()
    if rank == 0:
        shutil.rmtree(folder, ignore_errors=True)  # left by an earlier start
    own = Member(os.uname().nodename, os.getpid(), psutil.Process().create_time())
    members = processes.gather_objects(own)
    folder.mkdir(parents=True, exist_ok=True)
    file = path_of(folder, rank).open("a")  # others may append as well
    faulthandler.register(signal.SIGQUIT, file, all_threads=True)
    atexit.register(_remove_if_empty, path_of(folder, rank))
    _register = Register(folder, rank, members, file)


def write_after(seconds: float) -> Path | None:
    """Make this rank append the stacks of all its threads to its file after `seconds`, without interrupting it.

    Returns:
        The folder of stacks; None, and nothing is written, if there is none.
    """
    if _register is None:
        return None
    # not dump_traceback_later, which does not hold the GIL and so can read a frame while it changes: that killed ranks
    timer = threading.Timer(seconds, faulthandler.dump_traceback, (_register.file,), {"all_threads": True})
    timer.daemon = True
    timer.start()
    return _register.folder


def path_of(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}.txt"


def _remove_if_empty(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.stat().st_size == 0:
            path.unlink()
            path.parent.rmdir()  # by the last rank


def collect(absent: Collection[int], error: BaseException) -> tuple[Path | None, dict[int, str]]:
    """Write this rank's stacks, and make the lost ranks on its machine write theirs; takes at most ANSWER_S.

    Args:
        absent: the ranks that do not answer.
        error: how this rank noticed; its traceback says what it was waiting for.

    Returns:
        The folder of stacks, None if there is none; and what the process of a lost rank is doing, where that is known.
    """
    if _register is None:
        return None, {}
    known, lost = _register, set(absent) - {_register.rank}
    with contextlib.suppress(OSError):
        known.file.write("".join(traceback.format_exception(error)) + "\n")
        known.file.flush()
        faulthandler.dump_traceback(known.file, all_threads=True)
    host = known.members[known.rank].host
    here = [rank for rank, member in enumerate(known.members) if member.host == host]
    asks = known.rank == min(set(here) - lost)
    states = {}
    for rank in sorted(lost & set(here)):
        states[rank] = state_of(known.members[rank])
        if asks:
            with contextlib.suppress(OSError):
                _ask(known.members[rank], states[rank], path_of(known.folder, rank))
    return known.folder, states


def state_of(member: Member) -> str:
    """What a process of this machine is doing, for a message: "its process 12 on HOST is stopped"."""
    try:
        process = psutil.Process(member.pid)
        gone = process.create_time() != member.created or process.status() == psutil.STATUS_ZOMBIE
        doing = "gone" if gone else process.status()
    except psutil.Error:
        doing = "gone"
    return f"its process {member.pid} on {member.host} is {doing}"


def _ask(member: Member, state: str, path: Path) -> None:
    """Make a process append its stacks to `path`, after a line that says what it is doing."""
    with path.open("a") as file:
        file.write(f"{state}\n")
    if state.endswith((" gone", f" {psutil.STATUS_STOPPED}")):
        return
    before, end = path.stat().st_size, time.monotonic() + ANSWER_S
    os.kill(member.pid, signal.SIGQUIT)
    while path.stat().st_size == before and time.monotonic() < end:
        time.sleep(0.05)
