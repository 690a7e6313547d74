"""Files that are there whole or not at all: what a run, a table or a plot leaves is never half of it.

    write_whole(path, json.dumps(summary) + "\n")

    with replacing(path) as scratch:  # for libraries that write files themselves
        fig.savefig(scratch)

Here is only the standard library, so that every command can use it, on a bare GPU machine too.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """A path beside `path` to write to; at the end of the `with` block that file takes `path`'s place.

    Readers find the old file or the new one, never a part, and so does the next boot: the content is on the disk
    (fsync) before the name changes. If anything fails, the old file stays as it was, what was written beside it is
    removed, and the error goes on: an OSError where the disk is full. A killed process may leave the file beside it,
    NAME.*.tmp, which nothing reads. Of several writers at once, whatever their process or machine, one wins whole.
    Folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield scratch
        sync(scratch)
        os.replace(scratch, path)
    except BaseException:
        with contextlib.suppress(OSError):  # not there yet, or a disk that refuses everything: the first error counts
            scratch.unlink()
        raise


def write_whole(path: Path | str, content: str | bytes) -> None:
    """Write a file that fits in memory by way of `replacing`; text as UTF-8."""
    with replacing(path) as scratch:
        scratch.write_bytes(content.encode() if isinstance(content, str) else content)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
