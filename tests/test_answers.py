"""Claims about testing on generated tasks: predictions in pieces equal those of one pass; counts are by index."""

from __future__ import annotations

import statistics
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data.build import build_task
from data.tasks.base import IGNORE, Task
from data.tasks.positional_recall import PositionalRecallTask
from data.tasks.recall import RecallTask
from data.tasks.regression import RegressionTask
from data.tasks.rows import sequences_for_test
from eval import answers
from ovq.compose import compose
from tests.helpers import Largest, small_model

CPU = torch.device("cpu")


class Oracle(nn.Module):
    """Gives the right answer (its task's oracle's) at every `right`-th label only. Needs whole sequences."""

    def __init__(self, task: Task, right: int = 1) -> None:
        super().__init__()
        self.task, self.right = task, right

    def forward(self, inputs: Tensor, *, logits_to_keep: int, **_: Any) -> SimpleNamespace:
        predicted = np.stack([self.task.oracle(row) for row in np.pad(inputs.numpy(), ((0, 0), (0, 1)), mode="edge")])
        predicted = predicted[:, :-1]
        for row in predicted:
            labels = np.flatnonzero(row != IGNORE)
            row[[i for n, i in enumerate(labels) if n % self.right]] = 0
        kept = torch.from_numpy(predicted[:, predicted.shape[1] - logits_to_keep :]).clamp_min(0)
        return SimpleNamespace(logits=20.0 * nn.functional.one_hot(kept, self.task.vocab_size), state=None)


def batch_of(task: Task, length: int, rows: int) -> tuple[Tensor, Tensor]:
    batch = next(sequences_for_test(task, length, seed=3, rows=rows, batch=rows))
    return batch.inputs, batch.targets


@pytest.mark.parametrize("name", ["sw_ovq", "sw_nope", "sw_gdn", "std_att"])
@pytest.mark.parametrize("piece", [7, 32, 1000])
def test_predictions_in_pieces_equal_those_of_one_pass(name: str, piece: int) -> None:
    task = PositionalRecallTask(occurrences=2, key_vocab=20, value_vocab=9, value_tokens=2, filler=0.2)
    model = small_model(name, vocab_size=task.vocab_size).double().eval()
    inputs, targets = batch_of(task, 117, 3)
    predicted, log_p = answers.predict(model, inputs, targets, CPU, piece)
    with torch.no_grad():
        logits = model(inputs).logits
    labelled = targets != IGNORE
    assert np.array_equal(predicted, torch.where(labelled, logits.argmax(-1), IGNORE).numpy())
    expected = logits.log_softmax(-1).gather(2, targets.clamp_min(0)[..., None])[..., 0].where(labelled, 0)
    assert np.abs(log_p - expected.numpy()).max() < 1e-4  # taken from float32 logits
    assert log_p[labelled.numpy()].max() < 0


def test_a_sequence_without_labels_is_not_run() -> None:
    inputs = torch.zeros(2, 5, dtype=torch.int64)
    predicted, log_p = answers.predict(nn.Identity(), inputs, torch.full((2, 5), IGNORE), CPU, 2)  # type: ignore[arg-type]
    assert (predicted == IGNORE).all() and (log_p == 0).all()


def test_logits_are_made_at_labels_only() -> None:
    """A needle's answer is a few tokens at the end of a long text, so its logits take almost no memory."""
    vocab, length, piece = 3000, 2048, 256
    model = small_model("sw_ovq", vocab_size=vocab).eval()
    inputs = torch.randint(vocab, (1, length), generator=torch.Generator().manual_seed(0))

    def largest(labels: int) -> int:
        targets = torch.full_like(inputs, IGNORE)
        targets[:, length - labels - 1 : -1] = inputs[:, length - labels :]
        with Largest() as seen:
            answers.predict(model, inputs, targets, CPU, piece)
        return seen.elements

    weights = vocab * 32
    assert largest(length - 1) >= piece * vocab  # the measurement can detect logits everywhere
    assert largest(8) <= max(weights, piece * vocab // 8)


@pytest.mark.parametrize("right", [1, 4])
def test_accuracy_counts_the_models_correct_answers(right: int) -> None:
    task = RecallTask(key_vocab=100, value_vocab=9)
    tally = answers.test(Oracle(task, right), CPU, task, 64, at_least=100)  # type: ignore[arg-type]
    assert tally.total == (112 // right, 112)  # 7 sequences of 16 queries
    assert tally.curve() == [(0, 1 / right, 112)]
    assert tally.by_sequence.shape == (7,) and tally.by_sequence.mean() == pytest.approx(1 / right)


def test_accuracy_is_by_the_index_of_each_answer() -> None:
    task = RegressionTask(functions=4)
    inputs, targets = (part.numpy() for part in batch_of(task, 9 * 24, 5))
    predicted, indices = targets.copy(), task.indices(inputs)
    predicted[indices == 2] += 1  # the third example of every function is wrong
    labelled = targets != IGNORE
    one = np.flatnonzero(labelled[0] & (indices[0] == 5))[0]
    predicted[0, one] += 1  # and so is one token of another
    tally = answers.tally(task, inputs, targets, predicted)
    count = 5 * 4 * 4  # sequences, functions, tokens of y
    assert tally.curve() == [(i, {2: 0.0, 5: 1 - 1 / count}.get(i, 1.0), count) for i in range(1, 6)]
    others = [1 - 1 / 5] * 4  # one of five examples of every function is wrong
    assert tally.by_sequence == pytest.approx([others[0] - 1 / (5 * 4 * 4), *others])


def test_the_standard_error_is_that_of_the_mean_over_sequences() -> None:
    several = np.array([0.1, 0.4, 0.4, 0.9])
    tally = answers.Tally(np.array([18]), np.array([40]), several)
    assert tally.standard_error == pytest.approx(statistics.stdev(several) / 2)
    assert answers.Tally(np.array([1]), np.array([10]), several[:1]).standard_error is None


def test_the_curve_of_a_solver_of_regression_is_flat_at_one() -> None:
    task = RegressionTask(functions=16)
    tally = answers.test(Oracle(task), CPU, task, 9 * 64, at_least=1000)  # type: ignore[arg-type]
    assert tally.curve() == [(i, 1.0, 6 * 64) for i in (1, 2, 3)]  # 6 sequences of 16 functions with 4 tokens of y


@pytest.mark.parametrize("name", ["recall", "positional_recall", "regression"])
def test_a_small_model_is_tested_at_64k_tokens(name: str) -> None:
    more = ["data.task.key_tokens=2", "data.task.key_vocab=128"] if name == "recall" else []
    task = build_task(compose(["data=task", f"data/task={name}", *more]))
    model = small_model("sw", vocab_size=task.vocab_size).eval()
    tally = answers.test(model, CPU, task, 65_536, at_least=1)
    right, total = tally.total
    assert total == task.describe(65_536)["answers"]
    assert right / total < 0.1, "an untrained model is at chance"


def test_loss_is_the_mean_over_labels_and_another_seed_gives_other_sequences() -> None:
    task = RecallTask(key_vocab=20, value_vocab=9, value_tokens=2)
    model = small_model("sw", vocab_size=task.vocab_size).eval()
    rows = -(-30 // task.describe(60)["answers"])
    batch = next(sequences_for_test(task, 60, seed=5, rows=rows, batch=rows))
    with torch.no_grad():
        summed = model(batch.inputs, targets_BT=batch.targets).loss
    tally = answers.test(model, CPU, task, 60, 30, seed=5)
    assert tally.loss == pytest.approx(float(summed) / int((batch.targets != IGNORE).sum()), rel=1e-5)
    assert answers.test(model, CPU, task, 60, 30).loss != tally.loss
