"""Rows of a generated task for the loader, and batches of test sequences."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.lanes import LaneState, Row
from data.loader import Batch, Loader
from data.tasks.base import IGNORE, TEST, TRAIN, Task


class TaskTokenizer:
    """The tokenizer of a run on a task: the symbols of the task, which represent no text."""

    separator_id = 0

    def __init__(self, task: Task) -> None:
        self.vocab_size = task.vocab_size
        self.fingerprint = f"{task.name}:{task.vocab_size}"

    def encode(self, text: str) -> np.ndarray:
        return np.array([int(word) for word in text.split()], np.int64)

    def decode(self, ids: Any) -> str:
        return " ".join(str(int(i)) for i in np.asarray(ids).ravel())

    def num_bytes(self, ids: Any) -> int:
        return 0

    def save(self, folder: Path | str) -> None:
        """Nothing to save: the symbols follow from the config."""


class TaskRows:
    """A row source for `data.loader.Loader`: a row is a pure function of its lane and step."""

    def __init__(self, task: Task, context: int, seed: int) -> None:
        self.task, self.context, self.seed = task, context, seed

    def describe(self, lane: int, state: LaneState) -> str:
        return f"a generated sequence of task {self.task.name}"

    def row(self, lane: int, state: LaneState) -> Row:
        step = state["rows"]
        count = self.task.sequences_at(step)
        task = self.task.shorter(count)
        parts = [
            task.make(self.context // count, self.seed, TRAIN, step, lane * count + index) for index in range(count)
        ]
        inputs, targets = (np.concatenate(part).astype(np.int32) for part in zip(*parts))
        starts = list(range(0, self.context, self.context // count))
        after = {"ordinal": lane, "offset": 0, "rows": step + 1}
        labels = int((targets != IGNORE).sum())
        return Row(lane, inputs, targets, starts, [], after, {"tokens": labels})


class TaskLoader(Loader):
    """A `data.loader.Loader` that splits early micro-batches of m rows into m x `task.sequences_at(step)` shorter rows.

    `Batch.lanes` then has an entry for each of them: lane x `sequences_at(step)` + its index in the original row.
    """

    def __init__(self, task: Task, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.task = task

    def __iter__(self) -> Generator[Batch]:
        for batch in super().__iter__():
            count = self.task.sequences_at(next(iter(batch.lanes.values()))["rows"] - 1)
            if count > 1:
                shape = (-1, self.context // count)
                batch.inputs, batch.targets = batch.inputs.reshape(shape), batch.targets.reshape(shape)
                batch.lanes = {lane * count + i: state for lane, state in batch.lanes.items() for i in range(count)}
            yield batch


def sequences_for_test(task: Task, length: int, *, seed: int, rows: int, batch: int) -> Iterator[Batch]:
    """Test sequences: `rows` of `length` tokens, `batch` at a time, the same for every model."""
    for start in range(0, rows, batch):
        made = [task.make(length, seed, TEST, 0, row) for row in range(start, min(start + batch, rows))]
        inputs, targets = (torch.from_numpy(np.stack(part)) for part in zip(*made))
        yield Batch(inputs, targets)
