"""Basic in-context recall, generated on the fly: pairs of keys and values, then queries for the values.

    k1 v1 k2 v2 k3 v3 ... | k2 v2 k7 v7 k1 v1 ...

All keys of a sequence differ; queries come in random order, each key at most once; only the values of queries carry a
label, so loss and accuracy are those of answers. Which value belongs to which key is drawn anew for every sequence:
nothing can be learned but to look back.

Every sequence is a pure function of (seed, purpose, step, row), with no state and no data set, so training resumes
exactly on any number of processes, and test sequences of any length never coincide with those of training.

A curriculum can be part of the task: in the first `short_steps` steps each row of `trainer.context` tokens is several
shorter sequences, at first `short_factor` of them, then half as many, and so on, for equally many steps each, until one
sequence fills the row. The batch then has that many times more, shorter rows, so the sequences are apart without any
masking, and a step has the same number of tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.lanes import LaneState, Row
from data.loader import Batch, Loader
from ovq.config import Config, ConfigError

IGNORE = -100
BLANK = 0  # fills what does not divide into pairs
TRAIN, TEST = 0, 1  # purposes of a sequence; part of what its random numbers are drawn from


@dataclass(frozen=True)
class RecallTask:
    """The arguments of `data.task`.

    Raises:
        ConfigError: a size below 1, or a share outside its range.
    """

    key_tokens: int = 1  # tokens a key has
    value_tokens: int = 1
    key_vocab: int = 4096  # different tokens that keys are made of
    value_vocab: int = 256
    queried: float = 1.0  # queries in the sequence, as a share of its pairs
    filler: float = 0.0  # share of the sequence that is random filler between pairs and between queries
    filler_vocab: int = 64
    short_steps: int = 0  # steps at the start with shorter and more sequences
    short_factor: int = 4  # sequences in a row at the very start, a power of two

    def __post_init__(self) -> None:
        for name in ("key_tokens", "value_tokens", "key_vocab", "value_vocab", "filler_vocab", "short_factor"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.task.{name}={getattr(self, name)} must be at least 1")
        if not 0 < self.queried <= 1:
            raise ConfigError(f"data.task.queried={self.queried} must be above 0 and at most 1")
        if not 0 <= self.filler < 1 or self.short_steps < 0:
            raise ConfigError(
                f"data.task.filler={self.filler} must be in [0, 1) and data.task.short_steps={self.short_steps} "
                "at least 0"
            )
        if self.short_factor & (self.short_factor - 1):
            raise ConfigError(f"data.task.short_factor={self.short_factor} must be a power of two")

    @property
    def vocab_size(self) -> int:
        """Ids: blank, then keys, then values, then fillers if there are any."""
        return 1 + self.key_vocab + self.value_vocab + (self.filler_vocab if self.filler else 0)

    @property
    def item(self) -> int:
        """Tokens of a pair or of an answered query."""
        return self.key_tokens + self.value_tokens

    def sizes(self, length: int) -> tuple[int, int, int]:
        """(pairs, queries, filler tokens) of a sequence of `length` tokens.

        Raises:
            ConfigError: the length is too short for a pair and its query, or there are not enough different keys.
        """
        filler = round(self.filler * length)
        items = (length - filler) // self.item
        pairs = int(items / (1 + self.queried))
        queries = min(pairs, max(1, round(self.queried * pairs)), items - pairs)
        if pairs < 1 or queries < 1:
            raise ConfigError(f"a recall sequence of {length} tokens has no room for a pair and its query")
        if pairs > self.key_vocab**self.key_tokens:
            raise ConfigError(
                f"{pairs} different keys in {length} tokens need data.task.key_vocab ** data.task.key_tokens of at "
                f"least that; it is {self.key_vocab**self.key_tokens}"
            )
        return pairs, queries, filler


def task_of(cfg: Config) -> RecallTask:
    """The task of a config.

    Raises:
        ConfigError: data.task is missing, or has an unknown or illegal argument.
    """
    values = dict(cfg.data.task or {})
    legal = [f.name for f in dataclasses.fields(RecallTask)]
    for name in values:
        if name not in legal:
            raise ConfigError(f"there is no setting 'data.task.{name}'; legal: {', '.join(legal)}")
    try:
        return RecallTask(**values)
    except TypeError as error:
        raise ConfigError(f"data.task: {error}") from None


class RecallTokenizer:
    """Stands where a run expects a tokenizer: the task's own symbols, which spell no text."""

    separator_id = bos_id = eos_id = BLANK

    def __init__(self, task: RecallTask) -> None:
        self.vocab_size = task.vocab_size
        self.fingerprint = f"recall:{task.key_vocab}:{task.value_vocab}:{self.vocab_size}"

    def encode(self, text: str) -> np.ndarray:
        return np.array([int(word) for word in text.split()], np.int64)

    def decode(self, ids: Any) -> str:
        return " ".join(str(int(i)) for i in np.asarray(ids).ravel())

    def num_bytes(self, ids: Any) -> int:
        return 0

    def save(self, folder: Path | str) -> None:
        """Nothing to keep: the symbols follow from the config."""


def sequence(task: RecallTask, length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One sequence: inputs and targets, int64 [length]; a target is the next token where that answers, else -100."""
    pairs, queries, filler = task.sizes(length)
    codes = rng.choice(task.key_vocab**task.key_tokens, pairs, replace=False)
    digits = codes[:, None] // task.key_vocab ** np.arange(task.key_tokens) % task.key_vocab
    values = rng.integers(task.value_vocab, size=(pairs, task.value_tokens))
    items = np.concatenate([1 + digits, 1 + task.key_vocab + values], axis=1)
    items = np.concatenate([items, items[rng.permutation(pairs)[:queries]]])
    # Filler falls into the gaps before each item; what then is left over stands, blank, at the very start.
    gaps = np.bincount(rng.integers(len(items), size=filler), minlength=len(items))
    left_over = length - filler - items.size
    starts = left_over + np.cumsum(gaps) + task.item * np.arange(len(items))
    tokens = np.full(length, BLANK, np.int64)
    if filler:
        tokens[left_over:] = (
            1 + task.key_vocab + task.value_vocab + rng.integers(task.filler_vocab, size=length - left_over)
        )
    tokens[starts[:, None] + np.arange(task.item)] = items
    targets = np.full(length, IGNORE, np.int64)
    answers = starts[pairs:, None] + np.arange(task.key_tokens, task.item)
    targets[answers - 1] = tokens[answers]
    return tokens, targets


def make(task: RecallTask, length: int, seed: int, purpose: int, step: int, row: int) -> tuple[np.ndarray, np.ndarray]:
    """`sequence` as a pure function of where it stands."""
    return sequence(task, length, np.random.default_rng([seed, purpose, step, row, length]))


def oracle(task: RecallTask, inputs: np.ndarray) -> np.ndarray:
    """Targets [length] by a program that looks every key up: what a model that recalls perfectly would say."""
    first_value, keys = 1 + task.key_vocab, task.key_tokens
    book: dict[tuple[int, ...], np.ndarray] = {}
    said = np.full(len(inputs), IGNORE, np.int64)
    at = 0
    while at + task.item <= len(inputs):
        key = inputs[at : at + keys]
        if not ((key >= 1) & (key < first_value)).all():
            at += 1
            continue
        value = inputs[at + keys : at + task.item]
        if tuple(key) in book:
            said[at + keys - 1 : at + task.item - 1] = book[tuple(key)]
        else:
            book[tuple(key)] = value
        at += task.item
    return said


def accuracy(task: RecallTask, predicted: np.ndarray, targets: np.ndarray) -> tuple[int, int]:
    """(answers right, answers); an answer is right when all its tokens are."""
    answered = targets != IGNORE
    right = (predicted == targets)[answered].reshape(-1, task.value_tokens).all(axis=1)
    return int(right.sum()), len(right)


def test_batches(task: RecallTask, length: int, *, seed: int, rows: int, batch: int) -> Iterator[Batch]:
    """`rows` test sequences of `length` tokens, `batch` at a time; the same for every model."""
    for start in range(0, rows, batch):
        made = [make(task, length, seed, TEST, 0, row) for row in range(start, min(start + batch, rows))]
        inputs, targets = (torch.from_numpy(np.stack(part)) for part in zip(*made))
        yield Batch(inputs, targets)


class RecallRows:
    """The row source of `data.loader.Loader`: the row of a lane at a step, from nothing but their numbers."""

    def __init__(self, task: RecallTask, context: int, seed: int) -> None:
        self.task, self.context, self.seed = task, context, seed

    def sequences_at(self, step: int) -> int:
        """Sequences a row holds at this step: short_factor, halved log2(short_factor) times in equal stages."""
        task = self.task
        stages = task.short_factor.bit_length() - 1
        return task.short_factor >> (step * stages // task.short_steps) if step < task.short_steps else 1

    def row(self, lane: int, state: LaneState) -> Row:
        step = state["rows"]
        count = self.sequences_at(step)
        parts = [
            make(self.task, self.context // count, self.seed, TRAIN, step, lane * count + index)
            for index in range(count)
        ]
        inputs, targets = (np.concatenate(part).astype(np.int32) for part in zip(*parts))
        starts = list(range(0, self.context, self.context // count))
        after = {"ordinal": lane, "offset": 0, "rows": step + 1}
        labels = int((targets != IGNORE).sum())
        return Row(lane, inputs, targets, starts, [], after, {"tokens": labels})


class RecallLoader(Loader):
    """`data.loader.Loader` whose early micro-batches of m rows come out as m x short_factor shorter ones.

    `Batch.lanes` then has an entry for each of those: lane x short_factor + its place in the row.
    """

    def __iter__(self) -> Iterator[Batch]:
        rows: RecallRows = self._source  # type: ignore[assignment]
        for batch in super().__iter__():
            count = rows.sequences_at(next(iter(batch.lanes.values()))["rows"] - 1)
            if count > 1:
                shape = (-1, self.context // count)
                batch.inputs, batch.targets = batch.inputs.reshape(shape), batch.targets.reshape(shape)
                batch.lanes = {lane * count + i: state for lane, state in batch.lanes.items() for i in range(count)}
            yield batch


def build_loader(
    cfg: Config, tokenizer: Any, *, rank: int, world_size: int, state: dict[str, Any] | None = None
) -> RecallLoader:
    """The loader of one rank, as `data.build_loader`.

    Raises:
        ConfigError: an illegal task, a context that it does not fit, or a state of other data.
    """
    task, trainer = task_of(cfg), cfg.trainer
    if tokenizer.vocab_size < task.vocab_size:
        raise ConfigError(
            f"data=recall needs a vocabulary of {task.vocab_size}, the tokenizer has {tokenizer.vocab_size}; "
            "lower data.task.key_vocab"
        )
    if task.short_steps and trainer.context % task.short_factor:
        raise ConfigError(
            f"trainer.context={trainer.context} must be a multiple of data.task.short_factor={task.short_factor}"
        )
    task.sizes(trainer.context // (task.short_factor if task.short_steps else 1))
    fingerprint = {
        "kind": "recall",
        "task": hashlib.sha256(repr(task).encode()).hexdigest(),
        "context": trainer.context,
        "global_batch": trainer.global_batch,
        "seed": cfg.seed,
    }
    return RecallLoader(
        RecallRows(task, trainer.context, cfg.seed),
        fingerprint,
        context=trainer.context,
        global_batch=trainer.global_batch,
        micro_batch=trainer.micro_batch,
        rank=rank,
        world_size=world_size,
        num_workers=cfg.data.num_workers,
        prefetch=cfg.data.prefetch,
        state=state,
    )


def describe(cfg: Config) -> dict[str, int]:
    """What a training sequence holds, for a dry run."""
    task = task_of(cfg)
    pairs, queries, filler = task.sizes(cfg.trainer.context)
    return {"pairs": pairs, "queries": queries, "filler": filler, "vocabulary": task.vocab_size}
