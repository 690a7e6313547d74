"""A training run without text files: a tiny model, seeded random rows, and everything else as in train.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from data.loader import Batch
from ovq import processes
from ovq.processes import World
from ovq.train import checkpoint
from ovq.train.ema import WeightAverage
from ovq.train.loop import Trainer
from ovq.train.metrics import Metrics, read_rows
from ovq.train.optim import build_optimizer
from ovq.train.parallelize import parallelize
from tests.helpers import chosen, small_config, small_model

VOCAB = 31
RUN = [
    "trainer.device=cpu",
    "trainer.progress=false",
    "trainer.steps=6",
    "trainer.context=24",
    "trainer.global_batch=4",
    "trainer.micro_batch=4",
    "trainer.checkpoint_every=100",
    "trainer.health_every=0",
    "optim.lr=1e-2",
    "optim.warmup_steps=2",
]


class Lessons:
    """A loader whose row g of step n is a pure function of (n, g); the larger g, the more labels are missing."""

    def __init__(self, cfg: Any, world: World, done: int = 0) -> None:
        self.cfg, self.world, self.done = cfg, world, done
        self.own = cfg.trainer.global_batch // world.data.size
        self.micro_batches_per_step = self.own // cfg.trainer.micro_batch

    def __iter__(self) -> Iterator[Batch]:
        while True:
            first, micro = self.world.data.rank * self.own, self.cfg.trainer.micro_batch
            inputs, targets = rows(self.cfg, self.done)
            self.done += 1
            for start in range(first, first + self.own, micro):
                lanes = range(start, start + micro)
                yield Batch(
                    inputs[start : start + micro],
                    targets[start : start + micro],
                    documents=[f"lesson {self.done}.{lane}" for lane in lanes],
                    lanes={lane: {} for lane in lanes},
                    counts={"bytes": 10 * micro, "documents": micro},
                )

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}


def rows(cfg: Any, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets [global batch, context] of step `step` (from 0): a noisy phrase that can be learned."""
    size, length = cfg.trainer.global_batch, cfg.trainer.context
    phrase = torch.randint(VOCAB, (7,), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1 + step)
    text = phrase.repeat(length // 7 + 2)[: length + 1].repeat(size, 1)
    text = torch.where(
        torch.rand(text.shape, generator=generator) < 0.1, torch.randint(VOCAB, text.shape, generator=generator), text
    )
    targets = text[:, 1:].clone()
    for lane in range(size):
        targets[lane, : 2 * lane] = -100
    return text[:, :-1].contiguous(), targets


def trainer_for(
    run_dir: Path,
    *overrides: str,
    model: str = "sw_ovq",
    world: World | None = None,
    resume: str = "auto",
    evaluate: Any = None,
    prepare: Callable[[Any], None] = lambda model: None,
) -> Trainer:
    """The Trainer that train.py would build. `prepare` may change the model before it is sharded."""
    cfg = small_config(model, *RUN, f"eval.at_end={str(evaluate is not None).lower()}", *overrides)
    world = world or World()
    processes.seed_everything(0)
    built = small_model(model, *overrides, vocab_size=VOCAB)
    prepare(built)
    built = parallelize(built, cfg.trainer, world)
    optimizer = build_optimizer(built, cfg)
    ema = WeightAverage(built, cfg.optim.ema) if cfg.optim.ema else None
    start = chosen(run_dir, resume)
    extra = checkpoint.load(start, built, optimizer, ema) if start else None
    trainer = Trainer(
        cfg,
        built,
        optimizer,
        Lessons(cfg, world, extra["data"]["done"] if extra else 0),
        checkpoint.Checkpointer(run_dir, keep_last=cfg.trainer.keep_last, asynchronous=cfg.trainer.async_checkpoint),
        Metrics(run_dir, cfg, main=world.is_main, start_step=extra["step"] if extra else 0),
        world,
        run_dir=run_dir,
        merge_states=lambda states: states[0],
        evaluate=evaluate,
        ema=ema,
    )
    if extra:
        trainer.resume(extra)
    return trainer


def losses(run_dir: Path) -> list[float]:
    """The loss of every step; asserts that there is one line for each."""
    steps = [row for row in read_rows(run_dir / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, len(steps) + 1))
    return [row["loss"] for row in steps]
