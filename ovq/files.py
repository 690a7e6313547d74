r"""Atomic file writes: no run, table or plot is ever left half written.

    write_whole(path, json.dumps(summary) + "\n")

    with replacing(path) as scratch:  # for libraries that write files themselves
        fig.savefig(scratch)

Only the standard library is imported, so that every command can use this module, even on a bare GPU machine.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Yield a scratch path beside `path`; at the end of the `with` block the file written there replaces `path`.

    Readers find the old file or the new one, never a partial one, and so does the machine after a crash and a reboot:
    the content is on disk (fsync) before the rename. If anything fails, the old file is left unchanged, the scratch
    file is removed and the error propagates (an OSError if the disk is full). A killed process may leave its scratch
    file, NAME.*.tmp, which nothing reads and `remove_leftovers` removes. If several processes write at once, on one
    machine or several, exactly one of their files survives, complete. Parent folders are created.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{_machine()}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        yield scratch
        sync(scratch)
        os.replace(scratch, path)
    except BaseException:
        # The scratch file may not exist yet, or the disk may fail every operation: only the first error matters.
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise


def write_whole(path: Path | str, content: str | bytes) -> None:
    """Write a whole file atomically through `replacing`; text is encoded as UTF-8."""
    with replacing(path) as scratch:
        scratch.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def locked(folder: Path | str, *, shared: bool = False, wait: bool = False) -> Iterator[bool]:
    """Hold an advisory lock on a folder, which follows it through a rename; yields False if it is taken.

    A file system without such locks, or a missing folder, yields True: nothing can be known.

    Args:
        shared: let others hold it too, if they also share it.
        wait: until it is free.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        yield True
        return
    try:
        free = True
        try:
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(descriptor, kind if wait else kind | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        except OSError:
            pass
        yield free
    finally:
        os.close(descriptor)


ABANDONED_S = 3600  # a temporary file whose writer cannot be looked up is a leftover after this time
_SCRATCH = re.compile(r".+?\.(?:(?P<machine>[0-9a-f]{8})\.(?P<pid>\d+)\.)?[0-9a-f]{8}\.tmp")


def remove_leftovers(folder: Path | str) -> list[Path]:
    """Remove the temporary files of `replacing` whose writers were killed, in a folder and its direct subfolders.

    A file stays while the process whose id is in its name is alive. One from another machine stays for `ABANDONED_S`
    after its last write. Returns what was removed.
    """
    removed = []
    for path in [*Path(folder).glob("*.tmp"), *Path(folder).glob("*/*.tmp")]:
        with contextlib.suppress(OSError):  # its writer has just finished
            found = _SCRATCH.fullmatch(path.name)
            if found and path.is_file() and not _in_use(path, found["machine"], found["pid"]):
                path.unlink()
                removed.append(path)
    return removed


def _in_use(path: Path, machine: str | None, pid: str | None) -> bool:
    if machine != _machine() or pid is None:
        return time.time() - path.stat().st_mtime < ABANDONED_S
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's
        return True
    return True


def _machine() -> str:
    """A hash that identifies this machine in file names."""
    return hashlib.sha256(os.uname().nodename.encode()).hexdigest()[:8]


def check_writable(folder: Path | str) -> None:
    """Raise OSError, with the reason, unless a file can be written to this existing folder now."""
    with replacing(Path(folder) / ".writable") as scratch:
        scratch.write_bytes(b"\n")
    (Path(folder) / ".writable").unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
