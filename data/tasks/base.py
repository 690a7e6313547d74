"""The interface of generated tasks, and what all of them share: seeded sequences and a curriculum of lengths.

Every sequence is a pure function of (seed, purpose, step, row), without state or a data set. Training therefore resumes
exactly on any number of processes, and test sequences of any length never share a seed with training sequences.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from ovq.errors import ConfigError

IGNORE = -100  # target of a position that is not part of an answer
TRAIN, TEST = 0, 1  # purposes of a sequence; part of the seed of its random numbers


class Task:
    """Sequences of symbols, some of which answer questions posed earlier in the sequence.

    A subclass takes its settings as keyword arguments, which are exactly the keys of its
    `configs/data/task/<name>.yaml`, and passes `short_steps` and `short_factor` on.

    Args:
        short_steps: steps at the start of training with more and shorter sequences. A row of `trainer.context` tokens
            holds `short_factor` sequences at first, then half as many, and so on, for equally many steps each, until
            one sequence fills the row. The number of tokens per step does not change.
        short_factor: sequences in a row at first, a power of two.

    Raises:
        ConfigError: a setting outside its legal values.
    """

    name: str  # of the task, used in fingerprints

    def __init__(self, *, short_steps: int = 0, short_factor: int = 4) -> None:
        if short_steps < 0:
            raise ConfigError(f"data.task.short_steps={short_steps} must be at least 0")
        if short_factor < 1 or short_factor & (short_factor - 1):
            raise ConfigError(f"data.task.short_factor={short_factor} must be a power of two")
        self.short_steps, self.short_factor = short_steps, short_factor

    @property
    def vocab_size(self) -> int:
        """Number of symbols; ids are 0 .. vocab_size - 1."""
        raise NotImplementedError

    def sequence(self, length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """One sequence: inputs and targets, int64 [length]. A target is the next token if that is part of an answer,
        else IGNORE."""
        raise NotImplementedError

    def oracle(self, inputs: np.ndarray) -> np.ndarray:
        """Targets [length] of a program that solves the task: what a perfect model would predict from the inputs."""
        raise NotImplementedError

    def score(self, predicted: np.ndarray, targets: np.ndarray) -> tuple[int, int]:
        """(correct answers, answers) in rows [m, length] of predicted tokens. A token is an answer by default."""
        answered = targets != IGNORE
        return int((predicted == targets)[answered].sum()), int(answered.sum())

    def describe(self, length: int) -> dict[str, int]:
        """What a sequence of `length` tokens contains, by name, for a dry run; one of the names is "answers".

        Raises:
            ConfigError: no sequence has this length.
        """
        raise NotImplementedError

    def make(self, length: int, seed: int, purpose: int, step: int, row: int) -> tuple[np.ndarray, np.ndarray]:
        """`sequence` as a pure function of seed, purpose, step and row."""
        return self.sequence(length, np.random.default_rng([seed, purpose, step, row, length]))

    def sequences_at(self, step: int) -> int:
        """Sequences per row at this step: short_factor, halved log2(short_factor) times at equal intervals."""
        stages = self.short_factor.bit_length() - 1
        return self.short_factor >> (step * stages // self.short_steps) if step < self.short_steps else 1

    def check_context(self, context: int) -> None:
        """Raise ConfigError unless rows of `context` tokens are possible at every stage of the curriculum."""
        if self.short_steps and context % self.short_factor:
            raise ConfigError(
                f"trainer.context={context} must be a multiple of data.task.short_factor={self.short_factor}"
            )
        self.describe(context // (self.short_factor if self.short_steps else 1))


def digest(task: Task, settings: dict[str, Any]) -> str:
    """Hash of a task and all its settings, for the fingerprint of the data."""
    listed = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    return hashlib.sha256(f"{type(task).__name__}({listed})".encode()).hexdigest()
