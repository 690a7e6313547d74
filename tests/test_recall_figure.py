"""Claims about the recall figure: it tests the trained models, reuses finished runs, and records how it was made."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from eval.figures import recall

SMALL = [
    *("model.num_layers=2", "model.dim=16", "model.num_heads=1", "model.num_kv_heads=1", "model.head_dim=16"),
    *("model.ffn_dim=16", "data.task.key_vocab=64", "data.task.value_vocab=4", "data.task.short_steps=1"),
    *("trainer.steps=2", "trainer.context=32", "trainer.global_batch=4", "trainer.micro_batch=4"),
    *("trainer.device=cpu", "optim.warmup_steps=1"),
]


def test_the_figure_trains_its_runs_once_and_then_reuses_them(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    line = ["models=[sw_ovq]", "lengths=[1,2]", "num_centroids=[8]", "answers=20", f"out={tmp_path}/out"]
    line += [f"runs_root={tmp_path}/runs", *SMALL]
    assert recall.main(line) == 0
    (run,) = (tmp_path / "runs").iterdir()
    rows = list(csv.DictReader((tmp_path / "out" / "recall.csv").open()))
    assert list(rows[0]) == ["model", "seed", "train_length", "length", "num_centroids", "accuracy", "answers"]
    assert [(row["length"], row["num_centroids"]) for row in rows] == [
        ("32", "8"), ("64", "8"), ("32", "256"), ("64", "256")
    ]  # fmt: skip
    assert all(row["model"] == "sw_ovq" and 0 <= float(row["accuracy"]) <= 1 for row in rows)
    assert all(int(row["answers"]) >= 20 and row["train_length"] == "32" for row in rows)
    assert (tmp_path / "out" / "recall.png").stat().st_size > 5000
    made = json.loads((tmp_path / "out" / "recall.json").read_text())
    assert made["runs"][run.name]["steps"] == 2 and made["machine"]["command"] and made["machine"]["date"]

    hints = (run / "sweep.log").read_text().partition("next:")[2]
    assert "eval.plot" in hints and "eval.per_position" not in hints

    before = (run / "metrics.jsonl").read_bytes()
    assert recall.main(line) == 0 and "finished before" in capsys.readouterr().out
    assert (run / "metrics.jsonl").read_bytes() == before
    again = list(csv.DictReader((tmp_path / "out" / "recall.csv").open()))
    assert again == rows

    config_file = run / "config.yaml"
    config_file.write_text(config_file.read_text().replace("value_vocab: 4", "value_vocab: 5"))
    assert recall.main(line) == 2
    assert "was made with other settings (data.task.value_vocab: 5 -> 4)" in capsys.readouterr().err


def test_settings_that_an_option_replaces_are_rejected(capsys: pytest.CaptureFixture) -> None:
    assert recall.main(["seed=1"]) == 2
    assert capsys.readouterr().err == "error: seed=1 cannot be given here; use seeds=[0,1]\n"
    assert recall.main(["models=[nope]"]) == 2 and "model=nope" in capsys.readouterr().err
    assert recall.main(["trainer.stepz=1"]) == 2 and "trainer.steps" in capsys.readouterr().err
