"""Sensitivity of OVQ-attention on basic recall: capacity, chunk, inverse temperature, window and share of layers.

    python -m eval.figures.sensitivity dry_run=true          the plan: runs, tokens, minutes
    python -m eval.figures.sensitivity scale=cpu             everything, on this machine
    python -m eval.figures.sensitivity models=[sw_ovq,L=16,L=64] seeds=[0] out=/tmp/s runs_root=/tmp/runs

Each model is sw_ovq with one setting changed, in training and in tests, at sw_ovq's learning rate. The runs of sw_ovq
itself are those of figure 4.
Runs are ordinary train.py runs, reused or resumed if they exist. Settings of train.py are passed on to every run.
"""

from __future__ import annotations

import sys
from statistics import fmean
from typing import Any

from eval import style
from eval.figures import panels
from eval.figures.declare import RECALL, Figure, Model, Panel, Point, RecallOptions, by_length, variant
from eval.figures.make import make
from ovq.cli import command

S, O = "sliding_window", "ovq"
GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "capacity N in training": {f"N={n}": (f"ovq.num_centroids={n}",) for n in (64, 128, 512)},
    "chunk L": {f"L={n}": (f"ovq.chunk_size={n}",) for n in (8, 16, 64)},
    "inverse temperature at the start": {f"beta={n}": (f"ovq.beta_init={n}",) for n in (0.5, 2, 4)},
    "window": {f"window={n}": (f"sliding_window.window={n}",) for n in (2, 8, 16, 64, 512)},
    "layers": {
        f"layers={words}": (f"model.pattern=[{','.join(pattern)}]", f"model.num_layers={len(pattern)}")
        for words, pattern in {"1to1x2": (S, O, S, O), "3to1": (S, S, S, O), "1to3": (S, O, O, O)}.items()
    },
}
MODELS = (Model("sw_ovq"), *(variant(name, *changes) for group in GROUPS.values() for name, changes in group.items()))


def figure(options: RecallOptions) -> Figure:
    return Figure(
        name="sensitivity",
        title="Sensitivity of OVQ-attention on basic recall",
        panels=(Panel(RECALL.name, RECALL, MODELS, by_length(options)),),
        seeds={"cpu": 1, "gpu": 3, "paper": 1},
        differs=("The paper has no such figure; its reviewers asked for it.",),
        draw=draw,
        curves="Lines are means over a model's seeds.",
    )


def draw(figure: Figure, points: list[Point]) -> Any:
    """A panel for each setting: accuracy by length with the largest capacity of the tests."""
    largest = max((p.num_centroids for p in points if p.num_centroids), default=None)
    made = {p.model for p in points}
    groups = {title: shown for title, group in GROUPS.items() if (shown := [name for name in group if name in made])}
    picture, axes = panels.picture_of(max(1, len(groups)))
    for ax, (title, group) in zip(axes, groups.items()):
        for number, name in enumerate(["sw_ovq", *group]):
            own = [p for p in points if (p.model, p.num_centroids, p.index) == (name, largest, None)]
            lengths = sorted({p.length for p in own})
            mean = [100 * fmean(p.value for p in own if p.length == length) for length in lengths]
            ax.plot(lengths, mean, color=style.color(number), marker="o", markersize=2.5, label=name)
        style.token_axis(ax, "tokens in the sequence" + (f" (tested with N = {largest:,})" if largest else ""))
        panels.finish(ax, title)
        ax.legend(frameon=False, fontsize=8)
    return picture


@command(RecallOptions, overrides=True)
def main(options: RecallOptions, overrides: list[str]) -> int:
    """The command line shown in the module docstring."""
    return make(figure(options), options, overrides)


if __name__ == "__main__":
    sys.exit(main())
