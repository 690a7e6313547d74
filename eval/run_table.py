"""A table of results in a run folder, as Parquet: rows of an evaluation are replaced when it is repeated."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ovq.errors import ConfigError, one_line
from ovq.files import locked, replacing
from ovq.identity import FREE_AT_RESUME

Row = dict[str, Any]
# Settings that change no result of an evaluation, but for rounding.
NEUTRAL = tuple(f"{name}=" for name in FREE_AT_RESUME if name.startswith("trainer."))


@dataclass(frozen=True)
class RunTable:
    """`file`: its name in the run folder. `key`: columns shared by the rows of one evaluation. `what`: for messages."""

    file: str
    schema: pa.Schema
    key: tuple[str, ...]
    what: str

    def read(self, run_dir: Path | str) -> list[Row]:
        """All rows in the order they were written; empty if there is no table.

        Raises:
            ConfigError: the file is damaged, or is not such a table.
        """
        path = Path(run_dir) / self.file
        if not path.exists():
            return []
        try:
            content = pa.BufferReader(path.read_bytes())  # read_table opens a path twice: it may be replaced in between
            table = pq.read_table(content, page_checksum_verification=True)
            if table.schema.names != self.schema.names:
                raise ValueError(f"its columns are {', '.join(table.schema.names)}")
            return table.cast(self.schema).to_pylist()
        except (pa.ArrowException, OSError, ValueError) as error:
            cause = one_line(error)[:120]
            raise ConfigError(
                f"{path} is not a table of {self.what} ({cause}); the next evaluation renames it and begins a new one"
            ) from None

    def key_of(self, row: Row) -> tuple[Any, ...]:
        """The key that identifies the evaluation a row belongs to: the values of `key`."""
        return tuple(row[name] for name in self.key)

    def by_key(self, run_dir: Path | str) -> dict[tuple[Any, ...], Row]:
        """The last row of every key; nothing if the table is damaged, as `write` then begins a new one."""
        try:
            return {self.key_of(row): row for row in self.read(run_dir)}
        except ConfigError:
            return {}

    def as_csv(self, run_dir: Path | str) -> str:
        """The whole table as CSV; an empty field is a null."""
        return as_csv(self.schema.names, [list(row.values()) for row in self.read(run_dir)])

    def write(self, run_dir: Path | str, rows: list[Row]) -> Path:
        """Add rows, replacing earlier ones with the same keys; whole or not at all. Processes that write at the same
        time wait for each other, so that no row is lost.

        A damaged table is renamed, with a warning, and a new one begun, so that the evaluation just made is not lost.
        """
        path = Path(run_dir) / self.file
        with locked(run_dir, wait=True):
            try:
                before = self.read(run_dir)
            except ConfigError as error:
                print(f"{error}: it is now {_set_aside(path)}", file=sys.stderr, flush=True)
                before = []
            fresh = {self.key_of(row) for row in rows}
            kept = [row for row in before if self.key_of(row) not in fresh]
            with replacing(path) as scratch:
                pq.write_table(pa.Table.from_pylist(kept + rows, schema=self.schema), scratch, write_page_checksum=True)
        return path


def changes(overrides: list[str], *, text: bool = False) -> str:
    """The overrides that change the model or its numerics, as a column of a table.

    Args:
        text: list those of the data, too, because the table has no other column for them.
    """
    others = ("eval.", "logger.", "logger=", *NEUTRAL, *(() if text else ("data.",)))
    kept = [override for override in overrides if not override.startswith(others)]
    return " ".join(sorted([*kept, *(override for override in overrides if override.startswith("eval.weights="))]))


def mark(*texts: str) -> str:
    """The end of a picture's name: a short hash of what differs from the run's own settings; empty if nothing does."""
    return f"_{hashlib.sha256(' '.join(texts).encode()).hexdigest()[:8]}" if any(texts) else ""


def _set_aside(path: Path) -> str:
    number = 0
    while (target := path.with_name(f"{path.stem}.damaged{number or ''}{path.suffix}")).exists():
        number += 1
    os.replace(path, target)
    return target.name


def as_csv(head: list[str], rows: list[list[Any]]) -> str:
    """A table as CSV; an empty field is a None."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows([["" if value is None else value for value in row] for row in rows])
    return text.getvalue()
