"""Figure 8: recurrent baselines on regression (4 functions in training, 4 and 16 in tests) and on basic recall.

    python -m eval.figures.fig8 dry_run=true                 the plan: runs, tokens, minutes
    python -m eval.figures.fig8 scale=cpu                    everything, on this machine
    python -m eval.figures.fig8 scale=gpu part=1             one part of at most nine minutes
    python -m eval.figures.fig8 models=[sw_gdn,sw_ovq] seeds=[0] out=/tmp/fig8 runs_root=/tmp/runs

Gated DeltaNet, Mamba-2, Mesa-Net and linear attention, each alternating with a sliding window, are compared with
sw_ovq, whose runs on recall are those of figure 4. On recall, the recurrent layers with a short convolution also come
first (gdn_sw): with a window before it, Gated DeltaNet does not learn the task (docs/results/fig8/order.json).
Runs are ordinary train.py runs, reused or resumed if they exist. Settings of train.py are passed on to every run.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from eval.figures import panels
from eval.figures.declare import (
    OF_REGRESSION,
    RECALL,
    REGRESSION_4,
    Figure,
    Model,
    Panel,
    Point,
    RecallOptions,
    by_functions,
    by_length,
    models,
)
from eval.figures.make import make
from ovq.cli import command
from ovq.schema import setting

MODELS = models("sw_ovq", "sw_gdn", "sw_mamba2", "sw_mesa", "sw_linear")
RECURRENT_FIRST = tuple(
    Model(name, (f"model=sw_{mixed}", f"model.pattern=[{mixer},sliding_window]", *changes), full_trials=True)
    for name, mixed, mixer, *changes in (
        ("gdn_sw", "gdn", "gated_deltanet"),
        ("mamba2_sw", "mamba2", "mamba2"),
        ("mamba2_d0_sw", "mamba2", "mamba2", "model.mixers.mamba2.skip_init=0"),
        ("mesa_sw", "mesa", "mesa_net"),
    )
)
ABOUT_ORDER = (
    "In models whose names end with `_sw`, the recurrent layer comes before the window. Its own convolution can put a "
    "key beside its value; with a window before it, Gated DeltaNet did not learn recall "
    "(docs/results/fig8/order.json). Trials of these models are as long as their runs: the 36 steps at 16 tokens of "
    "shorter ones are too few to begin to recall.",
    "`mamba2_d0_sw` is `mamba2_sw` with an initial D (the weight of a token's own x in the output) of 0 instead of 1 "
    "(docs/results/fig8/why.json).",
)


@dataclass
class Figure8Options(RecallOptions):
    functions: list[int] = setting([4, 16], "functions of the test sequences", at_least=1)


def figure(options: Figure8Options) -> Figure:
    return Figure(
        name="fig8",
        title="Figure 8: recurrent models on regression in context and recall",
        panels=(
            Panel(REGRESSION_4.name, REGRESSION_4, MODELS, by_functions(options)),
            Panel(RECALL.name, RECALL, (*MODELS, *RECURRENT_FIRST), by_length(options)),
        ),
        seeds={"cpu": 3, "gpu": 3, "paper": 1},
        differs=("The baselines alternate with sliding-window attention, as sw_ovq does.",),
        about={REGRESSION_4.name: OF_REGRESSION, RECALL.name: ABOUT_ORDER},
        draw=draw,
    )


def draw(figure: Figure, points: list[Point]) -> Any:
    """A panel for each number of functions, then one for recall by length, as far as the figure shows them."""
    names = figure.models
    of_regression = [point for point in points if point.panel == REGRESSION_4.name]
    tests = list(dict.fromkeys(point.test for point in of_regression))
    picture, axes = panels.picture_of(max(1, len(tests) + (RECALL.name in figure.panel_names)))
    for ax, test in zip(axes, tests):
        panels.regression(ax, [p for p in of_regression if p.test == test], names, f"regression, tested with {test}")
    if RECALL.name in figure.panel_names:
        panels.accuracy_by_length(axes[-1], [p for p in points if p.panel == RECALL.name], names, RECALL.name)
    panels.shared_legend(axes)
    return picture


@command(Figure8Options, overrides=True)
def main(options: Figure8Options, overrides: list[str]) -> int:
    """The command line shown in the module docstring."""
    return make(figure(options), options, overrides)


if __name__ == "__main__":
    sys.exit(main())
