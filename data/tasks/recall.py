"""Basic in-context recall: pairs of keys and values, then queries for the values.

    k1 v1 k2 v2 k3 v3 ... | k2 v2 k7 v7 k1 v1 ...

All keys of a sequence differ. Queries come in random order, each key at most once. Only the values of queries have
labels, so loss and accuracy are those of the answers. The value of each key is drawn independently for every sequence,
so there is nothing to learn except to look back.

This is basic in-context recall, as in figure 4 of arXiv 2602.03922. The paper's format is not known; this one is ours.

A sequence of 65,536 tokens holds 16,384 pairs with one-token keys, or 10,922 with two-token keys, and needs as many
different keys. With `key_tokens=2`, `key_vocab=128` gives 16,384. Two tokens from a large vocabulary would do too, but
then the tokens of a key are nearly unique in a short training sequence, and a model may learn to look at one of them
only, which fails in long sequences.
"""

from __future__ import annotations

import numpy as np

from data.tasks.base import IGNORE, Task, lay_out, spell
from ovq.errors import ConfigError

MOST_TOKENS = 62  # in a key or a value, because their codes are int64


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
    whole_answers = True

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
        for name in ("key_tokens", "value_tokens"):
            if sizes[name] > MOST_TOKENS:
                raise ConfigError(f"data.task.{name}={sizes[name]} must be at most {MOST_TOKENS}")
        if not 0 < queried <= 1:
            raise ConfigError(f"data.task.queried={queried} must be above 0 and at most 1")
        if not 0 <= filler < 1:
            raise ConfigError(f"data.task.filler={filler} must be in [0, 1)")
        self.key_tokens, self.value_tokens = key_tokens, value_tokens
        self.key_vocab, self.value_vocab = key_vocab, value_vocab
        self.queried, self.filler, self.filler_vocab = queried, filler, filler_vocab

    @property
    def vocab_size(self) -> int:
        return 1 + self.key_vocab + self.value_vocab + len(self.filler_ids)

    @property
    def filler_ids(self) -> range:
        """Ids of fillers, the last of the vocabulary."""
        first = 1 + self.key_vocab + self.value_vocab
        return range(first, first + self.filler_vocab if self.filler else first)

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
        self.check_keys(pairs, length)
        return pairs, queries, filler

    def check_keys(self, needed: int, length: int) -> None:
        """Raise ConfigError unless there are `needed` different keys, the number that `length` tokens hold."""
        keys = self.key_vocab**self.key_tokens
        if keys < needed:
            raise ConfigError(
                f"{needed} different keys in {length} tokens need data.task.key_vocab ** data.task.key_tokens of at "
                f"least that; it is {keys}"
            )
        if keys >= 1 << 63:
            raise ConfigError(
                f"data.task.key_vocab={self.key_vocab} ** data.task.key_tokens={self.key_tokens} must be below 2 ** 63"
            )

    def random_keys(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Ids [count, key_tokens] of keys that all differ."""
        codes = rng.choice(self.key_vocab**self.key_tokens, count, replace=False)
        return 1 + spell(codes, self.key_vocab, self.key_tokens)

    def describe(self, length: int) -> dict[str, int]:
        pairs, queries, filler = self.sizes(length)
        return {"pairs": pairs, "answers": queries, "filler": filler, "vocabulary": self.vocab_size}

    def sequence(self, length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        pairs, queries, filler = self.sizes(length)
        keys = self.random_keys(pairs, rng)
        values = 1 + self.key_vocab + rng.integers(self.value_vocab, size=(pairs, self.value_tokens))
        items = np.concatenate([keys, values], axis=1)
        asked = items[rng.permutation(pairs)[:queries]]
        return lay_out(length, items, asked, self.value_tokens, rng, filler=filler, filler_ids=self.filler_ids)

    def oracle(self, inputs: np.ndarray) -> np.ndarray:
        """Looks up the value of every key that has occurred before."""
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
