"""Choose each model's learning rate from a grid: short runs of one seed, scored on sequences that no figure shows.

The score of a trial is its mean loss per label at the training length; the lowest is chosen. Its sequences come from
`TEST_SEED`, not from that of reported results, and trials are trained with a seed that no figure trains with. The
score stands in the trial's run folder, in held_out.json.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.build import build_task
from eval import answers
from launch.sweep import Job
from ovq.files import write_whole
from ovq.inference.run import load_run

TRAIN_SEED = 1000  # of the trials' runs
TEST_SEED = 1001  # of the sequences that they are scored on
assert TEST_SEED != answers.TEST_SEED
ANSWERS = 4096  # at least, per score
FILE = "held_out.json"


def score(run_dir: Path) -> dict[str, Any]:
    """Score a finished trial, once: {"seed", "length", "loss" (nats per label), "accuracy" (0 to 1), "answers"}."""
    found = read(run_dir)
    if found is not None and "failed" not in found:
        return found
    run = load_run(run_dir, ["trainer.precision=fp32"])
    length = run.cfg.trainer.context
    tally = answers.test(run.model, run.world.device, build_task(run.cfg), length, ANSWERS, seed=TEST_SEED)
    right, count = tally.total
    made = {"seed": TEST_SEED, "length": length, "loss": tally.loss, "accuracy": right / count, "answers": count}
    write_whole(run_dir / FILE, json.dumps(made) + "\n")
    return made


def note_failure(run_dir: Path, reason: str) -> None:
    """Record that a trial failed, so that a rate can be chosen among the others; it is tried again all the same."""
    write_whole(run_dir / FILE, json.dumps({"seed": TEST_SEED, "loss": None, "failed": reason}) + "\n")


def read(run_dir: Path) -> dict[str, Any] | None:
    """The score of a trial; None if it has none, or one of other sequences."""
    try:
        found = json.loads((run_dir / FILE).read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("seed") == TEST_SEED else None


def loss_of(job: Job) -> float | None:
    """The score of a trial, infinite if it failed or its loss is not a number; None if it is not known yet."""
    found = read(job.run_dir)
    if found is None:
        return None
    return found["loss"] if found["loss"] is not None and math.isfinite(found["loss"]) else math.inf


def best(trials: Mapping[float, Job]) -> float | None:
    """The rate of the lowest loss, the lowest of equal ones; None if a score is missing or no trial has a loss."""
    losses = {rate: loss_of(job) for rate, job in trials.items()}
    known = {rate: loss for rate, loss in losses.items() if loss is not None}
    if len(known) < len(losses) or not any(math.isfinite(loss) for loss in known.values()):
        return None
    return min(sorted(known), key=lambda rate: known[rate])
