"""Claims about the task `repeat`: what lies between a passage and its repetition, and what is trained on."""

from __future__ import annotations

import numpy as np
import pytest

from data import builtin
from data.builtin import BuiltinCorpus
from data.tasks.base import IGNORE, TEST, TRAIN
from data.tasks.repeat import FIRST_SYMBOL, RepeatTask
from ovq.compose import compose
from ovq.errors import ConfigError
from tests.data_helpers import loader


def is_in(part: bytes, split: str) -> bool:
    """Whether a document in a split of the built-in corpus contains these bytes."""
    corpus = BuiltinCorpus(split)
    return any(part in corpus.read(index).text.encode() for index in range(len(corpus)))


@pytest.mark.parametrize("length", [64, 65, 1000])
def test_the_passage_comes_again_after_half_of_the_text_or_more(length: int) -> None:
    task, starts = RepeatTask(passage=32, symbols=40), set()
    for row in range(60):
        inputs, _ = task.make(length, 0, TRAIN, 0, row)
        at = np.flatnonzero(inputs >= FIRST_SYMBOL)
        first, second = inputs[at[:32]], inputs[at[32:]]
        assert np.array_equal(first, second) and len(set(first)) == 32 and at[-1] == length - 1
        assert at[32] - at[31] - 1 >= (length - 64) / 2
        starts.add(int(at[0]))
    assert len(starts) == 1 if length < 66 else max(starts) - min(starts) > 200


def test_a_short_sequence_is_all_passage_and_one_of_three_tokens_is_refused() -> None:
    inputs, targets = RepeatTask().make(16, 0, TRAIN, 0, 0)
    assert np.array_equal(inputs[:8], inputs[8:]) and (targets != IGNORE).sum() == 7
    with pytest.raises(ConfigError, match="a repeat sequence of 3 tokens has no room"):
        RepeatTask().describe(3)
    with pytest.raises(ConfigError, match="data.task.symbols=9 must be at least data.task.passage=10"):
        RepeatTask(passage=10, symbols=9)


@pytest.mark.parametrize("length", [4, 5])
def test_a_rotated_passage_of_two_has_no_answer_and_is_refused(length: int) -> None:
    assert RepeatTask(rotated=True).describe(6)["answers"] == 1
    with pytest.raises(ConfigError, match=f"a repeat sequence of {length} tokens has no room"):
        RepeatTask(rotated=True).describe(length)
    with pytest.raises(ConfigError, match="data.task.passage=2 must be at least 3 if it is rotated"):
        RepeatTask(passage=2, rotated=True)


def test_a_rotated_repetition_begins_anywhere_but_at_the_first_symbol_and_goes_around() -> None:
    task, turns = RepeatTask(passage=8, symbols=40, rotated=True), set()
    for row in range(60):
        inputs, targets = task.make(64, 0, TRAIN, 0, row)
        symbols = inputs[inputs >= FIRST_SYMBOL]
        turn = int(np.argmax(symbols[:8] == symbols[8]))
        assert np.array_equal(np.roll(symbols[:8], -turn), symbols[8:])
        labelled = np.flatnonzero(targets != IGNORE)
        assert np.array_equal(targets[labelled], inputs[labelled + 1])
        assert sorted({*range(56, 63)} - {*labelled}) == [63 - turn] and len(labelled) == task.describe(64)["answers"]
        turns.add(turn)
    assert turns == {*range(1, 8)}


def test_text_of_tests_is_not_that_of_training_and_only_training_has_a_loss_on_it() -> None:
    task = RepeatTask(passage=4, text_loss=True)
    for purpose, split, other in ((TRAIN, "train", "validation"), (TEST, "validation", "train")):
        inputs, targets = task.make(600, 0, purpose, 0, 0)
        text = inputs[300:590].astype(np.uint8).tobytes()
        assert is_in(text, split) and not is_in(text, other)
        following = np.append(inputs[1:], FIRST_SYMBOL)
        answers = np.arange(600) >= 596
        answers[-1] = False
        labelled = answers | (following < FIRST_SYMBOL) if purpose == TRAIN else answers
        assert np.array_equal(targets, np.where(labelled, following, IGNORE))


def test_a_run_is_not_resumed_on_the_library_of_another_python(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = compose(["data=task", "data/task=repeat", "trainer.context=64", "data.num_workers=0"])
    state = loader(cfg).state_dict()
    loader(cfg, state=state)
    documents = builtin._documents()
    monkeypatch.setattr(builtin, "_documents", lambda: documents[:-1])
    with pytest.raises(ConfigError, match=r"differ from those of the checkpoint \(content: "):
        loader(cfg, state=state)


def test_the_demonstration_grows_its_sequences_as_its_config_says() -> None:
    cfg = compose(["experiment=repeat"])
    settings = {name: value for name, value in cfg.data.task.items() if name != "_target_"}
    lengths = [cfg.trainer.context // RepeatTask(**settings).sequences_at(step) for step in range(cfg.trainer.steps)]
    found = [(length, lengths.count(length)) for length in dict.fromkeys(lengths)]
    assert found == [(16, 70), (32, 10), (64, 10), (128, 10), (256, 10), (512, 10), (1024, 40)]
