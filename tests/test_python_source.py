"""Claims about the data set made of installed packages: whole files in order, no package in two splits."""

from __future__ import annotations

import shlex
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data import python_source
from data.build import build_corpus, sources_of
from ovq.compose import compose

SPLITS = ("train", "validation", "test")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three importable packages of small files, one of them with a file that is not UTF-8."""
    site = tmp_path / "site"
    for name in ("ovq_one", "ovq_two", "ovq_three"):
        for folder in (".", "b", "a"):
            (site / name / folder).mkdir(parents=True, exist_ok=True)
            for file in ("z.py", "__init__.py"):
                (site / name / folder / file).write_text(f"{name} {folder} {file} " + "x" * 250)
    (site / "ovq_one" / "latin.py").write_bytes("caf\xe9".encode("latin-1"))
    monkeypatch.syspath_prepend(str(site))
    return site


def test_documents_hold_every_file_once_in_order_and_are_long_enough(packages: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    chosen = ["train=[ovq_one]", "validation=[ovq_two]", "test=[ovq_three]"]
    assert python_source.main([f"out={out}", *chosen, "document_kb=1"]) == 0
    table = pq.read_table(out / "train-00000-of-00001.parquet").to_pydict()
    assert table["path"] == ["ovq_one/__init__.py", "ovq_one/b/__init__.py"], "a folder is not divided"
    assert all(len(text) >= 500 for text in table["text"])
    titles = [line for text in table["text"] for line in text.split("\n") if line.startswith("# ")]
    files = [f"ovq_one/{folder}{name}" for folder in ("", "a/", "b/") for name in ("__init__.py", "z.py")]
    assert titles == [f"# {name}" for name in files]
    assert "ovq_one a z.py xxx" in table["text"][0]


def test_its_files_are_a_corpus_with_the_path_as_title(
    packages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ["train=[ovq_one]", "validation=[ovq_two]", "test=[ovq_three]"]
    assert python_source.main([f"out={tmp_path}", *chosen, "document_kb=1"]) == 0
    printed = capsys.readouterr().out.splitlines()[-1].partition("use it with: ")[2]
    cfg = compose(shlex.split(printed))
    source = next(iter(sources_of(cfg).values()))
    titles = [build_corpus(source, split).read(0).title for split in SPLITS]
    assert titles == [f"{name}/__init__.py" for name in ("ovq_one", "ovq_two", "ovq_three")]
    first = (tmp_path / "train-00000-of-00001.parquet").read_bytes()
    assert python_source.main([f"out={tmp_path}", *chosen, "document_kb=1"]) == 0
    assert (tmp_path / "train-00000-of-00001.parquet").read_bytes() == first


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["train=[ovq_none]"], "'ovq_none' is not an installed package"),
        (["train=[../etc]"], "'../etc' is not an installed package"),
        (["train=[ovq_one]", "test=[ovq_one]"], "ovq_one is named twice"),
        (["test=[ovq_one]", "document_kb=100"], "test=['ovq_one'] holds no document of 50 thousand characters"),
    ],
)
def test_wrong_packages_are_refused_and_nothing_is_written(
    options: list[str], error: str, packages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert python_source.main([f"out={tmp_path}/out", *options]) == 2
    assert error in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
