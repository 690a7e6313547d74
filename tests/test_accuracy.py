"""Claims about accuracy on a generated task: what is counted, by which index, and what is written to the run folder."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.build import build_task
from data.tasks.rows import sequences_for_test
from eval import accuracy, per_position, perplexity
from eval.answers import TEST_SEED, Tally
from ovq import config
from ovq.inference.run import load_run
from ovq.train.checkpoint import Checkpointer
from ovq.train.summary import summary_text
from tests.helpers import extra_of, small_config, small_model

TASK = ["data=task", "data/task=regression", "data.task.functions=3", "trainer.context=108"]


def trained(root: Path, model: str, *overrides: str) -> Path:
    """A run folder with a checkpoint of an untrained model."""
    cfg = small_config(model, *overrides)
    config.save(cfg, root)
    vocabulary = build_task(cfg).vocab_size if cfg.data.kind == "task" else 257
    built = small_model(model, vocab_size=vocabulary)
    Checkpointer(root, asynchronous=False).save(3, built, torch.optim.SGD(built.parameters()), extra_of(3))
    return root


def test_rows_hold_the_shares_of_one_pass_over_the_test_sequences(tmp_path: Path) -> None:
    run_dir = trained(tmp_path / "run", "sw_ovq", *TASK)
    assert accuracy.main([f"run={run_dir}", "lengths=[108,216]", "answers=300"]) == 0
    rows = accuracy.TABLE.read(run_dir)
    run = load_run(run_dir)
    task = build_task(run.cfg)
    for length in (108, 216):
        answers = task.describe(length)["answers"]
        batch = next(sequences_for_test(task, length, seed=TEST_SEED, rows=-(-300 // answers), batch=99))
        with torch.no_grad():
            predicted = run.model(batch.inputs).logits.argmax(-1)
        right, labelled = (predicted == batch.targets).numpy(), (batch.targets != -100).numpy()
        total, *curve = [row for row in rows if row["length"] == length]
        assert total["index"] is None and total["answers"] == labelled.sum() >= 300
        assert total["accuracy"] == pytest.approx(right[labelled].mean())
        indices = task.indices(batch.inputs.numpy())
        assert [row["index"] for row in curve] == list(range(1, length // 9 // 3))
        for row in curve:
            chosen = labelled & (indices == row["index"])
            assert row["answers"] == chosen.sum() and row["accuracy"] == pytest.approx(right[chosen].mean())
    assert rows[0]["state_bytes"] == 4 * rows[0]["state_numbers"] and rows[0]["train_context"] == 108
    assert json.loads(rows[0]["settings"])["functions"] == 3
    written = list(csv.DictReader((run_dir / "accuracy.csv").open()))
    assert len(written) == len(rows) and written[0]["index"] == ""
    assert (run_dir / "plots" / "accuracy_regression.png").stat().st_size > 5000


def test_other_settings_and_capacities_are_added_and_the_same_test_is_replaced(tmp_path: Path) -> None:
    run_dir = trained(tmp_path / "run", "sw_ovq", *TASK)
    line = [f"run={run_dir}", "lengths=[216]", "answers=10"]
    totals = []
    for more in ([], [], ["data.task.functions=9"], ["num_centroids=3"], ["model.mixers.ovq.seeding=random"]):
        assert accuracy.main([*line, *more]) == 0
        totals.append([r for r in accuracy.TABLE.read(run_dir) if r["index"] is None])
    assert [len(found) for found in totals] == [1, 1, 2, 3, 4]
    assert [json.loads(row["settings"])["functions"] for row in totals[-1]] == [3, 9, 3, 3]
    assert [row["num_centroids"] for row in totals[-1]] == [None, None, 3, None]
    assert (run_dir / "plots" / "accuracy_regression_N3.png").exists()
    names = [path.name for path in (run_dir / "plots").glob("accuracy*.png")]
    assert len(names) == 4, "those of other settings have a hash in their names"


def test_lengths_that_the_task_cannot_have_are_left_out_unless_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished run says that this command is next, and it must work with the settings of any run."""
    run_dir = trained(tmp_path / "run", "sw", "data=recall", "data.task.key_vocab=20", "trainer.context=32")
    assert accuracy.main([f"run={run_dir}", "answers=10"]) == 0
    assert "lengths of 128 tokens and more are left out: " in capsys.readouterr().err
    assert {row["length"] for row in accuracy.TABLE.read(run_dir)} == {32, 64}
    assert accuracy.main([f"run={run_dir}", "answers=10", "lengths=[128]"]) == 2


def test_a_task_without_an_index_has_one_row_per_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = trained(tmp_path / "run", "sw", "data=recall", "data.task.value_vocab=4", "trainer.context=32")
    lengths: list[int] = []

    def half(model: Any, device: Any, task: Any, length: int, at_least: int) -> Tally:
        lengths.append(length)
        return Tally(np.array([length // 2]), np.array([length]), np.array([0.25, 0.75]))

    monkeypatch.setattr(accuracy, "test", half)
    assert accuracy.main([f"run={run_dir}"]) == 0
    assert lengths == [32, 64, 128, 256, 512]
    rows = accuracy.TABLE.read(run_dir)
    assert [(row["length"], row["index"], row["accuracy"], row["answers"]) for row in rows] == [
        (length, None, 0.5, length) for length in lengths
    ]
    assert {(row["sequences"], row["standard_error"]) for row in rows} == {(2, 0.25)}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lengths=[108,9]"], "a regression sequence of 9 tokens holds 1 examples"),
        (["data.task.functions=200"], "data.task.labels=128 must be at least data.task.functions=200"),
        (["data.task.labels=200"], "does not fit this model"),
        (["num_centroids=4"], "eval.num_centroids=4: no layer has a dictionary"),
        (["lengths=[0]"], "lengths=[0] must be at least 1"),
    ],
)
def test_impossible_requests_are_one_line(
    tmp_path: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = trained(tmp_path / "run", "sw", *TASK)
    assert accuracy.main([f"run={run_dir}", "answers=10", *arguments]) in (1, 2)
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and not (run_dir / "accuracy.parquet").exists()


@pytest.mark.parametrize("unread", ["eval.restart=16", "eval.piece=16", "eval.at_end=false"])
def test_settings_of_other_evaluations_are_refused(
    tmp_path: Path, unread: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = trained(tmp_path / "run", "sw", *TASK)
    assert accuracy.main([f"run={run_dir}", unread]) == 2
    assert "does not read eval." in (said := capsys.readouterr().err) and said.count("\n") == 1


@pytest.mark.parametrize("tool", [per_position, perplexity])
def test_a_run_on_a_task_has_no_loss_by_position(tool: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = trained(tmp_path / "run", "sw", *TASK)
    assert tool.main([f"run={run_dir}"]) == 2
    said = capsys.readouterr().err
    assert "a generated task, which has no text; see python -m eval.accuracy" in said and said.count("\n") == 1


def test_the_summary_of_a_run_on_a_task_names_the_tools_for_it(tmp_path: Path) -> None:
    summary = {"step": 3, "stopped_by": None, "tokens": 9, "first_loss": None, "tokens_per_s": None, "memory_gib": 0.5}
    text = summary_text({**summary, "evaluation": {}}, small_config("sw", *TASK), tmp_path)
    commands = [line.strip().partition("     ")[0] for line in text.partition("next:\n")[2].splitlines()]
    assert commands == [
        f"python -m eval.accuracy run={tmp_path}",
        f"python -m eval.plot 'runs=[{tmp_path}]' kind=accuracy",
    ]


def test_a_run_on_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = trained(tmp_path / "run", "sw", "data=builtin")
    assert accuracy.main([f"run={run_dir}"]) == 2
    assert "was not trained on a generated task; see python -m eval.per_position" in capsys.readouterr().err
