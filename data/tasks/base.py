"""The interface of generated tasks, and what they all share: seeded sequences, grading, a curriculum of lengths.

Every sequence is a pure function of (seed, purpose, step, row), without state or a data set. Training therefore resumes
exactly on any number of processes, and test sequences of any length never share a seed with training sequences.

Shapes: m rows (or none, for a single sequence) of T tokens. All arrays of tokens are int64.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from data.lanes import IGNORE as IGNORE
from ovq.errors import ConfigError

BLANK = 0  # fills positions left over at the start of a sequence
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
    version = 1  # raised when the sequences of a seed change, so that no run continues on other data
    whole_answers = False  # whether consecutive labels are one answer, right only if all are; otherwise each is one
    index_name: str | None = None  # what `indices` counts, for the axis of a plot; None: the task has no indices

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

    @property
    def floor(self) -> float | None:
        """Accuracy possible without using anything before the question, if that is far from chance; else None."""
        return None

    def content(self) -> str:
        """Identity of what sequences are made of besides the settings, such as a text; empty if there is nothing."""
        return ""

    def sequence(self, length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """One sequence: inputs and targets, int64 [length]. A target is the next token if that is part of an answer,
        else IGNORE."""
        raise NotImplementedError

    def oracle(self, inputs: np.ndarray) -> np.ndarray:
        """Predictions [length] of a program that solves the task: what a perfect model would predict from inputs."""
        raise NotImplementedError

    def indices(self, inputs: np.ndarray) -> np.ndarray:
        """Index [m, T], at least 0, of each answer, over which accuracy can be plotted; meaningless where there is no
        label. 0 everywhere by default."""
        return np.zeros(inputs.shape, np.int64)

    def grade(self, predicted: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """1 where an answer is right, 0 where it is wrong, IGNORE elsewhere [m, T]: one number for each answer, at its
        last label."""
        labelled, right = targets != IGNORE, predicted == targets
        if self.whole_answers:
            edge = np.zeros((*targets.shape[:-1], 1), bool)
            starts = labelled & ~np.concatenate([edge, labelled[..., :-1]], axis=-1)
            last = labelled & ~np.concatenate([labelled[..., 1:], edge], axis=-1)
            answer_of = np.cumsum(starts)[labelled.ravel()] - 1  # of each label; no answer extends over two rows
            wrong = np.bincount(answer_of, weights=~right[labelled], minlength=int(starts.sum()))
            labelled, right = last, np.zeros(targets.shape, bool)
            right[last] = wrong == 0
        return np.where(labelled, right, IGNORE)

    def score(self, predicted: np.ndarray, targets: np.ndarray) -> tuple[int, int]:
        """(correct answers, answers) in predicted tokens [m, T]."""
        grades = self.grade(predicted, targets)
        return int((grades == 1).sum()), int((grades != IGNORE).sum())

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

    def shorter(self, count: int) -> Task:
        """The task that training sequences come from while `count` of them share a row; by default this one."""
        return self

    def check_context(self, context: int) -> None:
        """Raise ConfigError unless rows of `context` tokens are possible at every stage of the curriculum."""
        if self.short_steps and context % self.short_factor:
            raise ConfigError(
                f"trainer.context={context} must be a multiple of data.task.short_factor={self.short_factor}"
            )
        count = self.short_factor if self.short_steps else 1
        while count:
            self.shorter(count).describe(context // count)
            count //= 2


def spell(codes: np.ndarray, base: int, tokens: int) -> np.ndarray:
    """Codes [...] written as `tokens` digits in base `base`, least significant first [..., tokens]."""
    return codes[..., None] // base ** np.arange(tokens) % base


def lay_out(
    length: int,
    given: np.ndarray,
    asked: np.ndarray,
    answer_tokens: int,
    rng: np.random.Generator,
    *,
    filler: int = 0,
    filler_ids: range = range(0),
) -> tuple[np.ndarray, np.ndarray]:
    """A sequence of statements followed by questions: inputs and targets [length].

    Args:
        length: at least filler + given.size + asked.size; positions left over are blanks at the start.
        given: tokens [items, width] of the statements.
        asked: tokens [questions, width] of the questions, each with its answer at the end.
        answer_tokens: tokens of an answer; only these are labelled.
        filler: number of random tokens in the gaps before statements and questions.
        filler_ids: ids they are drawn from.
    """
    widths = np.repeat([given.shape[1], asked.shape[1]], [len(given), len(asked)])
    gaps = np.bincount(rng.integers(len(widths), size=filler), minlength=len(widths))
    left_over = length - filler - given.size - asked.size
    starts = left_over + np.cumsum(gaps) + np.cumsum(widths) - widths
    tokens = np.full(length, BLANK, np.int64)
    if filler:
        tokens[left_over:] = filler_ids.start + rng.integers(len(filler_ids), size=length - left_over)
    asked_at = starts[len(given) :, None] + np.arange(asked.shape[1])
    tokens[starts[: len(given), None] + np.arange(given.shape[1])] = given
    tokens[asked_at] = asked
    targets = np.full(length, IGNORE, np.int64)
    answers = asked_at[:, asked.shape[1] - answer_tokens :]
    targets[answers - 1] = tokens[answers]
    return tokens, targets


def digest(task: Task, settings: dict[str, Any]) -> str:
    """Hash of a task, its version and all its settings, for the fingerprint of the data."""
    listed = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    version = f" version {task.version}" if task.version > 1 else ""
    return hashlib.sha256(f"{type(task).__name__}({listed}){version}".encode()).hexdigest()
