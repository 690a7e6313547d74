"""Locks that show which runs and which GPUs are in use by a sweep or by a job that it has started.

A lock lasts as long as any process that has its descriptor: if a sweep is killed, its jobs keep their locks. On a file
system without locks nothing is known, and only train.py's own check of its run folder is left.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path


def claim(path: Path) -> int | None:
    """Lock a file, created if needed. Returns a descriptor to close, or to pass to a child; None if it is locked."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:  # no locks here
        pass
    return descriptor


def claim_gpus(names: Iterable[str]) -> list[int] | None:
    """Lock GPUs of this machine, all or none, against other sweeps of this user; None if one is in use."""
    folder, held = Path(tempfile.gettempdir()) / f"ovq-gpus-{os.getuid()}", list[int]()
    for name in names:
        descriptor = claim(folder / f"{name.replace(os.sep, '_')}.lock")
        if descriptor is None:
            release(held)
            return None
        held.append(descriptor)
    return held


def release(descriptors: list[int]) -> None:
    """Release locks."""
    while descriptors:
        os.close(descriptors.pop())


def trainer_of(run_dir: Path) -> str:
    """The process that trains in a run folder, as "process 12 on HOST"; empty if none does.

    Tests the lock of `ovq.train.checkpoint_files.hold` without taking it, which could make a run that is just
    starting fail.
    """
    lock = run_dir.resolve() / "checkpoints" / ".lock"
    linux = sys.platform == "linux"  # elsewhere struct flock has the field order of macOS and the BSDs
    form = "hhqqi0q" if linux else "qqihh"
    whole = (0, 0)  # from byte 0 to the end
    wanted = (fcntl.F_WRLCK, os.SEEK_SET, *whole, 0) if linux else (*whole, 0, fcntl.F_WRLCK, os.SEEK_SET)
    with contextlib.suppress(OSError), lock.open() as file:  # nobody has trained there, or there are no locks
        found = struct.unpack(form, fcntl.fcntl(file, fcntl.F_GETLK, struct.pack(form, *wanted)))
        return "" if found[0 if linux else 3] == fcntl.F_UNLCK else file.read().strip() or "its lock is held"
    return ""
