"""Figure 4: accuracy of in-context recall by length, basic and positional, and the state that each model needs.

    python -m eval.figures.fig4 dry_run=true                 the plan: runs, tokens, minutes
    python -m eval.figures.fig4 scale=cpu                    everything, on this machine
    python -m eval.figures.fig4 scale=gpu part=1             one part of at most nine minutes
    python -m eval.figures.fig4 scale=paper                  the plan at a size of the paper, and how to launch it
    python -m eval.figures.fig4 models=[sw_nope,sw_ovq] seeds=[0] lengths=[128,2048] out=/tmp/fig4 runs_root=/tmp/runs

Five models are trained and then tested on fresh sequences of up to 65,536 tokens; a model with a dictionary is also
tested with larger capacities than it was trained with. Runs are ordinary train.py runs, reused or resumed if they
exist, and shared with other figures. Settings of train.py are passed on to every run. The files that are written are
listed in `eval/figures/folder.py`.
"""

from __future__ import annotations

import sys
from typing import Any

from eval.figures import panels
from eval.figures.declare import POSITIONAL, RECALL, Figure, Panel, Point, RecallOptions, by_length, models
from eval.figures.make import make
from ovq.cli import command

MODELS = models("std_att", "sw_nope", "sw", "sw_vq", "sw_ovq")


def figure(options: RecallOptions) -> Figure:
    tests = by_length(options)
    return Figure(
        name="fig4",
        title="Figure 4: in-context recall by length",
        panels=tuple(Panel(subject.name, subject, MODELS, tests) for subject in (RECALL, POSITIONAL)),
        seeds={"cpu": 3, "gpu": 3, "paper": 1},
        differs=(
            "Trained at the length in the table (the paper: about 4k, as one reader says).",
            "An answer of several tokens is right only if all of them are.",
        ),
        about={
            POSITIONAL.name: (
                "In positional recall, every key occurs several times with different values, and a query asks for the "
                "n-th of them.",
            )
        },
        draw=draw,
    )


def draw(figure: Figure, points: list[Point]) -> Any:
    """A panel for each task, then the state of a sequence by its length."""
    picture, axes = panels.picture_of(len(figure.panels) + 1)
    names = figure.models
    for ax, panel in zip(axes, figure.panels):
        panels.accuracy_by_length(ax, [p for p in points if p.panel == panel.name], names, panel.name)
    shown = figure.panels[0].name
    panels.state_by_length(axes[-1], [p for p in points if p.panel == shown], names, "state of one sequence")
    panels.shared_legend(axes)
    return picture


@command(RecallOptions, overrides=True)
def main(options: RecallOptions, overrides: list[str]) -> int:
    """The command line shown in the module docstring."""
    return make(figure(options), options, overrides)


if __name__ == "__main__":
    sys.exit(main())
