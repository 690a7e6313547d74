"""Claims about leaving a process group."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ovq.compose import CONFIG_DIR

# Handlers run in reverse order: the first one registered sees the process after the last other one.
LEAVES_A_GROUP = """
import atexit, json, os, sys
from pathlib import Path

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
    """A thread that releases a tensor while Python finalizes ends the process with status 134."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(CONFIG_DIR.parent)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", LEAVES_A_GROUP, str(tmp_path)],
            cwd=CONFIG_DIR.parent,
            env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    for rank in ranks:
        out, error = rank.communicate(timeout=300)
        assert rank.returncode == 0, error
        training, at_exit = json.loads(out.splitlines()[-1])
        assert training > 0 and at_exit == 0
