"""Claims about the embedded corpus, and about the tools that inspect data: describe and the pipeline benchmark."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data.build import build_corpus, build_tokenizer, heldout_documents
from data.builtin import BuiltinCorpus
from data.describe import describe
from eval.bench import pipeline
from ovq.compose import compose
from ovq.config import save
from ovq.errors import ConfigError
from tests.data_helpers import config, loader, write_jsonl

SPLITS = ("train", "validation", "test")


def test_the_corpus_is_the_same_in_every_process() -> None:
    code = f"from data.builtin import BuiltinCorpus as B; print([B(s).fingerprint()['files'] for s in {SPLITS}])"
    environment = {**os.environ, "PYTHONHASHSEED": "3"}
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert other.stdout.strip() == repr([BuiltinCorpus(split).fingerprint()["files"] for split in SPLITS])


def test_the_corpus_is_large_and_its_held_out_documents_are_long() -> None:
    corpora = {split: BuiltinCorpus(split) for split in SPLITS}
    documents = {split: [corpus.read(i) for i in range(len(corpus))] for split, corpus in corpora.items()}
    assert sum(len(d.text.encode()) for d in documents["train"]) > 5_000_000
    assert sum(len(d.text.encode()) >= 65_536 for d in documents["validation"]) >= 8
    assert sum(len(d.text.encode()) >= 65_536 for d in documents["test"]) >= 4
    titles = [d.title for split in SPLITS for d in documents[split]]
    assert len(titles) == len(set(titles)) and len({d.text for s in SPLITS for d in documents[s]}) == len(titles)


def test_the_demo_finds_enough_long_documents_to_evaluate_on() -> None:
    cfg = compose(["experiment=cpu_demo"])
    found = heldout_documents(cfg, build_tokenizer(cfg), "validation")
    assert sum(len(d.tokens) >= 65_538 for d in found) >= cfg.eval.documents


def test_a_pickled_corpus_is_small_and_rereads_its_documents() -> None:
    corpus = BuiltinCorpus("validation")
    assert len(pickle.dumps(corpus)) < 1000
    assert pickle.loads(pickle.dumps(corpus)).read(2) == corpus.read(2)


def test_a_python_without_its_sources_fails_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.builtin._documents", lambda: [("a", "b")])
    with pytest.raises(ConfigError, match="no library sources in .*; use data=text"):
        build_corpus(config("data=builtin"), "train")


def test_data_of_every_kind_are_described(tmp_path: Path) -> None:
    found = describe(config("data=builtin"))
    assert list(found) == list(SPLITS) and found["validation"]["documents"] == len(BuiltinCorpus("validation"))
    path = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    assert describe(config("data=jsonl", f"data.train=[{path}]")) == {
        "train": {"shards": 1, "missing": 0, "bytes": path.stat().st_size, "documents": None}
    }
    assert "no file matches" in describe(config("data=text", f"data.train=[{tmp_path}/*.txt]"))["train"]["error"]
    assert describe(compose(["data=recall"]))["train"]["vocabulary"] == 4353
    assert "has no prepared.json" in describe(config("data=memmap", f"data.train=[{tmp_path}]"))["train"]["error"]


@pytest.fixture
def quick(tmp_path: Path) -> list[str]:
    path = write_jsonl(tmp_path / "a.jsonl", ["some words of text " * 50] * 4)
    return ["data=jsonl", f"data.train=[{path}]", "trainer.context=64", "seconds=0.1"]


def test_bench_compares_the_pipelines_speed_with_the_need(
    quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "pipeline.json"
    assert pipeline.main([*quick, "workers=[0,1]", "need=100", f"json={report}"]) == 0
    written = json.loads(report.read_text())
    assert [row["workers"] for row in written["rows"]] == [0, 1] and written["need"] == 100
    assert all(row["tokens_per_s"] > 1000 and row["memory_mib"] > 10 for row in written["rows"])
    # Every token is a byte except the separators, one in every 951 tokens.
    assert written["rows"][0]["text_mb_per_s"] == pytest.approx(written["rows"][0]["tokens_per_s"] / 1e6, rel=0.1)
    assert written["machine"]["processor"] and written["config"]["trainer"]["context"] == 64
    assert "needed: 100 tokens/s" in (said := capsys.readouterr().out) and "enough" in said and "NOT" not in said
    assert pipeline.main([*quick, "workers=0", "need=1e15"]) == 0
    assert "NOT enough" in capsys.readouterr().out


def test_bench_takes_a_runs_settings_and_its_speed(
    quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    save(compose([o for o in quick if not o.startswith("seconds")]), run)
    assert pipeline.main([f"run={run}"]) == 2 and "has no step yet" in capsys.readouterr().err
    rows: list[dict[str, Any]] = [{"step": i, "tokens_per_s": speed} for i, speed in enumerate((10.0, 500.0, 9e9))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert pipeline.main([f"run={run}", "seconds=0.1", "workers=0"]) == 0
    assert "needed: 500 tokens/s" in capsys.readouterr().out
    assert pipeline.main([f"run={run}", "data=builtin"]) == 2 and "brings its own settings" in capsys.readouterr().err


def test_the_number_of_workers_is_lowered_to_divide_the_lanes() -> None:
    for lanes, requested, got in ((8, 3, 2), (6, 4, 3), (1, 2, 1), (4, 0, 0)):
        made = loader(config("data=builtin", f"trainer.global_batch={lanes}", f"data.num_workers={requested}"))
        assert made.num_workers == got
