"""The contract of all generated tasks, needles included: solvable from the context, deterministic, of any length."""

from __future__ import annotations

import functools
import inspect
import time
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from data.build import build_corpus, build_loader, build_task, build_tokenizer
from data.describe import describe
from data.loader import merge_states
from data.tasks.base import IGNORE, TEST, TRAIN, Task, lay_out, spell
from data.tasks.needle import KINDS, NeedleTask
from data.tasks.recall import RecallTask
from data.tasks.rows import sequences_for_test
from data.tokenizer import ByteTokenizer
from ovq.compose import CONFIG_DIR, compose, options
from ovq.errors import ConfigError
from ovq.instantiate import settings_of
from tests.data_helpers import rank_of

NAMES = options("data/task")
LONG = 65_536
# Settings for 64k tokens, for tasks whose defaults do not allow that length.
FOR_LONG = {"recall": ["data.task.key_tokens=2", "data.task.key_vocab=128"]}


def configured(name: str) -> Task:
    return build_task(compose(["data=task", f"data/task={name}", *FOR_LONG.get(name, [])]))


@functools.cache
def haystack() -> np.ndarray:
    corpus = build_corpus(compose(["data=builtin"]), "validation")
    return np.concatenate([ByteTokenizer().encode(corpus.read(i).text) for i in range(2)]).astype(np.int64)


MAKERS: dict[str, Any] = {
    **{name: functools.partial(configured, name) for name in NAMES},
    **{
        kind: functools.partial(lambda kind: NeedleTask(haystack(), ByteTokenizer(), kind=kind), kind) for kind in KINDS
    },
}
EVERY = pytest.mark.parametrize("name", MAKERS)


@functools.cache
def task_of(name: str) -> Task:
    return MAKERS[name]()


@pytest.mark.parametrize("name", NAMES)
def test_a_config_holds_exactly_the_settings_of_its_class_with_their_defaults(name: str) -> None:
    given = yaml.safe_load((CONFIG_DIR / "data" / "task" / f"{name}.yaml").read_text())
    task = build_task(compose(["data=task", f"data/task={name}"]))
    assert given.pop("_target_") == f"{type(task).__module__}.{type(task).__name__}" and task.name == name
    assert given == settings_of(type(task), {}, "data.task")
    assert "Args:" in (inspect.getdoc(type(task)) or "")


@EVERY
@pytest.mark.parametrize("length", [700, 2048, 2051, LONG])
def test_an_oracle_that_reads_only_the_context_answers_everything(name: str, length: int) -> None:
    task = task_of(name)
    expected = task.describe(length)["answers"]
    for row in range(3):
        inputs, targets = task.make(length, 3, TRAIN, 0, row)
        assert inputs.shape == targets.shape == (length,) and inputs.dtype == targets.dtype == np.int64
        assert inputs.min() >= 0 and inputs.max() < task.vocab_size
        predicted = task.oracle(inputs)
        assert np.array_equal(predicted, targets), "something other than an answer has a label"
        assert task.score(predicted, targets) == (expected, expected) and expected > 0
        labelled = np.flatnonzero(targets != IGNORE)
        assert np.array_equal(targets[labelled], inputs[labelled + 1]), "a label is not the next token"
        indices = task.indices(inputs)[labelled]
        assert indices.min() >= 0 and indices.max() < length


@EVERY
def test_an_oracle_cannot_see_the_answer_it_gives(name: str) -> None:
    """The last token of a sequence ends an answer: replacing it changes no prediction."""
    task = task_of(name)
    inputs, targets = task.make(1025, 5, TRAIN, 0, 0)
    assert targets[-2] == inputs[-1]
    inputs[-1] += 1
    assert np.array_equal(task.oracle(inputs), targets)


@EVERY
def test_a_sequence_is_a_pure_function_of_seed_purpose_step_row_and_length(name: str) -> None:
    task, again = task_of(name), MAKERS[name]()
    one = task.make(800, 1, TRAIN, 2, 3)
    task.make(800, 9, TRAIN, 9, 9)
    for other in (task, again):
        assert all(np.array_equal(a, b) for a, b in zip(one, other.make(800, 1, TRAIN, 2, 3)))
    for changed in ((2, TRAIN, 2, 3), (1, TEST, 2, 3), (1, TRAIN, 3, 3), (1, TRAIN, 2, 4)):
        assert not np.array_equal(one[0], task.make(800, *changed)[0])
    assert not np.array_equal(one[0], task.make(801, 1, TRAIN, 2, 3)[0][1:])


@EVERY
def test_64k_tokens_are_made_in_a_moment(name: str) -> None:
    task = task_of(name)
    began = time.process_time()
    task.make(LONG, 0, TEST, 0, 0)
    assert time.process_time() - began < 1.0


@EVERY
def test_test_sequences_do_not_depend_on_how_they_are_batched(name: str) -> None:
    task = task_of(name)
    few = [batch.inputs for batch in sequences_for_test(task, 640, seed=0, rows=3, batch=2)]
    assert torch.equal(torch.cat(few), next(sequences_for_test(task, 640, seed=0, rows=3, batch=3)).inputs)


def loader(name: str, *overrides: str, rank: int = 0, world_size: int = 1, state: dict[str, Any] | None = None) -> Any:
    small = ["trainer.context=256", "trainer.global_batch=4", "trainer.micro_batch=2", "data.task.short_steps=2"]
    small += (
        ["data.task.short_factor=2"] if name != "regression" else ["data.task.short_factor=2", "data.task.functions=4"]
    )
    cfg = compose(["data=task", f"data/task={name}", *small, *overrides])
    assert describe(cfg)["train"]["answers"] > 0
    return build_loader(cfg, build_tokenizer(cfg), rank_of(rank, world_size), state)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_stopped_twice_reads_what_an_unbroken_one_reads(name: str) -> None:
    def steps(made: Any, count: int) -> list[torch.Tensor]:
        return [torch.cat([b.inputs.flatten(), b.targets.flatten()]) for b in islice(made, count)]

    whole = steps(loader(name, "trainer.micro_batch=4"), 6)
    parts, states = [], []
    for rank in range(2):  # two ranks for two steps, in which the curriculum shortens the sequences
        part = loader(name, rank=rank, world_size=2)
        parts.append([batch for batch in islice(part, 2)])
        states.append(part.state_dict())
    for step in range(2):
        both = [torch.cat([parts[rank][step].inputs for rank in range(2)]).flatten()]
        both += [torch.cat([parts[rank][step].targets for rank in range(2)]).flatten()]
        assert torch.equal(torch.cat(both), whole[step])
    second = loader(name, "trainer.micro_batch=4", state=merge_states(states))
    assert all(torch.equal(a, b) for a, b in zip(steps(second, 1), whole[2:3]))
    third = loader(name, "trainer.micro_batch=4", state=merge_states([second.state_dict()]))
    assert all(torch.equal(a, b) for a, b in zip(steps(third, 3), whole[3:]))


def test_no_run_continues_on_sequences_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    state = loader("recall").state_dict()
    loader("recall", state=state)
    monkeypatch.setattr(RecallTask, "version", RecallTask.version + 1)
    with pytest.raises(ConfigError, match="task"):
        loader("recall", state=state)


# --- grading ---------------------------------------------------------------------------------------------------------


class Graded(Task):
    name = "graded"


TARGETS = np.array([[IGNORE, 5, 6, IGNORE, 7, 8], [9, IGNORE, 5, 5, 5, IGNORE]])


def test_by_default_every_label_is_an_answer() -> None:
    predicted = np.array([[5, 5, 0, 7, 7, 8], [9, 9, 5, 5, 0, 5]])
    expected = [[IGNORE, 1, 0, IGNORE, 1, 1], [1, IGNORE, 1, 1, 0, IGNORE]]
    assert Graded().grade(predicted, TARGETS).tolist() == expected
    assert Graded().score(predicted, TARGETS) == (6, 8)


def test_a_whole_answer_is_right_only_if_all_its_labels_are_and_rows_do_not_touch() -> None:
    task = Graded()
    task.whole_answers = True
    predicted = np.array([[5, 5, 0, 7, 7, 8], [9, 9, 5, 5, 0, 5]])
    expected = [[IGNORE, IGNORE, 0, IGNORE, IGNORE, 1], [1, IGNORE, IGNORE, IGNORE, 0, IGNORE]]
    assert task.grade(predicted, TARGETS).tolist() == expected
    assert task.score(predicted, TARGETS) == (2, 4)
    assert task.score(predicted[0], TARGETS[0]) == (1, 2), "a single sequence"
    assert task.score(predicted, np.full_like(TARGETS, IGNORE)) == (0, 0)


def test_codes_are_spelled_lowest_digit_first() -> None:
    assert spell(np.array([0, 5, 14]), 4, 2).tolist() == [[0, 0], [1, 1], [2, 3]]


def test_items_keep_their_order_and_only_answers_are_labelled() -> None:
    given, asked = np.array([[1, 2], [3, 4], [1, 5]]), np.array([[3, 9, 4], [1, 9, 5]])
    tokens, targets = lay_out(20, given, asked, 1, np.random.default_rng(0), filler=6, filler_ids=range(20, 30))
    assert tokens[:2].tolist() == [0, 0], "what is left over"
    assert tokens[(tokens > 0) & (tokens < 20)].tolist() == [1, 2, 3, 4, 1, 5, 3, 9, 4, 1, 9, 5]
    assert (tokens >= 20).sum() == 6
    assert targets[targets != IGNORE].tolist() == [4, 5]
    assert (tokens[np.flatnonzero(targets != IGNORE)] == 9).all()
