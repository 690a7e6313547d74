"""Basic in-context recall: pairs of keys and values, then queries for the values.

    k1 v1 k2 v2 k3 v3 ... | k2 v2 k7 v7 k1 v1 ...

All keys of a sequence differ. Queries come in random order, each key at most once. Only the values of queries have
labels, so loss and accuracy are those of the answers. The value of each key is drawn independently for every sequence,
so nothing can be learned but to look back.
"""

from __future__ import annotations

import numpy as np

from data.tasks.base import IGNORE, Task
from ovq.errors import ConfigError

BLANK = 0  # fills positions left over after the last whole pair


class RecallTask(Task):
    """Ids: the blank, then keys, then values, then fillers, if any.

    Args:
        key_tokens, value_tokens: tokens of a key and of a value.
        key_vocab, value_vocab: number of distinct tokens that keys and values consist of.
        queried: number of queries as a fraction of the number of pairs.
        filler: fraction of the sequence that is random filler between pairs and between queries.
        filler_vocab: number of distinct filler tokens.
        short_steps, short_factor: the curriculum, see `Task`.

    Raises:
        ConfigError: a size is below 1, or a fraction is outside its range.
    """

    name = "recall"

    def __init__(
        self,
        *,
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
        super().__init__(short_steps=short_steps, short_factor=short_factor)
        sizes = {
            "key_tokens": key_tokens,
            "value_tokens": value_tokens,
            "key_vocab": key_vocab,
            "value_vocab": value_vocab,
            "filler_vocab": filler_vocab,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ConfigError(f"data.task.{name}={size} must be at least 1")
        if not 0 < queried <= 1:
            raise ConfigError(f"data.task.queried={queried} must be above 0 and at most 1")
        if not 0 <= filler < 1:
            raise ConfigError(f"data.task.filler={filler} must be in [0, 1)")
        self.key_tokens, self.value_tokens = key_tokens, value_tokens
        self.key_vocab, self.value_vocab = key_vocab, value_vocab
        self.queried, self.filler, self.filler_vocab = queried, filler, filler_vocab

    @property
    def vocab_size(self) -> int:
        return 1 + self.key_vocab + self.value_vocab + (self.filler_vocab if self.filler else 0)

    @property
    def item(self) -> int:
        """Tokens of a pair, or of a query with its answer."""
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

    def describe(self, length: int) -> dict[str, int]:
        pairs, queries, filler = self.sizes(length)
        return {"pairs": pairs, "answers": queries, "filler": filler, "vocabulary": self.vocab_size}

    def sequence(self, length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        pairs, queries, filler = self.sizes(length)
        codes = rng.choice(self.key_vocab**self.key_tokens, pairs, replace=False)
        digits = codes[:, None] // self.key_vocab ** np.arange(self.key_tokens) % self.key_vocab
        values = rng.integers(self.value_vocab, size=(pairs, self.value_tokens))
        items = np.concatenate([1 + digits, 1 + self.key_vocab + values], axis=1)
        items = np.concatenate([items, items[rng.permutation(pairs)[:queries]]])
        # Filler goes into the gaps before items. Positions left over are blanks at the start of the sequence.
        gaps = np.bincount(rng.integers(len(items), size=filler), minlength=len(items))
        left_over = length - filler - items.size
        starts = left_over + np.cumsum(gaps) + self.item * np.arange(len(items))
        tokens = np.full(length, BLANK, np.int64)
        if filler:
            first = 1 + self.key_vocab + self.value_vocab
            tokens[left_over:] = first + rng.integers(self.filler_vocab, size=length - left_over)
        tokens[starts[:, None] + np.arange(self.item)] = items
        targets = np.full(length, IGNORE, np.int64)
        answers = starts[pairs:, None] + np.arange(self.key_tokens, self.item)
        targets[answers - 1] = tokens[answers]
        return tokens, targets

    def oracle(self, inputs: np.ndarray) -> np.ndarray:
        """Looks up every key that has occurred before."""
        first_value, keys = 1 + self.key_vocab, self.key_tokens
        book: dict[tuple[int, ...], np.ndarray] = {}
        predicted = np.full(len(inputs), IGNORE, np.int64)
        at = 0
        while at + self.item <= len(inputs):
            key = inputs[at : at + keys]
            if not ((key >= 1) & (key < first_value)).all():
                at += 1
                continue
            value = inputs[at + keys : at + self.item]
            if tuple(key) in book:
                predicted[at + keys - 1 : at + self.item - 1] = book[tuple(key)]
            else:
                book[tuple(key)] = value
            at += self.item
        return predicted

    def score(self, predicted: np.ndarray, targets: np.ndarray) -> tuple[int, int]:
        """An answer is correct if all its tokens are."""
        answered = targets != IGNORE
        right = (predicted == targets)[answered].reshape(-1, self.value_tokens).all(axis=1)
        return int(right.sum()), len(right)
