"""Memories of equal size on basic recall: OVQ beside simpler ways to keep the past, at equal entries and equal bytes.

    python -m eval.figures.memory dry_run=true               the plan: runs, tokens, minutes
    python -m eval.figures.memory scale=cpu                  everything, on this machine
    python -m eval.figures.memory models=[sw_ovq,sw_fifo] seeds=[0] out=/tmp/memory runs_root=/tmp/runs

OVQ keeps float32 sums, which take twice the bytes of the bf16 pairs that a FIFO, a reservoir and learned compression
keep; so at equal bytes the latter have about twice the entries. A model is trained with OVQ's number of entries, which
no training sequence fills, and tested with more; VQ's codebook is learned, so a larger one would be another model.
Runs are ordinary train.py runs, reused or resumed if they exist. Settings of train.py are passed on to every run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from eval.figures import panels
from eval.figures.declare import RECALL, Figure, Panel, Point, RecallOptions, Test, by_length, models
from eval.figures.equal_bytes import equal_capacities, label
from eval.figures.make import make
from ovq.cli import command
from ovq.config import Config
from ovq.plan import format_bytes

MODELS = models("sw_ovq", "sw_fifo", "sw_reservoir", "sw_compression", "sw_kvm", "sw_vq")


def figure(options: RecallOptions, overrides: Sequence[str] = ()) -> Figure:
    return Figure(
        name="memory",
        title="Memories of equal size on basic recall",
        panels=(Panel(RECALL.name, RECALL, MODELS, tests_of(options, overrides)),),
        seeds={"cpu": 2, "gpu": 3, "paper": 1},
        differs=("The paper has no such figure; its reviewers asked for it.",),
        draw=draw,
    )


def tests_of(options: RecallOptions, overrides: Sequence[str]) -> Callable[[Config, int | None], list[Test]]:
    """The tests of figure 4 and, for the other memories, tests with the bytes of each of OVQ's capacities."""

    def tests(cfg: Config, own: int | None) -> list[Test]:
        made = by_length(options)(cfg, own)
        if own is None or cfg.model.name == "sw_ovq":
            return made
        lengths = list(dict.fromkeys(test.length for test in made))
        equal = equal_capacities(RECALL, options.scale, options.num_centroids, cfg, own, overrides)
        for of_ovq, capacity in equal.items():
            made += [Test(length, options.answers, capacity, label(of_ovq)) for length in lengths]
        return made

    return tests


def draw(figure: Figure, points: list[Point]) -> Any:
    """For each of OVQ's capacities, a panel of equal entries and below it one of equal bytes. VQ's codebook is the same
    in all."""
    capacities = list(dict.fromkeys(p.num_centroids for p in points if p.model == "sw_ovq" and p.num_centroids))
    columns = max(1, len(capacities))
    picture, axes = panels.picture_of(2 * columns, rows=2)
    for capacity, upper, lower in zip(capacities, axes[:columns], axes[columns:]):
        fixed = [p for p in points if p.num_centroids is None]
        own = [p for p in points if p.model == "sw_ovq" and p.num_centroids == capacity]
        entries = [p for p in points if p.num_centroids == capacity and not p.test]
        equal = [p for p in points if p.test == label(capacity)]
        panels.accuracy_by_length(upper, [*entries, *fixed], figure.models, f"{capacity:,} entries", capacities=False)
        held = format_bytes(max(p.state_bytes for p in own))
        panels.accuracy_by_length(
            lower, [*own, *equal, *fixed], figure.models, f"at most {held} each", capacities=False
        )
    panels.shared_legend([*axes[columns:], *axes[:columns]])  # beside the first row
    return picture


@command(RecallOptions, overrides=True)
def main(options: RecallOptions, overrides: list[str]) -> int:
    """The command line shown in the module docstring."""
    return make(figure(options, overrides), options, overrides)


if __name__ == "__main__":
    sys.exit(main())
