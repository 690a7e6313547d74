"""Figure 7: ablations of OVQ-attention on basic recall: seeding, growth, step size, and two choices of ours.

    python -m eval.figures.fig7 dry_run=true                 the plan: runs, tokens, minutes
    python -m eval.figures.fig7 scale=cpu                    everything, on this machine
    python -m eval.figures.fig7 models=[sw_ovq,constant_step] seeds=[0] out=/tmp/fig7 runs_root=/tmp/runs

Each model is sw_ovq with one change, in training and in tests, at sw_ovq's learning rate. The runs of sw_ovq itself are
those of figure 4.
Runs are ordinary train.py runs, reused or resumed if they exist. Settings of train.py are passed on to every run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from eval.figures import panels
from eval.figures.declare import (
    RECALL,
    Figure,
    Model,
    Panel,
    Point,
    RecallOptions,
    by_length,
    replaced,
    variant,
)
from eval.figures.make import make
from ovq.cli import command
from ovq.compose import compose


def figure(options: RecallOptions, overrides: Sequence[str] = ()) -> Figure:
    context = compose(replaced(RECALL.settings(options.scale), overrides)).trainer.context
    models = (
        Model("sw_ovq"),
        variant("random_seeding", "ovq.seeding=random"),
        variant("linear_growth", "ovq.growth=linear", f"ovq.growth_tokens={context}"),
        variant("constant_step", "ovq.step_size=0.1"),
        variant("first_chunk_merge", "ovq.first_chunk=merge"),
        variant("assign_on_key_value", "ovq.assign_on=key_value"),
    )
    return Figure(
        name="fig7",
        title="Figure 7: ablations of OVQ-attention on basic recall",
        panels=(Panel(RECALL.name, RECALL, models, by_length(options)),),
        seeds={"cpu": 3, "gpu": 3, "paper": 1},
        differs=("The paper ablates seeding, growth and step size.",),
        about={
            "linear_growth": ("Linear growth reaches N at the training length: the paper's slope is not known.",),
            "constant_step": ("The constant step is 0.1: the paper's is not known.",),
            "first_chunk_merge": ("`first_chunk_merge` is an ablation of this project's.",),
            "assign_on_key_value": ("`assign_on_key_value` is an ablation of this project's.",),
        },
        draw=draw,
    )


def draw(figure: Figure, points: list[Point]) -> Any:
    """A panel for each capacity."""
    capacities = list(dict.fromkeys(point.num_centroids for point in points))
    picture, axes = panels.picture_of(max(1, len(capacities)))
    for ax, capacity in zip(axes, capacities):
        shown = [point for point in points if point.num_centroids == capacity]
        panels.accuracy_by_length(ax, shown, figure.models, f"N = {capacity:,}" if capacity else "", capacities=False)
    panels.shared_legend(axes)
    return picture


@command(RecallOptions, overrides=True)
def main(options: RecallOptions, overrides: list[str]) -> int:
    """The command line shown in the module docstring."""
    return make(figure(options, overrides), options, overrides)


if __name__ == "__main__":
    sys.exit(main())
