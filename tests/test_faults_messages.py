"""Claims about error messages on data: one short line with the file, line, what is wrong and what to do about it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.build import build_corpus
from ovq.errors import LONGEST, Failure, one_line
from tests.data_helpers import config, text_of, write_parquet

GOOD = b'{"text": "one", "title": "t"}\n'


def said(kind: str, path: Path, *overrides: str) -> str:
    """The message of the error that reading all documents of a file raises."""
    with pytest.raises(Failure) as error:
        corpus = build_corpus(config(f"data={kind}", f"data.train=[{path}]", *overrides), "train")
        for index in range(len(corpus)):
            corpus.read(index)
    message = str(error.value)
    assert "\n" not in message and len(message) < LONGEST + 400 and str(path) in message, message
    return message


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"42", 'line 2: a number, where an object is needed: {"text": "..."}'),
        (b"[1, 2]", "line 2: a list, where an object is needed"),
        (b'"words"', "line 2: a string, where an object is needed"),
        (b"null", "line 2: null, where an object is needed"),
        (b'{"text": 7}', "line 2: field 'text' holds a number, not text"),
        (b'{"text": ["a"]}', "line 2: field 'text' holds a list, not text"),
        (b'{"body": "a"}', "line 2: no field 'text' (fields: body); set data.text_field"),
        (b'{"text": "a"', "line 2: not valid JSON: Expecting ',' delimiter at character"),
        (b"{'text': 'a'}", "line 2: not valid JSON: Expecting property name"),
        (b"x" * 3_000_000, "line 2: not valid JSON: Expecting value at character 1"),
        (json.dumps({f"f{i}": i for i in range(50_000)}).encode(), "line 2: no field 'text' (fields: f0, f1, f10"),
        (b"[" * 200_000, "line 2: "),
    ],
)
def test_a_bad_line_of_json_is_named_with_what_is_wrong(tmp_path: Path, line: bytes, expected: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + line + b"\n" + GOOD)
    message = said("jsonl", path)
    assert f"{path} {expected}" in message
    assert message.endswith("(data.on_bad_shard=skip leaves it out and counts it)")


@pytest.mark.parametrize(
    ("kind", "content", "expected"),
    [
        ("jsonl", b'{"body": "a", "id": 1}\n', "data.text_field=text is not a field of {path}; legal: body, id"),
        ("jsonl", b'[\n{"text": "a"}\n]', "{path}: is one JSON array, not JSON lines; write an object a line: jq"),
        ("parquet", GOOD, "{path}: not a Parquet file; JSON lines are read with data=jsonl"),
        ("parquet", b"", "{path}: not a Parquet file (0 bytes)"),
    ],
)
def test_a_file_of_another_format_is_refused_by_name(tmp_path: Path, kind: str, content: bytes, expected: str) -> None:
    path = tmp_path / "a.data"
    path.write_bytes(content)
    assert expected.format(path=path) in said(kind, path)


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path: Path) -> None:
    for kind, content in (("jsonl", b'{"text": "one"}\n{"text": "two"}\n'), ("text", b"one")):
        path = tmp_path / f"a.{kind}"
        path.write_bytes(b"\xef\xbb\xbf" + content)
        corpus = build_corpus(config(f"data={kind}", f"data.train=[{path}]"), "train")
        assert corpus.read(0).text == "one"


def test_two_columns_of_one_name_are_counted_in_the_message(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), path)
    assert f"{path} has 2 columns named text (data.text_field)" in said("parquet", path)


def test_a_title_in_bad_utf8_is_mended_and_counted_like_text(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = write_parquet(tmp_path / "a.parquet", [text_of(20, 0)])
    table = pq.read_table(path)
    raw = pa.array([b"caf\xff"], pa.binary())
    title = pa.Array.from_buffers(pa.string(), 1, raw.buffers())
    pq.write_table(table.set_column(0, "short_book_title", title), path)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one", "short_book_title": "caf\xff"}\n')
    for kind in ("parquet", "jsonl"):
        cfg = config(f"data={kind}", f"data.train=[{tmp_path}/a.{kind}]", "data.title_field=short_book_title")
        document = build_corpus(cfg, "train").read(0)
        assert (document.title, document.flags) == ("caf\ufffd", {"bad_utf8": 1})


def test_a_message_keeps_its_beginning_and_its_end() -> None:
    cut = one_line(ValueError("what is wrong " + "x" * 10_000_000 + " what to do"))
    assert cut.startswith("what is wrong x") and cut.endswith("x what to do") and len(cut) <= LONGEST + 5
