"""Random access to the documents of a split, holding one document at a time.

A `Corpus` returns the text of document i, `Tokens` its token ids. Nothing here knows about ranks or order. Parquet row
groups are read in batches and only the needed columns, so memory is bounded by a page and a few documents rather than
by a row group (those of PG19 exceed 100 MB).

Disadvantages: unless documents are read in file order, reading one deep in a row group means decompressing everything
before it. A page is the smallest unit that can be decompressed, so a file whose writer put a thousand books into one
page (as pyarrow's default `write_batch_size` does) needs that much memory for a moment. `python -m data.prepare` pays
both costs once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from data.contents import BOM
from data.index import footer_hash
from data.sources import ChangedError, DataError, Shard, open_file
from data.tokenizer import Tokenizer
from ovq.config_data import SourceConfig
from ovq.errors import ConfigError, one_line

_READ_BYTES = 1 << 20  # of compressed column data read, and of text decoded, at a time
_OPEN_FILES = 8
FLAGS = ("bad_utf8", "unreadable_documents", "untitled_documents")  # what can be wrong with a document


@dataclass
class Text:
    """A document as read. `flags` counts what was wrong with it, by the names in FLAGS."""

    text: str
    title: str
    flags: dict[str, int] = field(default_factory=dict)


@dataclass
class TokenisedDocument:
    """Token ids of a document without separators (integers of any width), and its size in UTF-8 bytes and in words."""

    ids: np.ndarray
    title: str
    num_bytes: int
    num_words: int
    flags: dict[str, int] = field(default_factory=dict)


@dataclass
class Document:
    """A held-out document. `tokens` int64 [n + 2]: separator, ids, separator; so tokens[:-1] predict tokens[1:].

    `num_bytes` (UTF-8) and `num_words` (split at whitespace) refer to the whole document; for a part of it use
    `tokenizer.num_bytes(ids)` and `len(tokenizer.decode(ids).split())`.
    """

    tokens: np.ndarray
    title: str
    num_bytes: int
    num_words: int
    source: str = ""  # the data set of a mixture that it is from


class Identified(Protocol):
    """What identifies a data set: its text shards, or the folders they were prepared into."""

    def fingerprint(self) -> dict[str, Any]:
        """Identity of the contents: equal fingerprints mean the same documents in the same order."""
        ...

    @property
    def bad_shards(self) -> int: ...


class Corpus(Identified, Protocol):
    """Documents by index. Implementations are picklable and open their files lazily, once per process."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Text: ...

    def locate(self, index: int) -> str:
        """File and position of document `index`, for messages."""
        ...

    def sizes(self) -> np.ndarray:
        """Approximate bytes of each document, int64 [documents], without reading any."""
        ...


class Tokens(Protocol):
    """Tokenised documents by index."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> TokenisedDocument: ...

    def locate(self, index: int) -> str:
        """File and position of document `index`, for messages."""
        ...


def fingerprint_of(kind: str, identity: list[str], documents: int, **more: Any) -> dict[str, Any]:
    """The fingerprint of a corpus, from one string per shard (name, size and content hash)."""
    files = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    return {"kind": kind, "files": files, "shards": len(identity), "documents": documents, **more}


class TokenisedCorpus:
    """A corpus tokenised on the fly."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer) -> None:
        self.corpus, self.tokenizer = corpus, tokenizer

    def __len__(self) -> int:
        return len(self.corpus)

    def locate(self, index: int) -> str:
        return self.corpus.locate(index)

    def read(self, index: int) -> TokenisedDocument:
        document = self.corpus.read(index)
        text = document.text
        num_bytes = len(text) if text.isascii() else len(text.encode())
        return TokenisedDocument(
            self.tokenizer.encode(text), document.title, num_bytes, len(text.split()), document.flags
        )


@dataclass
class _Ahead:
    """A reader's position within a row group of an open file, and the last batch it returned."""

    reader: Any
    group: int
    batches: Iterator[Any]
    number: int = -1
    batch: Any = None


class ShardCorpus:
    """Documents of Parquet, JSON-lines or plain-text shards (one text file is one document)."""

    def __init__(self, data: SourceConfig, shards: list[Shard], bad_shards: int = 0) -> None:
        self.kind, self.text_field, self.title_field = data.kind, data.text_field, data.title_field
        self.skip_bad = data.on_bad_shard == "skip"
        self.shards, self.bad_shards = shards, bad_shards
        # A unit is where a reader can start: a row group, a JSON-lines file, a text file.
        self._units = [
            (s, g)
            for s, shard in enumerate(shards)
            for g in range(len(shard.rows) if shard.lines is None else min(1, len(shard.lines)))
        ]
        sizes = [shards[s].rows[g] if shards[s].lines is None else shards[s].documents for s, g in self._units]
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)
        self._open: OrderedDict[tuple[int, int], _Opened] = OrderedDict()
        self._ahead: _Ahead | None = None
        self._last = -1  # index of the document read last
        self.documents_decoded = 0  # including those skipped to reach the requested one

    def __len__(self) -> int:
        return int(self._starts[-1])

    def sizes(self) -> np.ndarray:
        parts = [np.empty(0, np.int64)]
        for shard in self.shards:
            if shard.lines is not None:
                parts.append(np.diff(shard.lines, append=shard.file.size))
            else:
                parts.append(np.repeat([b // max(1, n) for b, n in zip(shard.row_bytes, shard.rows)], shard.rows))
        return np.concatenate(parts).astype(np.int64)

    def fingerprint(self) -> dict[str, Any]:
        identity = [f"{shard.file.name}:{shard.file.size}:{shard.digest}" for shard in self.shards]
        field_ = None if self.kind == "text" else self.text_field
        commit = next((shard.file.commit for shard in self.shards if shard.file.commit), None)  # if from the hub
        return fingerprint_of(self.kind, identity, len(self), text_field=field_, commit=commit)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "_ahead": None}

    def _position(self, index: int) -> tuple[int, int, int]:
        """Shard, row group and row within the group of document `index`."""
        unit = int(np.searchsorted(self._starts, index, side="right")) - 1
        return *self._units[unit], index - int(self._starts[unit])

    def locate(self, index: int) -> str:
        s, group, row = self._position(index)
        return f"{self.shards[s].file.path} document {row + sum(self.shards[s].rows[:group])}"

    def read(self, index: int) -> Text:
        """Document `index` in 0..len-1.

        Raises:
            DataError: it cannot be read, and data.on_bad_shard is "error"; otherwise it counts as empty and unreadable.
            ChangedError: the file is no longer the one that was indexed.
        """
        in_order, self._last = index == self._last + 1, index
        s, group, row = self._position(index)
        shard = self.shards[s]
        number = row + sum(shard.rows[:group])
        fallback = f"{shard.file.name}#{number}"
        try:
            raw, title, bad = {"parquet": self._parquet, "jsonl": self._jsonl, "text": self._text}[self.kind](
                s, group, row
            )
            if not in_order:
                self._ahead = None  # it keeps a page in memory, which is useless if the next document is elsewhere
        except (ChangedError, ConfigError):
            raise
        except Exception as error:  # the readers of three formats raise a dozen types; the document is always named
            where, cause = f"{shard.file.path} {self._place(s, number)}", one_line(error)
            if not self.skip_bad:
                raise DataError(f"{where}: {cause} (data.on_bad_shard=skip leaves it out and counts it)") from None
            print(f"warning: {where} left out: {cause}", file=sys.stderr)
            return Text("", fallback, {"unreadable_documents": 1})
        return make_text(raw, title, fallback=fallback, titled=self.title_field is not None, bad=bad)

    def _parquet(self, s: int, group: int, row: int) -> tuple[bytes, str | None, int]:
        shard = self.shards[s]
        size = max(1, min(1024, _READ_BYTES * shard.rows[group] // max(1, shard.row_bytes[group])))
        batch = self._batch(s, group, row // size, size)
        text = batch.column(self.text_field)[row % size]
        title = batch.column(self.title_field)[row % size] if self.title_field else None
        # as_py would raise on bad UTF-8, which is replaced and counted instead.
        raw = text.as_buffer().to_pybytes() if text.is_valid else b""
        if title is None or not title.is_valid:
            return raw, None, 0
        if hasattr(title, "as_buffer"):
            return raw, *decode_utf8(title.as_buffer().to_pybytes())
        return raw, str(title.as_py()), 0

    def _batch(self, s: int, group: int, wanted: int, size: int) -> Any:
        """Batch number `wanted` of a row group; continues from the last batch read if that does not come after it."""
        reader, ahead = self._reader(s), self._ahead
        self._ahead = None  # a reader that has raised cannot be used again
        if ahead is None or ahead.reader is not reader or ahead.group != group or ahead.number > wanted:
            columns = [self.text_field, *([self.title_field] if self.title_field else [])]
            # Without threads: decoding ahead would hold more than a batch, and parallelism comes from the workers.
            batches = reader.iter_batches(size, row_groups=[group], columns=columns, use_threads=False)
            ahead = _Ahead(reader, group, batches)
        while ahead.number < wanted:
            ahead.batch = None  # so that two are never held at once
            ahead.batch = next(ahead.batches)
            ahead.number += 1
            self.documents_decoded += ahead.batch.num_rows
        self._ahead = ahead
        return ahead.batch

    def _jsonl(self, s: int, group: int, row: int) -> tuple[bytes, str | None, int]:
        stream, shard = self._reader(s), self.shards[s]
        assert shard.lines is not None and shard.line_crcs is not None
        stream.seek(int(shard.lines[row]))
        self.documents_decoded += 1
        raw_line = stream.readline()
        if zlib.crc32(raw_line) != shard.line_crcs[row]:
            raise ChangedError.of(shard.file.path, f"another line stands where document {row} was")
        if shard.lines[row] == 0:
            raw_line = raw_line.removeprefix(BOM)
        line, bad = decode_utf8(raw_line)
        record = _object(line, self.text_field)
        title = record.get(self.title_field) if self.title_field else None
        # JSON can escape half a surrogate pair, which is not a character: treated and counted like any bad UTF-8.
        raw = (record[self.text_field] or "").encode("utf-8", "surrogatepass")
        title, more = (None, 0) if title is None else decode_utf8(str(title).encode("utf-8", "surrogatepass"))
        return raw, title, bad + more

    def _place(self, s: int, number: int) -> str:
        """The position of document `number` in its shard, for messages: "line 12" in JSON lines, else "document 11"."""
        lines = self.shards[s].lines
        with contextlib.suppress(Exception):  # of a file that is gone, no line can be counted
            if lines is not None:
                stream, left, newlines = self._reader(s), int(lines[number]), 0
                stream.seek(0)
                while left > 0 and (block := stream.read(min(left, _READ_BYTES))):
                    newlines += block.count(b"\n")
                    left -= len(block)
                return f"line {newlines + 1}"
        return f"document {number}"

    def _text(self, s: int, group: int, row: int) -> tuple[bytes, str | None, int]:
        stream = self._reader(s)
        stream.seek(0)
        self.documents_decoded += 1
        raw = stream.read()
        if hashlib.sha256(raw).hexdigest() != self.shards[s].digest:
            raise ChangedError.of(self.shards[s].file.path, "another hash")
        return raw.removeprefix(BOM), os.path.splitext(self.shards[s].file.name)[0], 0

    def _reader(self, s: int) -> Any:
        """The open file of a shard. Few stay open; a forked process opens its own, as file offsets would be shared."""
        key = (os.getpid(), s)
        if (opened := self._open.get(key)) and opened.modified == _modified(opened.stream):
            self._open.move_to_end(key)
            return opened.reader
        self._open[key] = opened = self._open_shard(s)
        self._open.move_to_end(key)
        if len(self._open) > _OPEN_FILES:
            self._open.popitem(last=False)[1].reader.close()
        return opened.reader

    def _open_shard(self, s: int) -> _Opened:
        """Open a shard. Parquet is verified here, by its footer; JSON lines and text when they are read."""
        shard = self.shards[s]
        source = open_file(shard.file)
        if self.kind != "parquet":
            stream = open(source, "rb") if isinstance(source, str) else source  # noqa: SIM115 (closed when evicted)
            return _Opened(stream, stream, None)
        import pyarrow as pa
        import pyarrow.parquet as pq

        stream = pa.OSFile(source, "r") if isinstance(source, str) else source
        modified = _modified(stream)  # read first, so that a change during the check is noticed at the next read
        try:
            footer = footer_hash(stream)
        except DataError as error:
            raise ChangedError.of(shard.file.path, str(error)) from None
        if footer != shard.footer:
            raise ChangedError.of(shard.file.path, "another footer")
        reader = pq.ParquetFile(stream, buffer_size=_READ_BYTES, pre_buffer=False, page_checksum_verification=True)
        return _Opened(stream, reader, modified)


@dataclass
class _Opened:
    stream: Any
    reader: Any
    modified: tuple[int, int] | None


def _modified(stream: Any) -> tuple[int, int] | None:
    """Size and time of the last write to an open local Parquet file; None for other files."""
    import pyarrow as pa

    if not isinstance(stream, pa.OSFile):
        return None
    status = os.fstat(stream.fileno())
    return status.st_size, status.st_mtime_ns


def make_text(raw: bytes, title: str | None, *, fallback: str, titled: bool, bad: int = 0) -> Text:
    """A document from its bytes.

    Args:
        fallback: the title of a document without one.
        titled: whether documents should have titles.
        bad: invalid sequences of UTF-8 replaced so far.
    """
    text, more = decode_utf8(raw)
    flags = {"bad_utf8": bad + more} if bad + more else {}
    if titled and not title:
        flags["untitled_documents"] = 1
    return Text(text, title or fallback, flags)


def _object(line: str, text_field: str) -> dict[str, Any]:
    """Parse a line of JSON as an object whose text field is a string or null.

    Raises:
        DataError: it is anything else; the message says what.
    """
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"not valid JSON: {error.msg.removesuffix(' at')} at character {error.pos + 1}") from None
    if not isinstance(record, dict):
        raise DataError(f'{_JSON[type(record)]}, where an object is needed: {{"{text_field}": "..."}}')
    if text_field not in record:
        raise DataError(f"no field '{text_field}' (fields: {', '.join(sorted(record)[:20])}); set data.text_field")
    if not isinstance(record[text_field], str | None):
        raise DataError(f"field '{text_field}' holds {_JSON[type(record[text_field])]}, not text")
    return record


_JSON = {int: "a number", float: "a number", bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
_JSON |= {type(None): "null"}


def decode_utf8(raw: bytes) -> tuple[str, int]:
    """The decoded text, with each invalid sequence replaced by U+FFFD, and the number of replacements."""
    try:
        return raw.decode(), 0
    except UnicodeDecodeError:
        text = raw.decode("utf-8", "replace")
        return text, text.count("\ufffd") - raw.count(b"\xef\xbf\xbd")
