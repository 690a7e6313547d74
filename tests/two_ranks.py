"""Run under torchrun by test_system.py: behaviour that takes several processes to test, all in one launch. Writes JSON.

torchrun --nproc_per_node 2 tests/two_ranks.py FOLDER
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor

from ovq import processes
from ovq.train import checkpoint
from ovq.train.muon import orthogonalised
from ovq.train.optim import persistent_buffers
from tests.helpers import chosen, small_config
from tests.test_train import send_at
from tests.training import RUN, trainer_for

TWO = "trainer.micro_batch=2"  # rows per process: four in total, as with one process
SHARDING = {
    "full": ("trainer.shard=full",),
    "hybrid": ("trainer.shard=hybrid", "trainer.replicas=2", "trainer.activation_checkpointing=full"),
    "none": ("trainer.shard=none", "trainer.activation_checkpointing=selective", "trainer.async_checkpoint=false"),
    "accumulating": ("trainer.micro_batch=1",),
    "muon": ("optim=muon", "optim.ema=0.9"),
}


def main(out: Path) -> None:
    torch.set_num_threads(1)
    world = processes.init(small_config("sw", *RUN).trainer)
    results: dict[str, Any] = {}

    for name, settings in SHARDING.items():
        trainer_for(out / name, TWO, *settings, world=world).fit()
    trainer_for(out / "vq", TWO, model="sw_vq", world=world).fit()
    bf16 = dataclasses.replace(world, precision="bf16")
    trainer_for(out / "bf16", TWO, "trainer.precision=bf16", world=bf16).fit()

    # A matrix is orthogonalised as a whole, whichever part of it each process holds.
    mesh = dist.init_device_mesh("cpu", (2,))
    matrix = torch.randn(7, 12, generator=torch.Generator().manual_seed(0))
    sharded = orthogonalised(distribute_tensor(matrix, mesh, [Shard(0)]), 5)
    results["orthogonalised"] = [
        sharded.to_local().shape[0] in (3, 4),
        torch.equal(sharded.full_tensor(), orthogonalised(matrix, 5)),
    ]

    # The averaged weights of all shards replace the model's weights, which are then restored.
    trainer = trainer_for(out / "muon", TWO, *SHARDING["muon"], world=world)
    assert trainer.ema is not None
    probe = torch.arange(20)[None]
    with torch.no_grad():
        before = trainer.model(probe, targets_BT=probe).loss.item()
        with trainer.ema.in_place(trainer.model):
            averaged = trainer.model(probe, targets_BT=probe).loss.item()
        results["averaged"] = [before, averaged, trainer.model(probe, targets_BT=probe).loss.item()]

    # Each rank has its own copy of the codebook.
    trainer = trainer_for(out / "vq", TWO, model="sw_vq", world=world)
    ranks = processes.gather_objects([buffer.tolist() for buffer in persistent_buffers(trainer.model)])
    results["buffers"] = {"count": len(ranks[0]), "equal": ranks[0] == ranks[1]}

    # A signal to one process stops both after the same step.
    trainer = trainer_for(out / "signal", TWO, world=world)
    if world.rank == 1:
        send_at(trainer, 2, signal.SIGTERM)
    summary = trainer.fit()
    results["stopped"] = processes.gather_objects((summary["step"], summary["stopped_by"]))

    # A full disk on one rank fails the checkpoint on both ranks, and nothing but the checkpoint.
    write = checkpoint.dcp.save
    if world.rank == 1:
        checkpoint.dcp.save = full_disk  # type: ignore[assignment]
    results["full"] = processes.gather_objects(error_of(lambda: resave(trainer)))
    checkpoint.dcp.save = write
    resave(trainer)

    # An error on rank 0 is raised on every rank.
    results["on_main"] = processes.gather_objects(error_of(lambda: processes.on_main(lambda: int("no number"))))
    results["choice"] = processes.gather_objects(str(chosen(out / "signal")))

    # Only the collectives that training waits for get the short timeout.
    background = processes.background_group()
    processes.lower_timeout(77)
    results["timeouts"] = [timeout_s(dist.group.WORLD), timeout_s(background)]

    # Work on files may take longer than a collective may wait.
    processes.lower_timeout(2)

    def slowly() -> int:
        time.sleep(4)
        return world.rank

    results["slowly"] = processes.gather_objects(processes.on_main_slowly(slowly))
    results["failed slowly"] = processes.gather_objects(
        error_of(lambda: processes.on_main_slowly(lambda: int("no number")))
    )

    if world.is_main:
        (out / "results.json").write_text(json.dumps(results))
    processes.shutdown()


def full_disk(state: Any, storage_writer: Any, **how: Any) -> None:
    """Stands in for dcp.save: what this rank writes does not fit on the disk."""

    def write_data(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    storage_writer.write_data = write_data
    torch.distributed.checkpoint.state_dict_saver.save(state, storage_writer=storage_writer, **how)


def resave(trainer: Any) -> None:
    trainer.checkpointer.save(3, trainer.model, trainer.optimizer, {"step": 3, "data": {"done": 3}})
    trainer.checkpointer.wait()


def error_of(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def timeout_s(group: Any) -> float:
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
