"""Positional in-context recall: keys occur several times with different values, and a query asks for one occurrence.

    k1 v1 k2 v2 k1 v3 k3 v4 k2 v5 ... | #1 k2 v2 #2 k1 v3 #2 k2 v5 ...

A query consists of a mark and a key. The mark says which occurrence of the key is meant, counted from the start of the
sequence. The key comes last, as in basic recall, whose solution is then part of this one's.
Pairs and queries are in random order, and no two queries ask for the same pair. The values of a key all differ, so a
model that finds a key's values but not their order is right once in `occurrences` times, and one that sees only the
query guesses among all values.

This is the positional variant of in-context recall, as in figure 4 of arXiv 2602.03922. The paper's format is not
known; this one is ours.
"""

from __future__ import annotations

import copy

import numpy as np

from data.tasks.base import IGNORE, lay_out, spell
from data.tasks.recall import RecallTask
from ovq.errors import ConfigError


class PositionalRecallTask(RecallTask):
    """Ids: the blank, then keys, then values, then one mark per occurrence, then fillers, if any.

    Args:
        occurrences: pairs with the same key. One key of a sequence may have fewer, to fill the sequence.
        key_tokens, value_tokens, key_vocab, value_vocab, filler, filler_vocab: see `RecallTask`.
        queried: number of queries as a fraction of the number of pairs.
        short_steps, short_factor: the curriculum, see `Task`.

    Raises:
        ConfigError: a size is below 1, a fraction is outside its range, or there are fewer values than occurrences.
    """

    name = "positional_recall"
    version = 2  # 1: the mark followed the key
    index_name = "occurrence"

    def __init__(
        self,
        *,
        occurrences: int = 4,
        key_tokens: int = 1,
        value_tokens: int = 1,
        key_vocab: int = 4096,
        value_vocab: int = 256,
        queried: float = 1.0,
        filler: float = 0.0,
        filler_vocab: int = 64,
        short_steps: int = 0,
        short_factor: int = 4,
    ) -> None:
        super().__init__(
            key_tokens=key_tokens,
            value_tokens=value_tokens,
            key_vocab=key_vocab,
            value_vocab=value_vocab,
            queried=queried,
            filler=filler,
            filler_vocab=filler_vocab,
            short_steps=short_steps,
            short_factor=short_factor,
        )
        if occurrences < 1:
            raise ConfigError(f"data.task.occurrences={occurrences} must be at least 1")
        values = value_vocab**value_tokens
        if not occurrences <= values < 1 << 63:
            raise ConfigError(
                f"data.task.value_vocab ** data.task.value_tokens={values} must be at least "
                f"data.task.occurrences={occurrences}, as a key's values all differ, and below 2 ** 63"
            )
        self.occurrences = self.mark_count = occurrences

    @property
    def marks(self) -> range:
        """Ids of the marks of the first, second ... occurrence."""
        first = 1 + self.key_vocab + self.value_vocab
        return range(first, first + self.mark_count)

    def shorter(self, count: int) -> PositionalRecallTask:
        """Keys with fewer pairs, so that a short sequence has several keys too. The vocabulary is the same."""
        task = copy.copy(self)
        task.occurrences = max(1, self.occurrences // count)
        return task

    @property
    def filler_ids(self) -> range:
        return range(self.marks.stop, self.marks.stop + self.filler_vocab if self.filler else self.marks.stop)

    @property
    def vocab_size(self) -> int:
        return self.filler_ids.stop

    def sizes(self, length: int) -> tuple[int, int, int]:
        """(pairs, queries, filler tokens) of a sequence of `length` tokens.

        Raises:
            ConfigError: the length is too short for a pair and its query, or there are not enough different keys.
        """
        filler, question = round(self.filler * length), self.item + 1
        room = length - filler
        pairs = min(int(room / (self.item + self.queried * question)), (room - question) // self.item)
        if pairs < 1:
            raise ConfigError(f"a positional_recall sequence of {length} tokens has no room for a pair and its query")
        queries = min(pairs, max(1, round(self.queried * pairs)), (room - pairs * self.item) // question)
        self.check_keys(-(-pairs // self.occurrences), length)
        return pairs, queries, filler

    def describe(self, length: int) -> dict[str, int]:
        keys = -(-self.sizes(length)[0] // self.occurrences)
        return {"keys": keys, **super().describe(length)}

    def sequence(self, length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        pairs, queries, filler = self.sizes(length)
        key_count = -(-pairs // self.occurrences)
        keys = self.random_keys(key_count, rng)
        codes = different_in_rows(key_count, self.occurrences, self.value_vocab**self.value_tokens, rng)
        values = 1 + self.key_vocab + spell(codes, self.value_vocab, self.value_tokens)
        key_of = (np.arange(pairs) // self.occurrences)[
            rng.permutation(pairs)
        ]  # of each pair, in the order of the text
        occurrence = np.empty(pairs, np.int64)
        occurrence[np.argsort(key_of, kind="stable")] = np.arange(pairs) % self.occurrences
        value_of = values[key_of, occurrence]
        chosen = rng.permutation(pairs)[:queries]
        given = np.concatenate([keys[key_of], value_of], axis=1)
        marks = self.marks.start + occurrence[chosen, None]
        asked = np.concatenate([marks, keys[key_of[chosen]], value_of[chosen]], axis=1)
        return lay_out(length, given, asked, self.value_tokens, rng, filler=filler, filler_ids=self.filler_ids)

    def indices(self, inputs: np.ndarray) -> np.ndarray:
        """The occurrence that is asked for, counted from 0: that of the most recent mark."""
        is_mark = (inputs >= self.marks.start) & (inputs < self.marks.stop)
        last = np.maximum.accumulate(np.where(is_mark, np.arange(inputs.shape[-1]), 0), axis=-1)
        return np.maximum(np.take_along_axis(inputs, last, axis=-1) - self.marks.start, 0)

    def oracle(self, inputs: np.ndarray) -> np.ndarray:
        """Records the values of every key in order, and looks up those that are asked for."""
        key_tokens, value_tokens = self.key_tokens, self.value_tokens
        book: dict[tuple[int, ...], list[np.ndarray]] = {}
        predicted = np.full(len(inputs), IGNORE, np.int64)
        at = 0
        while at + self.item <= len(inputs):
            occurrence = int(inputs[at]) - self.marks.start
            if asks := inputs[at] in self.marks:
                at += 1
            key = inputs[at : at + key_tokens]
            if not ((key >= 1) & (key <= self.key_vocab)).all():
                at += 1
                continue
            at += key_tokens
            values = book.setdefault(tuple(key), [])
            if asks:
                predicted[at - 1 : at - 1 + value_tokens] = values[occurrence]
            else:
                values.append(inputs[at : at + value_tokens])
            at += value_tokens
        return predicted


def different_in_rows(rows: int, count: int, high: int, rng: np.random.Generator) -> np.ndarray:
    """Integers in 0 .. high - 1 [rows, count], uniform among those that all differ within each row."""
    drawn = np.empty((rows, count), np.int64)
    for j in range(count):
        drawn[:, j] = rng.integers(high - j, size=rows)
        # The draw is an index into the integers that are left: every taken one not above it moves it up by one.
        for taken in np.sort(drawn[:, :j], axis=1).T:
            drawn[:, j] += drawn[:, j] >= taken
    return drawn
