"""Sharding, recomputation and compilation, applied to a model from outside: the model knows nothing of them.

- `parallelize` puts FSDP2 around each block and around the model. `shard=full` shards over all processes,
  `hybrid` over groups of them with `replicas` copies (HSDP), `none` keeps whole copies (HSDP with groups of one).
- Gradients are *summed* over processes. The loss is divided once, by the global count of valid tokens, before
  backward, so that 1 process and N processes compute the same thing.
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
from ovq.model import Transformer
from ovq.processes import World


def parallelize(model: Transformer, trainer: TrainerConfig, world: World) -> Transformer:
    """Apply activation checkpointing, compilation and sharding to `model.layers` and to the model, and move it.

    Parameter names do not change, so checkpoints do not depend on how a run was parallelised. A lone process in
    float32 gets the plain module.

    Raises:
        ConfigError: replicas that do not divide the number of processes, or nothing to compile with.
    """
    if trainer.compile and world.device.type == "cpu" and not shutil.which(os.environ.get("CXX", "c++")):
        raise ConfigError("trainer.compile=true needs a C++ compiler on a CPU and finds none; install g++ or set CXX")
    model.loss_chunk_tokens = trainer.loss_chunk_tokens
    for mixer in model.mixers():
        mixer.data_axis = world.data
    for block in model.blocks():
        if trainer.compile:
            block.forward = torch.compile(block.forward)  # type: ignore[method-assign]
        if trainer.activation_checkpointing == "full":
            block.forward = recomputed(block.forward)  # type: ignore[method-assign]
        elif trainer.activation_checkpointing == "selective":
            # The mixer is the costly, sequential part: keep its activations, recompute the MLP's, the largest ones.
            block.mlp.forward = recomputed(block.mlp.forward)  # type: ignore[method-assign]
    if world.size == 1 and world.precision == "fp32":
        return model.to(world.device)

    shape, names = mesh_shape(trainer.shard, trainer.replicas, world.size)
    mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=names)
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if world.precision == "bf16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # a carried state holds float32 sums that must stay float32
    )
    for block in model.blocks():
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in sharded_modules(model):
        module.set_gradient_divide_factor(1.0)  # sums: the loss already carries the division
        module.set_force_sum_reduction_for_comms(True)  # gloo has no averaging reduction
    return model.to(world.device)


def mesh_shape(shard: str, replicas: int, size: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """(shape, names) of the device mesh: one dimension to shard over, or replicas x shards."""
    if shard == "full":
        return (size,), ("shard",)
    if shard == "none":
        return (size, 1), ("replicate", "shard")
    if size % replicas:
        raise ConfigError(f"trainer.replicas={replicas} must divide the number of processes, {size}")
    return (replicas, size // replicas), ("replicate", "shard")


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """The modules FSDP wraps; empty for a plain module."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def sync_gradients(model: nn.Module, last: bool) -> None:
    """Reduce gradients over processes in the next backward only if it is the step's last one."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)


def reshard(model: nn.Module) -> None:
    """Free gathered parameters, after forward passes that no backward follows."""
    for module in sharded_modules(model):
        module.reshard()


def recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with its activations recomputed in backward instead of kept."""

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return wrapped
