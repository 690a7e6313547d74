"""The files of a data set, found once per job and described by name, size and content hash.

A pattern is a local path or glob, `hf://datasets/OWNER/NAME/PATH`, or any fsspec address (`s3://bucket/...`). Rank 0
looks them up and broadcasts them, so that a hub or a bucket sees one client however many processes train. Hub files are
pinned to a commit, which the data fingerprint records: a resumed run reads that commit even if `data.revision` is null
and the branch has moved on. A repository is listed once per process.

Hub files come through `huggingface_hub` and are read with pyarrow. Other formats, and data sets with configurations,
are left to `datasets` (`data.dataset_corpus`).

A shard is missing if a path without wildcards does not exist, or if a pattern matches a series `NAME-00003-of-00008`
with gaps. It is corrupt if it cannot be indexed. With `data.on_bad_shard` "error" the job stops before anything runs;
with "skip" the shard is left out, named in a warning and counted.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import os
import re
import sys
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO, TypeVar

import numpy as np

from ovq.config_data import SourceConfig
from ovq.errors import ConfigError, Failure, one_line

SPLITS = ("train", "validation", "test")
HUB = "hf://datasets/"
NOT_LISTED = "cannot be listed"  # in the message about a repository that is out of reach
_SERIES = re.compile(r"^(?P<stem>.*-)(?P<index>\d+)-of-(?P<total>\d+)(?P<rest>.*)$")
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".zip")

T = TypeVar("T")


class DataError(Failure, RuntimeError):
    """Data that cannot be read. The message is one line: the file, what is wrong, and which setting to change."""


class ChangedError(DataError):
    """A file is no longer the one that was indexed. An error even if data.on_bad_shard is "skip"."""

    @classmethod
    def of(cls, path: str, what: str) -> ChangedError:
        """The error for a file, and what of it is different."""
        return cls(
            f"{path} has changed since this run opened its data ({what}); put the original file back and the same "
            "command resumes from the last checkpoint, or use another run_dir"
        )


@dataclass(frozen=True)
class File:
    """One file of a split, found but not opened. `size` in bytes; `digest` only if a listing provides it."""

    path: str
    name: str
    size: int
    digest: str | None = None
    commit: str | None = None  # of the hub repository


@dataclass(frozen=True)
class Shard:
    """A file with what is needed to read any document of it, and to notice that it is no longer the same file.

    `digest` is a SHA-256: the hub's of the file, else that of a Parquet footer, or of all of a JSON-lines or text file.
    """

    file: File
    digest: str
    rows: tuple[int, ...] = ()  # of each Parquet row group
    row_bytes: tuple[int, ...] = ()  # uncompressed size of each row group's text
    footer: str = ""  # SHA-256 of the Parquet footer
    lines: np.ndarray | None = None  # int64: offset of each JSON line in bytes
    line_crcs: np.ndarray | None = None  # uint32: CRC-32 of each JSON line

    @property
    def documents(self) -> int:
        return len(self.lines) if self.lines is not None else sum(self.rows)


def find_files(data: SourceConfig, split: str, commit: str | None = None) -> tuple[list[File], list[str]]:
    """The files of a split in a fixed order (patterns as given, names sorted within each), and those that are missing.

    Args:
        commit: hub commit to read instead of `data.revision`; a resumed run passes the one it started with.

    Raises:
        ConfigError: a pattern matches nothing, or files are missing and data.on_bad_shard is "error".
    """
    patterns = list(getattr(data, split))
    if not patterns:
        raise ConfigError(f"data.{split} is empty; give it paths or globs, for instance data.{split}=[books/*.parquet]")
    found: dict[str, File] = {}
    missing: list[str] = []
    for pattern in patterns:
        if pattern.startswith(HUB):
            files = _hub_files(pattern, commit or data.revision)
        elif "://" in pattern:
            files = _remote_files(pattern)
        else:
            files = [File(p, os.path.basename(p), os.path.getsize(p)) for p in sorted(_local_paths(pattern))]
        if not files and glob.has_magic(pattern):
            raise ConfigError(f"data.{split}: no file matches {pattern}")
        if not files:
            missing.append(pattern)
        missing += _holes(files, pattern)
        found.update({file.path: file for file in files if file.path not in found})
    for file in found.values():
        if file.name.endswith(_COMPRESSED):
            raise ConfigError(f"data.{split}: {file.path} is compressed and cannot be read at random; decompress it")
    _bad_shards(data, [f"{name}: missing" for name in missing], split, left=len(found))
    return list(found.values()), missing


def index_shards(data: SourceConfig, split: str, commit: str | None = None) -> tuple[list[Shard], int]:
    """The shards of a split, indexed, and how many were left out as missing or corrupt."""
    files, missing = find_files(data, split, commit)
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
    _bad_shards(data, corrupt, split, left=len(shards))
    return shards, len(missing) + len(corrupt)


def open_file(file: File) -> BinaryIO | str:
    """What readers open: a local path (hub files are downloaded to the local cache first) or a seekable remote file."""
    if file.path.startswith(HUB):
        return hub_download(file)
    if "://" in file.path:
        import fsspec

        return fsspec.open(file.path, "rb").open()
    return file.path


def hub_download(file: File) -> str:
    """Local path of a hub file, downloaded on first use.

    huggingface_hub holds a file lock during the download, and makes no request for a cached file of a known commit. So
    one process per node downloads each shard while the others wait.
    """
    from huggingface_hub import hf_hub_download

    repo, inside = hub_parts(file.path)
    return hf_hub_download(repo.partition("@")[0], inside, repo_type="dataset", revision=file.commit)


def hub_parts(path: str) -> tuple[str, str]:
    parts = path[len(HUB) :].split("/")
    if len(parts) < 3:
        raise ConfigError(f"{path}: hub patterns look like {HUB}OWNER/NAME/PATH")
    return "/".join(parts[:2]), "/".join(parts[2:])


def _hub_files(pattern: str, revision: str | None) -> list[File]:
    repo, inside = hub_parts(pattern)
    repo, _, named = repo.partition("@")
    revision = named or revision or _COMMITS.get(repo)
    try:
        commit, entries = _list_hub(repo, revision)
    except Exception as error:  # no network, no such repository or revision: the message quotes the cause
        raise ConfigError(
            f"{pattern} (revision {revision}) {NOT_LISTED}: {one_line(error)}; without a network, train from a "
            "folder made by python -m data.prepare (data=memmap)"
        ) from None
    _COMMITS.setdefault(repo, commit)
    return [
        File(
            f"{HUB}{repo}@{commit}/{entry.path}",
            os.path.basename(entry.path),
            entry.size,
            entry.lfs.sha256 if entry.lfs else entry.blob_id,
            commit,
        )
        for entry in entries
        if fnmatch.fnmatchcase(entry.path, inside)
    ]


def hub_commit(repo: str, revision: str | None) -> str | None:
    """The commit that a revision of a data set refers to; `revision` itself where the Hub cannot be asked."""
    from huggingface_hub import HfApi

    revision = revision or _COMMITS.get(repo)
    try:
        commit = str(HfApi().dataset_info(repo, revision=revision).sha)
    except Exception:  # no network, or no such data set, as opening it will tell
        return revision
    return _COMMITS.setdefault(repo, commit) if revision is None else commit


# The commit of each repository that is read if no revision is named, so that all splits of a run come from one commit.
_COMMITS: dict[str, str] = {}


@lru_cache(maxsize=16)
def _list_hub(repo: str, revision: str | None) -> tuple[str, list[Any]]:
    """The commit that a revision refers to, and its files sorted by path."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi()
    commit = api.dataset_info(repo, revision=revision).sha
    entries = api.list_repo_tree(repo, repo_type="dataset", revision=commit, recursive=True)
    files = [entry for entry in entries if isinstance(entry, RepoFile)]
    return str(commit), sorted(files, key=lambda entry: entry.path)


def _remote_files(pattern: str) -> list[File]:
    from fsspec.core import url_to_fs

    try:
        fs, path = url_to_fs(pattern)
        paths = sorted(fs.glob(path)) if glob.has_magic(pattern) else [path] * fs.exists(path)
        return [File(fs.unstrip_protocol(p), os.path.basename(p), int(fs.info(p)["size"])) for p in paths]
    except ImportError as error:
        raise ConfigError(f"{pattern} needs a package that is not installed: {one_line(error)}") from None


def _local_paths(pattern: str) -> list[str]:
    pattern = os.path.expanduser(pattern)
    paths = glob.glob(pattern, recursive=True) if glob.has_magic(pattern) else [pattern]
    return [path for path in paths if os.path.isfile(path)]


def _holes(files: list[File], pattern: str) -> list[str]:
    """Missing files of a numbered series (train-00003-of-00008.parquet) that match the pattern.

    Names may end in a hash, as on the hub. Shards that the pattern excludes, by a range or by naming one file, are not
    missing.
    """
    series: dict[tuple[str, str], dict[int, re.Match[str]]] = {}
    for file in files:
        if match := _SERIES.match(file.path):
            series.setdefault((match["stem"], match["total"]), {})[int(match["index"])] = match
    holes = []
    for (stem, total), present in series.items():
        like = next(iter(present.values()))
        for index in range(int(total)):
            name = f"{stem}{index:0{len(like['index'])}d}-of-{total}"
            wanted = fnmatch.fnmatchcase(os.path.basename(name + like["rest"]), os.path.basename(pattern))
            if index not in present and wanted:
                holes.append(name)
    return holes


def _bad_shards(data: SourceConfig, bad: list[str], split: str, left: int) -> None:
    if not bad:
        return
    shown = "; ".join(bad[:3]) + (f"; and {len(bad) - 3} more" if len(bad) > 3 else "")
    if not left:
        raise ConfigError(f"data.{split}: no good shard is left: {shown}")
    if data.on_bad_shard == "error":
        raise ConfigError(f"data.{split}: {shown} (data.on_bad_shard=skip leaves bad shards out and counts them)")
    print(f"warning: data.{split}: {len(bad)} shard(s) left out: {shown}", file=sys.stderr)


def _index_parquet(file: File, data: SourceConfig) -> Shard:
    """Row counts from the footer, a few kilobytes at the end of the file. The footer's hash stands for the contents."""
    import pyarrow.parquet as pq

    with _open_for_index(file) as stream:
        footer = footer_hash(stream)
        metadata = pq.ParquetFile(stream).metadata
        schema = metadata.schema.to_arrow_schema()
        for key, column in (("text_field", data.text_field), ("title_field", data.title_field)):
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
        DataError: it is not a Parquet file, or not all of it.
    """
    size = stream.seek(0, os.SEEK_END)
    if size < 12:
        raise DataError(f"not a Parquet file ({size} bytes)")
    stream.seek(size - 8)
    tail = stream.read(8)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != b"PAR1" or length + 12 > size:
        raise DataError("not a whole Parquet file (cut short or damaged)")
    stream.seek(size - 8 - length)
    return hashlib.sha256(stream.read(length)).hexdigest()


def _index_jsonl(file: File, data: SourceConfig) -> Shard:
    """Offset and CRC of each line that is not blank, and the hash of the whole file, in one pass of bounded memory."""
    digest = hashlib.sha256()
    offsets: list[int] = []
    crcs: list[int] = []
    position = 0
    with _open_for_index(file) as stream:
        for line in stream:
            digest.update(line)
            if line.strip():
                offsets.append(position)
                crcs.append(zlib.crc32(line))
            position += len(line)
    lines, line_crcs = np.asarray(offsets, np.int64), np.asarray(crcs, np.uint32)
    return Shard(file, digest.hexdigest(), lines=lines, line_crcs=line_crcs)


def _index_text(file: File, data: SourceConfig) -> Shard:
    digest = hashlib.sha256()
    with _open_for_index(file) as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return Shard(file, digest.hexdigest(), rows=(1,), row_bytes=(file.size,))


_INDEX = {"parquet": _index_parquet, "jsonl": _index_jsonl, "text": _index_text}


def _open_for_index(file: File) -> Any:
    if file.path.startswith(HUB):
        from huggingface_hub import HfFileSystem

        # A footer needs a few kilobytes: range requests, not the whole shard.
        return HfFileSystem().open(file.path, "rb", revision=file.commit)
    source = open_file(file)
    return open(source, "rb") if isinstance(source, str) else source
