"""Test the runs of a figure, one test at a time, and find again what was tested before.

Results are rows of the run folder's accuracy table (`eval.accuracy`), written after every test. A test is repeated only
if the run has been trained on, the settings differ, or more answers are asked for.
"""

from __future__ import annotations

import copy
from itertools import groupby
from pathlib import Path

from data.build import build_task
from eval.accuracy import TABLE, measure, task_settings
from eval.accuracy import Options as Wanted
from eval.figures.declare import Test
from eval.run_table import Row, changes
from ovq import config
from ovq.config import Config
from ovq.errors import ConfigError
from ovq.inference.run import load_run, override
from ovq.train.summary import read_finished

PRECISION = ["trainer.precision=fp32"]  # so that results do not depend on the machine


def with_settings(cfg: Config, test: Test) -> Config:
    """The config of a run in a test."""
    return override(copy.deepcopy(cfg), overrides_of(test))


def overrides_of(test: Test) -> list[str]:
    capacity = [] if test.num_centroids is None else [f"eval.num_centroids={test.num_centroids}"]
    return [*PRECISION, *test.overrides, *capacity]


def find(run_dir: Path, tests: list[Test], answers: int) -> dict[Test, list[Row]]:
    """The rows of those tests of a finished run that were made with at least `answers`, each total first."""
    finished = read_finished(run_dir)
    if finished is None:
        return {}
    try:
        rows = TABLE.read(run_dir)
    except ConfigError:  # damaged: the next test sets it aside and begins a new one
        return {}
    stored, made = config.load(run_dir), {}
    for test in tests:
        settings = task_settings(with_settings(stored, test))
        key = (finished["step"], settings, test.num_centroids, changes(PRECISION), test.length)
        of_test = [row for row in rows if TABLE.key_of(row) == key]
        if of_test and of_test[0]["answers"] >= answers:
            made[test] = of_test
    return made


def test_run(run_dir: Path, tests: list[Test], answers: int) -> None:
    """Make those tests of a run that were not made before, and keep each as it comes."""
    made = find(run_dir, tests, answers)
    for overrides, group in groupby([test for test in tests if test not in made], key=overrides_of):
        run = load_run(run_dir, overrides)
        for test in group:
            wanted = Wanted(run=str(run_dir), lengths=[test.length], answers=answers)
            TABLE.write(run_dir, measure(run, build_task(run.cfg), wanted, changes(PRECISION)))
