"""The built-in corpus: long documents made from the standard library of the running Python interpreter.

Nothing is downloaded or stored. Sources come from the interpreter's library folder (that of the base interpreter, in a
virtual environment), the help topics of the language reference from `pydoc_data`. The files of a large package are
concatenated into documents of their own; other modules are joined in alphabetical order. Documents are therefore long
enough for loss by position at 16k bytes and beyond. Tests and generated character maps are left out. The corpus has
about 10-13 MB. A different Python version gives a different corpus, with a different data fingerprint.
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

_LONG = 72 * 1024  # bytes at which a document is complete
_SHORT = 66 * 1024  # a shorter last document is appended to the one before it, so that all have 64k positions
_SKIP = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "__pycache__", "lib-dynload"}
_HELD_OUT = {
    3: "validation",
    11: "validation",
    7: "test",
}  # by document number modulo 16; the others are for training


class BuiltinCorpus:
    """One split of the built-in corpus. Of every sixteen documents, two are for validation and one is for testing."""

    bad_shards = 0

    def __init__(self, split: str) -> None:
        self._open(split)

    def _open(self, split: str) -> None:
        self.split = split
        documents = _documents()
        if len(documents) < 32:
            raise ConfigError(f"data=builtin: this Python has no library sources in {_library()}; use data=text")
        self._documents = [doc for i, doc in enumerate(documents) if _HELD_OUT.get(i % 16, "train") == split]

    def __len__(self) -> int:
        return len(self._documents)

    def sizes(self) -> np.ndarray:
        return np.array([len(text) for _, text in self._documents], np.int64)

    def fingerprint(self) -> dict[str, Any]:
        identity = [f"{title}:{hashlib.sha256(text.encode()).hexdigest()}" for title, text in self._documents]
        return fingerprint_of("builtin", identity, len(self))

    def __getstate__(self) -> dict[str, str]:
        return {"split": self.split}  # a worker reads the library for itself

    def __setstate__(self, state: dict[str, str]) -> None:
        self._open(state["split"])

    def locate(self, index: int) -> str:
        return f"built-in document {self._documents[index][0]}"

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
    except ImportError:  # some distributions package it separately
        return {}
    return dict(topics)


def _join(name: str, parts: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Parts under their names as headings, joined into documents of at least _SHORT bytes (if there is that much)."""
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
