"""Processes and devices: this process's rank and device, the axes of the process mesh, and collectives of objects.

One process per device, under torchrun or alone; NCCL between GPUs, gloo between CPU processes. Every group also has a
gloo backend, so that ranks exchange Python objects, stop flags and token counts without touching a GPU's stream.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import datetime
import gc
import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as functional
from torch.distributed.device_mesh import DeviceMesh

from ovq import cpu
from ovq.config import TrainerConfig
from ovq.errors import ConfigError

T = TypeVar("T")
FIRST_STEP_TIMEOUT_S = 1800  # the time to compile kernels and resolve data may differ by minutes between processes
NCCL_EXTRA_S = 120  # for a rank to report, after it has noticed that another is lost
POLL_S = 2e-4
WAITING_S = 1.0  # between checks that the other ranks still answer
BACKGROUND_TIMEOUT_S = 6 * 3600  # for writing a checkpoint: a shared disk may be slow, and training continues meanwhile


@dataclass(frozen=True)
class Axis:
    """One dimension of the process mesh: "data" (each process holds different rows of the batch) or "context" (each
    holds different tokens of the same rows). `group` is None if the axis spans all processes, or only this one.
    """

    name: str
    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the axis in place, ordered on the device's stream (the host does not wait)."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, which have equal shapes, concatenated along dimension 0. Not differentiable."""
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous(), group=self.group)
        return torch.cat(parts)

    def exchange(self, tensor: Tensor) -> Tensor:
        """All-to-all of `tensor` [size, ...]: row i goes to rank i, and row i of the result comes from it.

        Differentiable: the gradient is exchanged in the same way, as part of every rank's backward pass.
        """
        group = dist.group.WORLD if self.group is None else self.group
        assert group is not None
        received = functional.all_to_all_single_autograd(tensor.contiguous(), None, None, group)
        return functional.wait_tensor(received)  # a plain tensor, which custom operators and kernels can use


@dataclass(frozen=True)
class World:
    """This process's rank, device and compute precision ("fp32" or "bf16"), and the number of processes, `size`.

    `data` and `context` are the axes of the process mesh; the product of their sizes is `size`. A context axis
    consists of neighbouring ranks, usually on one machine, because it communicates most.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")
    precision: str = "fp32"
    data: Axis = Axis("data")
    context: Axis = Axis("context")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def itemsize(self) -> int:
        """Bytes of an activation."""
        return 2 if self.precision == "bf16" else 4

    def local_tokens(self, tokens: int) -> int:
        """How many tokens of a sequence of `tokens` this process holds."""
        return tokens // self.context.size


def init(trainer: TrainerConfig) -> World:
    """Join the other processes (found through torchrun's environment variables) or run alone, and choose the device.

    Raises:
        ConfigError: the device does not exist, there are more processes on this machine than GPUs, or
            trainer.context_parallel does not divide the number of processes.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if size % trainer.context_parallel:
        raise ConfigError(
            f"trainer.context_parallel={trainer.context_parallel} must divide the number of processes, {size}; start "
            f"with torchrun --nproc_per_node {trainer.context_parallel} ..."
        )
    kind = trainer.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and torch.cuda.device_count() < local_size:
        raise ConfigError(
            f"trainer.device=cuda needs {local_size} GPU(s) here and finds {torch.cuda.device_count()}; "
            "use trainer.device=cpu or fewer processes"
        )
    device = torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    precision = "bf16" if (kind, trainer.precision) == ("cuda", "auto") else trainer.precision
    if kind == "cpu" and size == 1:  # before the group is made, which compiled bf16 needs
        precision = cpu.choose_precision(precision)
    timeout = datetime.timedelta(seconds=max(FIRST_STEP_TIMEOUT_S, trainer.timeout_s))
    needed = size > 1 or (precision == "bf16" and (kind == "cuda" or trainer.compile))  # see `parallelize`
    if needed and not dist.is_initialized():  # as by another model of this process
        alone: dict[str, Any] = {} if size > 1 else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timeout=timeout, **alone)
    if kind == "cpu":
        cpu.keep_freed_memory()
        precision = cpu.choose_precision(on_main(lambda: cpu.choose_precision(precision)))
    data, context = axes(rank, size, trainer.context_parallel, timeout)
    return World(rank, size, local_rank, device, precision, data=data, context=context)


def axes(rank: int, size: int, context: int, timeout: datetime.timedelta | None = None) -> tuple[Axis, Axis]:
    """The data and the context axis of `size` processes, `context` neighbouring ranks sharing each sequence.

    A collective if both axes have several ranks, and therefore groups of their own.
    """
    data = size // context
    groups: list[dist.ProcessGroup | None] = [None, None]
    if data > 1 and context > 1:
        columns = [list(range(first, size, context)) for first in range(context)]
        rows = [list(range(first, first + context)) for first in range(0, size, context)]
        groups = [dist.new_subgroups_by_enumeration(ranks, timeout)[0] for ranks in (columns, rows)]
    return Axis("data", rank // context, data, groups[0]), Axis("context", rank % context, context, groups[1])


def wrong_replicas(shard: str, replicas: int, size: int) -> str:
    """Why `size` processes cannot hold this many copies of the model, or the setting has no effect; empty: neither."""
    if shard == "hybrid":
        return f"trainer.replicas={replicas} must divide the number of processes, {size}" if size % replicas else ""
    return f"trainer.replicas={replicas} is only used with trainer.shard=hybrid; set both" if replicas > 1 else ""


def shutdown() -> None:
    """Leave the process group, if there is one; its threads are joined when the process exits.

    The last collective's tensors are released by a gloo thread, which needs the GIL to do so. Once the interpreter is
    finalizing, Python ends such a thread, and C++ then ends the process: "terminate called without an active
    exception", status 134. Only the destructor of a group joins its threads, and references to groups outlive this
    call: in the caller's model and checkpointer, and in the meshes that DTensor's caches keep.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        _BACKGROUND.clear()
        atexit.unregister(_release_groups)
        atexit.register(_release_groups)


def _release_groups() -> None:
    """Drop all references to process groups, while the interpreter still works and the caller's frames are gone."""
    for item in gc.get_objects():
        if type(item) is DeviceMesh:
            item._pg_registry.clear()
    gc.collect()


def lower_timeout(seconds: int) -> None:
    """From now on, make a collective that waits longer than this fail: a process is assumed lost.

    Called after this process's first step, when nothing slow (compiling, resolving data) is left.
    NCCL gets more time, because its watchdog aborts the process, which then cannot say which rank was lost.
    """
    global _timeout_s
    if distributed():
        gather_objects(None)  # wait for every process to finish its first step, under the long timeout
        _timeout_s = seconds
        for group in list(dist.distributed_c10d._world.pg_map):
            if group not in _BACKGROUND:
                dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=seconds), group)
                if "nccl" in dist.get_backend_config(group):
                    nccl = group._get_backend(torch.device("cuda"))
                    nccl._set_default_timeout(datetime.timedelta(seconds=seconds + NCCL_EXTRA_S))


_timeout_s = FIRST_STEP_TIMEOUT_S


def await_device(device: torch.device) -> None:
    """Wait until the devices of all ranks have done the work queued so far, no longer than a collective may take.

    A collective. NCCL does not notice that a rank is lost, and inside a CUDA call Python can handle no signal; so the
    hosts wait here, and keep asking each other through gloo, which does notice.

    Raises:
        torch.distributed.DistError: a rank is lost, or the time is over.
    """
    if device.type != "cuda" or not distributed():
        return
    event = torch.cuda.current_stream(device).record_event()
    end = time.monotonic() + _timeout_s
    busy = True
    while busy:
        ask_at = time.monotonic() + WAITING_S
        while not event.query() and time.monotonic() < ask_at:
            time.sleep(POLL_S)
        busy = any_flag(not event.query())
        if busy and time.monotonic() > end:
            raise dist.DistError(f"{device} has not finished its work within {_timeout_s} s")


def background_group() -> dist.ProcessGroup | None:
    """A gloo group of all processes for a background thread, with a timeout for slow disks; None if run alone."""
    if not distributed():
        return None
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=BACKGROUND_TIMEOUT_S))
    _BACKGROUND.append(group)
    return group


_BACKGROUND: list[dist.ProcessGroup] = []


def in_background(work: Callable[..., T], *args: Any) -> Future[T]:
    """Run `work(*args)` in a thread that a normal exit of the process waits for, on this thread's GPU."""
    future: Future[T] = Future()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run() -> None:
        try:
            if device is not None:  # a new thread begins with GPU 0
                torch.cuda.set_device(device)
            future.set_result(work(*args))
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=run, name="background", daemon=False)
    _THREADS[:] = [other for other in _THREADS if other.is_alive()] + [thread]
    thread.start()
    return future


_THREADS: list[threading.Thread] = []


def join_background(seconds: float) -> None:
    """Wait at most this long for what `in_background` runs."""
    end = time.monotonic() + seconds
    for thread in _THREADS:
        thread.join(max(0.0, end - time.monotonic()))


def done_everywhere(future: Future[Any]) -> bool:
    """Whether `future` is done on every rank, after waiting a moment for this rank's.

    A collective: ranks that wait for something slow call it in a loop, and so notice a lost peer within the timeout of
    a collective.
    """
    concurrent.futures.wait([future], timeout=WAITING_S if distributed() else None)
    return not any_flag(not future.done())


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed Python, numpy and torch identically on every rank: ranks differ only in their data."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def rng_state() -> dict[str, Any]:
    """The states of this process's random number generators, as plain values and tensors."""
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


# --- collectives -----------------------------------------------------------------------------------------------------


def distributed() -> bool:
    """Whether there are other processes."""
    return dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if distributed() else 1


def on_main(compute: Callable[[], T]) -> T:
    """Run `compute()` on rank 0 and return its result, or raise its error, on every rank."""
    if not distributed():
        return compute()
    outcome: Any = None
    if rank() == 0:
        try:
            outcome = (True, compute())
        except Exception as error:  # or the others would wait for a rank that has failed
            outcome = (False, error)
    good, value = broadcast_object(outcome)
    if not good:
        raise value
    return value


def on_main_slowly(compute: Callable[[], T]) -> T:
    """As `on_main`, but in a thread and for as long as it takes: the other ranks would not wait for a collective longer
    than its timeout. For work on files, whose size or server decides how long it takes."""
    if not distributed():
        return compute()
    future: Future[Any] = Future()
    if rank() == 0:
        future = in_background(compute)
    else:
        future.set_result(None)
    while not done_everywhere(future):
        pass
    return on_main(future.result)


def broadcast_object(value: T, group: dist.ProcessGroup | None = None) -> T:
    """Rank 0's object on every rank."""
    if not distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group, device=torch.device("cpu"))
    return box[0]


def gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """The objects of all ranks, in rank order, on every rank."""
    if not distributed():
        return [value]
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value, group=group)
    return box


def sum_integers(values: list[int]) -> list[int]:
    """Element-wise sums over ranks of short lists of integers (each below 2^47), on the CPU: no GPU synchronisation."""
    if not distributed():
        return values
    total = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(total)
    return total.tolist()


def any_flag(flag: bool) -> bool:
    """Whether the flag is set on any rank. A collective."""
    return sum_integers([int(flag)])[0] > 0


def sum_tensor(tensor: Tensor) -> Tensor:
    """Sum over ranks in place, ordered on the device's stream (the host does not wait)."""
    if distributed():
        dist.all_reduce(tensor)
    return tensor
