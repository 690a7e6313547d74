"""Tokenise a data set once, so that training needs neither text nor network and resumes without delay.

    python -m data.prepare data=parquet 'data.train=[books/*.parquet]' out=DIR [processes=4] [splits=[train]] [key=..]
    python -m data.prepare verify DIR             hash every file of a prepared folder

Each data set of a mixture gets a folder of its own, DIR/NAME.

The documents of a split are divided into parts of about `part_mb` megabytes of text. A part is a pure function of its
documents and the tokenizer, can be written by any process, completely or not at all, and is recorded in a small file.
After a kill, a crash or a full disk, the same command therefore continues with the missing parts and produces the same
bytes as an uninterrupted run. prepared.json, which makes the folder usable, is written last. See data/prepared.py.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.build import build_corpus, build_tokenizer, named, shares_of, sources_of, splits_of
from data.corpus import FLAGS, TokenisedCorpus
from data.files import AtomicFile, hold
from data.prepared import (
    DOCUMENT,
    INDEX,
    SUFFIXES,
    VERSION,
    load_index,
    save_index,
    tokenizer_of,
    verify_prepared,
)
from data.sources import SPLITS, DataError, pin
from data.tokenizer import Tokenizer
from data.workers import die_with_parent
from ovq.cli import command
from ovq.compose import compose
from ovq.config import Config
from ovq.cpu import cores
from ovq.errors import ConfigError, one_line
from ovq.files import write_whole
from ovq.schema import setting

PLAN = "unfinished.json"
PART_MB = 32.0
TOTALS = ("documents", "tokens", "bytes", "words", *FLAGS)

Part = dict[str, Any]


@dataclass
class Job:
    """What a process needs to make any part: the output folder and the tokenised documents of each split."""

    folder: Path
    dtype: str
    tokens: dict[str, TokenisedCorpus]


@dataclass(frozen=True)
class Range:
    """Documents start..stop-1 of a split, which become the files `name`.*; about `size` bytes of text."""

    split: str
    name: str
    start: int
    stop: int
    size: int


def prepare(
    cfg: Config,
    out: Path | str,
    *,
    splits: list[str] | None = None,
    processes: int | None = None,
    part_mb: float = PART_MB,
) -> dict[str, Any]:
    """Tokenise the named splits of a config (default: all) into the folder `out`. Returns the index.

    Raises:
        ConfigError: there is nothing to prepare, or `out` holds the result of a different preparation.
        DataError: a document cannot be read, a file cannot be written, or another process is writing the folder;
            finished parts are kept.
    """
    folder = Path(out).expanduser()
    tokenizer = build_tokenizer(cfg)
    if earlier := _earlier(folder):
        pin(cfg.data, next(iter(earlier["splits"].values()))["source"].get("commit"))
    job, plan, ranges = _plan(cfg, tokenizer, folder, splits, part_mb)
    if (folder / INDEX).exists() and not (folder / PLAN).exists():
        return _already_there(folder, plan)
    try:
        with hold(folder):
            if (folder / INDEX).exists():  # finished meanwhile, or killed before tidying up
                _tidy(folder)
                return _already_there(folder, plan)
            if earlier := _earlier(folder):
                _refuse_another(folder, earlier, plan)
            else:
                write_whole(folder / PLAN, json.dumps(plan, indent=1).encode())
            tokenizer.save(folder / "tokenizer")
            for scratch in folder.glob("*.tmp"):  # left by a process that was killed
                scratch.unlink()
            done = {r.name: part for r in ranges if (part := _finished(folder, r))}
            done |= _make_all(job, [r for r in ranges if r.name not in done], ranges, processes)
            index = {"plan": plan, "splits": {split: _split_index(split, ranges, done) for split in job.tokens}}
            save_index(folder, index)
            _tidy(folder)
    except OSError as error:
        raise DataError(
            f"{error.filename or folder}: {error.strerror or error}; finished parts are kept, "
            "the same command continues"
        ) from None
    return index


def _tidy(folder: Path) -> None:
    """Remove what only an unfinished preparation needs; the plan last, as it marks the folder as unfinished."""
    for leftover in [*folder.glob("*.tmp"), *folder.glob("*.done"), folder / PLAN]:
        leftover.unlink(missing_ok=True)


def _earlier(folder: Path) -> dict[str, Any] | None:
    """The plan of an earlier preparation in the folder, finished or not.

    Raises:
        ConfigError: it is damaged.
    """
    path = folder / PLAN
    if not path.exists():
        return load_index(folder)["plan"] if (folder / INDEX).exists() else None
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({one_line(error)}); remove {folder} and prepare it again") from None


def _already_there(folder: Path, plan: dict[str, Any]) -> dict[str, Any]:
    index = load_index(folder)
    _refuse_another(folder, index["plan"], plan)
    print(f"{folder} is already prepared; check it with: python -m data.prepare verify {folder}", file=sys.stderr)
    return index


def _plan(
    cfg: Config, tokenizer: Tokenizer, folder: Path, splits: list[str] | None, part_mb: float
) -> tuple[Job, dict[str, Any], list[Range]]:
    """What will be made, decided beforehand: two preparations with equal plans produce equal folders."""
    wanted = splits or splits_of(cfg)
    if not wanted:
        raise ConfigError("data.train, data.validation and data.test are empty: nothing to prepare")
    corpora = {split: build_corpus(cfg, split) for split in wanted}
    ranges = []
    for split, corpus in corpora.items():
        if not len(corpus):
            raise ConfigError(f"data.{split} holds no documents: {list(getattr(cfg.data, split))}")
        ranges += _cut(split, corpus.sizes(), max(1, round(part_mb * (1 << 20))))
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    plan = {
        "version": VERSION,
        "tokenizer": tokenizer.fingerprint,
        "dtype": dtype,
        "part_mb": part_mb,
        "title_field": cfg.data.title_field,
        "splits": {
            split: {"source": corpus.fingerprint(), "bad_shards": corpus.bad_shards}
            for split, corpus in corpora.items()
        },
    }
    tokens = {split: TokenisedCorpus(corpus, tokenizer) for split, corpus in corpora.items()}
    return Job(folder, dtype, tokens), plan, ranges


def _cut(split: str, sizes: np.ndarray, part_bytes: int) -> list[Range]:
    """Divide the documents, in order, into ranges of about `part_bytes` bytes of text."""
    before = np.cumsum(sizes) - sizes
    bounds = [*np.flatnonzero(np.diff(before // part_bytes, prepend=-1)).tolist(), len(sizes)]
    return [
        Range(split, f"{split}-{number:05d}", start, stop, int(sizes[start:stop].sum()))
        for number, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:]))
    ]


def _refuse_another(folder: Path, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    if there == wanted:
        return
    keys = [key for key in wanted if key != "splits" and there.get(key) != wanted[key]]
    old, new = there.get("splits", {}), wanted["splits"]
    keys += [f"data.{split}" for split in {**old, **new} if old.get(split) != new.get(split)]
    raise ConfigError(f"{folder} holds another preparation (differs in {', '.join(keys)}); use another out=DIR")


def make_part(job: Job, wanted: Range) -> Part:
    """Write the three files and the record of one part, with one document in memory at a time."""
    rows = np.zeros(wanted.stop - wanted.start, DOCUMENT)
    titles = bytearray()
    start = 0
    files: dict[str, AtomicFile] = {suffix: AtomicFile(job.folder / f"{wanted.name}.{suffix}") for suffix in SUFFIXES}
    with files["tokens"] as stream:
        for row, index in zip(rows, range(wanted.start, wanted.stop)):
            document = job.tokens[wanted.split].read(index)
            ids, title = document.ids.astype(job.dtype).tobytes(), document.title.encode("utf-8", "replace")
            row["start"], row["tokens"], row["crc32"] = start, len(document.ids), zlib.crc32(ids)
            row["bytes"], row["words"] = document.num_bytes, document.num_words
            row["title_start"], row["title_bytes"] = len(titles), len(title)
            for name, count in document.flags.items():
                row[name] = count
            stream.write(ids)
            titles += title
            start += len(document.ids)
    for suffix, content in (("documents", rows.tobytes()), ("titles", bytes(titles))):
        with files[suffix] as stream:
            stream.write(content)
    part = {
        "name": wanted.name,
        "first_document": wanted.start,
        "documents": len(rows),
        **{name: int(rows[name].sum()) for name in TOTALS if name != "documents"},
        "files": {suffix: {"bytes": file.size, "sha256": file.sha256} for suffix, file in files.items()},
    }
    write_whole(_record(job.folder, wanted.name), json.dumps(part).encode())
    return part


def _record(folder: Path, name: str) -> Path:
    return folder / f"{name}.done"


def _finished(folder: Path, wanted: Range) -> Part | None:
    """The record of a part, if all its files are complete."""
    try:
        part = json.loads(_record(folder, wanted.name).read_text())
        there = all(
            (folder / f"{wanted.name}.{suffix}").stat().st_size == part["files"][suffix]["bytes"] for suffix in SUFFIXES
        )
    except (FileNotFoundError, ValueError):
        return None
    return part if there else None


def _split_index(split: str, ranges: list[Range], done: dict[str, Part]) -> dict[str, Any]:
    parts = [done[r.name] for r in ranges if r.split == split]
    return {**{name: sum(part[name] for part in parts) for name in TOTALS}, "parts": parts}


def _make_all(job: Job, todo: list[Range], ranges: list[Range], processes: int | None) -> dict[str, Part]:
    """Make the missing parts, with a progress bar in bytes of text."""
    from tqdm import tqdm

    sizes = {r.name: r.size for r in ranges}
    total = sum(sizes.values())
    bar = tqdm(
        total=total,
        initial=total - sum(r.size for r in todo),
        unit="B",
        unit_scale=True,
        desc="prepare",
        mininterval=0.1 if sys.stderr.isatty() else 10,
    )
    if len(todo) < len(ranges):
        bar.write(f"continuing: {len(ranges) - len(todo)} of {len(ranges)} parts are complete", file=sys.stderr)
    made: dict[str, Part] = {}
    with bar:
        for part in _run(job, todo, min(processes or cores(), len(todo))):
            made[part["name"]] = part
            bar.set_postfix(parts=f"{len(ranges) - len(todo) + len(made)}/{len(ranges)}", refresh=False)
            bar.update(sizes[part["name"]])
    return made


def _run(job: Job, todo: list[Range], processes: int) -> Iterator[Part]:
    if processes <= 1:
        for wanted in todo:
            yield make_part(job, wanted)
        return
    # Spawned, not forked: pyarrow's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_begin, initargs=(job,)) as pool:
        futures = [pool.submit(_make_mine, wanted) for wanted in todo]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise DataError(
                "a process was killed, perhaps because memory ran out; finished parts are kept, the same command "
                "continues (if memory is short, lower processes=)"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_mine: Job | None = None  # in a worker process


def _begin(job: Job) -> None:
    global _mine
    _mine = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # after Ctrl-C the parts in progress are finished
    die_with_parent()


def _make_mine(wanted: Range) -> Part:
    assert _mine is not None
    return make_part(_mine, wanted)


def _summary(index: dict[str, Any]) -> list[str]:
    """Lines that say what was made, and count every irregularity."""
    lines = []
    for split, made in index["splits"].items():
        size = sum(part["files"][suffix]["bytes"] for part in made["parts"] for suffix in SUFFIXES)
        per_token = made["bytes"] / max(1, made["tokens"])
        lines.append(
            f"{split:<11}{made['documents']:>11,} documents {made['words']:>14,} words {made['tokens']:>14,} tokens "
            f"({per_token:.2f} bytes each), {len(made['parts'])} part(s), {size / 2**20:,.1f} MiB"
        )
        odd = {name: made[name] for name in FLAGS if made[name]}
        odd |= {"bad_shards": index["plan"]["splits"][split]["bad_shards"]}
        if any(odd.values()):
            lines.append(
                " " * 11 + "counted: " + ", ".join(f"{name} {count:,}" for name, count in odd.items() if count)
            )
    return lines


@dataclass
class Options:
    out: str | None = setting(None, "folder to write (required)", writes="folder")
    splits: list[str] = setting([], "splits to prepare; empty: all that the data provide", choices=SPLITS)
    processes: int | None = setting(None, "processes that tokenise; null: one per core", at_least=1)
    part_mb: float = setting(PART_MB, "megabytes of text per part", above=0)


@command(Options, overrides=True, words=True)
def main(options: Options, overrides: list[str], words: list[str]) -> int:
    """The command line in the module's docstring."""
    if words:
        return _verify(words)
    if not options.out:
        raise ConfigError("out=DIR is required: where to write")
    began = time.perf_counter()
    cfg, folder = compose(overrides), Path(options.out)
    folders: dict[str, Path] = {}
    model = ""
    try:
        for name, source in sources_of(cfg).items():
            splits = options.splits
            if name:
                splits = [split for split in splits_of(source) if not options.splits or split in options.splits]
                print(name)
            if name and not splits:
                continue
            folders[name] = at = folder / name
            with named(name):
                index = prepare(source, at, splits=splits, processes=options.processes, part_mb=options.part_mb)
            print(*_summary(index), sep="\n")
            model = tokenizer_of(at, index)
    except KeyboardInterrupt:
        print("\nstopped; finished parts are kept, the same command continues", file=sys.stderr)
        return 130
    print(f"{time.perf_counter() - began:.1f} s; use it with: {_use(cfg, folders)} {model}")
    return 0


def _use(cfg: Config, folders: dict[str, Path]) -> str:
    """The overrides with which a run reads what was prepared."""
    if "" in folders:
        return f"data=memmap 'data.train=[{folders['']}]'"
    shares = shares_of(cfg)
    parts = [
        f"{name}: {{data: memmap, train: [{folder}], weight: {shares[name]:g}}}" for name, folder in folders.items()
    ]
    return f"data=mixture 'data.mixture={{{', '.join(parts)}}}'"


def _verify(words: list[str]) -> int:
    if words[0] != "verify" or len(words) < 2:
        raise ConfigError(f"'{' '.join(words)}' is not understood; give key=value settings, or: verify DIR")
    status = 0
    for folder in words[1:]:
        problems = verify_prepared(folder)
        print("\n".join(f"error: {problem}" for problem in problems) or f"{folder}: every file is as it was written")
        status = status or int(bool(problems))
    return status


if __name__ == "__main__":
    sys.exit(main())
