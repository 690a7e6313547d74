"""Sharding, recomputation and compilation, applied to a model from outside: the model itself is unaware of them.

- `parallelize` wraps each block and the model in FSDP2. `shard=full` shards over all processes, `hybrid` over groups
  of them with `replicas` copies (HSDP), `none` keeps whole copies (HSDP with groups of one).
- Gradients are *summed* over all processes, whether they hold different rows or different tokens of the same rows.
  The loss is divided once, by the global count of valid tokens, before backward, so that one process and N processes
  compute the same gradients.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from ovq.config import TrainerConfig
from ovq.errors import ConfigError
from ovq.model import Transformer, divides_heads, undivided
from ovq.processes import World, wrong_replicas
from ovq.train.hand_over import hand_over


def parallelize(model: Transformer, trainer: TrainerConfig, world: World, isolated: bool = False) -> Transformer:
    """Apply activation checkpointing, compilation and sharding, and move the model to the device.

    Parameter names do not change, so checkpoints do not depend on how a run was parallelised. In a single process,
    nothing is wrapped in FSDP, unless a GPU or the compiler computes in bf16: these leave the casts to FSDP.

    Args:
        isolated: the model will be trained with data.isolate_documents.

    Raises:
        ConfigError: replicas do not fit the sharding or the number of processes, a mixer can neither divide its heads
            over the context axis nor hand over its state, or there is no C++ compiler.
    """
    problem = undivided(model, world.context.size, isolated)
    if problem := problem or wrong_replicas(trainer.shard, trainer.replicas, world.size):
        raise ConfigError(problem)
    if trainer.compile and world.device.type == "cpu" and not shutil.which(os.environ.get("CXX", "c++")):
        raise ConfigError("trainer.compile=true needs a C++ compiler on a CPU and found none; install g++ or set CXX")
    model.loss_chunk_tokens = trainer.loss_chunk_tokens
    for mixer in model.mixers():
        mixer.data_axis, mixer.context_axis = world.data, world.context
        if world.context.size > 1 and not divides_heads(mixer, world.context.size):
            hand_over(mixer, world.context)
    for block in model.blocks():
        if trainer.compile:
            block.forward = torch.compile(block.forward)  # type: ignore[method-assign]
        if trainer.activation_checkpointing == "full":
            block.forward = recomputed(block.forward)  # type: ignore[method-assign]
        elif trainer.activation_checkpointing == "selective":
            # The mixer is the slow, sequential part: keep its activations and recompute the MLP's, which are larger.
            block.mlp.forward = recomputed(block.mlp.forward)  # type: ignore[method-assign]
    if world.size == 1 and (world.precision == "fp32" or not (trainer.compile or world.device.type == "cuda")):
        for part in model.modules() if world.precision == "bf16" else ():
            part.forward = with_parameters_in(torch.bfloat16, part)  # type: ignore[method-assign]
        return model.to(world.device)

    shape, names = mesh_shape(trainer.shard, trainer.replicas, world.size)
    mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=names)
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if world.precision == "bf16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # a carried state holds sums that must stay in float32
    )
    for block in model.blocks():
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in sharded_modules(model):
        module.set_gradient_divide_factor(1.0)  # sum: the loss has been divided already
        module.set_force_sum_reduction_for_comms(True)  # gloo has no averaging reduction
    return model.to(world.device)


def with_parameters_in(dtype: torch.dtype, module: nn.Module) -> Callable[..., Any]:
    """The module's `forward`, in which its own parameters (not its children's) are cast to `dtype`.

    As with FSDP, the parameters and their gradients keep their dtype, and a float32 input of the module is not cast.
    """
    forward = module.forward

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        cast = {name: p.to(dtype) for name, p in module.named_parameters(recurse=False)}
        module.__dict__.update(cast)  # found before the registered parameters, which stay where they are
        try:
            return forward(*args, **kwargs)
        finally:
            for name in cast:
                del module.__dict__[name]

    return wrapped


def mesh_shape(shard: str, replicas: int, size: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """(shape, names) of the device mesh: (shard,) or (replicate, shard)."""
    if shard == "full":
        return (size,), ("shard",)
    if shard == "none":
        return (size, 1), ("replicate", "shard")
    return (replicas, size // replicas), ("replicate", "shard")


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """The modules FSDP wraps; empty for a plain module."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def sync_gradients(model: nn.Module, last: bool) -> None:
    """Make the next backward pass reduce gradients over processes only if it is the last of the step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)


def reshard(model: nn.Module) -> None:
    """Free gathered parameters after forward passes without a backward pass."""
    for module in sharded_modules(model):
        module.reshard()


def recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, with its activations recomputed in the backward pass instead of kept."""

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return wrapped
