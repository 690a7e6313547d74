"""In-context regression over integers: examples of several functions are interleaved, and each y is to be predicted.

    f3 x x x x y y y y f1 x x x x y y y y f3 x x x x y y y y ...

A function maps x to y = b + a P x with integers 0 < a, b < 5, the same for all entries, and a permutation P of the
entries. An example is the function's label, then the entries of x, then those of y, one token each. Accuracy is that of
the tokens of y, by the number of earlier examples of the same function (`indices`), which gives an in-context learning
curve.

What needs no earlier example must not be mistaken for in-context learning. With the defaults, a model that sees only a
label and an x is right on 8% of the tokens of y; one that also uses the earlier entries of this y, on 44% (9, 22, 44
and nearly 100% from the first entry to the last): within one example, the beginning of y nearly determines its end.

Source: the functions and the metric are those of arXiv 2602.03922, figures 5 and 8 (4 or 16 functions in training, 4 to
128 in tests). Its squared-error relatives (arXiv 2208.01066) are over real numbers; here answers are tokens, right or
wrong. The rest is ours:
- x has four entries in 0 .. 9. They all differ by default, so that one example determines its function: sorting x and y
  gives P, a and b. With `distinct=false` they are drawn independently, and it may take several examples.
- Labels are drawn for every sequence from `labels` ids, so that testing with more functions needs no new id.
- The functions of a sequence all differ, unless it has more than exist. Each has as many examples as any other, give or
  take one, and their order is random.
- A function's first example, whose y cannot be known, has no labels in the targets.
- Small models do not discover by themselves that the label tells which examples belong together. `pool` gives them
  training sequences in which each function has a few different examples, which are repeated: there it is (nearly)
  enough to copy what followed the same label.
"""

from __future__ import annotations

import copy
import functools
import itertools

import numpy as np

from data.tasks.base import BLANK, IGNORE, TRAIN, Task
from ovq.errors import ConfigError

COEFFICIENTS = 4  # a and b are in 1 .. 4
MOST_DIMENSIONS = 7  # permutations are enumerated


class RegressionTask(Task):
    """Ids: the blank, then the integers 0 .. the largest y, then labels.

    Args:
        functions: functions interleaved in a sequence.
        labels: ids to draw their labels from.
        dimensions: entries of x and of y.
        values: entries of x are integers in 0 .. values - 1.
        distinct: whether the entries of an x all differ.
        pool: in training, each function has only 1 to `pool` different x (the number is drawn for each sequence), which
            are repeated, and x is labelled as well. 0: a new x is drawn for every example.
        pool_share: share of training sequences with such a pool.
        short_steps, short_factor: the curriculum, see `Task`. Shorter sequences have as many examples of each
            function, but fewer functions.

    Raises:
        ConfigError: a size is out of range, or there are fewer labels, functions or values than needed.
    """

    name = "regression"
    index_name = "earlier examples of the function"

    def __init__(
        self,
        *,
        functions: int = 16,
        labels: int = 128,
        dimensions: int = 4,
        values: int = 10,
        distinct: bool = True,
        pool: int = 0,
        pool_share: float = 1.0,
        short_steps: int = 0,
        short_factor: int = 4,
    ) -> None:
        super().__init__(short_steps=short_steps, short_factor=short_factor)
        if not 2 <= dimensions <= MOST_DIMENSIONS:
            raise ConfigError(f"data.task.dimensions={dimensions} must be in 2 to {MOST_DIMENSIONS}")
        if values < (dimensions if distinct else 2):
            reason = f"data.task.dimensions={dimensions}, as the entries of x all differ" if distinct else "2"
            raise ConfigError(f"data.task.values={values} must be at least {reason}")
        if functions < 1:
            raise ConfigError(f"data.task.functions={functions} must be at least 1")
        if functions > labels:
            raise ConfigError(f"data.task.labels={labels} must be at least data.task.functions={functions}")
        if pool < 0:
            raise ConfigError(f"data.task.pool={pool} must be at least 0")
        if not 0 <= pool_share <= 1:
            raise ConfigError(f"data.task.pool_share={pool_share} must be in 0 to 1")
        self.functions, self.labels, self.dimensions = functions, labels, dimensions
        self.values, self.distinct = values, distinct
        self.pool, self.pool_share = pool, pool_share
        self.permutations = np.array(list(itertools.permutations(range(dimensions))))

    @property
    def first_label(self) -> int:
        return 1 + COEFFICIENTS * self.values + 1  # the largest y is COEFFICIENTS * (values - 1) + COEFFICIENTS

    @property
    def vocab_size(self) -> int:
        return self.first_label + self.labels

    @property
    def floor(self) -> float:
        return without_examples(self.dimensions, self.values, self.distinct)

    @property
    def item(self) -> int:
        """Tokens of an example."""
        return 1 + 2 * self.dimensions

    def apply(self, codes: np.ndarray, x: np.ndarray) -> np.ndarray:
        """y [n, dimensions] of functions `codes` [n], each encoding (a, b, P), at x [n or 1, dimensions]."""
        permutation, coefficients = divmod(codes, COEFFICIENTS**2)
        a, b = 1 + coefficients // COEFFICIENTS, 1 + coefficients % COEFFICIENTS
        x = np.broadcast_to(x, (len(codes), self.dimensions))
        return b[:, None] + a[:, None] * np.take_along_axis(x, self.permutations[permutation], axis=1)

    def shorter(self, count: int) -> RegressionTask:
        task = copy.copy(self)
        task.functions = max(1, self.functions // count)
        return task

    def examples(self, length: int) -> int:
        """Examples in a sequence of `length` tokens.

        Raises:
            ConfigError: no function would have a second example.
        """
        count = length // self.item
        if count <= self.functions:
            raise ConfigError(
                f"a regression sequence of {length} tokens holds {count} examples, and with "
                f"data.task.functions={self.functions} no function has a second one; it takes "
                f"{(self.functions + 1) * self.item} tokens"
            )
        return count

    def describe(self, length: int) -> dict[str, int]:
        count = self.examples(length)
        answers = (count - self.functions) * self.dimensions
        return {
            "functions": self.functions,
            "examples": count,
            "answers": answers,
            "vocabulary": self.vocab_size,
        }

    def make(self, length: int, seed: int, purpose: int, step: int, row: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng([seed, purpose, step, row, length])
        pooled = purpose == TRAIN and self.pool > 0 and rng.random() < self.pool_share
        return self._sequence(length, rng, 1 + int(rng.integers(self.pool)) if pooled else 0)

    def sequence(self, length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return self._sequence(length, rng, 0)

    def draw_x(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """x of `count` examples [count, dimensions]."""
        if self.distinct:
            return rng.permuted(np.tile(np.arange(self.values), (count, 1)), axis=1)[:, : self.dimensions]
        return rng.integers(self.values, size=(count, self.dimensions))

    def _sequence(self, length: int, rng: np.random.Generator, pool: int) -> tuple[np.ndarray, np.ndarray]:
        count, d = self.examples(length), self.dimensions
        exist = COEFFICIENTS**2 * len(self.permutations)
        codes = rng.choice(exist, self.functions, replace=self.functions > exist)
        labels = self.first_label + rng.choice(self.labels, self.functions, replace=False)
        which = rng.permutation(np.arange(count) % self.functions)
        if pool:
            x = self.draw_x(self.functions * pool, rng)[which * pool + rng.integers(pool, size=count)]
        else:
            x = self.draw_x(count, rng)
        y = self.apply(codes[which], x)
        tokens = np.full(length, BLANK, np.int64)
        start = length - count * self.item
        rows = tokens[start:].reshape(count, self.item)
        rows[:] = np.concatenate([labels[which, None], 1 + x, 1 + y], axis=1)
        targets = np.full(length, IGNORE, np.int64)
        of_example = targets[start:].reshape(count, self.item)
        again = earlier(which) > 0
        first = 0 if pool else d
        of_example[again, first : 2 * d] = rows[again, first + 1 :]
        return tokens, targets

    def indices(self, inputs: np.ndarray) -> np.ndarray:
        """For each token, the number of earlier examples of the function that its example belongs to."""
        found = np.zeros(inputs.shape, np.int64)
        start = inputs.shape[-1] % self.item
        for tokens, out in zip(np.atleast_2d(inputs), np.atleast_2d(found)):
            out[start:] = np.repeat(earlier(tokens[start :: self.item]), self.item)
        return found

    def oracle(self, inputs: np.ndarray) -> np.ndarray:
        """Tries all functions: those that agree with every earlier token vote on the next one.

        Predicts nothing in the first example of a function. Where the context leaves a choice (only if `distinct` is
        false), the most frequent value is taken.
        """
        d = self.dimensions
        predicted = np.full(len(inputs), IGNORE, np.int64)
        codes = np.arange(COEFFICIENTS**2 * len(self.permutations))
        candidates: dict[int, np.ndarray] = {}
        for at in range(len(inputs) % self.item, len(inputs), self.item):
            label, x, y = int(inputs[at]), inputs[at + 1 : at + 1 + d] - 1, inputs[at + 1 + d : at + self.item] - 1
            left = candidates.get(label, codes)
            possible = self.apply(left, x)
            for j in range(d):
                if label in candidates:
                    predicted[at + d + j] = 1 + np.bincount(possible[:, j]).argmax()
                agree = possible[:, j] == y[j]
                left, possible = left[agree], possible[agree]
            candidates[label] = left
        return predicted


@functools.cache
def without_examples(dimensions: int, values: int, distinct: bool, draws: int = 4000) -> float:
    """Accuracy on y's tokens when each is predicted from its own example alone, as the most frequent value among the
    functions that agree with the tokens so far. Over fixed random examples; the standard error is below 0.8%."""
    task = RegressionTask(functions=1, dimensions=dimensions, values=values, distinct=distinct)
    rng = np.random.default_rng(0)
    codes = np.arange(COEFFICIENTS**2 * len(task.permutations))
    right = 0
    for code, x in zip(rng.integers(len(codes), size=draws), task.draw_x(draws, rng)):
        possible = task.apply(codes, x[None])
        y = possible[code]
        for j in range(dimensions):
            right += int(np.bincount(possible[:, j]).argmax() == y[j])
            possible = possible[possible[:, j] == y[j]]
    return right / (draws * dimensions)


def earlier(items: np.ndarray) -> np.ndarray:
    """For each of n items, how many equal ones come before it [n]."""
    order = np.argsort(items, kind="stable")
    ordered = items[order]
    counts = np.empty(len(items), np.int64)
    counts[order] = np.arange(len(items)) - np.searchsorted(ordered, ordered)
    return counts
