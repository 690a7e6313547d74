"""Memories of equal size on PG19: the loss by position of OVQ beside simpler ways to keep the past.

    python -m eval.figures.memory_pg19 dry_run=true          the plan: runs, tokens, minutes
    python -m eval.figures.memory_pg19 scale=cpu             everything, on this machine

The models of eval/figures/memory.py on the data of figure 6, whose runs are reused. Memories are tested with OVQ's
number of entries and with its bytes; tests at equal bytes are named after OVQ's capacity. At CPU scale, OVQ and a FIFO
trained with more entries and a window without positions are shown beside them.
Runs are ordinary train.py runs, reused or resumed if they exist. Settings of train.py are passed on to every run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from eval.figures.declare import PG19, Figure, Panel, Test
from eval.figures.equal_bytes import capacities_of_ovq, equal_capacities, label
from eval.figures.fig6 import (
    ABOUT,
    CURVES,
    LARGER,
    LARGER_FIFO,
    RECENT,
    SMALL,
    Figure6Options,
    draw,
    findings,
    models_on_text,
)
from eval.figures.fig6 import tests_of as tests_of_figure_6
from eval.figures.make import make
from ovq.cli import command
from ovq.config import Config

MODELS = (
    *("sw", "sw_nope", RECENT, "sw_ovq", LARGER, "sw_fifo", LARGER_FIFO),
    *("sw_reservoir", "sw_compression", "sw_kvm", "sw_vq"),
)


def figure(options: Figure6Options, overrides: Sequence[str] = ()) -> Figure:
    return Figure(
        name="memory_pg19",
        title="Memories of equal size on PG19",
        panels=(Panel(PG19.name, PG19, models_on_text(options.scale, *MODELS), tests_of(options, overrides)),),
        seeds={"cpu": 1, "gpu": 2, "paper": 1},
        differs=(
            "The paper has no such figure; its reviewers asked for it.",
            *(SMALL if options.scale == "cpu" else ()),
        ),
        draw=draw,
        findings=findings,
        about=ABOUT,
        curves=CURVES,
    )


def tests_of(options: Figure6Options, overrides: Sequence[str]) -> Callable[[Config, int | None], list[Test]]:
    """Tests with the trained capacity and, for memories trained with as many entries as OVQ, with OVQ's bytes."""

    def tests(cfg: Config, own: int | None) -> list[Test]:
        as_trained = tests_of_figure_6(options)(cfg, own)[0]
        if cfg.model.name == "sw_ovq" or own not in capacities_of_ovq(PG19, options.scale, [], overrides):
            return [as_trained]
        equal = equal_capacities(PG19, options.scale, [], cfg, own, overrides)
        return [as_trained, *(Test(options.length, options.documents, n, label(of)) for of, n in equal.items())]

    return tests


@command(Figure6Options, overrides=True)
def main(options: Figure6Options, overrides: list[str]) -> int:
    """The command line shown in the module docstring."""
    return make(figure(options, overrides), options, overrides)


if __name__ == "__main__":
    sys.exit(main())
