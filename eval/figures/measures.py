"""How trained runs are tested: accuracy on a generated task, or loss by position on held-out text.

Results are rows of the run folder's own tables (`eval.accuracy`, `eval.per_position`), written after every test.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data.build import build_task, build_tokenizer, build_tokens, is_task, sources_of, splits_of
from eval import accuracy, answers, loss_table, per_position
from eval.accuracy_table import task_settings
from eval.figures.declare import Test
from eval.run_table import Row, changes
from ovq import config
from ovq.config import Config
from ovq.errors import ConfigError
from ovq.inference.run import load_run, override

PRECISION = ["trainer.precision=fp32"]  # so that results do not depend on the machine
CHOOSING_SEED = 1001  # of the sequences on which learning rates are chosen
assert CHOOSING_SEED != answers.TEST_SEED
ANSWERS = 4096  # at least, when choosing a learning rate
DOCUMENTS = 32  # at most, when choosing a learning rate


@dataclass(frozen=True)
class Value:
    """One number from a test: see `declare.Point`."""

    index: int | None
    document: int | None
    value: float
    count: int


class Measure(Protocol):
    """How models that were trained on one kind of data are tested."""

    name: str
    chosen_on: str  # the data on which learning rates are chosen, in words

    def described(self, test: Test) -> str:
        """The data of a test in words, for a caption."""

    def vocab_size(self, cfg: Config) -> int:
        """The vocabulary size. Raises ConfigError if it depends on a file that is missing."""

    def text(self, cfg: Config) -> dict[str, str]:
        """What identifies the text or the task's sequences that a run with this config is trained and tested on, apart
        from its settings.

        Raises:
            ConfigError: the text is missing.
        """

    def settings(self, test: Test) -> list[str]:
        """The settings that define a test."""

    def tokens(self, cfg: Config, test: Test) -> int:
        """The most tokens that the test reads. Raises ConfigError if a run with this config cannot take it."""

    def make(self, run_dir: Path, test: Test) -> None:
        """Run a test, and add its rows to the run folder's table."""

    def find(self, run_dir: Path, cfg: Config, step: int, test: Test) -> list[Value]:
        """The results of a test of the run at this step, the total first if there is one; empty if it was not run."""

    def score(self, run_dir: Path) -> dict[str, Any]:
        """The score of a run that tries a learning rate: {"on", "length", "loss" (nats per label) ...}."""


def measure_of(cfg: Config) -> Measure:
    return Accuracy() if is_task(cfg) else Loss()


def changed(cfg: Config, overrides: Sequence[str]) -> Config:
    """The config of a run with the overrides of a test."""
    return override(copy.deepcopy(cfg), overrides) if overrides else cfg


def overrides(measure: Measure, test: Test) -> list[str]:
    """The overrides of a run for a test; they reset its own settings that withhold context or change a capacity."""
    return ["eval.num_centroids=null", "eval.restart=null", *measure.settings(test)]


def capacity_of(test: Test) -> list[str]:
    return [] if test.num_centroids is None else [f"eval.num_centroids={test.num_centroids}"]


def rows_of(table: Any, run_dir: Path) -> list[Row]:
    """The rows of a table; none if it is damaged, as the next test sets it aside and begins a new one."""
    try:
        return list(table.read(run_dir))
    except ConfigError:
        return []


class Accuracy:
    """Accuracy on fresh sequences of the generated task."""

    name = "accuracy"
    chosen_on = f"sequences of seed {CHOOSING_SEED}"

    def described(self, test: Test) -> str:
        return (
            f"at least {test.amount:,} answers each, from as few whole sequences of seed {answers.TEST_SEED} as have "
            "them (a single one if it is long). No run was trained on them, no learning rate was chosen with them, and "
            "they are the same for every model"
        )

    def vocab_size(self, cfg: Config) -> int:
        return build_task(cfg).vocab_size

    def text(self, cfg: Config) -> dict[str, str]:
        version = build_task(cfg).version
        return {"version of the task": str(version)} if version > 1 else {}

    def settings(self, test: Test) -> list[str]:
        return [*PRECISION, *test.overrides, *capacity_of(test)]

    def tokens(self, cfg: Config, test: Test) -> int:
        task = build_task(changed(cfg, test.overrides))  # precision and capacity do not affect the task
        return test.length * math.ceil(test.amount / task.describe(test.length)["answers"])

    def make(self, run_dir: Path, test: Test) -> None:
        run = load_run(run_dir, overrides(self, test))
        wanted = accuracy.Options(run=str(run_dir), lengths=[test.length], answers=test.amount)
        accuracy.TABLE.write(run_dir, accuracy.measure(run, build_task(run.cfg), wanted, changes(PRECISION)))

    def find(self, run_dir: Path, cfg: Config, step: int, test: Test) -> list[Value]:
        settings = task_settings(changed(cfg, test.overrides))
        key = (step, settings, test.num_centroids, changes(PRECISION), test.length)
        rows = [row for row in rows_of(accuracy.TABLE, run_dir) if accuracy.TABLE.key_of(row) == key]
        if not rows or rows[0]["answers"] < test.amount:
            return []
        return [Value(row["index"], None, row["accuracy"], row["answers"]) for row in rows]

    def score(self, run_dir: Path) -> dict[str, Any]:
        run = load_run(run_dir, PRECISION)
        length = run.cfg.trainer.context
        tally = answers.test(run.model, run.world.device, build_task(run.cfg), length, ANSWERS, seed=CHOOSING_SEED)
        right, count = tally.total
        made = {"on": self.chosen_on, "length": length, "loss": tally.loss}
        return made | {"accuracy": right / count, "answers": count}


class Loss:
    """Loss by position of the beginnings of the test split's documents."""

    name = "loss"
    chosen_on = "documents of the validation split"

    def described(self, test: Test) -> str:
        return (
            f"the first {test.length:,} tokens of at most {test.amount} documents of the test split. No run was "
            "trained on them, no learning rate was chosen with them, and they are the same for every model"
        )

    def vocab_size(self, cfg: Config) -> int:
        return cfg.tokenizer.vocab_size or build_tokenizer(cfg).vocab_size

    def text(self, cfg: Config) -> dict[str, str]:
        tokenizer = build_tokenizer(cfg)
        found = {"tokenizer": tokenizer.fingerprint}
        for name, source in sources_of(cfg).items():
            for split in splits_of(source):
                fingerprint = json.dumps(build_tokens(source, tokenizer, split)[1].fingerprint(), sort_keys=True)
                found[f"{name} {split}".strip()] = hashlib.sha256(fingerprint.encode()).hexdigest()
        return found

    def settings(self, test: Test) -> list[str]:
        wanted = ["eval.split=test", f"eval.context={test.length}", f"eval.documents={test.amount}"]
        return [*PRECISION, *wanted, *test.overrides, *capacity_of(test)]

    def tokens(self, cfg: Config, test: Test) -> int:
        changed(cfg, overrides(self, test))
        return test.length * test.amount

    def make(self, run_dir: Path, test: Test) -> None:
        run = load_run(run_dir, overrides(self, test))
        per_position.evaluate_strictly(
            *(run.model, run.cfg, run.tokenizer, run.world, run_dir, run.step),
            should_stop=lambda: False,
            changed=changes(PRECISION),
        )

    def find(self, run_dir: Path, cfg: Config, step: int, test: Test) -> list[Value]:
        restart = changed(cfg, overrides(self, test)).eval.restart
        table = loss_table.BY_DOCUMENT
        key = (step, test.length, test.num_centroids, "test", restart, changes(PRECISION))
        rows = [row for row in rows_of(table, run_dir) if table.key_of(row) == key]
        if not rows or rows[0]["asked"] < test.amount:
            return []
        return [
            Value(row["position_start"], row["document"], row["loss"], row["position_end"] - row["position_start"])
            for row in rows
        ]

    def score(self, run_dir: Path) -> dict[str, Any]:
        length = config.load(run_dir).trainer.context
        wanted = ["eval.split=validation", f"eval.context={length}", f"eval.documents={DOCUMENTS}"]
        run = load_run(run_dir, [*PRECISION, *wanted])
        measured = per_position.measure(run.model, run.cfg, run.tokenizer, run.world, lambda: False)
        assert measured is not None  # nothing could stop it
        loss = measured.nats / measured.tokens
        return {"on": self.chosen_on, "length": length, "loss": loss, "documents": measured.documents}
