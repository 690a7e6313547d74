"""A data set tokenised in advance: the folder that `python -m data.prepare` writes, and how it is read.

    prepared.json            everything about the folder, written last: source, tokenizer, and every file's sha256
    tokenizer/               the tokenizer, as in a run folder
    train-00000.tokens       ids of some documents, concatenated without separators: np.memmap(path, "uint16")
    train-00000.documents    a DOCUMENT record for each: offset of its ids, bytes, words, flags, CRC-32
    train-00000.titles       their titles in UTF-8, concatenated

Opening a folder reads only prepared.json and the size of each file, at whatever step a run resumes; neither text nor
network is needed. A wrong file size is noticed when the folder is opened, a changed byte when its document is read.
`python -m data.prepare verify DIR` hashes everything at once.

Ids are read with one ordinary read per document. Memory-mapping them would save a copy, but truncating a mapped file
under a running job kills the job without a message.
"""

from __future__ import annotations

import hashlib
import json
import sys
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.corpus import FLAGS, TokenisedDocument, fingerprint_of
from data.files import sha256_of
from data.sources import DataError
from data.tokenizer import Tokenizer
from ovq.errors import ConfigError, one_line
from ovq.files import write_whole

INDEX = "prepared.json"
VERSION = 1
SUFFIXES = ("tokens", "documents", "titles")
# Offsets and counts within a part; `start` and `tokens` in ids.
DOCUMENT = np.dtype(
    [(name, "<i8") for name in ("start", "tokens", "bytes", "words", "title_start", "title_bytes")]
    + [(name, "<u4") for name in ("crc32", *FLAGS)]
)
_OPEN_PARTS = 64

Index = dict[str, Any]


@dataclass
class _Part:
    documents: np.ndarray
    titles: np.ndarray


class PreparedTokens:
    """The tokenised documents of one split in one or more prepared folders. Also acts as their `Identified`.

    A single folder has the fingerprint of the files it was made from, because a run sees the same rows with either.

    Args:
        skip_bad: a document that cannot be read counts as empty and unreadable.

    Raises:
        ConfigError: no folder is given, or one is incomplete, lacks the split, was made with another tokenizer, or has
            a file of the wrong size.
    """

    def __init__(self, folders: list[str], split: str, tokenizer: Tokenizer, *, skip_bad: bool = False) -> None:
        if not folders:
            raise ConfigError("data.train is empty; give it a folder made by: python -m data.prepare ... out=DIR")
        self.skip_bad = skip_bad
        self.folders = [Path(folder).expanduser() for folder in folders]
        indices = [load_index(folder) for folder in self.folders]
        for folder, index in zip(self.folders, indices):
            _check_tokenizer(folder, index, tokenizer)
            if split not in index["splits"]:
                raise ConfigError(f"{folder} has no {split} split; it has: {', '.join(index['splits'])}")
            for problem in _wrong_sizes(folder, index, split):
                raise ConfigError(f"{problem}; prepare the folder again, or copy it again")
        self._sources = [index["plan"]["splits"][split] for index in indices]
        self._parts = [
            (folder, part) for folder, index in zip(self.folders, indices) for part in index["splits"][split]["parts"]
        ]
        self._starts = np.cumsum([0, *(part["documents"] for _, part in self._parts)], dtype=np.int64)
        self.dtype = np.dtype(indices[0]["plan"]["dtype"])
        self._open: OrderedDict[int, _Part] = OrderedDict()
        self._verified: dict[Path, tuple[int, ...]] = {}  # _identity of each file when its hash was verified

    def __len__(self) -> int:
        return int(self._starts[-1])

    def lengths(self) -> np.ndarray:
        """Ids of each document, int64 [documents]."""
        return np.concatenate([self._part(p).documents["tokens"] for p in range(len(self._parts))]).astype(np.int64)

    def checksums(self) -> np.ndarray:
        """A number for each document, uint64 [documents]: 0 if it is empty, and equal for documents of equal ids."""
        parts = (self._part(p).documents for p in range(len(self._parts)))
        return np.concatenate(
            [rows["crc32"].astype(np.uint64) << 32 | rows["tokens"].astype(np.uint64) for rows in parts]
        )

    def fingerprint(self) -> dict[str, Any]:
        sources = [source["source"] for source in self._sources]
        if len(sources) == 1:
            return dict(sources[0])
        return fingerprint_of("memmap", [json.dumps(source, sort_keys=True) for source in sources], len(self))

    @property
    def bad_shards(self) -> int:
        return sum(source["bad_shards"] for source in self._sources)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def locate(self, index: int) -> str:
        p = int(np.searchsorted(self._starts, index, side="right")) - 1
        folder, part = self._parts[p]
        return f"{folder / part['name']}.tokens document {index - int(self._starts[p])}"

    def read(self, index: int) -> TokenisedDocument:
        """Document `index` in 0..len-1.

        Raises:
            DataError: a file is missing or damaged, unless `skip_bad`.
        """
        try:
            return self._read(index)
        except DataError as error:
            if not self.skip_bad:
                raise
            print(f"warning: {self.locate(index)} left out: {error}", file=sys.stderr)
            return TokenisedDocument(np.empty(0, self.dtype), self.locate(index), 0, 0, {"unreadable_documents": 1})

    def _read(self, index: int) -> TokenisedDocument:
        p = int(np.searchsorted(self._starts, index, side="right")) - 1
        folder, part = self._parts[p]
        opened = self._part(p)
        record = opened.documents[index - int(self._starts[p])]
        path = folder / f"{part['name']}.tokens"
        try:
            ids = np.fromfile(
                path, self.dtype, int(record["tokens"]), offset=int(record["start"]) * self.dtype.itemsize
            )
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
        if len(ids) != record["tokens"] or zlib.crc32(ids.tobytes()) != record["crc32"]:
            raise DataError(f"{path} is damaged in document {index}; see: python -m data.prepare verify {folder}")
        first = int(record["title_start"])
        title = opened.titles[first : first + int(record["title_bytes"])].tobytes().decode()
        flags = {name: int(record[name]) for name in FLAGS if record[name]}
        return TokenisedDocument(ids, title, int(record["bytes"]), int(record["words"]), flags)

    def _part(self, p: int) -> _Part:
        """A part's records and titles, memory-mapped; hashed when opened, unless they have not changed since."""
        if p in self._open:
            self._open.move_to_end(p)
            return self._open[p]
        folder, part = self._parts[p]
        opened = []
        for suffix, dtype in (("documents", DOCUMENT), ("titles", np.dtype(np.uint8))):
            path = folder / f"{part['name']}.{suffix}"
            try:
                identity = _identity(path)
                if self._verified.get(path) != identity:
                    if sha256_of(path) != part["files"][suffix]["sha256"]:
                        raise DataError(f"{path} is damaged; see: python -m data.prepare verify {folder}")
                    self._verified[path] = identity
                # An empty file cannot be memory-mapped.
                opened.append(np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype))
            except OSError as error:
                raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
        self._open[p] = _Part(*opened)
        if len(self._open) > _OPEN_PARTS:
            self._open.popitem(last=False)
        return self._open[p]


def _identity(path: Path) -> tuple[int, ...]:
    """A value that changes if the file is written to or replaced: not even `touch` can restore the change time."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def load_index(folder: Path | str) -> Index:
    """Load a folder's prepared.json and check it against its own hash.

    Raises:
        ConfigError: it does not exist, is damaged, or was written by another version of this program.
    """
    path = Path(folder).expanduser() / INDEX
    try:
        index = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(
            f"{folder} is not completely prepared: it has no {INDEX}; run: python -m data.prepare data=... out={folder}"
        ) from None
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path} cannot be read: {one_line(error)}") from None
    if not isinstance(index, dict) or index.pop("sha256", None) != _digest(index):
        raise ConfigError(f"{path} is damaged: its hash is wrong")
    if index["plan"]["version"] != VERSION:
        raise ConfigError(f"{path} has version {index['plan']['version']}; this program reads version {VERSION}")
    return index


def save_index(folder: Path | str, index: Index) -> None:
    """Write prepared.json with its own hash, completely or not at all."""
    text = json.dumps({**index, "sha256": _digest(index)}, indent=1)
    write_whole(Path(folder) / INDEX, text.encode())


def _digest(index: Index) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def _check_tokenizer(folder: Path, index: Index, tokenizer: Tokenizer) -> None:
    made_with = index["plan"]["tokenizer"]
    if made_with == tokenizer.fingerprint:
        return
    raise ConfigError(
        f"{folder} was prepared with another tokenizer ({made_with[:30]}, not {tokenizer.fingerprint[:30]}); "
        f"use {tokenizer_of(folder, index)}"
    )


def tokenizer_of(folder: Path, index: Index) -> str:
    """The overrides that choose the tokenizer of a prepared folder."""
    kind = index["plan"]["tokenizer"].partition(":")[0]
    return f"tokenizer={kind}" + ("" if kind == "byte" else f" tokenizer.model_path={folder}/tokenizer/tokenizer.model")


def _wrong_sizes(folder: Path, index: Index, split: str) -> list[str]:
    """Problems with the files of a split that their sizes reveal."""
    problems = []
    for part in index["splits"][split]["parts"]:
        for suffix in SUFFIXES:
            path, size = folder / f"{part['name']}.{suffix}", part["files"][suffix]["bytes"]
            if not path.is_file():
                problems.append(f"{path} is missing")
            elif path.stat().st_size != size:
                problems.append(f"{path} has {path.stat().st_size} bytes instead of {size}")
    return problems


def verify_prepared(folder: Path | str) -> list[str]:
    """Hash every file of a prepared folder. Returns a description of each file that is missing or damaged."""
    folder = Path(folder).expanduser()
    index = load_index(folder)
    problems = []
    kind, digest = index["plan"]["tokenizer"].split(":")[:2]
    model = folder / "tokenizer" / "tokenizer.model"
    if kind != "byte" and not (model.is_file() and sha256_of(model) == digest):
        problems.append(f"{model} is missing or damaged")
    for split in index["splits"]:
        wrong = _wrong_sizes(folder, index, split)
        problems += wrong
        for part in index["splits"][split]["parts"]:
            for suffix in SUFFIXES:
                path = folder / f"{part['name']}.{suffix}"
                known = any(problem.startswith(f"{path} ") for problem in wrong)
                if not known and sha256_of(path) != part["files"][suffix]["sha256"]:
                    problems.append(f"{path} is damaged: its hash is wrong")
    return problems


def describe_prepared(folders: list[str], split: str) -> dict[str, Any]:
    """Parts, bytes on disk, documents and tokens of a split; for a dry run."""
    indices = [(Path(folder).expanduser(), load_index(folder)) for folder in folders]
    found = {"shards": 0, "bytes": 0, "documents": 0, "tokens": 0}
    for folder, index in indices:
        if split not in index["splits"]:
            raise ConfigError(f"{folder} has no {split} split; it has: {', '.join(index['splits'])}")
        for problem in _wrong_sizes(folder, index, split):
            raise ConfigError(problem)
        parts = index["splits"][split]["parts"]
        found["shards"] += len(parts)
        found["bytes"] += sum(part["files"][suffix]["bytes"] for part in parts for suffix in SUFFIXES)
        for name in ("documents", "tokens"):
            found[name] += sum(part[name] for part in parts)
    return found
