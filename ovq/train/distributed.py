"""Processes, devices and sharding: everything about parallelism, applied to a model from outside.

- One process per device, under torchrun or alone; NCCL between GPUs, gloo between CPU processes. Every group also has
  a gloo half, so that Python objects, stop flags and token counts are agreed without touching a GPU's stream.
- `parallelize` puts FSDP2 around each block and around the model. `shard=full` shards over all processes,
  `hybrid` over groups of them with `replicas` copies (HSDP), `none` keeps whole copies (HSDP with groups of one).
- Gradients are *summed* over processes. The loss is divided once, by the global count of valid tokens, before
  backward, so that 1 process and N processes compute the same thing.
"""

from __future__ import annotations

import datetime
import functools
import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from ovq.config import ConfigError

T = TypeVar("T")
Model = TypeVar("Model", bound=nn.Module)
FIRST_STEP_TIMEOUT_S = 1800  # compiling kernels and resolving data may differ by minutes between processes
GLOO_SETTLES_S = 0.3
BACKGROUND_TIMEOUT_S = 6 * 3600  # writing a checkpoint: a shared disk may be slow, and training goes on meanwhile


@dataclass(frozen=True)
class World:
    """Who this process is. `device` is its own; `precision` is "fp32" or "bf16", of compute."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")
    precision: str = "fp32"

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def init(trainer: Any) -> World:
    """Join the other processes (torchrun's environment) or run alone, and choose the device.

    Raises:
        ConfigError: a device that is not there, or more processes on this machine than GPUs.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    kind = trainer.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and torch.cuda.device_count() < local_size:
        raise ConfigError(
            f"trainer.device=cuda needs {local_size} GPU(s) here and finds {torch.cuda.device_count()}; "
            "use trainer.device=cpu or fewer processes"
        )
    precision = {"cuda": "bf16", "cpu": "fp32"}[kind] if trainer.precision == "auto" else trainer.precision
    device = torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    if size > 1 or precision == "bf16":  # FSDP is also what gives a lone device bf16 compute on float32 parameters
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
            timeout=datetime.timedelta(seconds=max(FIRST_STEP_TIMEOUT_S, trainer.timeout_s)),
            **({} if size > 1 else {"store": dist.HashStore(), "rank": 0, "world_size": 1}),  # type: ignore[arg-type]
        )
    return World(rank, size, local_rank, device, precision)


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
        # A gloo thread that drops the last collective's tensor takes the interpreter's lock for it. If the interpreter
        # has begun to end, Python ends that thread, and C++ the process with it: "terminate called without an active
        # exception", status 134, now and then on a busy machine, after all is done.
        time.sleep(GLOO_SETTLES_S)


def lower_timeout(seconds: int) -> None:
    """From now on a collective that waits longer than this fails: some process is lost.

    Called after the first step of this process, when nothing slow (compiling, finding data) is left.
    """
    if distributed():
        gather_objects(None)  # a process still in its first step must not be given up by one that is not
        for group in list(dist.distributed_c10d._world.pg_map):
            if group not in _BACKGROUND:
                dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=seconds), group)


def background_group() -> dist.ProcessGroup | None:
    """A gloo group of all processes for a thread of its own, patient enough for slow disks; None for a lone process."""
    if not distributed():
        return None
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=BACKGROUND_TIMEOUT_S))
    _BACKGROUND.append(group)
    return group


_BACKGROUND: list[dist.ProcessGroup] = []


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed Python, numpy and torch, alike on every rank: what differs by rank comes from the data alone."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def rng_state() -> dict[str, Any]:
    """The states of this process's random-number generators, as plain values and tensors."""
    name, keys, *rest = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """The inverse of `rng_state`."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


# --- agreeing across ranks -------------------------------------------------------------------------------------------


def distributed() -> bool:
    """Whether there are other processes."""
    return dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if distributed() else 1


def on_main(compute: Callable[[], T]) -> T:
    """`compute()` of rank 0, its result or its error, on every rank."""
    if not distributed():
        return compute()
    outcome: Any = None
    if rank() == 0:
        try:
            outcome = (True, compute())
        except Exception as error:  # the others must not wait for a rank that has given up
            outcome = (False, error)
    good, value = broadcast_object(outcome)
    if not good:
        raise value
    return value


def broadcast_object(value: T, group: dist.ProcessGroup | None = None) -> T:
    """Rank 0's object, on every rank."""
    if not distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group, device=torch.device("cpu"))
    return box[0]


def gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's object, in the order of ranks, on every rank."""
    if not distributed():
        return [value]
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value, group=group)
    return box


def sum_integers(values: list[int]) -> list[int]:
    """Sums over ranks of small lists of integers (each below 2^47), on the CPU: no GPU is made to wait."""
    if not distributed():
        return values
    total = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(total)
    return total.tolist()


def any_flag(flag: bool) -> bool:
    """Whether the flag is up on any rank; every rank must ask."""
    return sum_integers([int(flag)])[0] > 0


def sum_tensor(tensor: Tensor) -> Tensor:
    """Sum over ranks in place, in the order of the device's stream (no host wait)."""
    if distributed():
        dist.all_reduce(tensor)
    return tensor


# --- the model -------------------------------------------------------------------------------------------------------


def parallelize(model: Model, trainer: Any, world: World) -> Model:
    """Apply activation checkpointing, compilation and sharding to `model.layers` and to the model, and move it.

    Parameter names do not change, so checkpoints do not depend on how a run was parallelised. A lone process in
    float32 gets the plain module.

    Raises:
        ConfigError: replicas that do not divide the number of processes, or nothing to compile with.
    """
    if trainer.compile and world.device.type == "cpu" and not shutil.which(os.environ.get("CXX", "c++")):
        raise ConfigError("trainer.compile=true needs a C++ compiler on a CPU and finds none; install g++ or set CXX")
    for block in model.layers:  # type: ignore[union-attr]
        if trainer.compile:
            block.forward = torch.compile(block.forward)
        if trainer.activation_checkpointing == "full":
            block.forward = recomputed(block.forward)
        elif trainer.activation_checkpointing == "selective":
            # The mixer is the costly, sequential part: keep its activations, recompute the MLP's, the largest ones.
            block.mlp.forward = recomputed(block.mlp.forward)
    if world.size == 1 and world.precision == "fp32":
        return model.to(world.device)

    shape, names = mesh_shape(trainer.shard, trainer.replicas, world.size)
    mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=names)
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if world.precision == "bf16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # a carried state holds float32 sums that must stay float32
    )
    for block in model.layers:  # type: ignore[union-attr]
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


def persistent_buffers(model: nn.Module) -> list[Tensor]:
    """Buffers that training changes and checkpoints hold (a codebook and its averages); tables are not among them."""
    return [
        buffer
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    ]


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
