"""Random access to the text of anything that `datasets.load_dataset` opens: data=datasets.

    data.path=OWNER/NAME data.config_name=en        a data set of the Hub; data.revision names a commit
    data.path=FOLDER                                local files, or what `save_to_disk` wrote
    data.path=books.csv                             one file, of the kinds in BUILDERS
    data.path=csv 'data.data_files={train: a.csv, validation: b.csv}'

`data.train`, `data.validation` and `data.test` name its splits, or slices of them such as 'train[:95%]'. `datasets`
keeps each split as Arrow files in its cache, made at first use and then memory-mapped, so document i is read without
the others. Its streaming mode is not used: it offers no access to document i, loses its shuffle buffer when resumed,
and holds whole row groups in memory (measured: 670 MB for a group of 114 MB).

Disadvantage: the cache is an uncompressed copy of all columns. data=parquet reads Parquet files without one.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np

from data.corpus import Text, fingerprint_of, make_text
from data.sources import ChangedError, DataError, hub_commit
from ovq.config_data import SourceConfig
from ovq.errors import ConfigError, one_line

# Extension -> the builder of `datasets` that reads such a file.
BUILDERS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
_SAMPLED = 256  # documents whose text is part of the fingerprint
_TEXT = ("string", "large_string")


class DatasetCorpus:
    """The documents of one split of a config, which may combine several splits of the data set.

    The fingerprint covers the sizes of all documents and the text of `_SAMPLED` of them. When unpickled in another
    process, a corpus maps the same files or, on a machine without them, opens the same commit again.

    Raises:
        ConfigError: there is no such data set, split or column, or the column holds no text.
    """

    bad_shards = 0

    def __init__(self, data: SourceConfig, split: str) -> None:
        self.data, self.split, self.path = data, split, str(data.path)
        self.names = list(getattr(data, split))
        self.commit = data.revision
        if is_remote(self.path):
            self.commit = hub_commit(self.path, self.commit)
        self._pickled = b""
        self._parts = [self._load(name) for name in self.names]
        self._starts = np.cumsum([0, *map(len, self._parts)], dtype=np.int64)
        self._identity = self._identify()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def sizes(self) -> np.ndarray:
        return np.concatenate([np.empty(0, np.int64), *map(self._sizes_of, self._open())])

    def fingerprint(self) -> dict[str, Any]:
        return fingerprint_of(
            "datasets", self._identity, len(self), text_field=self.data.text_field, commit=self.commit
        )

    def locate(self, index: int) -> str:
        part, row = self._position(index)
        return f"{self.path} {self.names[part]} document {row}"

    def read(self, index: int) -> Text:
        """Document `index` in 0..len-1.

        Raises:
            DataError: it cannot be read, and data.on_bad_shard is "error"; otherwise it counts as empty and unreadable.
            ChangedError: the data set is no longer the one that was indexed.
        """
        part, row = self._position(index)
        name = f"{self.names[part]}#{row}"
        table = self._open()[part]
        try:
            columns = table[row]
            text = columns.column(self.data.text_field)[0]
            titled = columns.column(self.data.title_field)[0] if self.data.title_field else None
            title = str(titled.as_py()) if titled is not None and titled.is_valid else None
            # as_py would raise on bad UTF-8, which is replaced and counted instead.
            raw = text.as_buffer().to_pybytes() if text.is_valid else b""
        except Exception as error:  # whatever pyarrow raises for a damaged file
            if self.data.on_bad_shard == "error":
                raise DataError(f"{self.locate(index)}: {one_line(error)} (data.on_bad_shard=skip)") from None
            print(f"warning: {self.locate(index)} left out: {one_line(error)}", file=sys.stderr)
            return Text("", name, {"unreadable_documents": 1})
        return make_text(raw, title, fallback=name, titled=self.data.title_field is not None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_parts": None, "_pickled": self._pickled or pickle.dumps(self._parts)}

    def _position(self, index: int) -> tuple[int, int]:
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return part, index - int(self._starts[part])

    def _open(self) -> list[Any]:
        if self._parts is None:
            try:
                self._parts = pickle.loads(self._pickled)  # made by this job, so safe to load
            except OSError:  # another machine, whose cache lacks these files
                self._parts = [self._load(name) for name in self.names]
            if self._identify() != self._identity:
                raise ChangedError.of(self.path, "another size or text")
        return self._parts

    def _load(self, name: str) -> Any:
        """A split of the data set in Arrow format: indexing it gives a `pyarrow.Table` of one row."""
        table = load(self.data, name, self.commit, f"data.{self.split}")
        for key, column in (("text_field", self.data.text_field), ("title_field", self.data.title_field)):
            if column and column not in table.column_names:
                raise ConfigError(
                    f"data.{key}={column} is not a field of {self.path} {name}; legal: {', '.join(table.column_names)}"
                )
        kind = getattr(table.features[self.data.text_field], "dtype", table.features[self.data.text_field])
        if kind not in _TEXT:
            raise ConfigError(f"data.text_field={self.data.text_field} of {self.path} {name} holds {kind}, not text")
        wanted = [self.data.text_field, *([self.data.title_field] if self.data.title_field else [])]
        return table.select_columns(list(dict.fromkeys(wanted))).with_format("arrow")

    def _sizes_of(self, table: Any) -> np.ndarray:
        """Bytes of text of each document, int64; reads offsets only."""
        import pyarrow.compute as pc

        lengths = pc.binary_length(table.data.column(self.data.text_field))
        return pc.fill_null(lengths, 0).to_numpy().astype(np.int64)

    def _identify(self) -> list[str]:
        """A string for each part that identifies it and its contents."""
        found = []
        for name, table in zip(self.names, self._parts):
            digest = hashlib.sha256(self._sizes_of(table).astype("<i8").tobytes())
            for row in sorted({len(table) * i // _SAMPLED for i in range(_SAMPLED if len(table) else 0)}):
                text = table[row].column(self.data.text_field)[0]
                digest.update(text.as_buffer().to_pybytes() if text.is_valid else b"")
            found.append(f"{name}:{len(table)}:{digest.hexdigest()}")
        return found


def is_remote(path: str) -> bool:
    """Whether a path names a data set of the Hub."""
    return path.count("/") == 1 and not os.path.exists(os.path.expanduser(path)) and _suffix(path) not in BUILDERS


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def load(data: SourceConfig, name: str, commit: str | None, setting: str) -> Any:
    """The `datasets.Dataset` of a split or slice.

    Args:
        setting: the setting that names the split, for messages.

    Raises:
        ConfigError: it cannot be opened; the message quotes the cause.
    """
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    path = os.path.expanduser(str(data.path))
    folder, suffix = Path(path), _suffix(path)
    files: Any = {key: value if isinstance(value, str) else list(value) for key, value in data.data_files.items()}
    try:
        if any((folder / file).is_file() for file in ("dataset_dict.json", "state.json")):
            if data.config_name or files:
                raise ConfigError(
                    f"data.config_name and data.data_files are ignored with data.path={data.path}, which save_to_disk "
                    "wrote; leave them out"
                )
            return _saved(datasets.load_from_disk(path), name, setting)
        if suffix in BUILDERS and not folder.exists():
            raise ConfigError(f"data.path={data.path} does not exist")
        if folder.is_file():
            if suffix not in BUILDERS:
                raise ConfigError(f"data.path={path} is of no known kind; legal: {', '.join(BUILDERS)}")
            more = {"sep": "\t"} if suffix == ".tsv" else {}
            return datasets.load_dataset(BUILDERS[suffix], data_files={"train": path}, split=name, **more)
        revision = commit if is_remote(path) else None
        return datasets.load_dataset(
            path, data.config_name, data_files=files or None, split=name, revision=revision, streaming=False
        )
    except ConfigError:
        raise
    except Exception as error:  # of a dozen types, among them those of pandas and pyarrow
        raise ConfigError(_explain(error, data, name, setting)) from None


def describe_dataset(data: SourceConfig, split: str) -> dict[str, Any]:
    """Documents and bytes of text of a split, for a dry run; for a data set of the Hub, as stated on its card.

    Raises:
        ConfigError: it cannot be opened.
    """
    if not is_remote(str(data.path)):
        corpus = DatasetCorpus(data, split)
        return {"shards": 0, "documents": len(corpus), "bytes": int(corpus.sizes().sum())}
    import datasets

    found: dict[str, Any] = {"shards": 0, "documents": None, "bytes": 0}
    try:
        splits = datasets.load_dataset_builder(data.path, data.config_name, revision=data.revision).info.splits or {}
    except Exception as error:
        raise ConfigError(_explain(error, data, ",".join(getattr(data, split)), f"data.{split}")) from None
    for name in getattr(data, split):
        if name in splits:
            found["documents"] = (found["documents"] or 0) + splits[name].num_examples
            found["bytes"] += splits[name].num_bytes
    return found


def _saved(found: Any, name: str, setting: str) -> Any:
    """A split, or slices, of what `save_to_disk` wrote: a `DatasetDict`, or one `Dataset`, which is called train."""
    import datasets

    splits = found if isinstance(found, datasets.DatasetDict) else {"train": found}
    if name in splits:
        return splits[name]
    try:
        slices = datasets.ReadInstruction.from_spec(name).to_absolute({key: len(part) for key, part in splits.items()})
    except ValueError as error:
        if str(error).startswith("Unknown split"):
            raise ConfigError(f"{setting}: there is no split {name}; legal: {', '.join(splits)}") from None
        raise ConfigError(f"{setting}: {one_line(error)}") from None
    if any(part.from_ >= part.to for part in slices):
        raise ConfigError(f"{setting}: {name} holds no documents")
    rows = [splits[part.splitname].select(range(part.from_, part.to)) for part in slices]
    return datasets.concatenate_datasets(rows) if len(rows) > 1 else rows[0]


def _explain(error: Exception, data: SourceConfig, name: str, setting: str) -> str:
    cause = one_line(error.__cause__ if type(error).__name__ == "DatasetGenerationError" and error.__cause__ else error)
    if cause.startswith("Unknown split"):
        return f"{setting}: {cause}"
    if "Config name is missing" in cause or cause.startswith("BuilderConfig"):
        return f"data.config_name={data.config_name}: {cause}"
    hint = ""
    if isinstance(error, ConnectionError):
        hint = (
            "; without a network, name a local folder, or train from one made by python -m data.prepare (data=memmap)"
        )
    return f"data.path={data.path} cannot be opened: {cause}{hint}"
