"""Recognises what a file holds by its first bytes: compressed data are decompressed once, unsuitable files refused.

gzip, zstd, bzip2 and xz are recognised whatever the file is called. Documents are read at random, which compressed data
do not allow, so a file is decompressed into the cache folder (`cache_dir`) the first time a process on the machine
opens it. The copy takes up its full size there, and is reused as long as the original stays the same.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import os
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ovq.errors import ConfigError, Failure, one_line
from ovq.files import replacing

HEAD = 8192  # bytes at the start of a file that are examined
BOM = b"\xef\xbb\xbf"
_BLOCK = 1 << 20
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
# Text may begin with BZh: the digit and the mark of a block, or of the end of an empty file, must follow.
_BZ2 = re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)")
MAGIC = 10  # bytes at the start of a file that tell how it is compressed
# What is often given as text by mistake, and what to do about it.
_OTHERS = (
    (b"PAR1", "a Parquet file", "read it with data=parquet"),
    (b"PK\x03\x04", "a ZIP archive (as are .docx, .epub and .npz files)", "unpack it"),
    (b"%PDF", "a PDF file", "extract its text"),
    (b"SQLite format 3", "an SQLite database", "extract its text"),
    (b"\xff\xfe", "text in UTF-16", "convert it to UTF-8: iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "text in UTF-16", "convert it to UTF-8: iconv -f UTF-16 -t UTF-8"),
    (b"\x89PNG", "a picture", "leave it out"),
    (b"\xff\xd8\xff", "a picture", "leave it out"),
    (b"\x7fELF", "a program", "leave it out"),
)


class Unreadable(Failure):
    """A file that is damaged, or not of its data.kind. The message says what is wrong, without the file's name."""


def compression_of(head: bytes) -> str | None:
    """The compression that the first MAGIC bytes of a file indicate: "gzip", "zstd", "bz2", "xz" or None."""
    if _BZ2.match(head):
        return "bz2"
    return next((name for magic, name in _COMPRESSIONS.items() if head.startswith(magic)), None)


def check(head: bytes, kind: str) -> None:
    """Raise Unreadable if the first bytes of a file are not those of text, or of JSON lines.

    Args:
        kind: data.kind, "text" or "jsonl".
    """
    for magic, what, mend in _OTHERS:
        if head.startswith(magic):
            raise Unreadable(f"is {what}, not {_WANTED[kind]}; {mend}")
    if head[257:262] == b"ustar":
        raise Unreadable(f"is a tar archive, not {_WANTED[kind]}; unpack it")
    if b"\x00" in head:
        raise Unreadable(f"holds binary data, not {_WANTED[kind]}; leave it out, say by a pattern such as *.txt")
    if kind == "jsonl" and head.removeprefix(BOM).lstrip().startswith(b"["):
        raise Unreadable("is one JSON array, not JSON lines; write an object a line: jq -c '.[]' FILE")


_WANTED = {"text": "text", "jsonl": "JSON lines"}


def cache_dir() -> Path:
    """Where decompressed files are kept: $OVQ_CACHE, or ovq in $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("OVQ_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ovq"


def plain(path: str) -> str:
    """The path to a local file's plain content: its own, or that of its decompressed copy, which is made if needed.

    Raises:
        Unreadable: the compressed data are damaged or cut short.
        ConfigError: the copy cannot be written.
        OSError: it cannot be opened.
    """
    with open(path, "rb") as stream:
        compression = compression_of(stream.read(MAGIC))
    if compression is None:
        return path
    status = os.stat(path)
    identity = f"{os.path.realpath(path)}:{status.st_size}:{status.st_mtime_ns}"
    with open(path, "rb") as stream:
        return decompressed(stream, compression, identity, path)


def decompressed(stream: BinaryIO, compression: str, identity: str, shown: str) -> str:
    """The path of the decompressed copy of a stream, written atomically if it is not there yet.

    Args:
        identity: determines the copy's name; must differ for different content.
        shown: the file's name, for messages.
    """
    copy = cache_dir() / "decompressed" / hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()
    if copy.is_file():
        return str(copy)
    print(f"decompressing {shown} to {copy}, once", file=sys.stderr)
    try:
        with replacing(copy) as scratch, open(scratch, "wb") as out:
            for block in _blocks(stream, compression):
                out.write(block)
    except OSError as error:  # it must not count as a fault of the data
        raise ConfigError(
            f"the decompressed copy of {shown} cannot be written to {copy.parent} ({one_line(error)}); make room "
            "there, or set OVQ_CACHE to another folder"
        ) from None
    return str(copy)


def _blocks(stream: BinaryIO, compression: str) -> Iterator[bytes]:
    try:
        source = _opened(stream, compression)
        while block := source.read(_BLOCK):
            yield block
    except (EOFError, zlib.error, lzma.LZMAError, ValueError, OSError) as error:
        raise Unreadable(f"cannot be decompressed ({compression}): {one_line(error)}") from None


def _opened(stream: BinaryIO, compression: str) -> Any:
    if compression == "gzip":
        return gzip.open(stream)
    if compression == "bz2":
        return bz2.open(stream)
    if compression == "xz":
        return lzma.open(stream)
    import pyarrow as pa

    return _Frames(pa.CompressedInputStream(pa.PythonFile(stream, "r"), "zstd"))


class _Frames:
    """pyarrow's stream with a read method that returns bytes; it reads one zstd frame after another."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def read(self, size: int) -> bytes:
        return bytes(self._stream.read(size))
