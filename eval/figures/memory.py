"""Memories of equal size on basic recall: OVQ beside simpler ways to keep the past, at equal entries and equal bytes.

    python -m eval.figures.memory dry_run=true               the plan: runs, tokens, minutes
    python -m eval.figures.memory scale=cpu                  everything, on this machine
    python -m eval.figures.memory models=[sw_ovq,sw_fifo] seeds=[0] out=/tmp/memory runs_root=/tmp/runs

OVQ keeps float32 sums, which take twice the bytes of the pairs in bf16 that a FIFO, a reservoir and learned compression
keep; so at equal bytes those have about twice the entries. A model is trained with OVQ's number of entries, which no
sequence of the training fills, and tested with more; the codebook of VQ is trained, so a larger one is another model.
Runs are those of train.py: found again and resumed. Settings of train.py are passed on to every run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from data.build import build_task
from eval.figures import panels
from eval.figures.declare import LONGEST, RECALL, SCALES, Figure, Options, Panel, Point, RecallOptions, Test, by_length
from eval.figures.declare import models as models_named
from eval.figures.make import make
from ovq.cli import command
from ovq.compose import compose
from ovq.config import Config
from ovq.mixers.base import other_capacity
from ovq.model import Transformer, build_model, state_bytes
from ovq.plan import format_bytes

MODELS = models_named("sw_ovq", "sw_fifo", "sw_reservoir", "sw_compression", "sw_kvm", "sw_vq")


@dataclass
class MemoryOptions(RecallOptions, Options):
    pass


def figure(options: MemoryOptions) -> Figure:
    return Figure(
        name="memory",
        title="Memories of equal size on basic recall",
        panels=(Panel(RECALL.name, RECALL, MODELS, tests_of(options)),),
        seeds={"cpu": 2, "gpu": 3, "paper": 1},
        differs=("The paper has no such figure; its reviewers asked for it.",),
        draw=draw,
    )


def tests_of(options: MemoryOptions) -> Callable[[Config, int | None], list[Test]]:
    """Those of figure 4 and, for the other memories, the capacities that take the bytes of each of OVQ's."""

    def tests(cfg: Config, own: int | None) -> list[Test]:
        made = by_length(options)(cfg, own)
        if own is None or cfg.model.name == "sw_ovq":
            return made
        lengths = list(dict.fromkeys(test.length for test in made))
        for capacity in capacities_of_ovq(options):
            equal = capacity_of_bytes(cfg, own, bytes_of(ovq(options), capacity))
            made += [Test(length, options.answers, equal, bytes_label(capacity)) for length in lengths]
        return made

    return tests


def ovq(options: MemoryOptions) -> Transformer:
    """sw_ovq at the figure's scale, on the meta device."""
    return on_meta(compose([f"experiment={RECALL.experiment}", *RECALL.at.get(options.scale, ()), "model=sw_ovq"]))


def capacities_of_ovq(options: MemoryOptions) -> list[int]:
    chosen = SCALES[options.scale].num_centroids if options.num_centroids is None else options.num_centroids
    own = next(mixer.capacity for mixer in ovq(options).mixers() if mixer.capacity)
    return sorted({own, *chosen})


def bytes_label(capacity: int) -> str:
    return f"bytes of N = {capacity:,}"


def on_meta(cfg: Config) -> Transformer:
    with torch.device("meta"):
        return build_model(cfg.model, build_task(cfg).vocab_size)


def bytes_of(network: Transformer, capacity: int) -> int:
    """Bytes of the state of a long sequence."""
    with other_capacity(network.mixers(), capacity):
        return state_bytes(network, LONGEST)


def capacity_of_bytes(cfg: Config, own: int, wanted: int) -> int:
    """The largest capacity whose state takes at most so many bytes; state is linear in the capacity."""
    network = on_meta(cfg)
    one, two = bytes_of(network, own), bytes_of(network, own + 1)
    return own + (wanted - one) // (two - one)


def draw(figure: Figure, points: list[Point]) -> Any:
    """Two panels for each of OVQ's capacities: equal entries, and equal bytes. VQ's codebook is the same in all."""
    capacities = list(dict.fromkeys(p.num_centroids for p in points if p.model == "sw_ovq" and p.num_centroids))
    picture, axes = panels.picture_of(max(1, 2 * len(capacities)))
    for capacity, left, right in zip(capacities, axes[::2], axes[1::2]):
        fixed = [p for p in points if p.num_centroids is None]
        own = [p for p in points if p.model == "sw_ovq" and p.num_centroids == capacity]
        entries = [p for p in points if p.num_centroids == capacity and not p.test]
        equal = [p for p in points if p.test == bytes_label(capacity)]
        panels.accuracy_by_length(left, [*entries, *fixed], figure.models, f"{capacity:,} entries", capacities=False)
        held = format_bytes(max(p.state_bytes for p in own))
        panels.accuracy_by_length(right, [*own, *equal, *fixed], figure.models, f"{held} each", capacities=False)
    panels.shared_legend(axes)
    return picture


@command(MemoryOptions, overrides=True)
def main(options: MemoryOptions, overrides: list[str]) -> int:
    """The command line shown in the module docstring."""
    return make(figure(options), options, overrides)


if __name__ == "__main__":
    sys.exit(main())
