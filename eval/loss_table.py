"""A run folder's per_position_loss.parquet: loss by position for every evaluation, one row per bucket."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ovq.errors import ConfigError
from ovq.files import replacing

FILE = "per_position_loss.parquet"
SCHEMA = pa.schema(
    [
        ("run", pa.string()),
        ("step", pa.int64()),
        ("context", pa.int64()),
        ("position_start", pa.int64()),  # position 0 has seen only the separator
        ("position_end", pa.int64()),  # exclusive
        ("loss", pa.float64()),  # nats per token
        ("stderr", pa.float64()),  # over documents; null if there is only one
        ("tokens", pa.int64()),
        ("buckets", pa.string()),  # "log" or "linear"; each set partitions the context
        ("num_centroids", pa.int64()),  # eval.num_centroids; null: as trained
        ("split", pa.string()),
    ]
)
# Rows of one evaluation share these columns; repeating an evaluation replaces its earlier rows.
KEY = ("step", "context", "num_centroids", "split")

Row = dict[str, Any]


def read(run_dir: Path | str) -> list[Row]:
    """All rows in the order they were written; empty if there is no table.

    Raises:
        ConfigError: the file is damaged, or is not such a table.
    """
    path = Path(run_dir) / FILE
    if not path.exists():
        return []
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        if table.schema.names != SCHEMA.names:
            raise ValueError(f"its columns are {', '.join(table.schema.names)}")
        return table.cast(SCHEMA).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        cause = " ".join(str(error).split())[:120]
        raise ConfigError(
            f"{path} is not a table of loss by position ({cause}); the next evaluation renames it and begins a new one"
        ) from None


def key_of(row: Row) -> tuple[Any, ...]:
    """The key that identifies the evaluation a row belongs to: the values of `KEY`."""
    return tuple(row[name] for name in KEY)


def write(run_dir: Path | str, rows: list[Row]) -> Path:
    """Add the rows of one evaluation, replacing an earlier one with the same key; whole or not at all.

    A damaged table is renamed, with a warning, and a new one begun: the evaluation just made must not be lost to it.
    """
    path = Path(run_dir) / FILE
    try:
        before = read(run_dir)
    except ConfigError as error:
        print(f"{error}: it is now {_set_aside(path)}", file=sys.stderr, flush=True)
        before = []
    fresh = {key_of(row) for row in rows}
    kept = [row for row in before if key_of(row) not in fresh]
    with replacing(path) as scratch:
        pq.write_table(pa.Table.from_pylist(kept + rows, schema=SCHEMA), scratch, write_page_checksum=True)
    return path


def _set_aside(path: Path) -> str:
    number = 0
    while (target := path.with_name(f"{path.stem}.damaged{number or ''}{path.suffix}")).exists():
        number += 1
    os.replace(path, target)
    return target.name
