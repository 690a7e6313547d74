"""Report what a run would cost without running it: `python train.py dry_run=true` prints this report.

The model is built on the meta device, so describing a 480M model takes seconds and little memory.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from ovq.config import Config
from ovq.identity import digest
from ovq.lengths import phases
from ovq.memory import MemoryPlan, checkpoint_bytes, memory_of
from ovq.model import Transformer, build_model, count_parameters, flops_per_token, state_bytes, state_size, undivided
from ovq.optim_config import last_before_decay
from ovq.processes import wrong_replicas

CONTEXTS = (2048, 4096, 8192, 16384, 32768, 65536)


def report(cfg: Config, vocab_size: int, data: dict[str, Any], world_size: int, run_dir: Path, epochs: str = "") -> str:
    """The whole plan as text: model, state by context, compute, memory, data.

    Args:
        vocab_size: number of pieces in the tokenizer.
        data: what `data.describe.describe` found for each split (shards, bytes, documents), or its error.
        epochs: how often the schedule reads the training data, in words, if that is known.
        world_size: number of processes the run would use; to plan for 8, setting torchrun's WORLD_SIZE=8 is enough.
    """
    with torch.device("meta"):
        model = build_model(cfg.model, vocab_size)
    total, body = count_parameters(model)
    trainer = cfg.trainer
    tokens_per_step = trainer.global_batch * trainer.context
    flops = {length: flops_per_token(model, length) for _, length in phases(trainer)}
    total_flops = tokens_per_step * sum(steps * flops[length] for steps, length in phases(trainer))
    each = ", ".join(f"{number:.4g} per token at context {length:,}" for length, number in flops.items())
    names = [cfg.model.pattern[index % len(cfg.model.pattern)] for index in range(cfg.model.num_layers)]
    tokens = tokens_per_step * trainer.steps
    rows = [
        ("run folder", str(run_dir)),
        ("settings", digest(cfg)),
        ("model", f"{cfg.model.name}, size {cfg.model.size}, vocabulary {vocab_size:,}"),
        ("layers", f"{len(names)}: {_runs(names)}"),
        ("parameters", f"{total:,} in total, {body:,} without embedding and head"),
        ("training FLOPs", f"{each}; {total_flops:.3g} in total"),
        ("tokens", f"{tokens_per_step:,} per step ({trainer.global_batch} x {trainer.context:,}); {tokens:,} in total"),
        ("steps", f"{trainer.steps:,}" + (f", {epochs}" if epochs else "")),
        ("processes", _processes(cfg, world_size, model)),
        ("device memory", _memory(memory_of(cfg, model, world_size))),
        ("checkpoints", "{} each, {} at most at once".format(*map(format_bytes, disk_bytes(cfg, model)))),
    ]
    rows += [(f"data {split}", _found(found)) for split, found in data.items()]
    rows += [] if data else [("data", "none: data.train is empty")]
    lines = [f"{name:<16} {value}" for name, value in rows]
    lines += [
        "",
        f"{'context':>10} {'state elements':>16} {'bytes':>12}   per sequence, over all layers; activations in bf16",
    ]
    for context in CONTEXTS:
        held = state_bytes(model, context)
        lines.append(f"{context:>10,} {state_size(model, context):>16,} {format_bytes(held):>12}")
    return "\n".join(lines)


def _processes(cfg: Config, world_size: int, model: Transformer) -> str:
    """How the batch is divided among the processes, or why it or the model cannot be."""
    trainer, ranks = cfg.trainer, cfg.trainer.context_parallel
    if problem := undivided(model, ranks, cfg.data.isolate_documents) or indivisible(cfg, world_size):
        return f"{world_size}: impossible, {problem}"
    accumulation = trainer.global_batch * ranks // (trainer.micro_batch * world_size)
    sharing = f", {ranks} share each sequence" if ranks > 1 else ""
    return f"{world_size}{sharing}, micro-batch {trainer.micro_batch}, accumulation {accumulation}"


def indivisible(cfg: Config, world_size: int) -> str:
    """Why the batch or the copies of the model cannot be divided among `world_size` processes; empty if they can."""
    trainer, ranks = cfg.trainer, cfg.trainer.context_parallel
    if world_size % ranks:
        return f"trainer.context_parallel={ranks} does not divide {world_size}"
    if trainer.global_batch % (trainer.micro_batch * world_size // ranks):
        return (
            f"trainer.global_batch={trainer.global_batch} is not a multiple of "
            f"trainer.micro_batch={trainer.micro_batch} x {world_size // ranks}; change one of them"
        )
    return wrong_replicas(trainer.shard, trainer.replicas, world_size)


def _found(found: dict[str, Any]) -> str:
    """'23 shards, 28,602 documents, 10.9 GiB'; unknown values are left out."""
    parts = []
    for name, value in found.items():
        if name in ("error", "commit"):
            parts.append(f"{name}: {value}")
        elif name == "bytes":
            parts.append(format_bytes(value))
        elif name == "share":
            parts.append(f"{value:.3g} of the rows")
        elif name == "epochs" and value is not None:
            parts.append(f"read {value:.3g} times")
        elif value is not None and not (name == "missing" and value == 0):
            parts.append(f"{value:,} {name}")
    return ", ".join(parts)


def _runs(names: list[str]) -> str:
    """'(a, b) x 2' for a, b, a, b where the pattern repeats a whole number of times."""
    for width in range(1, len(names) // 2 + 1):
        if len(names) % width == 0 and names == names[:width] * (len(names) // width):
            return f"({', '.join(names[:width])}) x {len(names) // width}"
    return ", ".join(names)


def _memory(plan: MemoryPlan) -> str:
    parts = {
        "weights, gradients, optimizer": plan.weights + plan.gradients + plan.optimizer,
        "gathered blocks": plan.gathered,
        "activations": plan.activations,
        "at work": plan.working,
    }
    return f"about {format_bytes(plan.total)} ({'; '.join(f'{n} {format_bytes(v)}' for n, v in parts.items() if v)})"


def disk_bytes(cfg: Config, model: Transformer) -> tuple[float, float]:
    """Bytes of one checkpoint, and of all that are on disk at once: those kept and the one being written."""
    each = checkpoint_bytes(cfg, model)
    before_decay = last_before_decay(cfg.optim, cfg.trainer.steps) is not None
    return each, each * (cfg.trainer.keep_last + before_decay + 1)


def lacking_room(cfg: Config, model: Transformer, run_dir: Path) -> str:
    """A line if the disk has too little room for the run's checkpoints, less those already there; else empty."""
    each, all_of_them = disk_bytes(cfg, model)
    held = sum(file.stat().st_size for file in run_dir.glob("checkpoints/step_*/*") if file.is_file())
    place = next(parent for parent in (run_dir, *run_dir.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(place).free
    if free >= all_of_them - held:
        return ""
    return (
        f"{run_dir} has {format_bytes(free)} of free disk, and the checkpoints need {format_bytes(all_of_them - held)} "
        f"({format_bytes(each)} each: trainer.keep_last={cfg.trainer.keep_last} and the one being written); make room, "
        "lower trainer.keep_last, or choose another disk with runs_root="
    )


def format_bytes(number: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if number < 1024 or unit == "PiB":
            return f"{number:.4g} {unit}"
        number /= 1024
    raise AssertionError
