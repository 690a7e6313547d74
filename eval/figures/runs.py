"""A run of a figure, and what is known of it: from its run folder or, if there is none, from a committed record.

A record is a small JSON file: how to repeat the run, how its training went, and every number from its tests. A figure
that finds a run's record, made with the same settings, does not train that run again. So a figure can be made in
pieces, on several machines, and redrawn from a clean clone; `records=null` neither reads nor writes records.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from eval.figures.declare import Test
from eval.figures.measures import Measure, Value
from launch.sweep import Job
from ovq import config
from ovq.config import Config
from ovq.errors import ConfigError
from ovq.files import write_whole
from ovq.identity import VALUE, default_of, identity, part_of
from ovq.machine import processor_name
from ovq.train.metrics import training_rows
from ovq.train.summary import read_finished

SCORE = "held_out.json"  # in the run folder of a run that tried a learning rate
TEXT = "text.json"  # in the run folder: fingerprints of the text that the run was made with
BEGAN = "init_from.path"  # the folder of the run whose weights this one started from
STEPS = "trainer.steps"  # may change at a resume, but not in a figure
SHOWN_LOSSES = 40  # about how many training losses a record keeps


@dataclass
class FigureRun:
    """A run that a figure needs. `records`: the folder of records, if there is one."""

    job: Job
    measure: Measure
    records: Path | None

    @property
    def cfg(self) -> Config:
        return self.job.cfg

    @functools.cached_property
    def stored_cfg(self) -> Config:
        """The config in the run folder, which must have one."""
        return config.load(self.run_dir)

    @property
    def run_dir(self) -> Path:
        return self.job.run_dir

    @functools.cached_property
    def record_file(self) -> Path | None:
        """The file of the run's record, named after the run folder. If that is missing, or of another run, the file of
        the same run in another folder: the name of a folder contains the path of the text, and not its content."""
        if self.records is None:
            return None
        own = self.records / f"{self.run_dir.name}.json"
        for path in (own, *sorted(self.records.glob("*.json"))):
            if self.is_of(read_json(path)):
                return path
        if not own.exists():
            return own
        made_of = json.dumps([self.settings, self.text], sort_keys=True)
        return own.with_name(f"{own.stem}-{hashlib.sha256(made_of.encode()).hexdigest()[:8]}.json")

    def record(self) -> dict[str, Any] | None:
        """The committed record, if there is one with the same settings and the same text."""
        found = read_json(self.record_file) if self.record_file else None
        return found if self.is_of(found) else None

    def is_of(self, record: dict[str, Any] | None) -> bool:
        """Whether a record is of this run: with the same settings and the same text."""
        if record is None or not same_settings(record.get("settings", {}), self.settings):
            return False
        return record.get("text", {}) == self.text  # the text is opened only if all else is equal

    @functools.cached_property
    def text(self) -> dict[str, str]:
        """Fingerprints of the text that the config asks for, because settings only name its path."""
        return self.measure.text(self.cfg)

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """What determines the run's outcome."""
        return json.loads(json.dumps(identity(self.cfg) | {STEPS: self.cfg.trainer.steps}))

    def trained_here(self) -> bool:
        """Whether the run folder holds the trained weights."""
        return read_finished(self.run_dir) is not None

    def score(self) -> dict[str, Any] | None:
        """The score of a run that tried a learning rate ("loss" is None if it failed); None if it is not scored."""
        found = read_json(self.run_dir / SCORE)
        if found is not None and self.trained_here():
            self.check_text()
        if found is None and (record := self.record()):
            found = record["score"]
        return found if found and found.get("on") == self.measure.chosen_on else None

    def loss(self) -> float | None:
        """The loss of `score`, infinite if the run failed or its loss is not a number; None if it is not known yet."""
        found = self.score()
        if found is None:
            return None
        return found["loss"] if found["loss"] is not None and math.isfinite(found["loss"]) else math.inf

    def write_score(self, found: dict[str, Any]) -> None:
        write_whole(self.run_dir / SCORE, json.dumps(found) + "\n")

    def values(self, test: Test) -> list[Value]:
        """The results of a test, the total first if there is one; empty if it was not run."""
        finished = read_finished(self.run_dir)
        if finished is not None:
            self.check_text()
            values = self.measure.find(self.run_dir, self.stored_cfg, finished["step"], test)
        else:
            found = (self.record() or {"tests": {}})["tests"].get(self.name_of(test))
            enough = found is not None and found["amount"] >= test.amount
            values = [Value(*value) for value in found["values"]] if found and enough else []
        return [value for value in values if value.document is None or value.document < test.amount]

    def check_text(self) -> None:
        """Raise ConfigError if the run in the folder used other text than the config asks for. What it used is noted in
        the folder at the first test, since the same files may hold another text later."""
        stored, asked = self.stored_cfg, self.cfg
        made_with = read_json(self.run_dir / TEXT)
        if made_with is None:
            same = (stored.data, stored.tokenizer) == (asked.data, asked.tokenizer)
            made_with = self.text if same else self.measure.text(stored)
            write_whole(self.run_dir / TEXT, json.dumps(made_with) + "\n")
        if changed := [name for name in self.text if self.text[name] != made_with.get(name)]:
            raise ConfigError(
                f"{self.run_dir} was made with other text ({', '.join(changed)}); remove it, or use another runs_root"
            )

    def name_of(self, test: Test) -> str:
        """The name of a test in a record."""
        settings = [text for text in self.measure.settings(test) if not text.startswith("eval.documents=")]
        return f"{self.measure.name} at {test.length}: {' '.join(settings)}"

    def training(self) -> dict[str, Any]:
        """How training went: steps, labels, losses, minutes, commit and processor; empty if it has not begun."""
        rows = training_rows(self.run_dir)
        if not rows:
            return (self.record() or {"training": {}})["training"]
        every = max(1, len(rows) // SHOWN_LOSSES)
        summary = read_finished(self.run_dir) or {}
        return {
            "steps": rows[-1]["step"],
            "tokens": rows[-1]["tokens"],
            "first_loss": round(rows[0]["loss"], 4),
            "last_loss": round(rows[-1]["loss"], 4),
            "minutes": round(minutes_of(rows, self.cfg.trainer.global_batch * self.cfg.trainer.context), 2),
            "losses": [[row["step"], round(row["loss"], 4)] for row in rows[every - 1 :: every]],
            "commit": summary.get("commit"),
            "processor": processor_name(),
        }

    def write_record(self, tests: list[Test]) -> None:
        """Write the record of a run that was trained here. An existing record of the same training keeps its tests; one
        of another training is replaced only if the new record has all its tests."""
        if self.record_file is None or not self.trained_here():
            return
        made = {test: values for test in tests if (values := self.values(test))}
        rows = {
            self.name_of(test): {"amount": test.amount, "values": [rounded(value) for value in values]}
            for test, values in made.items()
        }
        training, before = self.training(), self.record()
        if before and before["training"].get("losses") == training.get("losses"):
            larger = {name for name, row in before["tests"].items() if row["amount"] > rows.get(name, row)["amount"]}
            rows = before["tests"] | {name: row for name, row in rows.items() if name not in larger}
        elif before and not before["tests"].keys() <= rows.keys():
            return
        record = {
            "command": f"python train.py {' '.join(self.job.overrides)}",
            "settings": self.settings,
            **({"text": self.text} if self.text else {}),
            "training": training,
            "score": self.score(),
            "tests": rows,
        }
        if record != before:
            write_whole(self.record_file, as_json(record))


def same_settings(recorded: dict[str, Any], asked: dict[str, Any]) -> bool:
    """Whether a record is of the run that is asked for, if its text is the same (settings say only where that lies). A
    setting that is newer than the record must be at its default, and one that no longer identifies a run is ignored."""
    recorded, asked = (
        {key: value for key, value in settings.items() if key == STEPS or part_of(key) == VALUE}
        | {BEGAN: name_of_run(settings.get(BEGAN))}
        for settings in (recorded, asked)
    )
    known = all(asked.get(key) == value for key, value in recorded.items())
    return known and all(value == default_of(key, asked) for key, value in asked.items() if key not in recorded)


def name_of_run(path: str | None) -> str | None:
    """The name of a run's folder, wherever it lies; None if there is none."""
    return path and Path(path).name


def as_json(record: dict[str, Any]) -> str:
    """JSON with a line for each entry and each test, so that diffs are readable."""
    lines = [f' "{name}": {json.dumps(value)}' for name, value in record.items() if name != "tests"]
    tests = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in record["tests"].items())
    return "{\n" + ",\n".join([*lines, f' "tests": {{\n{tests}\n }}']) + "\n}\n"


def rounded(value: Value) -> list[Any]:
    return [round(item, 6) if isinstance(item, float) else item for item in astuple(value)]


def minutes_of(rows: list[dict[str, Any]], tokens: int) -> float:
    """Minutes that the steps of a metrics.jsonl took, each of `tokens` tokens (its own `tokens` counts only labels)."""
    return sum(tokens / row["tokens_per_s"] for row in rows if row["tokens_per_s"]) / 60


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
