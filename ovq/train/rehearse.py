"""A lack of GPU memory is one line, and a rehearsal of a step shows it before the training data are opened."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ovq.config import Config, TrainerConfig
from ovq.errors import TrainingError
from ovq.model import Transformer
from ovq.processes import World
from ovq.train.optim import LearnedBuffers
from ovq.train.parallelize import sync_gradients


def rehearse(model: Transformer, optimizer: torch.optim.Optimizer, cfg: Config, vocab_size: int, world: World) -> None:
    """On a GPU, run the forward and backward passes of a step on random tokens: one, or two if a step has several
    micro-batches, because their gradients are then summed before they are reduced.

    Raises:
        TrainingError: the step does not fit in memory; names the settings that help.
    """
    if world.device.type != "cuda":
        return
    trainer = cfg.trainer
    generator = torch.Generator().manual_seed(0)
    shape = (trainer.micro_batch, world.local_tokens(trainer.context))
    tokens = torch.randint(vocab_size, shape, generator=generator).to(world.device)
    buffers = LearnedBuffers(model)
    buffers.snapshot()
    with naming_what_saves_memory(trainer):
        moments = [torch.empty_like(p) for p, count in moments_of(optimizer) for _ in range(count)]
        for last in passes(trainer, world.data.size):
            sync_gradients(model, last)
            model(tokens, targets_BT=tokens).loss.backward()
    del moments
    model.zero_grad()
    buffers.restore_if(torch.ones((), dtype=torch.bool, device=world.device))


def passes(trainer: TrainerConfig, processes: int) -> list[bool]:
    """The passes to rehearse, as whether each is the last of its step. `processes` divide the rows of a step."""
    return [True] if trainer.global_batch == trainer.micro_batch * processes else [False, True]


@contextlib.contextmanager
def naming_what_saves_memory(trainer: TrainerConfig) -> Iterator[None]:
    """Turn a lack of GPU memory within the `with` block into a TrainingError that names the settings that help."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise TrainingError(
            f"trainer.micro_batch={trainer.micro_batch} x trainer.context={trainer.context} does not fit this GPU; "
            "lower trainer.micro_batch, set trainer.activation_checkpointing=full or a smaller "
            "trainer.loss_chunk_tokens, or share sequences between ranks with trainer.context_parallel"
        ) from None


def moments_of(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, int]]:
    """Each parameter and the number of tensors of its size that the optimizer will hold: one for Muon's, else two, as
    AdamW does (a custom optimizer is assumed to)."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            yield p, 1 if group.get("muon") else 2
