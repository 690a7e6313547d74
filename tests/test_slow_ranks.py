"""Claims about a slow rank that all others wait for: which one it is, and why, is reported once."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from ovq import processes
from ovq.compose import CONFIG_DIR
from ovq.processes import World
from ovq.train import slow_ranks
from ovq.train.slow_ranks import Pace, slow
from tests.helpers import two_ranks

SLOW_RANK = """
import os, sys, time
from pathlib import Path

import torch
from ovq import processes, stacks
from ovq.config import TrainerConfig
from ovq.train import slow_ranks
from tests.training import trainer_for

if os.environ["RANK"] == "1":
    product = torch.Tensor.__matmul__
    torch.Tensor.__matmul__ = lambda a, b: (time.sleep(0.1), product(a, b))[1]

slow_ranks.EVERY_S = 0.0
torch.set_num_threads(1)
run_dir = Path(sys.argv[1])
world = processes.init(TrainerConfig(device="cpu"))
stacks.register(run_dir)
trainer_for(run_dir, "trainer.steps=12", "trainer.log_every=1", "trainer.micro_batch=1", world=world).fit()
processes.shutdown()
"""


def test_a_slow_rank_is_named_with_the_stacks_of_all(tmp_path: Path) -> None:
    ranks = two_ranks(SLOW_RANK, tmp_path)
    errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), errors
    named = [line for line in errors[0].splitlines() if line.startswith("rank 1 on ")]
    assert named and not [line for line in errors[1].splitlines() if line.startswith("rank ")]
    assert re.fullmatch(
        rf"rank 1 on \S+ is slow, and the others wait for it: a matrix product takes \d+\.\d times as long as on the "
        rf"others; stacks of all ranks in the next step: {tmp_path / 'stacks'}",
        named[0],
    )
    for rank in range(2):
        assert "most recent call first" in (tmp_path / "stacks" / f"rank_{rank:05d}.txt").read_text()


BUSY = """
import sys, time
from pathlib import Path
from ovq import stacks

folder = Path(sys.argv[1])
file = stacks.path_of(folder, 0).open("a")
stacks._register = stacks.Register(folder, 0, [], file)
end, asked = time.monotonic() + 4, 0
while time.monotonic() < end:
    stacks.write_after(0.0005)
    asked += 1
    for number in range(30):  # new code objects each time: what a frame refers to may be freed while it is read
        name = f"name_{number}_" * 20
        exec(compile(f"def {name}(n):\\n return n and 1 + {name}(n - 1)\\n{name}(300)", "f" * 500, "exec"), {})
    file.truncate(0)
print(asked)
"""


def test_writing_stacks_does_not_crash_a_rank_that_is_running(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", BUSY, str(tmp_path)], cwd=CONFIG_DIR.parent, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 50


def test_a_slow_rank_is_named_once_until_it_is_as_fast_as_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    found, said = [Pace("a", 100.0, 0.0), Pace("b", 40.0, 0.0)], list[str]()
    monkeypatch.setattr(processes, "any_flag", lambda flag: flag)
    monkeypatch.setattr(processes, "gather_objects", lambda own: found)
    monkeypatch.setattr(slow_ranks, "EVERY_S", 0.0)
    watch = slow_ranks.SlowRanks(World(size=2), said.append)
    for looks, lines in ((2, 0), (1, 1), (5, 1)):
        for _ in range(looks):
            watch.look(0.0, 1.0)
        assert len(said) == lines
    found[1] = found[0]
    watch.look(0.0, 1.0)
    found[1] = Pace("b", 40.0, 0.0)
    for lines in (1, 1, 2):
        watch.look(0.0, 1.0)
        assert len(said) == lines
    assert said[0] == said[1]
    assert said[0] == (
        "rank 1 on b is slow, and the others wait for it: a matrix product takes 2.5 times as long as on the others"
    )


def test_a_rank_is_slow_beside_the_median_of_the_others() -> None:
    paces = [Pace("a", 100.0, 0.01), Pace("b", 90.0, 0.02), Pace("c", 40.0, 0.01), Pace("d", 110.0, 0.3)]
    assert slow(paces) == {
        2: "a matrix product takes 2.5 times as long as on the others",
        3: "it waits for data 30% of the time, the others 1%",
    }
    assert slow(paces[:2]) == {}
    assert slow([Pace("a", 100.0, 0.5), Pace("b", 100.0, 0.6)]) == {}, "all wait for data: none is the slow one"
