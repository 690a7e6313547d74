"""A passage hidden in text and repeated at its end.

    text ... s17 s3 s92 ... text, tens of thousands of bytes if asked for ... s17 s3 s92 ...

The passage consists of distinct symbols that the text does not use, drawn anew for every sequence, so there is nothing
to learn except to look back. It begins in the first half of the text, and its repetition ends the sequence, so at least
half of the text lies between them. The text is Python's own library, in bytes (`data.builtin`): the training documents
in training, the validation documents in tests.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from data.builtin import BuiltinCorpus
from data.tasks.base import IGNORE, TRAIN, Task
from ovq.errors import ConfigError

FIRST_SYMBOL = 256  # smaller ids are bytes


class RepeatTask(Task):
    """Ids: the 256 bytes, then the symbols.

    Args:
        passage: symbols of the passage; at most half of a sequence, which then has no text.
        symbols: number of different symbols, at least `passage`; a passage holds none of them twice. With too few (64),
            guessing is so cheap that a small model is slow to discover copying.
        rotated: begin the repetition at any symbol but the first and wrap around, so that the answers are at no fixed
            distance. If no text lies between, a sliding window with positions otherwise learns the distance instead of
            copying. The symbol after the passage's last one is not an answer.
        text_loss: train on the bytes of the text as well. They are not answers: tests ask for the passage only.
        short_steps, short_factor: the curriculum, see `Task`, in the second half of these steps. In the first half all
            sequences have the shortest length: once the model copies there, longer ones need few steps.

    Raises:
        ConfigError: fewer than 2 symbols in a passage (rotated: 3), or not enough different ones.
    """

    name = "repeat"

    def __init__(
        self,
        *,
        passage: int = 32,
        symbols: int = 256,
        rotated: bool = False,
        text_loss: bool = False,
        short_steps: int = 0,
        short_factor: int = 4,
    ) -> None:
        super().__init__(short_steps=short_steps, short_factor=short_factor)
        if passage < 2 + rotated:
            kind = " if it is rotated" if rotated else ""
            raise ConfigError(f"data.task.passage={passage} must be at least {2 + rotated}{kind}")
        if symbols < passage:
            raise ConfigError(f"data.task.symbols={symbols} must be at least data.task.passage={passage}")
        self.passage, self.symbols, self.rotated, self.text_loss = passage, symbols, rotated, text_loss

    @property
    def vocab_size(self) -> int:
        return FIRST_SYMBOL + self.symbols

    def content(self) -> str:
        return str(BuiltinCorpus("train").fingerprint()["files"])

    def sequences_at(self, step: int) -> int:
        return self.short_factor if 2 * step < self.short_steps else super().sequences_at(2 * step - self.short_steps)

    def passage_of(self, length: int) -> int:
        """Symbols of the passage in a sequence of `length` tokens.

        Raises:
            ConfigError: the length is too short for two symbols (rotated: three) and their repetition.
        """
        if length < 2 * (2 + self.rotated):
            raise ConfigError(f"a repeat sequence of {length} tokens has no room for a passage and its repetition")
        return min(self.passage, length // 2)

    def describe(self, length: int) -> dict[str, int]:
        size = self.passage_of(length)
        return {"answers": size - 1 - self.rotated, "text": length - 2 * size, "vocabulary": self.vocab_size}

    def make(self, length: int, seed: int, purpose: int, step: int, row: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng([seed, purpose, step, row, length])
        inputs, targets = self._sequence(length, rng, "train" if purpose == TRAIN else "validation")
        if self.text_loss and purpose == TRAIN:
            following = np.append(inputs[1:], FIRST_SYMBOL)
            targets = np.where(following < FIRST_SYMBOL, following, targets)
        return inputs, targets

    def sequence(self, length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return self._sequence(length, rng, "train")

    def _sequence(self, length: int, rng: np.random.Generator, split: str) -> tuple[np.ndarray, np.ndarray]:
        size, text = self.passage_of(length), _text(split)
        inputs = text[(rng.integers(len(text)) + np.arange(length)) % len(text)].astype(np.int64)
        symbols = FIRST_SYMBOL + rng.permutation(self.symbols)[:size]
        start, again = rng.integers((length - 2 * size) // 2 + 1), length - size
        turn = int(rng.integers(1, size)) if self.rotated else 0
        inputs[start : start + size], inputs[again:] = symbols, np.roll(symbols, -turn)
        targets = np.full(length, IGNORE, np.int64)
        targets[again : length - 1] = inputs[again + 1 :]
        if turn:
            targets[length - 1 - turn] = IGNORE  # after the passage's last symbol
        return inputs, targets

    def oracle(self, inputs: np.ndarray) -> np.ndarray:
        """Knows where the repetition begins, and copies what followed each of its symbols in the first occurrence."""
        size = self.passage_of(len(inputs))
        start, again = int(np.argmax(inputs >= FIRST_SYMBOL)), len(inputs) - size
        first = list(inputs[start : start + size])
        following = dict(zip(first, [*first[1:], IGNORE]))
        predicted = np.full(len(inputs), IGNORE, np.int64)
        predicted[again:-1] = [following[symbol] for symbol in inputs[again:-1]]
        return predicted


@lru_cache(maxsize=2)
def _text(split: str) -> np.ndarray:
    """All documents of a split of the built-in corpus, uint8."""
    corpus = BuiltinCorpus(split)
    return np.frombuffer("".join(corpus.read(i).text for i in range(len(corpus))).encode(), np.uint8)
