"""Claims about in-context regression: the functions are the paper's, and only earlier examples tell which they are."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from data.build import build_task, build_tokenizer
from data.describe import describe
from data.tasks.base import IGNORE, TEST, TRAIN
from data.tasks.regression import RegressionTask, earlier
from ovq.compose import compose
from ovq.errors import ConfigError
from tests.data_helpers import learned_guess, loader

FUNCTIONS = [(a, b, p) for a, b in itertools.product(range(1, 5), repeat=2) for p in itertools.permutations(range(4))]


def read(task: RegressionTask, inputs: np.ndarray) -> list[tuple[int, list[int], list[int]]]:
    """(label, x, y) of every example, in the order of the sequence."""
    rows = inputs[len(inputs) % task.item :].reshape(-1, task.item)
    d = task.dimensions
    return [(int(row[0]), (row[1 : 1 + d] - 1).tolist(), (row[1 + d :] - 1).tolist()) for row in rows]


def fits(function: tuple[int, int, tuple[int, ...]], x: list[int], y: list[int]) -> bool:
    a, b, permutation = function
    return [b + a * x[i] for i in permutation] == y


@pytest.mark.parametrize("functions", [1, 4, 16, 128])
@pytest.mark.parametrize("distinct", [True, False])
def test_examples_are_of_as_many_functions_of_the_papers_form_as_asked_for(functions: int, distinct: bool) -> None:
    task = RegressionTask(functions=functions, distinct=distinct)
    examples = read(task, task.make(9 * 3 * functions + 5, 1, TRAIN, 0, 0)[0])
    of_label: dict[int, list[int]] = {}
    for label, x, y in examples:
        assert all(0 <= entry < 10 for entry in x) and (len(set(x)) == 4 or not distinct)
        left = of_label.setdefault(label, list(range(len(FUNCTIONS))))
        of_label[label] = [i for i in left if fits(FUNCTIONS[i], x, y)]
    assert len(examples) == 3 * functions and set(Counter(label for label, _, _ in examples).values()) == {3}
    assert len(of_label) == functions and all(of_label.values()), "no function fits"
    if distinct:
        assert all(len(left) == 1 for left in of_label.values()), "one example does not determine its function"
        assert len({left[0] for left in of_label.values()}) == functions, "two labels have one function"


def test_every_function_and_every_label_occurs() -> None:
    task = RegressionTask(functions=2, labels=5, dimensions=2, values=4)
    functions, labels = set(), set()
    for row in range(300):
        for label, x, y in read(task, task.make(20, 2, TRAIN, 0, row)[0]):
            labels.add(label)
            functions |= {
                (a, b, p)
                for a, b in itertools.product(range(1, 5), repeat=2)
                for p in ((0, 1), (1, 0))
                if fits((a, b, p), x, y)
            }
    assert labels == set(range(task.first_label, task.vocab_size)) and len(functions) == 32


def test_labels_are_the_y_of_all_but_the_first_example_of_a_function() -> None:
    task = RegressionTask(functions=3)
    inputs, targets = task.make(9 * 12 + 2, 3, TRAIN, 0, 0)
    indices, seen = task.indices(inputs), Counter[int]()
    assert (inputs[:2] == 0).all() and (targets[:2] == IGNORE).all()
    for number, (label, _, y) in enumerate(read(task, inputs)):
        at = 2 + 9 * number
        expected = [IGNORE] * 4 if seen[label] == 0 else [1 + entry for entry in y]
        assert targets[at : at + 9].tolist() == [IGNORE] * 4 + expected + [IGNORE]
        assert indices[at : at + 9].tolist() == [seen[label]] * 9
        seen[label] += 1
    assert task.describe(len(inputs))["answers"] == (targets != IGNORE).sum()
    both = np.stack([inputs, task.make(len(inputs), 3, TRAIN, 0, 1)[0]])
    assert np.array_equal(task.indices(both)[0], indices) and np.array_equal(
        task.indices(both)[1], task.indices(both[1])
    )


def test_a_query_alone_predicts_no_better_than_chance() -> None:
    """A guess from x and the label alone, given the distribution of functions, is right on a twelfth of the tokens."""
    task = RegressionTask(functions=4)
    right = expected = total = 0.0
    for row in range(150):
        inputs, targets = task.make(9 * 30, 7, TRAIN, 0, row)
        indices = task.indices(inputs)
        for number, (_, x, y) in enumerate(read(task, inputs)):
            if indices[9 * number] == 0:
                continue
            for j in range(4):
                votes = Counter(b + a * x[p[j]] for a, b, p in FUNCTIONS)
                guess, count = votes.most_common(1)[0]
                right, expected, total = right + (guess == y[j]), expected + count / len(FUNCTIONS), total + 1
    chance = expected / total
    assert 0.07 < chance < 0.10
    # 15,600 answers, but only 600 functions: the share is known to about 1%.
    assert abs(right / total - chance) < 0.03
    for feature in (lambda x, at: x[at - at % 9], lambda x, at: at):  # the label; the position in the sequence
        assert learned_guess(task, 90, feature, learn=300, test=150) < 0.10


def test_the_end_of_an_example_follows_from_its_beginning() -> None:
    """The warning in the task's docstring: a model that sees only the current example gets 44% of tokens right."""
    task, rng = RegressionTask(), np.random.default_rng(0)
    codes = np.arange(len(FUNCTIONS))
    right = np.zeros(4)
    for code in rng.integers(len(codes), size=1500):
        possible = task.apply(codes, rng.permutation(10)[None, :4])
        y = possible[code]
        for j in range(4):
            right[j] += np.bincount(possible[:, j]).argmax() == y[j]
            possible = possible[possible[:, j] == y[j]]
    # The standard deviation of each is at most 1.3%.
    assert np.allclose(right / 1500, [0.09, 0.22, 0.44, 1.0], atol=0.04)
    assert abs(right.mean() / 1500 - task.floor) < 0.02


def test_with_more_functions_than_exist_several_labels_have_the_same() -> None:
    task = RegressionTask(functions=64, dimensions=2)
    inputs, targets = task.make(5 * 64 * 3, 0, TEST, 0, 0)
    assert len({label for label, _, _ in read(task, inputs)}) == 64
    grades = task.grade(task.oracle(inputs), targets)
    assert (grades == 1).sum() == (grades != IGNORE).sum() == 2 * 64 * 2


def test_with_repeated_entries_more_examples_tell_more() -> None:
    """The oracle's curve with distinct=false: right where all functions that still fit agree, and soon everywhere."""
    task = RegressionTask(functions=4, distinct=False)
    right, total = np.zeros(8), np.zeros(8)
    for row in range(40):
        inputs, targets = task.make(9 * 32, 0, TRAIN, 0, row)
        grades, indices = task.grade(task.oracle(inputs), targets), task.indices(inputs)
        for index in range(1, 8):
            mine = grades[(grades != IGNORE) & (indices == index)]
            right[index], total[index] = right[index] + mine.sum(), total[index] + len(mine)
    curve = right[1:] / total[1:]
    assert 0.85 < curve[0] < 0.97 and curve[0] < curve[1] and (curve[4:] == 1).all()


@pytest.mark.parametrize("functions", [4, 16, 128])
def test_testing_with_other_numbers_of_functions_needs_no_new_ids(functions: int) -> None:
    train = compose(["data=task", "data/task=regression", "data.task.functions=16"])
    test = compose(["data=task", "data/task=regression", f"data.task.functions={functions}"])
    assert build_tokenizer(train).fingerprint == build_tokenizer(test).fingerprint
    held = describe(test)["train"]
    assert held["functions"] == functions and held["examples"] == 227 and held["answers"] == 4 * (227 - functions)


@pytest.mark.parametrize("pool", [1, 3])
def test_a_pool_gives_a_function_few_different_examples_in_training(pool: int) -> None:
    task = RegressionTask(functions=4, pool=pool)
    numbers = set()
    for row in range(60):
        inputs, targets = task.make(9 * 64 + 3, 0, TRAIN, 0, row)
        examples: dict[int, set[tuple[int, ...]]] = {}
        for label, x, y in read(task, inputs):
            examples.setdefault(label, set()).add((*x, *y))
        numbers |= {len(found) for found in examples.values()}
        seen = set()
        for number, (label, x, _) in enumerate(read(task, inputs)):
            expected = [1 + entry for entry in x] if label in seen else [IGNORE] * 4
            assert targets[3 + 9 * number :][:4].tolist() == expected, "the x of a repeated function is no label"
            seen.add(label)
    assert numbers == set(range(1, pool + 1))
    in_test, plain = task.make(9 * 64, 0, TEST, 0, 0), RegressionTask(functions=4).make(9 * 64, 0, TEST, 0, 0)
    assert all(np.array_equal(a, b) for a, b in zip(in_test, plain)), "tests have a pool"


def test_the_share_of_sequences_with_a_pool_is_as_asked_for() -> None:
    task = RegressionTask(functions=1, pool=1, pool_share=0.3)
    drawn = [read(task, task.make(9 * 8, 0, TRAIN, 0, row)[0]) for row in range(1000)]
    share = np.mean([len({tuple(x) for _, x, _ in examples}) == 1 for examples in drawn])
    assert abs(share - 0.3) < 0.06  # four standard deviations


def test_shorter_sequences_of_the_curriculum_have_fewer_functions() -> None:
    given = ["data.task.functions=8", "data.task.short_steps=2", "data.task.short_factor=4", "trainer.context=288"]
    cfg = compose(["data=task", "data/task=regression", *given])
    task = build_task(cfg)
    for batch, functions in zip(loader(cfg), [2, 4, 8]):
        assert batch.inputs.shape[1] == 36 * functions
        for row in batch.inputs.numpy():
            assert len({label for label, _, _ in read(task, row)}) == functions


def test_equal_items_are_counted_in_order() -> None:
    assert earlier(np.array([5, 2, 5, 5, 2, 9])).tolist() == [0, 0, 1, 2, 1, 0]


GOLDEN_INPUTS = [0, 14, 3, 1, 11, 5, 14, 1, 3, 5, 11]
GOLDEN_TARGETS = [-100, -100, -100, -100, -100, -100, -100, -100, 5, 11, -100]


def test_the_data_never_change_between_versions() -> None:
    task = RegressionTask(functions=1, labels=2, dimensions=2, values=3)
    inputs, targets = task.make(11, 0, TRAIN, 0, 0)
    assert inputs.tolist() == GOLDEN_INPUTS and targets.tolist() == GOLDEN_TARGETS


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["functions=0"], "data.task.functions=0 must be at least 1"),
        (["functions=129"], "data.task.labels=128 must be at least data.task.functions=129"),
        (["dimensions=1"], "data.task.dimensions=1 must be in 2 to 7"),
        (["dimensions=8"], "data.task.dimensions=8 must be in 2 to 7"),
        (["values=3"], "data.task.values=3 must be at least data.task.dimensions=4, as the entries of x all differ"),
        (["values=1", "distinct=false"], "data.task.values=1 must be at least 2"),
        (["short_steps=2", "short_factor=128"], "16 tokens holds 1 examples, and with data.task.functions=1 no"),
        (["pool=-1"], "data.task.pool=-1 must be at least 0"),
        (["pool=1", "pool_share=1.5"], "data.task.pool_share=1.5 must be in 0 to 1"),
    ],
)  # fmt: skip
def test_impossible_settings_fail_in_one_line(overrides: list[str], words: str) -> None:
    cfg = compose(["data=task", "data/task=regression", *(f"data.task.{override}" for override in overrides)])
    with pytest.raises(ConfigError) as error:
        build_task(cfg).check_context(cfg.trainer.context)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_the_shortest_sequence_has_one_function_with_two_examples() -> None:
    task = RegressionTask(functions=16)
    assert task.describe(17 * 9)["answers"] == 4
    with pytest.raises(ConfigError, match="it takes 153 tokens"):
        task.describe(17 * 9 - 1)
    assert math.factorial(4) * 16 == len(FUNCTIONS)
