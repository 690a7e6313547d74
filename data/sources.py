"""The files of a data set, found once per job and described by name, size and content hash.

A pattern is a local path or glob, `hf://datasets/OWNER/NAME/PATH`, or any fsspec address (`s3://bucket/...`). Rank 0
looks them up and broadcasts them, so that a hub or a bucket sees one client however many processes train. Hub files are
pinned to a commit, which the data fingerprint records: a resumed run reads that commit even if `data.revision` is null
and the branch has moved on. A repository is listed once per process.

Hub files are fetched with `huggingface_hub` and read with pyarrow. Other formats, and data sets with configurations,
are left to `datasets` (`data.dataset_corpus`).

A folder stands for all files in it and its subfolders whose extensions fit data.kind. A path that exists exactly as
typed is taken literally, even if it contains brackets. Compressed files are recognised by content (`data.contents`).

A shard is missing if a path without wildcards does not exist, if it is a broken link, or if a pattern matches a series
`NAME-00003-of-00008` with gaps. It is corrupt if it cannot be indexed. If `data.on_bad_shard` is "error", the job stops
before anything runs; if "skip", the shard is left out, named in a warning and counted.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO

import numpy as np

from data import contents
from ovq.config_data import SourceConfig
from ovq.errors import ConfigError, Failure, one_line

SPLITS = ("train", "validation", "test")
HUB = "hf://datasets/"
NOT_LISTED = "cannot be listed"  # in the message about a repository that is out of reach
_SERIES = re.compile(r"^(?P<stem>.*-)(?P<index>\d+)-of-(?P<total>\d+)(?P<rest>.*)$")
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
# Extensions of the files that a folder stands for, before any .gz, .zst ...; text: any file that is not hidden.
_ENDINGS = {"parquet": (".parquet", ".pq"), "jsonl": (".jsonl", ".ndjson", ".json"), "text": ("",)}


class DataError(Failure, RuntimeError):
    """Data that cannot be read. The message is one line: the file, what is wrong, and which setting to change."""


class ChangedError(DataError):
    """A file is no longer the one that was indexed. An error even if data.on_bad_shard is "skip"."""

    @classmethod
    def of(cls, path: str, what: str) -> ChangedError:
        """The error for a file that has changed; `what` says what is different."""
        return cls(
            f"{path} has changed since this run opened its data ({what}); put the original file back and the same "
            "command resumes from the last checkpoint, or use another run_dir"
        )


@dataclass(frozen=True)
class File:
    """One file of a split, found but not opened. `size` in bytes; `digest` only from a hub (SHA-256 or git blob id)."""

    path: str
    name: str
    size: int
    digest: str | None = None
    commit: str | None = None  # of the hub repository


@dataclass(frozen=True)
class Shard:
    """A file, with what is needed to read any document in it and to notice that the file has changed.

    `digest`: for Parquet, `file.digest` or else the SHA-256 of the footer; otherwise the SHA-256 of the whole file.
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


def find_files(data: SourceConfig, split: str) -> tuple[list[File], list[str]]:
    """The files of a split in a fixed order (patterns as given, names sorted within each), and those that are missing.

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
            here = _hub_files(pattern, data.kind, data.revision)
        elif "://" in pattern:
            here = _remote_files(pattern, data.kind, split)
        else:
            here = _local_files(pattern, data.kind, split)
        if not here.files and not here.missing:
            if glob.has_magic(pattern):
                raise ConfigError(f"data.{split}: no file matches {pattern}")
            endings = ", ".join(f"*{ending}" for ending in _ENDINGS[data.kind] if ending) or "visible"
            missing.append(f"{pattern}: a folder without {endings} files" if here.folder else f"{pattern}: missing")
        missing += [
            *here.missing,
            *(f"{name}: missing" for name in _holes(here.files, "*" if here.folder else pattern)),
        ]
        found.update({file.path: file for file in here.files if file.path not in found})
    bad_shards(data, missing, split, left=len(found))
    return list(found.values()), missing


def open_file(file: File) -> BinaryIO | str:
    """What readers open: a local path (hub files are downloaded to the local cache first) or a seekable remote file.

    For a compressed file, that is its decompressed copy.

    Raises:
        contents.Unreadable: compressed data are damaged.
    """
    if file.path.startswith(HUB):
        return contents.plain(hub_download(file))
    if "://" not in file.path:
        return contents.plain(file.path)
    import fsspec

    stream: BinaryIO = fsspec.open(file.path, "rb").open()
    compression = contents.compression_of(stream.read(contents.MAGIC))
    stream.seek(0)
    if compression is None:
        return stream
    with stream:
        return contents.decompressed(stream, compression, f"{file.path}:{file.size}", file.path)


def hub_download(file: File) -> str:
    """Local path of a hub file, downloaded on first use.

    huggingface_hub holds a file lock during the download, and makes no request for a cached file of a known commit. So
    one process per node downloads each shard while the others wait.
    """
    from huggingface_hub import hf_hub_download

    repo, inside = hub_parts(file.path)
    return hf_hub_download(repo.partition("@")[0], inside, repo_type="dataset", revision=file.commit)


@dataclass
class _Found:
    """What a pattern refers to; `folder`: whether it names a folder."""

    files: list[File]
    missing: list[str]  # paths that are there but lead to no file: "PATH: why"
    folder: bool = False


def _fits(path: str, kind: str) -> bool:
    """Whether a file found within a folder is of this kind, judging by its name."""
    name = os.path.basename(path).lower()
    stem, ending = os.path.splitext(name)
    return not name.startswith(".") and (stem if ending in _COMPRESSED else name).endswith(_ENDINGS[kind])


def hub_parts(path: str) -> tuple[str, str]:
    parts = path[len(HUB) :].split("/")
    if len(parts) < 2 or not parts[1]:
        raise ConfigError(f"{path}: hub patterns look like {HUB}OWNER/NAME/PATH")
    return "/".join(parts[:2]), "/".join(parts[2:])


def _hub_files(pattern: str, kind: str, revision: str | None) -> _Found:
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
    prefix = inside.rstrip("/") + "/" if inside.rstrip("/") else ""
    chosen = [entry for entry in entries if entry.path == inside]
    within = [] if chosen else [entry for entry in entries if entry.path.startswith(prefix)]
    chosen = chosen or [entry for entry in within if _fits(entry.path, kind)]
    if not within:
        chosen = chosen or [entry for entry in entries if fnmatch.fnmatchcase(entry.path, inside)]
    files = [
        File(
            f"{HUB}{repo}@{commit}/{entry.path}",
            os.path.basename(entry.path),
            entry.size,
            entry.lfs.sha256 if entry.lfs else entry.blob_id,
            commit,
        )
        for entry in chosen
    ]
    return _Found(files, [], folder=bool(within))


def hub_commit(repo: str, revision: str | None) -> str | None:
    """The commit that a revision of a data set refers to; `revision` itself if the Hub cannot be reached."""
    from huggingface_hub import HfApi

    revision = revision or _COMMITS.get(repo)
    try:
        commit = str(HfApi().dataset_info(repo, revision=revision).sha)
    except Exception:  # no network, or no such data set: opening it reports which
        return revision
    return _COMMITS.setdefault(repo, commit) if revision is None else commit


def pin(data: SourceConfig, commit: str | None) -> None:
    """From here on, read the repository of a data set at this commit unless a revision is named; None changes nothing.

    Args:
        commit: that of an earlier `fingerprint`. If data.train names several repositories, it is the first one's.
    """
    on_hub = (hub_parts(pattern)[0] for pattern in data.train if pattern.startswith(HUB))
    repo = str(data.path) if data.kind == "datasets" else next(on_hub, None)
    if commit and repo and "@" not in repo:
        _COMMITS[repo] = commit


# The commit to read of each repository if no revision is named, so that all splits of a run come from one commit.
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


def _remote_files(pattern: str, kind: str, split: str) -> _Found:
    from fsspec.core import url_to_fs

    try:
        fs, path = url_to_fs(pattern)
        folder = bool(fs.isdir(path))
        if folder:
            paths = [p for p in sorted(fs.find(path)) if _fits(p, kind)]
        elif fs.exists(path):
            paths = [path]
        else:
            paths = sorted(fs.glob(path)) if glob.has_magic(pattern) else []
        files = [File(fs.unstrip_protocol(p), os.path.basename(p), int(fs.info(p)["size"])) for p in paths]
        return _Found(files, [], folder)
    except ImportError as error:
        raise ConfigError(f"{pattern} needs a package that is not installed: {one_line(error)}") from None
    except ValueError as error:  # an unknown protocol
        raise ConfigError(f"data.{split}: {pattern}: {one_line(error)}; write it like s3://bucket/*.txt") from None
    except Exception as error:  # whatever a service's client raises: no credentials, no network, no such bucket
        raise ConfigError(f"data.{split}: {pattern} {NOT_LISTED}: {one_line(error)}") from None


def _local_files(pattern: str, kind: str, split: str) -> _Found:
    typed = os.path.expanduser(pattern)
    # A path that exists as typed is not a pattern, even if it contains brackets.
    literal = os.path.lexists(typed) or not glob.has_magic(typed)
    if os.path.isfile(os.path.join(typed, "prepared.json")):
        raise ConfigError(f"data.{split}: {pattern} was made by python -m data.prepare; read it with data=memmap")
    paths: list[str] = []
    for path in [typed] if literal else glob.glob(typed, recursive=True):
        paths += [inner for inner in _walk(path) if _fits(inner, kind)] if os.path.isdir(path) else [path]
    found = _Found([], [], folder=literal and os.path.isdir(typed))
    for path in sorted(set(paths)):
        if os.path.isfile(path):
            found.files.append(File(path, os.path.basename(path), os.path.getsize(path)))
        elif os.path.islink(path):
            found.missing.append(f"{path}: a link to {os.readlink(path)}, which does not exist")
        elif os.path.exists(path):
            found.missing.append(f"{path}: not a file")
    return found


def _walk(folder: str) -> Iterator[str]:
    """The files in a folder and its subfolders; follows links, visits each folder once and skips hidden folders."""

    def fail(error: OSError) -> None:
        raise error

    seen: set[str] = set()
    for path, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        real = os.path.realpath(path)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:
            yield from (os.path.join(path, name) for name in files)
        seen.add(real)


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
        first = int(0 not in present and int(total) in present)  # some series begin with 1
        for index in range(first, first + int(total)):
            name = f"{stem}{index:0{len(like['index'])}d}-of-{total}"
            wanted = fnmatch.fnmatchcase(os.path.basename(name + like["rest"]), os.path.basename(pattern))
            if index not in present and wanted:
                holes.append(name)
    return holes


def bad_shards(data: SourceConfig, bad: list[str], split: str, left: int) -> None:
    """Refuse missing or corrupt files, or warn about them, as data.on_bad_shard says.

    Args:
        bad: "FILE: why" for each.
        left: number of good files.

    Raises:
        ConfigError: data.on_bad_shard is "error", or no good file is left.
    """
    if not bad:
        return
    bad = [one_line(reason) for reason in bad]
    shown = "; ".join(bad[:3]) + (f"; and {len(bad) - 3} more" if len(bad) > 3 else "")
    if not left:
        raise ConfigError(f"data.{split}: no good shard is left: {shown}")
    if data.on_bad_shard == "error":
        raise ConfigError(f"data.{split}: {shown} (data.on_bad_shard=skip leaves bad shards out and counts them)")
    print(f"warning: data.{split}: {len(bad)} shard(s) left out: {shown}", file=sys.stderr)
