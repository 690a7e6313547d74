"""Claims about positional recall: keys repeat, their values differ, and only the occurrence decides the answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from data.build import build_task
from data.describe import describe
from data.tasks.base import IGNORE, TRAIN
from data.tasks.positional_recall import PositionalRecallTask, different_in_rows
from ovq.compose import compose
from ovq.errors import ConfigError
from tests.data_helpers import learned_guess

SMALL = {"occurrences": 3, "key_vocab": 24, "value_vocab": 8}
TASKS = {
    "plain": PositionalRecallTask(**SMALL),  # type: ignore[arg-type]
    "long": PositionalRecallTask(occurrences=2, key_tokens=2, value_tokens=2, key_vocab=8, value_vocab=5),
    "few queries": PositionalRecallTask(occurrences=4, key_vocab=64, queried=0.2),
    "filler": PositionalRecallTask(occurrences=5, key_vocab=64, filler=0.4),
    "once": PositionalRecallTask(occurrences=1, key_vocab=64),
}


def read(task: PositionalRecallTask, inputs: np.ndarray) -> tuple[list[tuple], list[tuple]]:
    """(key, value) of every pair and (key, occurrence, value) of every query, in the order of the sequence."""
    words = inputs[(inputs > 0) & ~np.isin(inputs, task.filler_ids)].tolist()
    pairs, queries = [], []
    k, v = task.key_tokens, task.value_tokens
    while words:
        mark = words.pop(0) - task.marks.start if words[0] in task.marks else None
        key, value, words = tuple(words[:k]), tuple(words[k : k + v]), words[k + v :]
        if mark is None:
            pairs.append((key, value))
        else:
            queries.append((key, mark, value))
    return pairs, queries


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("length", [60, 301])
def test_keys_occur_several_times_with_values_that_all_differ(name: str, length: int) -> None:
    task = TASKS[name]
    inputs, _ = task.make(length, 4, TRAIN, 0, 0)
    pairs, queries = read(task, inputs)
    pair_count, query_count, filler = task.sizes(length)
    assert (len(pairs), len(queries)) == (pair_count, query_count)
    assert int(np.isin(inputs, task.filler_ids).sum()) == filler
    often = sorted(Counter(key for key, _ in pairs).values(), reverse=True)
    assert set(often[:-1]) <= {task.occurrences} and 1 <= often[-1] <= task.occurrences
    assert len(often) == task.describe(length)["keys"]
    assert len(set(pairs)) == len(pairs), "a key has a value twice"
    assert len({query[:2] for query in queries}) == len(queries), "a pair is asked for twice"


@pytest.mark.parametrize("name", TASKS)
def test_the_answer_is_the_value_of_the_occurrence_that_the_mark_names(name: str) -> None:
    task = TASKS[name]
    inputs, targets = task.make(300, 5, TRAIN, 0, 1)
    pairs, queries = read(task, inputs)
    for key, occurrence, value in queries:
        assert [v for k, v in pairs if k == key][occurrence] == value
    answers = targets[targets != IGNORE].reshape(-1, task.value_tokens)
    assert [tuple(answer) for answer in answers.tolist()] == [value for _, _, value in queries]
    asked = task.indices(inputs)[targets != IGNORE].reshape(-1, task.value_tokens)
    assert asked.tolist() == [[occurrence] * task.value_tokens for _, occurrence, _ in queries]
    assert np.array_equal(task.indices(np.stack([inputs, inputs]))[1], task.indices(inputs))


def test_a_short_sequence_is_full_and_has_a_query() -> None:
    task = TASKS["few queries"]
    for length in range(5, 60):
        pairs, queries, _ = task.sizes(length)
        assert pairs >= 1 and queries >= 1 and abs(queries - 0.2 * pairs) < 1
        assert length - 2 * pairs - 3 * queries < 5


@pytest.mark.parametrize(
    "feature",
    [
        lambda x, at: (x[at - 1], x[at]),  # mark and key: the whole query
        lambda x, at: x[at],
        lambda x, at: at,
        lambda x, at: x[at - 2],  # the previous answer
    ],
    ids=["query", "key", "place", "answer before"],
)
def test_a_query_alone_predicts_no_better_than_chance(feature: Callable[[np.ndarray, int], int]) -> None:
    # Sequences of 50 tokens have 10 queries: 5,000 answers, a standard deviation of 0.47%.
    assert abs(learned_guess(TASKS["plain"], 50, feature) - 1 / 8) < 0.02


def test_who_ignores_the_position_is_right_once_in_as_many_times_as_the_key_occurs() -> None:
    task = PositionalRecallTask(occurrences=4, key_vocab=64)
    right: Counter[str] = Counter()
    total = 0
    for row in range(100):
        pairs, queries = read(task, task.make(200, 6, TRAIN, 0, row)[0])
        for key, _, value in queries:
            values = [v for k, v in pairs if k == key]
            if len(values) == 4:
                right["first"] += values[0] == value
                right["last"] += values[-1] == value
                total += 1
    # Every pair is asked for, so the share is exact.
    assert total > 3000 and right["first"] / total == right["last"] / total == 1 / 4


def test_sequences_of_the_curriculum_have_fewer_pairs_of_each_key_and_the_same_vocabulary() -> None:
    task = PositionalRecallTask(occurrences=4, key_vocab=64, short_steps=30, short_factor=8)
    for count, often in ((8, 1), (4, 1), (2, 2), (1, 4)):
        shorter = task.shorter(count)
        pairs, queries = read(task, shorter.make(128 // count, 7, TRAIN, 0, 0)[0])
        times = Counter(key for key, _ in pairs)
        assert max(times.values()) == often and len(times) >= 3 and len(queries) == len(pairs)
        assert shorter.vocab_size == task.vocab_size and shorter.marks == task.marks
    assert task.occurrences == 4


def test_different_integers_are_uniform_in_every_column() -> None:
    drawn = different_in_rows(30_000, 3, 4, np.random.default_rng(0))
    assert all(len(set(row)) == 3 for row in drawn[:500].tolist())
    assert drawn.min() == 0 and drawn.max() == 3
    arrangements = np.bincount(drawn @ [1, 4, 16], minlength=64)
    assert (arrangements > 0).sum() == 24, "4 x 3 x 2 arrangements exist"
    # 1,250 of each are expected, with a standard deviation of 35.
    assert abs(arrangements[arrangements > 0] - 1250).max() < 175


GOLDEN_INPUTS = [0, 5, 9, 3, 9, 3, 8, 10, 3, 9, 10, 5, 9, 11, 3, 8]
GOLDEN_TARGETS = [-100, -100, -100, -100, -100, -100, -100, -100, 9, -100, -100, 9, -100, -100, 8, -100]


def test_the_data_never_change_between_versions() -> None:
    task = PositionalRecallTask(occurrences=2, key_vocab=5, value_vocab=4)
    inputs, targets = task.make(16, 0, TRAIN, 0, 0)
    assert inputs.tolist() == GOLDEN_INPUTS and targets.tolist() == GOLDEN_TARGETS


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.task.occurrences=0"], "data.task.occurrences=0 must be at least 1"),
        (["data.task.value_vocab=3"], "data.task.value_tokens=3 must be at least data.task.occurrences=4"),
        (["data.task.key_vocab=50"], "103 different keys in 2048 tokens need"),
        (["data.task.key_vocab=0"], "data.task.key_vocab=0 must be at least 1"),
        (["trainer.context=4"], "a positional_recall sequence of 4 tokens has no room for a pair and its query"),
        (["+data.task.occurences=3"], "no setting 'data.task.occurences'; legal: occurrences, key_tokens"),
    ],
)
def test_impossible_settings_fail_in_one_line(overrides: list[str], words: str) -> None:
    cfg = compose(["data=task", "data/task=positional_recall", *overrides])
    with pytest.raises(ConfigError) as error:
        build_task(cfg).check_context(cfg.trainer.context)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_dry_run_says_what_a_sequence_holds() -> None:
    cfg = compose(["data=task", "data/task=positional_recall", "trainer.context=65536"])
    expected = {"keys": 3277, "pairs": 13107, "answers": 13107, "filler": 0, "vocabulary": 4357}
    assert describe(cfg) == {"train": expected}
