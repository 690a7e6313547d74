"""The embedded corpus: Python's own standard library, as long documents, from the interpreter that runs this.

Nothing is downloaded and nothing is stored: sources come from the interpreter's library folder (the base
interpreter's, in a virtual environment), the language reference's help topics from `pydoc_data`. Files of one package
follow each other in one document, single modules are joined in alphabetical order until they make a long one, so that
documents are long enough for loss by position at 16k bytes and beyond. Left out: tests, generated character maps.
About 10-13 MB; another Python version is another corpus, and the data fingerprint says so.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data.corpus import Text, decode_utf8, fingerprint_of
from ovq.errors import ConfigError

_LONG = 72 * 1024  # bytes after which a document is closed
_SHORT = 66 * 1024  # a last piece below this joins the one before it: every document allows 64k positions
_SKIP = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "__pycache__", "lib-dynload"}
_HELD_OUT = {
    3: "validation",
    11: "validation",
    7: "test",
}  # by the document's number modulo 16; the rest is for training


class BuiltinCorpus:
    """Documents of one split of the embedded corpus; of every sixteen, two are for validation and one for test."""

    bad_shards = 0

    def __init__(self, split: str) -> None:
        self.split = split
        documents = _documents()
        if len(documents) < 32:
            raise ConfigError(f"data=builtin: this Python's library has no sources in {_library()}; use data=text")
        self._documents = [doc for i, doc in enumerate(documents) if _HELD_OUT.get(i % 16, "train") == split]

    def __len__(self) -> int:
        return len(self._documents)

    def sizes(self) -> np.ndarray:
        return np.array([len(text) for _, text in self._documents], np.int64)

    def fingerprint(self) -> dict[str, Any]:
        identity = [f"{title}:{hashlib.sha256(text.encode()).hexdigest()}" for title, text in self._documents]
        return fingerprint_of("builtin", identity, len(self))

    def __getstate__(self) -> dict[str, str]:
        return {"split": self.split}  # a worker reads the library itself

    def __setstate__(self, state: dict[str, str]) -> None:
        self.__init__(state["split"])  # type: ignore[misc]

    def locate(self, index: int) -> str:
        return f"embedded document {self._documents[index][0]}"

    def read(self, index: int) -> Text:
        title, text = self._documents[index]
        return Text(text, title)


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


@lru_cache(maxsize=1)
def _documents() -> list[tuple[str, str]]:
    """(title, text) of every document, in a fixed order."""
    library = _library()
    entries = sorted(entry.name for entry in os.scandir(library) if entry.name not in _SKIP)
    documents: list[tuple[str, str]] = []
    singles: list[tuple[str, str]] = []
    for name in entries:
        folder = library / name
        if folder.is_dir() and (folder / "__init__.py").is_file() and name != "pydoc_data":
            parts = list(_sources(library, folder))
            whole = documents if sum(len(text) for _, text in parts) >= _SHORT else singles
            whole += _join(name, parts) if whole is documents else parts
        elif name.endswith(".py"):
            singles += _source(library, folder)
    topics = [(f"topic {name}", text) for name, text in sorted(_topics().items())]
    return documents + _join("modules", singles) + _join("topics", topics)


def _sources(library: Path, folder: Path) -> Iterator[tuple[str, str]]:
    for path, folders, files in os.walk(folder):
        folders[:] = sorted(set(folders) - _SKIP)
        for name in sorted(files):
            if name.endswith(".py"):
                yield from _source(library, Path(path) / name)


def _source(library: Path, path: Path) -> list[tuple[str, str]]:
    text, _ = decode_utf8(path.read_bytes())
    return [(str(path.relative_to(library)), text)] if text.strip() else []


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it apart
        return {}
    return dict(topics)


def _join(name: str, parts: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Parts headed by their names, in documents of at least _SHORT bytes (unless there is less in all)."""
    pieces: list[list[str]] = []
    size = _LONG
    for title, text in parts:
        if size >= _LONG:
            pieces.append([])
            size = 0
        pieces[-1].append(f"# {title}\n{text}\n")
        size += len(text.encode())
    if len(pieces) > 1 and size < _SHORT:
        tail = pieces.pop()
        pieces[-1] += tail
    return [(f"{name} {i + 1}/{len(pieces)}", "".join(piece)) for i, piece in enumerate(pieces)]
