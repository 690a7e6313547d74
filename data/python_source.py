"""Make long, repetitive documents of Python source, as Parquet files, from installed packages without a network.

    python -m data.python_source                 # then data=python_source (configs/data/python_source.yaml)
    python -m data.python_source out=DIR train=[torch,sympy] validation=[numpy] test=[networkx] document_kb=256

A document consists of the .py files of neighbouring folders of one package, in the order of their paths, each preceded
by a line with its path. Its contents depend only on the versions of the packages, which the lock files in launch/ pin.
No package is in two splits.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.sources import SPLITS
from ovq.cli import command
from ovq.errors import ConfigError
from ovq.files import write_whole
from ovq.schema import setting

ROWS = 16  # documents in a row group: what a reader holds at once


@dataclass
class Options:
    out: str = setting("runs/python", "folder to write train, validation and test to", writes="folder")
    train: list[str] = setting(["torch", "sympy", "pandas"], "packages to train on")
    validation: list[str] = setting(["numpy", "networkx"], "packages to choose settings with")
    test: list[str] = setting(["matplotlib", "fontTools", "wandb", "datasets", "pydantic"], "packages to test with")
    document_kb: int = setting(
        512, "characters of a document, in thousands; the last of a package has at least half", at_least=1
    )


@command(Options)
def main(options: Options) -> int:
    """The command line in the module's docstring."""
    chosen = {split: getattr(options, split) for split in SPLITS}
    for name in (names := [name for split in chosen.values() for name in split]):
        if names.count(name) > 1:
            raise ConfigError(f"{name} is named twice; a package belongs to one split, once")
    folders = {name: folder_of(name) for name in names}
    made = {}
    for split, packages in chosen.items():
        made[split] = [pair for name in packages for pair in documents(folders[name], 1000 * options.document_kb)]
        if not made[split]:
            raise ConfigError(f"{split}={packages} holds no document of {options.document_kb // 2} thousand characters")
    for split, found in made.items():
        write_whole(Path(options.out) / f"{split}-00000-of-00001.parquet", parquet(found))
        print(f"{split:<10}  {len(found):>4} documents  {sum(len(text) for _, text in found) / 1e6:6.1f} MB")
    elsewhere = [f"'data.{split}=[{options.out}/{split}-*.parquet]'" for split in SPLITS]
    print("use it with:", "data=python_source", *(elsewhere if options.out != Options().out else []))
    return 0


def folder_of(name: str) -> Path:
    """The folder of an installed package, without importing it.

    Raises:
        ConfigError: there is none.
    """
    found = importlib.util.find_spec(name) if name.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise ConfigError(f"'{name}' is not an installed package")
    return Path(next(iter(found.submodule_search_locations)))


def documents(folder: Path, size: int) -> Iterator[tuple[str, str]]:
    """(path of the first file, text) of each document of a package: files are added folder by folder until there are
    `size` characters. What is left at the end becomes a document if it has at least half as many."""
    first, parts, length = "", [], 0
    for inside, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(name for name in files if name.endswith(".py")):
            path = Path(inside, name)
            try:
                text = path.read_text("utf-8")
            except UnicodeDecodeError:  # for instance a package's test of other encodings
                continue
            title = path.relative_to(folder.parent).as_posix()
            first = first or title
            parts.append(f"# {title}\n{text}\n")
            length += len(parts[-1])
        if length >= size:
            yield first, "".join(parts)
            first, parts, length = "", [], 0
    if length >= size // 2:
        yield first, "".join(parts)


def parquet(rows: list[tuple[str, str]]) -> bytes:
    """A Parquet file with the columns path and text."""
    import pyarrow
    import pyarrow.parquet

    paths, texts = zip(*rows)
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.table({"path": list(paths), "text": list(texts)})
    pyarrow.parquet.write_table(table, sink, row_group_size=ROWS)
    return sink.getvalue().to_pybytes()


if __name__ == "__main__":
    sys.exit(main())
