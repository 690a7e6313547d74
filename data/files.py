"""Files and their hashes, and folders that one process at a time may write to."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TextIO

from data.sources import DataError
from ovq.files import replacing

LOCK = ".lock"


class AtomicFile:
    """A file written in pieces that appears complete or not at all (see `replacing`), with its hash and size.

    It is renamed into place at the end of the `with` block.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._hash = hashlib.sha256()
        self.size = 0

    def __enter__(self) -> AtomicFile:
        self._open = contextlib.ExitStack()
        scratch = self._open.enter_context(replacing(self.path))
        self._stream = self._open.enter_context(open(scratch, "wb"))
        return self

    def write(self, content: bytes) -> None:
        self._stream.write(content)
        self._hash.update(content)
        self.size += len(content)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._open.__exit__(kind, error, at)


def sha256_of(path: Path | str) -> str:
    """Hexadecimal SHA-256 of a file, in bounded memory."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder. The lock file is removed at the end; after a kill the kernel unlocks it.

    Raises:
        DataError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    while True:
        with path.open("a+") as file:
            _lock(file, folder)
            # Its previous holder may have removed the file between our opening and locking it.
            if not (path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())):
                continue
            try:
                file.truncate(0)
                file.write(f"process {os.getpid()} on {os.uname().nodename}")
                file.flush()
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _lock(file: TextIO, folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read() or "another process"
        raise DataError(f"{folder} is being written by {owner}; wait for it, or use another out=DIR") from None
    except OSError as error:
        warning = f"this file system has no locks ({error}); make sure that only one process writes to it"
        print(f"warning: {folder}: {warning}", file=sys.stderr)
