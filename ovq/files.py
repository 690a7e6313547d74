"""Atomic file writes: no run, table or plot is ever left half written.

    write_whole(path, json.dumps(summary) + "\n")

    with replacing(path) as scratch:  # for libraries that write files themselves
        fig.savefig(scratch)

Only the standard library is imported, so that every command can use this module, even on a bare GPU machine.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Yield a scratch path beside `path`; at the end of the `with` block the file written there replaces `path`.

    Readers find the old file or the new one, never a partial one, and so does the machine after a crash and a reboot:
    the content is on disk (fsync) before the rename. If anything fails, the old file is left unchanged, the scratch
    file is removed and the error propagates (an OSError if the disk is full). A killed process may leave its scratch
    file, NAME.*.tmp, which nothing reads. If several processes write at once, on one machine or several, exactly one of
    their files survives, complete. Parent folders are created.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
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


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
