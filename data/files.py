"""Files that are there whole or not at all, with their hash."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from types import TracebackType

HASH_BLOCK = 1 << 20


class AtomicFile:
    """A file written beside its name, synced to disk and moved there at the end of the `with` block.

    After an error nothing is left under either name, so that a full disk holds no half files. `sha256` and `size` are
    those of what was written.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._scratch = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        self._hash = hashlib.sha256()
        self.size = 0

    def __enter__(self) -> AtomicFile:
        self._stream = open(self._scratch, "wb")  # noqa: SIM115 (closed in __exit__)
        return self

    def write(self, content: bytes) -> None:
        self._stream.write(content)
        self._hash.update(content)
        self.size += len(content)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None:
                self._stream.flush()
                os.fsync(self._stream.fileno())
                self._stream.close()
                os.replace(self._scratch, self.path)
        finally:
            with contextlib.suppress(OSError):  # closing flushes, which a full disk refuses once more
                self._stream.close()
            self._scratch.unlink(missing_ok=True)


def write_whole(path: Path | str, content: bytes) -> None:
    """Write a small file, whole or not at all."""
    with AtomicFile(path) as file:
        file.write(content)


def sha256_of(path: Path | str) -> str:
    """Hash of a file, in bounded memory."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()
