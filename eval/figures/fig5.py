"""Figure 5: in-context learning from examples: regression with 16 functions in training and 4 to 128 in tests.

    python -m eval.figures.fig5 dry_run=true                 the plan: runs, tokens, minutes
    python -m eval.figures.fig5 scale=cpu                    everything, on this machine
    python -m eval.figures.fig5 scale=gpu part=1             one part of at most nine minutes
    python -m eval.figures.fig5 models=[sw_ovq] seeds=[0] functions=[4] out=/tmp/fig5 runs_root=/tmp/runs

Accuracy of the tokens of y by the number of earlier examples of the same function. Every test has as many examples of
each function as training had, so its length grows with the number of functions; a model with a dictionary is also
tested with a larger capacity than it was trained with.
Runs are ordinary train.py runs, reused or resumed if they exist, and shared with other figures. Settings of train.py
are passed on to every run.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from eval.figures import panels
from eval.figures.declare import (
    OF_REGRESSION,
    REGRESSION_16,
    Figure,
    Options,
    Panel,
    Point,
    TaskOptions,
    by_functions,
    models,
)
from eval.figures.make import make
from ovq.cli import command
from ovq.schema import setting

MODELS = models("std_att", "sw_nope", "sw", "sw_vq", "sw_ovq")


@dataclass
class Figure5Options(TaskOptions, Options):
    functions: list[int] = setting([4, 16, 64, 128], "functions of the test sequences", at_least=1)
    num_centroids: list[int] = setting(
        [4096], "test-time capacities of a model with a dictionary, besides its own", at_least=1, empty=True
    )


def figure(options: Figure5Options) -> Figure:
    return Figure(
        name="fig5",
        title="Figure 5: regression in context by example",
        panels=(Panel(REGRESSION_16.name, REGRESSION_16, MODELS, by_functions(options, options.num_centroids)),),
        seeds={"cpu": 3, "gpu": 3, "paper": 1},
        differs=OF_REGRESSION,
        draw=draw,
    )


def draw(figure: Figure, points: list[Point]) -> Any:
    """A panel for each number of functions."""
    tests = list(dict.fromkeys(point.test for point in points))
    picture, axes = panels.picture_of(max(1, len(tests)))
    for ax, test in zip(axes, tests):
        panels.regression(ax, [p for p in points if p.test == test], figure.models, f"tested with {test}")
    panels.shared_legend(axes)
    return picture


@command(Figure5Options, overrides=True)
def main(options: Figure5Options, overrides: list[str]) -> int:
    """The command line shown in the module docstring."""
    return make(figure(options), options, overrides)


if __name__ == "__main__":
    sys.exit(main())
