"""Indexes the files of a split: the position of each document, and hashes that tell whether a file has changed."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from dataclasses import replace
from typing import Any, BinaryIO

import numpy as np

from data import contents
from data.sources import HUB, DataError, File, Shard, bad_shards, find_files, open_file
from ovq.config_data import SourceConfig
from ovq.errors import ConfigError, one_line

_FIRST_LINES = 100  # lines of a JSON-lines file that are searched for the text field


def index_shards(data: SourceConfig, split: str) -> tuple[list[Shard], int]:
    """The shards of a split, indexed, and how many were left out as missing or corrupt."""
    files, missing = find_files(data, split)
    shards: list[Shard] = []
    corrupt: list[str] = []
    for file in files:
        try:
            shards.append(_INDEX[data.kind](file, data))
        except ConfigError:
            raise
        except (
            Exception
        ) as error:  # whatever the reader of the format raises; the message names the file and quotes the cause
            corrupt.append(f"{file.path}: {one_line(error)}")
    bad_shards(data, corrupt, split, left=len(shards))
    return shards, len(missing) + len(corrupt)


def _index_parquet(file: File, data: SourceConfig) -> Shard:
    """Read row counts from the footer, a few kilobytes at the end of the file, whose hash identifies the contents."""
    import pyarrow.parquet as pq

    with _open_for_index(file, data.kind) as stream:
        footer = footer_hash(stream)
        metadata = pq.ParquetFile(stream).metadata
        schema = metadata.schema.to_arrow_schema()
        for key, column in (("text_field", data.text_field), ("title_field", data.title_field)):
            if column and schema.names.count(column) > 1:
                raise ConfigError(
                    f"{file.path} has {schema.names.count(column)} columns named {column} (data.{key}); write it with "
                    "one of them, or under different names"
                )
            if column and column not in schema.names:
                raise ConfigError(
                    f"data.{key}={column} is not a column of {file.path}; legal: {', '.join(schema.names)}"
                )
        kind = schema.field(data.text_field).type
        if str(kind) not in ("string", "large_string", "binary", "large_binary"):
            raise ConfigError(f"data.text_field={data.text_field} of {file.path} holds {kind}, not text")
        groups = [metadata.row_group(g) for g in range(metadata.num_row_groups)]
        text = [metadata.schema.column(c).path for c in range(metadata.num_columns)].index(data.text_field)
    return Shard(
        file,
        file.digest or footer,
        tuple(group.num_rows for group in groups),
        tuple(group.column(text).total_uncompressed_size for group in groups),
        footer,
    )


def footer_hash(stream: Any) -> str:
    """SHA-256 of the footer of an open Parquet file.

    Raises:
        DataError: it is not a Parquet file, or an incomplete one.
    """
    size = stream.seek(0, os.SEEK_END)
    if size < 12:
        raise DataError(f"not a Parquet file ({size} bytes)")
    stream.seek(size - 8)
    tail = stream.read(8)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != b"PAR1":
        stream.seek(0)
        if stream.read(4) != b"PAR1":
            raise DataError("not a Parquet file; JSON lines are read with data=jsonl, plain text with data=text")
    if tail[4:] != b"PAR1" or length + 12 > size:
        raise DataError("not a whole Parquet file (cut short or damaged)")
    stream.seek(size - 8 - length)
    return hashlib.sha256(stream.read(length)).hexdigest()


def _index_jsonl(file: File, data: SourceConfig) -> Shard:
    """Offset and CRC of each nonblank line, and the hash of the whole file, in one pass with bounded memory."""
    digest = hashlib.sha256()
    offsets: list[int] = []
    crcs: list[int] = []
    fields: dict[str, None] = {}  # of the first lines
    position = 0
    with _open_for_index(file, data.kind) as stream:
        _check_head(stream, data.kind)
        for line in stream:
            digest.update(line)
            if line.strip() and line != contents.BOM:
                if len(offsets) < _FIRST_LINES:
                    fields |= dict.fromkeys(fields_of(line))
                offsets.append(position)
                crcs.append(zlib.crc32(line))
            position += len(line)
    if fields and data.text_field not in fields:
        raise ConfigError(
            f"data.text_field={data.text_field} is not a field of {file.path}; legal: {', '.join(sorted(fields)[:20])}"
        )
    lines, line_crcs = np.asarray(offsets, np.int64), np.asarray(crcs, np.uint32)
    return Shard(replace(file, size=position), digest.hexdigest(), lines=lines, line_crcs=line_crcs)


def fields_of(line: bytes) -> list[str]:
    """The field names in a line of JSON; empty if it is not an object, which is reported when the line is read."""
    try:
        record = json.loads(line.removeprefix(contents.BOM))
    except (ValueError, RecursionError):
        return []
    return list(record) if isinstance(record, dict) else []


def _index_text(file: File, data: SourceConfig) -> Shard:
    digest = hashlib.sha256()
    size = 0
    with _open_for_index(file, data.kind) as stream:
        _check_head(stream, data.kind)
        while block := stream.read(1 << 20):
            digest.update(block)
            size += len(block)
    return Shard(replace(file, size=size), digest.hexdigest(), rows=(1,), row_bytes=(size,))


def _check_head(stream: BinaryIO, kind: str) -> None:
    contents.check(stream.read(contents.HEAD), kind)
    stream.seek(0)


_INDEX = {"parquet": _index_parquet, "jsonl": _index_jsonl, "text": _index_text}


def _open_for_index(file: File, kind: str) -> Any:
    if file.path.startswith(HUB) and kind == "parquet":
        from huggingface_hub import HfFileSystem

        # A footer needs a few kilobytes: range requests, not the whole shard.
        return HfFileSystem().open(file.path, "rb", revision=file.commit)
    source = open_file(file)
    return open(source, "rb") if isinstance(source, str) else source
