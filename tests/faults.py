"""Fault injection at named moments of a run, for tests of what survives it.

    faults.command([Fault("step", 7, "kill")], ["experiment=cpu_demo", ...])

is the command line of train.py with the fault injected: a process that patches the function of that moment and then
runs train.main. A moment is counted in the process where it happens; the loader's workers inherit the patches.

    moment       happens                                            counted from 1 by
    start        before train.main                                  (happens once)
    step         before a training step                             the step
    row          before a row of a lane is made                     rows made in that process
    save         before a checkpoint is staged                      saves in this process
    write        in the thread that writes a checkpoint             writes in this process
    renamed      a checkpoint is in place, `latest` still older     renames in this process
    evaluate     before an evaluation                               evaluations in this process

    action       does
    kill         sends SIGKILL to this process
    stop         sends SIGSTOP to this process
    freeze       blocks this thread forever; the main thread then also ignores SIGTERM and SIGINT
    term usr1 usr2 hup int      sends that signal to this process
    raise        raises an OSError
    full         every later write of this process to a file fails, as on a full disk
    closed       stdout and stderr become pipes that nobody reads
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

# moment -> (module, qualified name of the function, whether the fault comes after it)
MOMENTS: dict[str, tuple[str, str, bool]] = {
    "start": ("train", "main", False),
    "step": ("ovq.train.loop", "Trainer.train_step", False),
    "row": ("data.lanes", "LaneReader.row", False),
    "save": ("ovq.train.checkpoint", "Checkpointer.save", False),
    "write": ("ovq.train.checkpoint", "Checkpointer._write", False),
    "renamed": ("ovq.train.checkpoint", "rename", True),
    "evaluate": ("eval.per_position", "evaluate", False),
}
SIGNALS = {
    name: getattr(signal, f"SIG{name.upper()}") for name in ("kill", "stop", "term", "usr1", "usr2", "hup", "int")
}


@dataclass(frozen=True)
class Fault:
    """An action at the count-th occurrence of a moment, in one rank of the job (None: in all)."""

    moment: str
    count: int
    action: str
    rank: int | None = 0


def command(faults: list[Fault], overrides: list[str], processes: int = 1) -> list[str]:
    """The command line that runs train.py in `processes` processes with the faults injected."""
    plan = json.dumps([dataclasses.asdict(fault) for fault in faults])
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    program = [*launcher, str(Path(__file__))] if processes > 1 else [str(Path(__file__))]
    return [sys.executable, *program, plan, *overrides]


def ranks(faults: list[Fault], overrides: list[str], processes: int, logs: Path) -> list[subprocess.Popen[bytes]]:
    """Start the ranks of a job without a launcher, so that nothing else ends them; rank r prints to `logs`/r.log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs.mkdir(parents=True, exist_ok=True)
    started = []
    for rank in range(processes):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        environment = os.environ | {key: str(value) for key, value in place.items()}
        with (logs / f"{rank}.log").open("wb") as log:
            started.append(
                subprocess.Popen(command(faults, overrides), stdout=log, stderr=log, env=environment, cwd=ROOT)
            )
    return started


def install(faults: list[Fault]) -> None:
    """Patch the moments of the faults that concern this rank."""
    rank = int(os.environ.get("RANK", 0))
    for moment in dict.fromkeys(fault.moment for fault in faults):
        mine = {f.count: f.action for f in faults if f.moment == moment and f.rank in (None, rank)}
        if mine:
            _patch(moment, mine)


def _patch(moment: str, actions: dict[int, str]) -> None:
    module_name, path, after = MOMENTS[moment]
    owner: Any = importlib.import_module(module_name)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    inner, seen = getattr(owner, name), 0

    @functools.wraps(inner)
    def patched(*args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        seen = args[0].step + 1 if moment == "step" else seen + 1
        action = actions.get(seen)
        if action and not after:
            act(action)
        result = inner(*args, **kwargs)
        if action and after:
            act(action)
        return result

    setattr(owner, name, patched)


def act(action: str) -> None:
    """Perform an action on this process."""
    if action in SIGNALS:
        os.kill(os.getpid(), SIGNALS[action])
    elif action == "freeze":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
        while True:
            time.sleep(3600)
    else:
        {"raise": _raise, "full": _fill, "closed": _close}[action]()


def _raise() -> None:
    raise OSError(errno.EIO, "injected fault")


def _fill() -> None:
    """Make every write to a file fail from now on, as on a full disk."""
    import resource

    # A write then fails with EFBIG, because Python ignores SIGXFSZ from startup.
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def _close() -> None:
    for number in (1, 2):
        read, write = os.pipe()
        os.close(read)
        os.dup2(write, number)


# --- damage to files at rest -----------------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    """Flip every bit of one byte."""
    content = bytearray(path.read_bytes())
    content[at] ^= 0xFF
    path.write_bytes(content)


def truncate(path: Path, keep: int) -> None:
    """Truncate a file to its first `keep` bytes."""
    with path.open("r+b") as file:
        file.truncate(keep)


def children_of(pid: int) -> list[int]:
    """Ids of the descendants of a process, at any depth."""
    import psutil

    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def running(pid: int) -> bool:
    """Whether a process exists and is not a zombie, which only waits to be reaped by its parent."""
    import psutil

    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(happened: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for something that another process does.

    Raises:
        AssertionError: it has not happened in time.
    """
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"it has not happened in {seconds:g} s"
        time.sleep(0.01)


def main(argv: list[str]) -> int:
    install([Fault(**fault) for fault in json.loads(argv[0])])
    import train

    return train.main(argv[1:])


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main(sys.argv[1:]))
