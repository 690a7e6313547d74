"""Needle in a haystack: sentences hidden at a given depth of a long text, which ends in a question about one of them.

    ...text... The magic number for amber-anchor is: 4821973. ...text... The magic number for amber-anchor is: 4821973

Haystack, needles, question and answer are tokenised separately and their ids joined, so a sequence has exactly the
requested length and no needle, question or answer is ever truncated. The question is the beginning of the needle's own
sentence, so it is answered by continuing it, which a model trained on plain text can do. Only the answer has labels.

`python -m eval.needle` tests a trained run with this task, in the ids of the run's own tokenizer. The task needs a
haystack and a tokenizer, so it is not an option of `data/task`.

Source: the kinds are named after RULER's (arXiv 2404.06654), and as there, a number has seven digits, a word is an
adjective and a noun, and `niah_single_1` hides its needle in a repeated passage. The wording, without instructions, and
the scoring, by exact tokens instead of a search in generated text, are ours, so scores are not comparable with
published ones. In `niah_multivalue`, the question repeats all values of the key but one, and that one is the answer:
there is a single right answer, whatever the order.

Shapes: T tokens of a sequence, n tokens of a part of one.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from functools import partial

import numpy as np

from data.tasks.base import IGNORE, TEST, Task
from data.tasks.needle_words import ADJECTIVES, NOUNS
from data.tokenizer import Tokenizer
from ovq.errors import ConfigError

PASSAGE = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@dataclass(frozen=True)
class Kind:
    """`haystack`: passage, text, or needles (other sentences like the one asked for). `keys`, `values`: word, number or
    uuid. `others`: needles with other keys in the text. `same`: further needles with the key that is asked for."""

    haystack: str
    keys: str = "word"
    values: str = "number"
    others: int = 0
    same: int = 0


KINDS = {
    "niah_single_1": Kind("passage"),
    "niah_single_2": Kind("text"),
    "niah_single_3": Kind("text", values="uuid"),
    "niah_multikey_1": Kind("text", others=3),
    "niah_multikey_2": Kind("needles"),
    "niah_multikey_3": Kind("needles", keys="uuid", values="uuid"),
    "niah_multivalue": Kind("text", same=3),
}


class NeedleTask(Task):
    """Ids: those of the tokenizer. A sequence begins with the tokenizer's separator.

    Args:
        haystack: int [n], ids of text without separators; every sequence takes a random stretch of it.
        tokenizer: the tokenizer of these ids, and of the needles.
        kind: one of `KINDS`.
        depth: position of the needle that is asked for, as a fraction of the haystack: 0 at its beginning, 1 just
            before the question; None: drawn for each sequence. Sequences that differ only in depth have the same
            haystack and needles.

    Raises:
        ConfigError: no such kind, or a depth outside 0 to 1.
    """

    name = "needle"
    whole_answers = True

    def __init__(
        self, haystack: np.ndarray, tokenizer: Tokenizer, *, kind: str = "niah_single_2", depth: float | None = None
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ConfigError(f"there is no needle kind '{kind}'; legal: {', '.join(KINDS)}")
        if depth is not None and not 0 <= depth <= 1:
            raise ConfigError(f"the depth of a needle, {depth:g}, must be in 0 to 1")
        self.haystack, self.tokenizer, self.kind, self.depth = haystack, tokenizer, kind, depth
        self.parts = KINDS[kind]
        self.opening = self.encode(f"\nThe magic {self.parts.values} for")
        self.middle, self.ending = self.encode(" is:"), self.encode(".\n")
        texts = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
        self.opens_word = np.array([text[:1].isspace() for text in texts])  # of each id
        self.closes_word = np.array([text[-1:].isspace() for text in texts])

    def encode(self, text: str) -> np.ndarray:
        return self.tokenizer.encode(text).astype(np.int64)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def stem(self, key: str) -> np.ndarray:
        """The needle's sentence up to its value."""
        return np.concatenate([self.opening, self.encode(" " + key), self.middle])

    def sentence(self, key: str, value: str) -> np.ndarray:
        """A needle, on a line of its own."""
        return np.concatenate([self.stem(key), self.encode(" " + value), self.ending])

    def describe(self, length: int) -> dict[str, int]:
        _, targets = self.make(length, 0, TEST, 0, 0)
        return {"answers": 1, "answer_tokens": int((targets != IGNORE).sum()), "vocabulary": self.vocab_size}

    def sequence(self, length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """See `Task.sequence`.

        Raises:
            ConfigError: the length has no room for needles, question and answer; the haystack is shorter than the
                sequence; or there are not enough different keys.
        """
        parts = self.parts
        depth = rng.random() if self.depth is None else self.depth
        places = rng.random(parts.others + parts.same)  # of the other needles, as depths
        key, *other_keys = distinct(parts.keys, 1 + parts.others, rng)
        answer, *more = distinct(parts.values, 1 + parts.same + parts.others, rng)
        same, other_values = more[: parts.same], more[parts.same :]
        hidden = [(depth, self.sentence(key, answer))]
        others = [*zip(other_keys, other_values), *((key, value) for value in same)]
        hidden += [(float(place), self.sentence(*pair)) for place, pair in zip(places, others)]
        reminders = [self.sentence(key, same[i]) for i in rng.permutation(parts.same)]
        question = np.concatenate([*reminders, self.stem(key)])
        answer_ids = self.encode(" " + answer)
        fixed = 1 + sum(len(ids) for _, ids in hidden) + len(question) + len(answer_ids)
        if length < fixed:
            raise ConfigError(f"a {self.kind} sequence takes at least {fixed} tokens; {length} are too few")
        text, gaps = self.stretch(length - fixed, key, answer, rng)
        body, last = [np.array([self.tokenizer.separator_id])], 0
        for place, needle in sorted(hidden, key=lambda item: item[0]):
            at = int(gaps[np.searchsorted(gaps, round(place * len(text)), side="right") - 1])
            body += [text[last:at], needle]
            last = at
        tokens = np.concatenate([*body, text[last:], question, answer_ids]).astype(np.int64)
        assert len(tokens) == length
        targets = np.full(length, IGNORE, np.int64)
        targets[length - len(answer_ids) - 1 : -1] = answer_ids
        return tokens, targets

    def stretch(self, size: int, key: str, answer: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """`size` tokens of haystack, and the ascending offsets between 0 and size at which a needle may be put.

        A haystack of needles does not contain the given key or answer.
        """
        if self.parts.haystack == "text":
            if size > len(self.haystack):
                raise ConfigError(
                    f"the haystack has {len(self.haystack)} tokens, and {size} are needed; choose more text or a "
                    "shorter length"
                )
            start = int(rng.integers(len(self.haystack) - size + 1))
            text = self.haystack[start : start + size]
            word_starts = 1 + np.flatnonzero(self.closes_word[text[:-1]] | self.opens_word[text[1:]])
            return text, np.unique(np.concatenate([[0], word_starts, [size]]))
        if self.parts.haystack == "passage":
            passage = self.encode(PASSAGE)
            sentences = [passage] * (1 + size // len(passage))
        else:
            keys = partial(distinct, self.parts.keys, rng=rng, besides=key)
            values = partial(distinct, self.parts.values, rng=rng, besides=answer)
            shortest = len(self.opening) + len(self.middle) + len(self.ending) + 2
            sentences, held = [], 0
            for pair in zip(keys(1 + size // shortest), values(1 + size // shortest)):
                if held >= size:
                    break
                sentences.append(self.sentence(*pair))
                held += len(sentences[-1])
        # The first sentence is cut at its beginning to fit; a stretch of text may begin in mid-sentence too.
        ends = np.cumsum([len(ids) for ids in sentences])
        cut = int(ends[-1]) - size if sentences else 0
        return np.concatenate([*sentences, np.empty(0, np.int64)])[cut:], np.unique([0, *(ends[ends > cut] - cut)])

    def oracle(self, inputs: np.ndarray) -> np.ndarray:
        """Reads every needle from the tokens, and predicts the one value of the last key that occurs only once."""
        starts = [*find(inputs, self.opening), len(inputs)]
        book: dict[bytes, dict[bytes, int]] = {}
        predicted = np.full(len(inputs), IGNORE, np.int64)
        for start, stop in zip(starts, starts[1:]):
            # The line break that ends a needle may be the one that opens the next, if that was cut there.
            sentence = inputs[start + len(self.opening) : stop + len(self.ending)]
            middle = next(iter(find(sentence, self.middle)))
            key, rest = sentence[:middle].tobytes(), sentence[middle + len(self.middle) :]
            if stop < len(inputs):
                value = rest[: next(iter(find(rest, self.ending)))].tobytes()
                counts = book.setdefault(key, {})
                counts[value] = counts.get(value, 0) + 1
            else:
                (once,) = (value for value, count in book[key].items() if count == 1)
                answer = np.frombuffer(once, np.int64)
                predicted[-len(rest) - 1 : -1] = answer[: len(rest)]
        return predicted


def find(tokens: np.ndarray, pattern: np.ndarray) -> list[int]:
    """All offsets at which the pattern occurs."""
    if len(tokens) < len(pattern):
        return []
    windows = np.lib.stride_tricks.sliding_window_view(tokens, len(pattern))
    return np.flatnonzero((windows == pattern).all(axis=1)).tolist()


def distinct(what: str, count: int, rng: np.random.Generator, besides: str | None = None) -> list[str]:
    """`count` different words, numbers or uuids, none of which is `besides`.

    Raises:
        ConfigError: there are not that many words or numbers.
    """
    if what == "uuid":  # 122 random bits: they never coincide in practice
        return [str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(count)]
    first, number = (0, len(ADJECTIVES) * len(NOUNS)) if what == "word" else (10**6, 9 * 10**6)
    if count + 1 > number:
        raise ConfigError(f"{count} needles need as many different keys, of which there are {number}")
    codes = first + rng.choice(number, count + 1, replace=False)
    made = [f"{ADJECTIVES[c // len(NOUNS)]}-{NOUNS[c % len(NOUNS)]}" if what == "word" else str(c) for c in codes]
    return [text for text in made if text != besides][:count]
