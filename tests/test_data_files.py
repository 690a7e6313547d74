"""Claims about reading files: memory is bounded by a book, and anything wrong with a file is reported or counted."""

from __future__ import annotations

import json
import os
import pickle
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.build import build_corpus, build_tokenizer, heldout_documents
from data.corpus import ShardCorpus, decode_utf8
from data.describe import describe
from data.index import index_shards
from data.sources import DataError, find_files
from ovq.config import Config
from ovq.errors import ConfigError
from tests.data_helpers import config, loader, texts, write_jsonl, write_parquet


def parquet(pattern: Path | str, *overrides: str) -> Config:
    return config("data=parquet", f"data.train=[{pattern}]", "data.num_workers=0", *overrides)


def read_all(cfg: Config) -> list[str]:
    corpus = build_corpus(cfg, "train")
    return [corpus.read(i).text for i in range(len(corpus))]


def book(length: int, seed: int) -> str:
    return bytes(np.random.default_rng(seed).integers(97, 123, length, np.uint8)).decode()


@pytest.fixture(scope="module")
def big_group(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One row group of 150 books of 200 kB each in pages of a few books, as a careful writer produces."""
    path = tmp_path_factory.mktemp("big") / "big.parquet"
    return write_parquet(path, [book(200_000, i) for i in range(150)], row_group_size=1000, write_batch_size=4)


def test_memory_is_bounded_by_a_book_and_not_by_a_row_group(big_group: Path) -> None:
    import pyarrow as pa

    corpus = build_corpus(parquet(big_group), "train")
    assert isinstance(corpus, ShardCorpus) and len(corpus.shards[0].rows) == 1
    before = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(before)  # counts from zero
    pa.set_memory_pool(pool)
    try:
        for index in (140, 3, 75):
            assert corpus.read(index).text == book(200_000, index)
        assert pool.bytes_allocated() == 0, "nothing is kept but the book"
        assert 200_000 < pool.max_memory() < 6_000_000, "of a row group of 30 MB"
        corpus.read(76), corpus.read(77)
        assert pool.max_memory() < 6_000_000
    finally:
        pa.set_memory_pool(before)


def test_reading_in_order_decodes_each_book_once(big_group: Path) -> None:
    corpus = build_corpus(parquet(big_group), "train")
    assert isinstance(corpus, ShardCorpus)
    for index in range(len(corpus)):
        assert len(corpus.read(index).text) == 200_000
    assert corpus.documents_decoded == 150
    assert corpus.read(149).text == corpus.read(149).text == book(200_000, 149)


def test_documents_of_every_format_can_be_read_in_any_order(tmp_path: Path) -> None:
    documents = texts()
    for i, text in enumerate(documents):
        path = tmp_path / "text" / f"{i:02d}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    write_jsonl(tmp_path / "0.jsonl", documents[:4])
    write_jsonl(tmp_path / "1.jsonl", documents[4:])
    write_parquet(tmp_path / "0.parquet", documents[:4], row_group_size=3)
    write_parquet(tmp_path / "1.parquet", documents[4:], row_group_size=2, compression="zstd")
    for kind, pattern, title in (
        ("text", "text/*.txt", "05"),
        ("jsonl", "*.jsonl", "book 1"),
        ("parquet", "*.parquet", "1 book 1"),
    ):
        field = {"text": "null", "jsonl": "title", "parquet": "short_book_title"}[kind]
        corpus = build_corpus(
            config(f"data={kind}", f"data.train=[{tmp_path}/{pattern}]", f"data.title_field={field}"), "train"
        )
        order = np.random.default_rng(0).permutation(len(documents))
        for index in [*order, *sorted(order), 5, 5]:
            assert corpus.read(int(index)).text == documents[index]
        again = pickle.loads(pickle.dumps(corpus))
        assert (again.read(5).text, again.read(5).title) == (documents[5], title)
        assert len(corpus.sizes()) == len(documents) and corpus.sizes().sum() >= sum(map(len, documents))


def test_patterns_keep_their_order_and_name_each_file_once(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(name)
    assert read_all(config("data=text", f"data.train=[{tmp_path}/c.md,{tmp_path}/*.txt,{tmp_path}/a.*]")) == [
        "c.md",
        "a.txt",
        "b.txt",
    ]


# --- missing and corrupt shards --------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for i in range(4):
        write_parquet(tmp_path / f"train-{i:05d}-of-00004.parquet", [f"shard {i} book {j}" for j in range(3)])
    return tmp_path


def both_ways(pattern: Path, words: str, capsys: pytest.CaptureFixture[str], left: int) -> None:
    """on_bad_shard=error raises an error with `words`; "skip" prints and counts the shard, and reads the rest."""
    with pytest.raises(ConfigError, match=words) as error:
        loader(parquet(pattern))
    assert "\n" not in str(error.value) and "data.on_bad_shard=skip" in str(error.value)
    skipping = parquet(pattern, "data.on_bad_shard=skip")
    assert len(read_all(skipping)) == left
    made = loader(skipping)
    assert made.counts == {"bad_shards": 1}
    next(iter(made))
    assert made.state_dict()["counts"]["bad_shards"] == 1
    assert "1 shard(s) left out" in capsys.readouterr().err
    found = describe(skipping)["train"]
    assert found["documents"] == left


def test_a_gap_in_a_numbered_series_is_a_missing_shard(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shards / "train-00002-of-00004.parquet").unlink()
    both_ways(shards / "train-*.parquet", "train-00002-of-00004: missing", capsys, 9)


def test_shards_that_a_pattern_excludes_are_not_missing(shards: Path) -> None:
    assert len(read_all(parquet(shards / "train-00002-of-00004.parquet"))) == 3
    two = parquet("", "data.on_bad_shard=error")
    two.data.train = [f"{shards}/train-0000[0-1]-of-*.parquet"]
    assert len(read_all(two)) == 6
    (shards / "train-00001-of-00004.parquet").unlink()
    with pytest.raises(ConfigError, match="train-00001-of-00004: missing"):
        read_all(two)


def test_a_numbered_series_may_begin_with_one(tmp_path: Path) -> None:
    for index in (1, 2, 3):
        (tmp_path / f"part-{index}-of-3.txt").write_text(f"text {index}")
    cfg = config("data=text", f"data.train=[{tmp_path}/*.txt]")
    assert read_all(cfg) == ["text 1", "text 2", "text 3"]
    (tmp_path / "part-2-of-3.txt").unlink()
    with pytest.raises(ConfigError, match=r"^data.train: [^;]*/part-2-of-3: missing \(data"):
        read_all(cfg)


def test_a_missing_file_is_an_error_or_skipped(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = shards / "train-00000-of-00004.parquet"
    write_parquet(shards / "a.parquet", ["one", "two"])
    with pytest.raises(ConfigError, match="nowhere.parquet: missing"):
        find_files(parquet(f"{shards}/a.parquet,{shards}/nowhere.parquet").data, "train")
    both_ways(f"{shards}/a.parquet,{shards}/nowhere.parquet", "nowhere.parquet: missing", capsys, 2)  # type: ignore[arg-type]
    one.unlink()
    with pytest.raises(ConfigError, match=r"no file matches .*/none-\*"):
        loader(parquet(f"{shards}/none-*.parquet", "data.on_bad_shard=skip"))


def cut(content: bytes) -> bytes:
    return content[:-100]


def empty(content: bytes) -> bytes:
    return b""


def other_ending(content: bytes) -> bytes:
    return content[:-1] + b"?"


def flipped_in_footer(content: bytes) -> bytes:
    return content[:-9] + bytes([content[-9] ^ 0x40]) + content[-8:]


def flipped_in_footer_start(content: bytes) -> bytes:
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    return content[:start] + bytes([content[start] ^ 0xFF]) + content[start + 1 :]


@pytest.mark.parametrize("corrupt", [cut, empty, other_ending, flipped_in_footer_start])
def test_a_corrupt_shard_is_an_error_or_skipped(shards: Path, corrupt: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = shards / "train-00001-of-00004.parquet"
    path.write_bytes(corrupt(path.read_bytes()))
    both_ways(shards / "train-*.parquet", "train-00001-of-00004.parquet: ", capsys, 9)


def test_a_flipped_byte_in_a_footer_changes_the_fingerprint(shards: Path) -> None:
    """The fingerprint catches what the reader does not notice."""
    made = loader(parquet(shards / "train-*.parquet"))
    path = shards / "train-00001-of-00004.parquet"
    path.write_bytes(flipped_in_footer(path.read_bytes()))
    with pytest.raises(ConfigError, match="the data differ|cannot|train-00001"):
        loader(parquet(shards / "train-*.parquet"), state={**made.state_dict()})


def test_a_damaged_page_within_a_shard_is_named_or_skipped_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_parquet(
        tmp_path / "a.parquet", [book(3000, i) for i in range(6)], row_group_size=2, write_page_checksum=True
    )
    good = read_all(parquet(path))
    content = bytearray(path.read_bytes())
    content[bytes(content).find(book(3000, 2)[:40].encode())] ^= 1  # a letter of the third book
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"a.parquet document 2: .*\(data.on_bad_shard=skip leaves"):
        read_all(parquet(path))
    skipping = parquet(path, "data.on_bad_shard=skip")
    # The page holds two books: both are lost, the others remain.
    assert read_all(skipping) == [*good[:2], "", "", *good[4:]]
    assert "a.parquet document 2 left out" in capsys.readouterr().err
    made = loader(skipping)
    for _ in islice(made, 6 * 3001 // 16):
        pass
    assert made.counts["unreadable_documents"] >= 2 and "empty_documents" not in made.counts


def test_a_broken_line_of_json_is_named_or_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "tw\n\n  \n{"text": "three", "title": 3}\n{"body": "four"}\n')
    cfg = config("data=jsonl", f"data.train=[{path}]")
    for index, line, words in (
        (1, 2, "not valid JSON: Invalid control character at character 13"),
        (3, 6, r"no field 'text' \(fields: body\); set data.text_field"),
    ):
        with pytest.raises(DataError, match=rf"a.jsonl line {line}: {words}"):
            build_corpus(cfg, "train").read(index)
    cfg.data.on_bad_shard = "skip"
    assert read_all(cfg) == ["one", "", "three", ""]


@pytest.mark.parametrize("kind", ["jsonl", "text", "parquet"])
def test_documents_of_a_file_that_vanishes_are_named_or_skipped_and_counted(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.file"
    writers: dict[str, Any] = {"jsonl": write_jsonl, "parquet": write_parquet}
    writers.get(kind, lambda path, _: path.write_text("text"))(path, ["one", "two"])
    cfg = config(f"data={kind}", f"data.train=[{path}]")
    strict = build_corpus(cfg, "train")
    cfg.data.on_bad_shard = "skip"
    corpus = build_corpus(cfg, "train")
    path.unlink()
    with pytest.raises(DataError, match=r"a\.file document 0: .*No such file.* \(data.on_bad_shard=skip"):
        strict.read(0)
    assert corpus.read(0).flags == {"unreadable_documents": 1}


# --- bad documents ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw,text,bad",
    [
        (b"abc", "abc", 0),
        ("caf\u00e9 \U0001f9ea \ufffd".encode(), "caf\u00e9 \U0001f9ea \ufffd", 0),  # a genuine U+FFFD is valid text
        (b"a\xffb", "a\ufffdb", 1),
        (b"\xe2\x82", "\ufffd", 1),  # the start of a euro sign
        (b"\xef\xbf\xbd\xfe", "\ufffd\ufffd", 1),
    ],
)
def test_bad_utf8_is_replaced_and_counted(raw: bytes, text: str, bad: int) -> None:
    assert decode_utf8(raw) == (text, bad)


def test_bad_and_empty_and_untitled_documents_are_counted(tmp_path: Path) -> None:
    lines = [b'{"text": "caf\xff"}', b'{"text": "", "title": "t"}', b'{"text": null}', b'{"text": "long enough text"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    write_parquet(tmp_path / "a.parquet", [b"caf\xff", "", None, "long enough text"])
    expected = {"bad_utf8": 1, "empty_documents": 2, "short_documents": 1, "documents": 2}
    for kind, field in (("jsonl", "title"), ("parquet", "short_book_title")):
        files = [f"data.train=[{tmp_path}/a.{kind}]", f"data.title_field={field}", "trainer.context=17"]
        made = loader(config(f"data={kind}", *files, "data.shuffle=false", "trainer.global_batch=1"))
        for batch in made:
            assert "\ufffd" not in "".join(batch.documents)
            if batch.lanes[0]["ordinal"] >= 3:
                break
        counts = {name: made.counts.get(name) for name in expected}
        # One row: the first book (6 bytes and a separator), two empty ones, and ten bytes of the last.
        assert counts == expected, kind
        assert made.counts.get("untitled_documents", 0) == (3 if kind == "jsonl" else 0)


def test_wrong_columns_are_rejected_with_the_legal_ones(shards: Path) -> None:
    pattern = shards / "train-*.parquet"
    with pytest.raises(
        ConfigError, match=r"data.text_field=body is not a column of .*legal: short_book_title, .*, text"
    ):
        loader(parquet(pattern, "data.text_field=body", "data.on_bad_shard=skip"))
    with pytest.raises(ConfigError, match="data.title_field=name is not a column"):
        loader(parquet(pattern, "data.title_field=name"))
    with pytest.raises(ConfigError, match="data.text_field=publication_date of .* holds int32, not text"):
        loader(parquet(pattern, "data.text_field=publication_date"))


def test_files_without_documents_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data.train is empty"):
        loader(config("data=jsonl"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="data.train holds no documents"):
        loader(config("data=jsonl", f"data.train=[{tmp_path}/empty.jsonl]"))


def test_buckets_are_read_like_files(tmp_path: Path) -> None:
    """s3:// and similar schemes go through fsspec, whose memory file system stands in for a bucket."""
    import fsspec

    local = write_parquet(tmp_path / "a.parquet", texts(), row_group_size=4)
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/x/a.parquet", local.read_bytes())
    memory.pipe("/bucket/x/a.jsonl", b"".join(json.dumps({"text": t}).encode() + b"\n" for t in texts()))
    assert read_all(parquet("memory://bucket/x/*.parquet")) == texts()
    assert read_all(config("data=jsonl", "data.train=[memory://bucket/x/a.jsonl]")) == texts()
    with pytest.raises(ConfigError, match="memory://bucket/x/b.parquet: missing"):
        loader(parquet("memory://bucket/x/b.parquet"))
    with pytest.raises(ConfigError, match=r"^data.train: S3://bucket/\*.parquet: .*Protocol not known: S3; write it"):
        loader(parquet("S3://bucket/*.parquet"))
    bucket, disk = (build_corpus(parquet(p), "train").fingerprint() for p in ("memory://bucket/x/*.parquet", local))
    assert bucket == disk, "a file's content matters, not its location"


def test_a_bucket_that_cannot_be_listed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec.core

    class NoCredentialsError(Exception):
        """Neither an OSError nor a ValueError, as botocore's."""

    def refuse(pattern: str) -> Any:
        raise NoCredentialsError("Unable to locate credentials")

    monkeypatch.setattr(fsspec.core, "url_to_fs", refuse)
    with pytest.raises(ConfigError, match=r"^data.train: s3://b/\*.parquet cannot be listed: .*Unable to locate cred"):
        loader(parquet("s3://b/*.parquet"))


def test_held_out_documents_are_in_file_order(shards: Path) -> None:
    cfg = parquet(shards / "train-*.parquet", f"data.validation=[{shards}/train-00000-of-00004.parquet]")
    cfg.data.title_field = "short_book_title"
    tokenizer = build_tokenizer(cfg)
    got = list(heldout_documents(cfg, tokenizer, "validation"))[:2]
    assert [d.title for d in got] == ["train-00000-of-00004 book 0", "train-00000-of-00004 book 1"]
    assert tokenizer.decode(got[1].tokens) == "shard 0 book 1" and got[1].num_bytes == 14 and got[1].num_words == 4
    assert got[0].tokens[0] == got[0].tokens[-1] == tokenizer.separator_id


def test_only_rank_0_looks_up_files_and_its_errors_reach_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """`on_main`, which the loader uses to open files, with one process in both roles: rank 0 sends, rank 1 receives."""
    import torch.distributed as dist

    from ovq.processes import on_main

    wire: list[Any] = []
    calls: list[int] = []

    def broadcast(box: list[Any], **_: Any) -> None:
        if dist.get_rank() == 0:
            wire[:] = pickle.loads(pickle.dumps(box))
        box[:] = wire

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)

    def lookup() -> int:
        calls.append(dist.get_rank())
        return 7

    def failing() -> int:
        raise DataError("gone for good")

    for rank in range(2):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        assert on_main(lookup) == 7
    for rank in range(2):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        with pytest.raises(DataError, match="gone for good"):
            on_main(failing if rank == 0 else lookup)
    assert calls == [0]


def test_open_files_are_keyed_by_process_so_forks_share_none(shards: Path) -> None:
    corpus = build_corpus(parquet(shards / "train-*.parquet"), "train")
    assert isinstance(corpus, ShardCorpus)
    corpus.read(0)
    assert all(pid == os.getpid() for pid, _ in corpus._open)
    for i in range(len(corpus)):
        corpus.read(i)
    assert len(index_shards(parquet(shards / "train-*.parquet").data, "train")[0]) == len(corpus._open) == 4


def test_parquet_documents_equal_those_that_datasets_reads(shards: Path) -> None:
    """Hugging Face's own reader is the oracle: the same documents in the same order."""
    datasets = pytest.importorskip("datasets")
    files = sorted(str(path) for path in shards.glob("train-*.parquet"))
    theirs = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    corpus = build_corpus(parquet(shards / "train-*.parquet"), "train")
    assert [row["text"] for row in theirs] == [corpus.read(i).text for i in range(len(corpus))]
