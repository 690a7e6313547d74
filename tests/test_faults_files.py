"""Claims about data files: their content is inspected, whatever their names and wherever they are."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from data.build import build_corpus
from ovq.config import Config
from ovq.errors import ConfigError, Failure
from tests.data_helpers import config, texts, write_jsonl, write_parquet


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("OVQ_CACHE", str(folder))
    return folder


def data(kind: str, *paths: Any, **settings: str) -> Config:
    cfg = config(f"data={kind}", *(f"data.{name}={value}" for name, value in settings.items()))
    cfg.data.train = [str(path) for path in paths]
    return cfg


def read_all(cfg: Config) -> list[str]:
    corpus = build_corpus(cfg, "train")
    return [corpus.read(index).text for index in range(len(corpus))]


# --- folders, brackets and links -------------------------------------------------------------------------------------


def test_a_folder_stands_for_the_files_of_its_kind_at_any_depth(tmp_path: Path) -> None:
    books = tmp_path / "books"
    write_jsonl(books / "b.jsonl", ["2"])
    write_jsonl(books / "a" / "deep" / "x.JSONL", ["1"])
    write_jsonl(books / ".hidden" / "x.jsonl", ["hidden"])
    (books / "README.md").write_text("not a line of JSON")
    write_parquet(books / "c.parquet", ["3"])
    (books / "loop").symlink_to(books)
    assert read_all(data("jsonl", books)) == read_all(data("jsonl", f"{books}/")) == ["1", "2"]
    assert read_all(data("parquet", books)) == ["3"]
    assert read_all(data("jsonl", f"{tmp_path}/*")) == ["1", "2"], "a pattern that leads to a folder"


def test_a_folder_without_files_of_the_kind_is_not_called_missing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ConfigError, match=rf"{tmp_path}: a folder without \*.parquet, \*.pq files"):
        read_all(data("parquet", tmp_path))
    (tmp_path / "prepared.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"was made by python -m data.prepare; read it with data=memmap"):
        read_all(data("text", tmp_path))


def test_a_path_that_exists_is_no_pattern(tmp_path: Path) -> None:
    for name in ("books [1]", "a*b", "what?"):
        write_jsonl(tmp_path / name / "x[0-9].jsonl", [name])
        assert read_all(data("jsonl", tmp_path / name / "x[0-9].jsonl")) == [name]
    write_jsonl(tmp_path / "books [1]" / "x5.jsonl", ["five"])
    assert read_all(data("jsonl", f"{tmp_path}/books [[]1]/x[1-9].jsonl")) == ["five"]


def test_a_link_to_nothing_is_an_error_or_skipped_and_counted(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["1"])
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    for pattern in (tmp_path, f"{tmp_path}/*.jsonl", f"{tmp_path}/[ab].jsonl"):
        with pytest.raises(ConfigError, match=r"b.jsonl: a link to .*gone.jsonl, which does not exist"):
            read_all(data("jsonl", pattern))
    corpus = build_corpus(data("jsonl", tmp_path, on_bad_shard="skip"), "train")
    assert (len(corpus), corpus.bad_shards) == (1, 1)


def test_a_bucket_is_read_by_folder_and_by_name_too() -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/shelf/deep/a[1].jsonl", b'{"text": "1"}\n')
    memory.pipe("/shelf/b.jsonl.gz", gzip.compress(b'{"text": "2"}\n'))
    memory.pipe("/shelf/notes.md", b"no")
    assert sorted(read_all(data("jsonl", "memory://shelf"))) == ["1", "2"]
    assert read_all(data("jsonl", "memory://shelf/deep/a[1].jsonl")) == ["1"]


# --- compressed files ------------------------------------------------------------------------------------------------


def zstd(content: bytes) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


COMPRESS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}


@pytest.mark.parametrize("name", COMPRESS)
def test_compressed_files_are_read_at_random_whatever_they_are_called(tmp_path: Path, cache: Path, name: str) -> None:
    whole = write_jsonl(tmp_path / "plain.jsonl", texts()).read_bytes()
    half = len(whole.splitlines(keepends=True)) // 2
    parts = whole.splitlines(keepends=True)
    content = COMPRESS[name](b"".join(parts[:half])) + COMPRESS[name](b"".join(parts[half:]))  # two joined streams
    for called in (f"a.jsonl.{name}", f"a.JSONL.{name.upper()}", "a.jsonl"):
        folder = tmp_path / called.replace(".", "_")
        folder.mkdir()
        (folder / called).write_bytes(content)
        corpus = build_corpus(data("jsonl", folder), "train")
        order = [*range(len(corpus) - 1, -1, -1), 3]
        assert [corpus.read(i).text for i in order] == [texts()[i] for i in order]
        assert corpus.sizes().min() > 0 and corpus.sizes().sum() == len(whole)
    (tmp_path / "book").write_bytes(COMPRESS[name](b"a book"))
    assert read_all(data("text", tmp_path / "book")) == ["a book"]
    kept = len(list((cache / "decompressed").iterdir()))
    assert read_all(data("text", tmp_path / "book")) == ["a book"]
    assert len(list((cache / "decompressed").iterdir())) == kept, "a file is decompressed once"


def test_text_that_begins_as_bzip2_does_is_text_and_an_empty_bzip2_file_is_compressed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("BZhang wrote this, and BZh91 more")
    (tmp_path / "b.txt").write_bytes(bz2.compress(b""))
    (tmp_path / "c.txt").write_bytes(bz2.compress(b"a book", 1))
    assert read_all(data("text", tmp_path)) == ["BZhang wrote this, and BZh91 more", "", "a book"]


@pytest.mark.parametrize("name", COMPRESS)
def test_a_compressed_file_that_is_cut_short_is_a_bad_shard(tmp_path: Path, name: str) -> None:
    write_jsonl(tmp_path / "b.jsonl", ["good"])
    content = COMPRESS[name](write_jsonl(tmp_path / "a", texts()).read_bytes())
    (tmp_path / "a.jsonl").write_bytes(content[:-9])
    with pytest.raises(ConfigError, match=r"a.jsonl: cannot be decompressed .*data.on_bad_shard=skip"):
        read_all(data("jsonl", f"{tmp_path}/*.jsonl"))
    assert read_all(data("jsonl", f"{tmp_path}/*.jsonl", on_bad_shard="skip")) == ["good"]


@pytest.mark.parametrize("on_bad_shard", ["error", "skip"])
def test_a_cache_that_cannot_be_written_is_no_bad_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_bad_shard: str
) -> None:
    monkeypatch.setenv("OVQ_CACHE", "/proc/nope")
    write_jsonl(tmp_path / "b.jsonl", ["good"])
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(b'{"text": "good, too"}'))
    with pytest.raises(ConfigError, match="copy of .*a.jsonl cannot be written to /proc/nope.*set OVQ_CACHE"):
        read_all(data("jsonl", tmp_path, on_bad_shard=on_bad_shard))


# --- what is not text ------------------------------------------------------------------------------------------------


def archive() -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as made:
        made.writestr("a.txt", "text")
    return held.getvalue()


def tar() -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as made:
        made.addfile(tarfile.TarInfo("a.txt"))
    return held.getvalue()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"%PDF-1.7 words", "is a PDF file, not text; extract its text"),
        (archive(), "is a ZIP archive (as are .docx, .epub and .npz files), not text; unpack it"),
        (tar(), "is a tar archive, not text; unpack it"),
        (gzip.compress(tar(), mtime=0), "is a tar archive, not text; unpack it"),
        ("words".encode("utf-16"), "is text in UTF-16, not text; convert it to UTF-8: iconv"),
        (b"PAR1 and so on", "is a Parquet file, not text; read it with data=parquet"),
        (b"words\x00\x01\x02", "holds binary data, not text; leave it out"),
    ],
)
def test_what_is_not_text_is_refused_by_name(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "b.txt").write_text("good")
    for kind in ("text", "jsonl"):
        with pytest.raises(Failure) as error:
            read_all(data(kind, f"{tmp_path}/a.txt"))
        words = expected.replace("not text", "not JSON lines") if kind == "jsonl" else expected
        assert f"{tmp_path}/a.txt: {words}" in str(error.value)
    assert read_all(data("text", tmp_path, on_bad_shard="skip")) == ["good"]
