"""Files with their hash."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from types import TracebackType

from ovq.files import replacing

HASH_BLOCK = 1 << 20


class AtomicFile:
    """A file written piece by piece, whole or not at all (see `replacing`), with the hash and size of what was written.

    It takes its name at the end of the `with` block.
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
    """Hash of a file, in bounded memory."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()
