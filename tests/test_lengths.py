"""Claims about `trainer.lengths`: shorter sequences in early steps, cut from the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data.loader import Batch
from ovq.compose import compose
from ovq.config import load, save
from ovq.errors import ConfigError
from ovq.lengths import length_at, phases
from ovq.model import flops_per_token
from ovq.train.metrics import read_rows
from tests.helpers import small_config, small_model
from tests.training import RUN, VOCAB, rows, trainer_for

LENGTHS = "trainer.lengths={0:8,2:12,4:24}"


def record(run_dir: Path) -> list[dict[str, Any]]:
    return [row for row in read_rows(run_dir / "metrics.jsonl") if "loss" in row]


def test_the_length_changes_after_the_steps_that_are_named() -> None:
    trainer = small_config("sw", *RUN, LENGTHS).trainer
    assert [length_at(step, trainer) for step in range(1, 8)] == [8, 8, 12, 12, 24, 24, 24]
    assert phases(trainer) == [(2, 8), (2, 12), (2, 24)]
    trainer.steps = 3
    assert phases(trainer) == [(2, 8), (1, 12)]
    assert phases(small_config("sw", *RUN).trainer) == [(6, 24)]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["trainer.lengths={5:8}"], "trainer.lengths must begin with step 0, but begins with 5"),
        (
            ["trainer.lengths={0:7}"],
            "trainer.lengths has 7 tokens from step 0 on, which must divide trainer.context=24",
        ),
        (["trainer.lengths={0:8,3:0}"], "trainer.lengths has 0 tokens from step 3 on"),
        (
            ["trainer.lengths={0:3,5:24}", "trainer.context_parallel=2"],
            "trainer.context_parallel=2 must divide all trainer.lengths, 3 of step 0 too",
        ),
    ],
)
def test_lengths_that_cannot_be_are_one_line(settings: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        small_config("sw", *RUN, *settings)
    assert str(error.value).startswith(says) and "\n" not in str(error.value)


def test_questions_are_not_cut_off_what_they_ask_about() -> None:
    with pytest.raises(ConfigError, match="trainer.lengths would cut a generated task's questions"):
        compose(["experiment=recall", "trainer.lengths={0:32}"])


def test_lengths_survive_the_run_folder(tmp_path: Path) -> None:
    save(small_config("sw", *RUN, LENGTHS), tmp_path)
    assert load(tmp_path).trainer.lengths == {0: 8, 2: 12, 4: 24}


def test_a_cut_batch_has_the_same_tokens_and_bounds_where_it_is_cut() -> None:
    inputs, bounds = torch.arange(16).view(2, 8), torch.tensor([0, 3, 8, 16], dtype=torch.int32)
    cut = Batch(inputs, inputs + 1, bounds).cut(4)
    assert cut.inputs.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert torch.equal(cut.targets, cut.inputs + 1)
    assert cut.cu_seqlens is not None and cut.cu_seqlens.tolist() == [0, 3, 4, 8, 12, 16]
    assert Batch(inputs, inputs).cut(8).inputs is inputs
    with pytest.raises(ConfigError, match="trainer.lengths has 3 tokens, which must divide the 8 tokens of every row"):
        Batch(inputs, inputs).cut(3)


def test_a_run_reads_the_same_tokens_whatever_the_lengths_and_resumes_in_any_of_them(tmp_path: Path) -> None:
    settings = ["trainer.context=24", LENGTHS, "trainer.checkpoint_every=3"]
    trainer_for(tmp_path / "cut", *settings).fit()
    trainer_for(tmp_path / "whole").fit()
    cut, whole = record(tmp_path / "cut"), record(tmp_path / "whole")
    assert [row["length"] for row in cut] == [8, 8, 12, 12, 24, 24]
    for name in ("token_hash", "tokens"):
        assert [row[name] for row in cut] == [row[name] for row in whole]

    inputs, targets = (x.reshape(-1, 8) for x in rows(small_config("sw_ovq", *RUN), 0))
    loss = small_model("sw_ovq", *RUN, vocab_size=VOCAB)(inputs, targets_BT=targets).loss
    assert cut[0]["loss"] == pytest.approx(float(loss.detach()) / int((targets != -100).sum()), rel=1e-6)

    branch = str(tmp_path / "cut" / "checkpoints" / "step_00000003")
    trainer_for(tmp_path / "resumed", *settings, resume=branch).fit()
    assert [row["loss"] for row in record(tmp_path / "resumed")] == [row["loss"] for row in cut[3:]]


def test_mfu_counts_the_work_of_the_length_in_use(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, "trainer.context=24", LENGTHS, "trainer.log_every=2")
    trainer.flops_per_token = lambda length: flops_per_token(trainer.model, length)
    trainer.peak = (1e10, "stated")  # more than a fast machine reaches
    batches = iter(trainer.loader)
    trainer._restart_window()  # as `fit` does
    for _ in range(6):
        trainer.train_step(batches)
        if trainer.step % 2 == 0:
            trainer.flush()
    for row in record(tmp_path):
        work = flops_per_token(trainer.model, row["length"])
        assert row["mfu"] == pytest.approx(row["tokens_per_s"] * work / 1e10, rel=1e-2)
    assert flops_per_token(trainer.model, 24) > flops_per_token(trainer.model, 8)
