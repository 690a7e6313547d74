"""Checks made before a job takes a GPU or a place in a queue: settings, data, tokenizer, run folder and disk, initial
weights or the checkpoint to continue from, memory.

Nothing is written, no GPU is touched and the run folder is not locked.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

import train
from data.build import build_tokenizer, named
from data.describe import describe
from eval.preflight import check_held_out, check_room
from launch.claims import trainer_of
from launch.plan import HEADROOM
from ovq.compose import compose, run_dir_of
from ovq.config import Config
from ovq.errors import ConfigError
from ovq.inference.run import check_capacity
from ovq.memory import memory_of
from ovq.model import Transformer, build_model, undivided
from ovq.plan import format_bytes, indivisible, report
from ovq.train.claim import check_resume, same_run, unwritable
from ovq.train.warm_start import check_weights


@dataclass(frozen=True)
class Checked:
    """A run that can start. `report`: what a dry run prints about it; `warnings`: one line each."""

    cfg: Config
    run_dir: Path
    report: str
    warnings: tuple[str, ...] = ()


def check(overrides: list[str], world_size: int, gpu_bytes: int | None = None) -> Checked:
    """Check a run of `world_size` processes.

    Args:
        gpu_bytes: memory of each GPU that it will run on; None: unknown, or it runs on CPUs.

    Raises:
        ConfigError, DataError, CheckpointError: a setting, a data file, the tokenizer, the run folder or the checkpoint
            to continue from cannot be used, the disk has too little room for the checkpoints, the batch or the heads
            cannot be divided among the processes, or weights, gradients and moments alone do not fit on a GPU.
    """
    cfg = compose(overrides)
    train.check_classes(cfg)
    run_dir = run_dir_of(cfg, overrides)
    if running := trainer_of(run_dir):
        raise ConfigError(f"{run_dir} is in use by another process ({running}); wait for it, or stop it")
    if problem := unwritable(run_dir):
        raise ConfigError(problem)
    begun = same_run(run_dir, cfg)
    tokenizer = build_tokenizer(cfg, run_dir if begun else None)
    hints = check_held_out(cfg, tokenizer)
    found = describe(cfg)
    for split, facts in found.items():
        if facts.get("error"):
            with named(split.partition(" ")[2]):  # a mixture has "train NAME"
                raise ConfigError(str(facts["error"]))
    if not any(split.partition(" ")[0] == "train" for split in found):
        raise ConfigError("data.train is empty; give it files")
    if problem := indivisible(cfg, world_size):
        raise ConfigError(f"{world_size} processes: {problem}")
    with torch.device("meta"):
        model = build_model(cfg.model, tokenizer.vocab_size)
    if problem := undivided(model, cfg.trainer.context_parallel, cfg.data.isolate_documents):
        raise ConfigError(problem)
    check_capacity(model, cfg)
    check_weights(cfg, model, begun)
    check_resume(run_dir, cfg)
    check_room(cfg, model, run_dir)
    text = report(cfg, tokenizer.vocab_size, found, world_size, run_dir)
    warnings = check_memory(cfg, model, world_size, gpu_bytes) if gpu_bytes else ()
    return Checked(cfg, run_dir, text, (*hints, *warnings))


def check_memory(cfg: Config, model: Transformer, world_size: int, gpu_bytes: int) -> tuple[str, ...]:
    """Refuse a run that cannot fit on a GPU; warn if it may not, as the memory of the step itself is only estimated.

    Raises:
        ConfigError: weights, gradients and moments need more than a GPU has.
    """
    plan = memory_of(cfg, model, world_size)
    has, kept = f"each GPU has {format_bytes(gpu_bytes)}", plan.weights + plan.gradients + plan.optimizer
    if kept > gpu_bytes:
        raise ConfigError(
            f"weights, gradients and moments need {format_bytes(kept)} on each GPU and {has}; use more GPUs"
            + ("" if cfg.trainer.shard == "full" else f", or trainer.shard=full instead of {cfg.trainer.shard}")
        )
    if plan.total > HEADROOM * gpu_bytes:
        advice = "lower trainer.micro_batch, or set trainer.activation_checkpointing=full"
        return (f"the run may not fit: about {format_bytes(plan.total)} are needed and {has}; {advice}",)
    return ()


def gpus_here() -> list[int]:
    """The memory in bytes of each GPU that this process may use, without allocating any."""
    return [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]
