"""Claims about the in-context recall task: it is solvable, but only by looking back, and fully deterministic."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from data.build import build_loader, build_tokenizer
from data.describe import describe
from data.loader import merge_states
from data.tasks.base import TEST, TRAIN
from data.tasks.recall import RecallTask
from data.tasks.rows import sequences_for_test
from ovq.compose import compose
from ovq.errors import ConfigError
from ovq.processes import World
from tests.data_helpers import learned_guess, rank_of

GOLDEN_INPUTS = [1, 14, 7, 11, 5, 13, 7, 11, 1, 14, 5, 13]
GOLDEN_TARGETS = [-100, -100, -100, -100, -100, -100, 11, -100, 14, -100, 13, -100]

TASKS = [
    RecallTask(),
    RecallTask(key_tokens=2, value_tokens=3, key_vocab=16, value_vocab=8),
    RecallTask(key_vocab=128, value_vocab=16, queried=0.3),
    RecallTask(key_vocab=128, value_vocab=16, filler=0.4, value_tokens=2),
]


def loader(*overrides: str, rank: int = 0, world_size: int = 1, state: dict[str, Any] | None = None) -> Any:
    cfg = compose(["data=recall", "trainer.context=32", "trainer.global_batch=4", "trainer.micro_batch=2", *overrides])
    return build_loader(cfg, build_tokenizer(cfg), rank_of(rank, world_size), state)


@pytest.mark.parametrize("length", [32, 57, 200])
@pytest.mark.parametrize("task", TASKS, ids=["plain", "long", "few queries", "filler"])
def test_an_oracle_answers_everything(task: RecallTask, length: int) -> None:
    for row in range(20):
        inputs, targets = task.make(length, 3, TRAIN, 0, row)
        right, answers = task.score(task.oracle(inputs), targets)
        pairs, queries, _ = task.sizes(length)
        assert right == answers == queries
        assert inputs.shape == targets.shape == (length,) and inputs.max() < task.vocab_size
        assert np.array_equal(task.oracle(inputs), targets), "something other than an answer has a label"


@pytest.mark.parametrize("task", TASKS, ids=["plain", "long", "few queries", "filler"])
def test_keys_are_unique_and_each_is_queried_at_most_once(task: RecallTask) -> None:
    inputs, _ = task.make(300, 4, TRAIN, 0, 0)
    pairs, queries, filler = task.sizes(300)
    is_key = (inputs >= 1) & (inputs <= task.key_vocab)
    keys = inputs[is_key].reshape(-1, task.key_tokens).tolist()
    first, queried = keys[:pairs], keys[pairs:]
    assert len({tuple(key) for key in first}) == pairs
    assert len({tuple(key) for key in queried}) == queries == len(queried)
    assert all(key in first for key in queried) and queried != first[:queries]
    assert int((inputs > task.key_vocab + task.value_vocab).sum()) == filler
    assert int((inputs == 0).sum()) < 2 * task.item and abs(queries / pairs - task.queried) < 0.1


def test_keys_of_two_tokens_are_enough_for_64k_tokens() -> None:
    """Keys are unique and all found, though a token is in many of them; a larger vocabulary allows far more."""
    for task, length, pairs in (
        (RecallTask(key_tokens=2, key_vocab=128), 65_536, 10_922),
        (RecallTask(key_vocab=16_384), 65_536, 16_384),
        (RecallTask(key_tokens=2), 1 << 20, 174_762),
    ):
        inputs, targets = task.make(length, 1, TEST, 0, 0)
        assert task.sizes(length) == (pairs, pairs, 0)
        assert np.array_equal(task.oracle(inputs), targets)


def test_a_query_alone_predicts_no_better_than_chance() -> None:
    """The best guess from the query's key, its position or the preceding token, learned from many sequences."""
    task = RecallTask(key_vocab=24, value_vocab=8)
    seen = {"key": lambda x, at: x[at], "place": lambda x, at: at, "last value": lambda x, at: x[at - 1]}
    for name, feature in seen.items():
        # 6,000 answers: a standard deviation of 0.43%.
        assert abs(learned_guess(task, 48, feature) - 1 / 8) < 0.02, name


def test_sequences_are_a_pure_function_of_seed_purpose_step_and_row() -> None:
    task = TASKS[0]
    one = task.make(64, 1, TRAIN, 2, 3)
    assert all(np.array_equal(a, b) for a, b in zip(one, task.make(64, 1, TRAIN, 2, 3)))
    for other in ((2, TRAIN, 2, 3), (1, TEST, 2, 3), (1, TRAIN, 3, 3), (1, TRAIN, 2, 4)):
        assert not np.array_equal(one[0], task.make(64, *other)[0])


def test_the_data_never_change_between_versions() -> None:
    inputs, targets = RecallTask(key_vocab=9, value_vocab=5).make(12, 0, TRAIN, 0, 0)
    assert inputs.tolist() == GOLDEN_INPUTS and targets.tolist() == GOLDEN_TARGETS


def test_ranks_and_micro_batches_only_divide_the_rows() -> None:
    alone = [b.inputs for b in islice(loader("trainer.micro_batch=4"), 3)]
    halves = [[b.inputs for b in islice(loader(rank=rank, world_size=2), 3)] for rank in range(2)]
    for step in range(3):
        assert torch.equal(alone[step], torch.cat([halves[0][step], halves[1][step]]))


def test_a_stopped_run_resumes_with_the_next_rows_on_a_different_number_of_ranks() -> None:
    whole = [b.inputs for b in islice(loader("trainer.micro_batch=4"), 5)]
    states = []
    for rank in range(2):
        part = loader(rank=rank, world_size=2)
        list(islice(part, 2))
        states.append(part.state_dict())
    rest = loader("trainer.micro_batch=4", state=merge_states(states))
    assert all(torch.equal(b.inputs, want) for b, want in zip(islice(rest, 3), whole[2:]))
    with pytest.raises(ConfigError, match="task"):
        loader("data.task.value_vocab=99", state=merge_states(states))


def test_workers_change_nothing() -> None:
    with_workers = loader("data.num_workers=2")
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(islice(loader(), 4), islice(with_workers, 4)))


def test_the_curriculum_gives_more_and_shorter_sequences_first() -> None:
    short = ("data.task.short_steps=4", "trainer.micro_batch=4")
    task = RecallTask()
    made = loader(*short)
    shapes, lanes = [], []
    for batch in islice(made, 5):
        shapes.append(tuple(batch.inputs.shape))
        lanes.append(len(batch.lanes))
        for inputs, targets in zip(batch.inputs.numpy(), batch.targets.numpy()):
            assert np.array_equal(task.oracle(inputs), targets), "a sequence is not whole"
    assert shapes == [(16, 8), (16, 8), (8, 16), (8, 16), (4, 32)] and lanes == [16, 16, 8, 8, 4]
    assert sorted(made.state_dict()["lanes"]) == [0, 1, 2, 3]
    resumed = loader(*short)
    list(islice(resumed, 3))
    again = loader(*short, state=merge_states([resumed.state_dict()]))
    assert [tuple(b.inputs.shape) for b in islice(again, 2)] == [(8, 16), (4, 32)]
    # Splitting the batch over ranks gives the same short sequences.
    halves = [next(iter(loader("data.task.short_steps=2", rank=rank, world_size=2))) for rank in range(2)]
    whole = next(iter(loader(*short)))
    assert torch.equal(whole.inputs, torch.cat([half.inputs for half in halves]))
    assert list(whole.lanes) == [lane for half in halves for lane in half.lanes]


def test_test_sequences_do_not_depend_on_how_they_are_batched() -> None:
    task = TASKS[2]
    one = torch.cat([b.inputs for b in sequences_for_test(task, 64, seed=0, rows=7, batch=3)])
    assert torch.equal(one, next(sequences_for_test(task, 64, seed=0, rows=7, batch=7)).inputs) and len(one) == 7


def test_an_answer_is_correct_only_if_all_its_tokens_are() -> None:
    task = RecallTask(value_tokens=2, key_vocab=8, value_vocab=4)
    inputs, targets = task.make(36, 0, TRAIN, 0, 0)
    predicted = targets.copy()
    predicted[np.flatnonzero(targets != -100)[0]] += 1
    _, queries, _ = task.sizes(36)
    assert task.score(predicted, targets) == (queries - 1, queries)


@pytest.mark.parametrize(
    "overrides,words",
    [
        (["data.task.value_vocab=0"], "data.task.value_vocab=0 must be at least 1"),
        (["data.task.queried=1.5"], "data.task.queried=1.5"),
        (["data.task.filler=1"], "data.task.filler=1"),
        (["data.task.key_vocab=3"], "8 different keys in 32 tokens"),
        (["+data.task.colour=3"], "no setting 'data.task.colour'; legal: key_tokens, "),
        (["data.task.key_vocab=5", "data.task.short_steps=4"], "8 different keys in 32 tokens"),  # 2 in the first 8
        (["data.task.key_tokens=20"], "no room for a pair"),
        (["data.task.key_tokens=7"], "key_vocab=4096 \\*\\* data.task.key_tokens=7 must be below 2 \\*\\* 63"),
        (["data.task.short_factor=5"], "data.task.short_factor=5 must be a power of two"),
        (["data.task.short_steps=5", "data.task.short_factor=64"], "trainer.context=32 must be a multiple of"),
    ],
)  # fmt: skip
def test_bad_settings_fail_in_one_line(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("+", r"\+")) as error:
        loader(*overrides)
    assert "\n" not in str(error.value)


def test_the_experiment_gives_the_described_task() -> None:
    cfg = compose(["experiment=recall"])
    assert describe(cfg) == {"train": {"pairs": 32, "answers": 32, "filler": 0, "vocabulary": 4353}}
    assert build_loader(cfg, build_tokenizer(cfg), World()).micro_batches_per_step == 1
