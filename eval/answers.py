"""Test a model on a generated task: its predictions at the answers, piece by piece with carried state, and their tally.

Logits are computed only from a piece's first label on, so memory grows with the context only by what the mixers keep.

Shapes: B sequences in a batch, S in a test, T positions, N values of an index.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data.tasks.base import IGNORE, Task
from data.tasks.rows import sequences_for_test
from ovq.mixers.base import detach_state
from ovq.model import Transformer

TEST_SEED = 1  # of the sequences that results are reported on; choices are made on others (eval.figures.search)
TOKENS_AT_ONCE = 16384  # tokens per forward pass, which bounds the memory of the logits


@dataclass
class Tally:
    """Numbers of correct answers and of all answers by index (`Task.indices`), int64 [N] each, and the accuracy of each
    sequence, float64 [S]; `loss` is the mean negative log-probability of all labels, in nats, if it was measured."""

    right: np.ndarray
    answers: np.ndarray
    by_sequence: np.ndarray
    loss: float | None = None

    @property
    def total(self) -> tuple[int, int]:
        """(correct answers, answers)."""
        return int(self.right.sum()), int(self.answers.sum())

    @property
    def standard_error(self) -> float | None:
        """Of the mean accuracy over sequences, which have equally many answers; None with a single sequence."""
        count = len(self.by_sequence)
        return float(self.by_sequence.std(ddof=1) / math.sqrt(count)) if count > 1 else None

    def curve(self) -> list[tuple[int, float, int]]:
        """(index, accuracy in 0 to 1, answers) of every index that has answers."""
        seen = np.flatnonzero(self.answers)
        return [(int(i), float(self.right[i] / self.answers[i]), int(self.answers[i])) for i in seen]


@torch.inference_mode()
def predict(
    model: Transformer,
    inputs_BT: torch.Tensor,
    targets_BT: torch.Tensor,
    device: torch.device,
    piece: int,
    between: Callable[[list[Any]], list[Any]] = lambda state: state,
) -> tuple[np.ndarray, np.ndarray]:
    """The model's greedy prediction at each label, and the log-probability of the label.

    Teacher-forced: the tokens before a label are those of the sequence. Greedy decoding would produce a whole answer
    exactly if all its predictions here are right.

    Args:
        inputs_BT, targets_BT: int64; a target is IGNORE where there is no label.
        piece: positions per forward pass.
        between: maps the state after one piece to the state before the next.

    Returns:
        Predicted tokens int64 [B, T], IGNORE where there is no label; and the log-probability (nats) of each label,
        float64 [B, T], 0 where there is none.
    """
    predicted = np.full(targets_BT.shape, IGNORE, np.int64)
    log_p = np.zeros(targets_BT.shape)
    columns = (targets_BT != IGNORE).any(dim=0).nonzero()[:, 0].tolist()
    state = None
    for start in range(0, columns[-1] + 1 if columns else 0, piece):
        span = slice(start, min(start + piece, columns[-1] + 1))
        first = next((column for column in columns if start <= column < span.stop), span.stop)
        out = model(inputs_BT[:, span].to(device), state=state, return_state=True, logits_to_keep=span.stop - first)
        state = between(detach_state(out.state))
        targets = targets_BT[:, first : span.stop]
        rows, at = (targets != IGNORE).nonzero(as_tuple=True)
        if len(rows):
            logits = out.logits[rows.to(device), at.to(device)].float()
            right = logits.log_softmax(-1).gather(1, targets[rows, at].to(device)[:, None])[:, 0]
            predicted[rows.numpy(), first + at.numpy()] = logits.argmax(-1).cpu().numpy()
            log_p[rows.numpy(), first + at.numpy()] = right.double().cpu().numpy()
    return predicted, log_p


def tally(task: Task, inputs: np.ndarray, targets: np.ndarray, predicted: np.ndarray, count: int = 0) -> Tally:
    """The tally of predicted tokens [B, T], with at least `count` indices."""
    grades = task.grade(predicted, targets)
    graded = grades != IGNORE
    index, right = task.indices(inputs)[graded], grades[graded] == 1
    by_sequence = (grades == 1).sum(1) / graded.sum(1)
    return Tally(np.bincount(index[right], minlength=count), np.bincount(index, minlength=count), by_sequence)


def test(
    model: Transformer,
    device: torch.device,
    task: Task,
    length: int,
    at_least: int,
    seed: int = TEST_SEED,
    piece: int = TOKENS_AT_ONCE,
    between: Callable[[list[Any]], list[Any]] = lambda state: state,
) -> Tally:
    """The tally of as many whole test sequences of `length` tokens as are needed for `at_least` answers in total.

    The sequences are the same for every model, and others for another seed. `piece` and `between`: see `predict`.

    Raises:
        ConfigError: the task has no sequence of this length.
    """
    rows = math.ceil(at_least / task.describe(length)["answers"])
    tallies, nats, labels = [], 0.0, 0
    for batch in sequences_for_test(task, length, seed=seed, rows=rows, batch=max(1, TOKENS_AT_ONCE // length)):
        predicted, log_p = predict(model, batch.inputs, batch.targets, device, piece, between)
        tallies.append(tally(task, batch.inputs.numpy(), batch.targets.numpy(), predicted, length))
        nats, labels = nats - log_p.sum(), labels + int((batch.targets != IGNORE).sum())
    right, answers = (np.sum([getattr(t, name) for t in tallies], axis=0) for name in ("right", "answers"))
    return Tally(right, answers, np.concatenate([t.by_sequence for t in tallies]), float(nats / labels))
