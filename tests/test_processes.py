"""Claims about a process group: waiting for what another rank may never do, threads, leaving."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from threading import current_thread

import pytest
import torch
from torch.distributed import DistError

from ovq import peers, processes
from tests.helpers import two_ranks

# Handlers run in reverse order: the one registered first sees the process after all others have run.
LEAVES_A_GROUP = """
import atexit, json, os, sys
from pathlib import Path
from threading import current_thread

def gloo_threads():
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return [name for name in names if "gloo" in name]

counts = []
atexit.register(lambda: print(json.dumps([*counts, len(gloo_threads())])))

import torch
from ovq import processes
from ovq.config import TrainerConfig
from tests.training import trainer_for

def main():
    torch.set_num_threads(1)
    world = processes.init(TrainerConfig(device="cpu"))
    trainer = trainer_for(Path(sys.argv[1]), world=world)
    trainer.fit()
    counts.append(len(gloo_threads()))
    processes.shutdown()

main()
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="lists its threads in /proc")
def test_no_gloo_thread_outlives_the_interpreter(tmp_path: Path) -> None:
    """A thread that releases a tensor while Python finalizes aborts the process with status 134."""
    ranks = two_ranks(LEAVES_A_GROUP, tmp_path)
    for rank in ranks:
        out, error = rank.communicate(timeout=300)
        assert rank.returncode == 0, error
        training, at_exit = json.loads(out.splitlines()[-1])
        assert training > 0 and at_exit == 0


COMPILED = """
import torch.distributed as dist
from ovq import cpu, processes
from ovq.config import TrainerConfig
cpu.choose_precision = lambda precision: "bf16" if precision == "auto" else precision  # as on a CPU with AMX
world = processes.init(TrainerConfig(device="cpu", compile=True))
assert world.precision == "bf16" and dist.is_initialized()
processes.shutdown()
"""


def test_a_second_model_of_the_same_process_uses_the_same_group() -> None:
    (start,) = [line for line in COMPILED.splitlines() if line.startswith("world = ")]
    twice = COMPILED.replace(start, f"{start}\n{start}")
    made = subprocess.run([sys.executable, "-c", twice], capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stderr


def test_a_compiled_model_in_bf16_gets_its_group_although_the_processor_chose_bf16() -> None:
    made = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stderr


class NeverDone:
    """Stands in for the stream and the event of a GPU that waits for a rank that is lost."""

    def __init__(self, device: torch.device) -> None:
        pass

    def record_event(self) -> NeverDone:
        return self

    def query(self) -> bool:
        return False


def test_a_gpu_that_waits_for_a_lost_rank_is_given_up_by_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", NeverDone)
    monkeypatch.setattr(processes, "_timeout_s", 0.05)
    processes.await_device(torch.device("cuda"))  # alone, it may take as long as it likes
    monkeypatch.setattr(processes, "distributed", lambda: True)
    monkeypatch.setattr(processes, "any_flag", lambda flag: flag)  # as if the other ranks answered
    monkeypatch.setattr(processes, "WAITING_S", 0.01)
    processes.await_device(torch.device("cpu"))
    with pytest.raises(DistError) as caught:
        processes.await_device(torch.device("cuda"))
    assert peers.is_communication_error(caught.value)


KILLED_BESIDE_A_BUSY_GPU = """
import os, threading, time
import torch
from ovq import peers, processes
from ovq.config import TrainerConfig

class Stream:  # and event of a GPU that is busy until `done`
    done = 0.0
    def __init__(self, device): pass
    def record_event(self): return self
    def query(self): return time.monotonic() > self.done

torch.cuda.current_stream = Stream
world = processes.init(TrainerConfig(device="cpu"))
Stream.done = time.monotonic() + 1.5 * world.rank
processes.await_device(torch.device("cuda"))
began = time.monotonic()
Stream.done = began + 3600
if world.rank == 1:
    threading.Timer(0.5, os._exit, [9]).start()
try:
    processes.await_device(torch.device("cuda"))
except Exception as error:
    print(peers.is_communication_error(error), time.monotonic() - began < 30, flush=True)
    os._exit(0)
"""


def test_a_rank_that_is_killed_is_noticed_although_the_gpu_goes_on_waiting(tmp_path: Path) -> None:
    """NCCL does not notice it, and its timeout is ten minutes."""
    survivor, killed = two_ranks(KILLED_BESIDE_A_BUSY_GPU, tmp_path)
    out, error = survivor.communicate(timeout=300)
    assert (survivor.returncode, out) == (0, "True True\n"), error
    assert killed.wait(60) == 9


def test_a_background_thread_uses_the_gpu_of_the_thread_that_starts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[tuple[str, int]] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append((current_thread().name, device)))
    assert processes.in_background(lambda: len(chosen)).result() == 1
    assert chosen == [("background", 3)]
