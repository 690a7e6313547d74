"""Choose each model's learning rate from a grid: short runs of one seed, scored on data that no figure shows.

The score of a trial is its mean loss per label at the training length (`Measure.score`); the lowest is chosen. Trials
are trained with a seed that no figure trains with. The score is stored in the trial's run folder, in held_out.json.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from eval.figures.runs import FigureRun

TRAIN_SEED = 1000  # of the trials' runs


def score(trial: FigureRun) -> None:
    """Score a finished trial that has no finite score yet."""
    if (trial.loss() or math.inf) == math.inf and trial.trained_here():
        trial.write_score(trial.measure.score(trial.run_dir))


def note_failure(trial: FigureRun, reason: str) -> None:
    """Record that a trial failed, so that a rate can be chosen among the others; later commands still retry it."""
    trial.write_score({"on": trial.measure.chosen_on, "loss": None, "failed": reason})


def best(trials: Mapping[float, FigureRun]) -> float | None:
    """The rate with the lowest loss, the lowest among equals; None if a score is missing or no loss is finite."""
    losses = {rate: trial.loss() for rate, trial in trials.items()}
    known = {rate: loss for rate, loss in losses.items() if loss is not None}
    if len(known) < len(losses) or not any(math.isfinite(loss) for loss in known.values()):
        return None
    return min(sorted(known), key=lambda rate: known[rate])
