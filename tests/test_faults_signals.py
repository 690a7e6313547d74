"""Claims about runs whose signals, output or peers fail: nothing saved is lost, and one line says what happened.

Faults are injected at a named moment (tests/faults.py), never after a delay.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from ovq import peers, stacks
from ovq.report import LastingStream, lasting_streams
from ovq.train import checkpoint
from ovq.train.summary import read_finished
from tests import faults
from tests.faults import Fault
from tests.helpers import TINY
from tests.training import losses

STEPS = 12
SETTINGS = [
    "experiment=cpu_demo",
    "model=sw_ovq",
    *TINY,
    f"trainer.steps={STEPS}",
    "trainer.context=64",
    "trainer.global_batch=6",
    "trainer.micro_batch=1",
    "trainer.device=cpu",
    "trainer.checkpoint_every=2",
    "trainer.health_every=0",
    "trainer.timeout_s=4",
    "eval.at_end=false",
]


def train_alone(run_dir: Path, *planned: Fault, **how: Any) -> subprocess.CompletedProcess[str]:
    how.setdefault("stderr", subprocess.PIPE)
    how.setdefault("stdout", subprocess.PIPE)
    line = faults.command(list(planned), [*SETTINGS, f"run_dir={run_dir}"])
    return subprocess.run(
        line, cwd=faults.ROOT, text=True, timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"}, **how
    )


class Ranks:
    """A job of several ranks without a launcher; processes still running at the end are killed."""

    def __init__(self, folder: Path, processes: int, *planned: Fault) -> None:
        self.run_dir, self.logs = folder / "run", folder / "logs"
        overrides = [*SETTINGS, f"run_dir={self.run_dir}"]
        self.processes = faults.ranks(list(planned), overrides, processes, self.logs)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def error(self, rank: int) -> str:
        """The only error line in a rank's output, once it has exited with status 1."""
        status = self.processes[rank].wait(timeout=120)
        text = (self.logs / f"{rank}.log").read_text()
        assert status == 1, text
        assert "Traceback" not in text, text
        (line,) = (line for line in text.splitlines() if line.startswith("error: "))
        return line


def newest(run_dir: Path) -> Path:
    return checkpoint.complete(run_dir / "checkpoints")[-1]


# --- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["usr1", "hup"])
def test_what_a_scheduler_or_a_closed_terminal_sends_ends_a_run_with_a_checkpoint(tmp_path: Path, name: str) -> None:
    done = train_alone(tmp_path / "run", Fault("step", 5, name))
    assert done.returncode == 0, done.stderr
    assert f"stopped by SIG{name.upper()} at step 5 of {STEPS}" in done.stdout
    assert checkpoint.verify(newest(tmp_path / "run"))["step"] == 5
    assert read_finished(tmp_path / "run") is None


INTERRUPTED_IMPORT = """
import builtins, os, runpy, signal, sys
inner, awaited = builtins.__import__, {name!r}
def hooked(name, *rest):
    global awaited
    if name == awaited:
        awaited = None
        os.kill(os.getpid(), signal.SIGINT)
    return inner(name, *rest)
builtins.__import__ = hooked
sys.argv = ["train.py", {run_dir!r}]
sys.path.insert(0, {root!r})
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.parametrize("name", ["ovq", "ovq.schema", "hydra", "torch", "torch.fx", "data.build"])
def test_ctrl_c_while_modules_are_imported_is_one_line(tmp_path: Path, name: str) -> None:
    code = INTERRUPTED_IMPORT.format(name=name, run_dir=f"run_dir={tmp_path}", root=str(faults.ROOT))
    done = subprocess.run([sys.executable, "-c", code], cwd=faults.ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr, done.stdout) == (130, "interrupted\n", "")


# --- output ----------------------------------------------------------------------------------------------------------


def assert_finished(run_dir: Path) -> None:
    assert len(losses(run_dir)) == STEPS
    summary = read_finished(run_dir)
    assert summary is not None and summary["step"] == STEPS
    assert checkpoint.verify(newest(run_dir))["step"] == STEPS


@pytest.mark.slow
def test_output_that_nobody_reads_any_more_does_not_stop_training(tmp_path: Path) -> None:
    assert train_alone(tmp_path / "run", Fault("step", 3, "closed")).returncode == 0
    assert_finished(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_the_log_does_not_stop_training(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        assert train_alone(tmp_path / "run", stdout=full, stderr=full).returncode == 0
    assert_finished(tmp_path / "run")


@pytest.mark.slow
def test_a_run_that_starts_without_any_output_trains(tmp_path: Path) -> None:
    def close() -> None:
        for number in (0, 1, 2):
            os.close(number)

    assert train_alone(tmp_path / "run", preexec_fn=close).returncode == 0
    assert_finished(tmp_path / "run")


def test_text_that_a_stream_cannot_encode_is_escaped() -> None:
    raw = io.BytesIO()
    stream = LastingStream(io.TextIOWrapper(raw, encoding="ascii"))
    print("naïve", file=stream, flush=True)  # type: ignore[call-overload]
    assert raw.getvalue() == b"na\\xefve\n"


def test_a_broken_stdout_does_not_change_the_exit_status() -> None:
    code = "from ovq.cli import guarded; import sys; sys.exit(guarded(lambda: print('x' * 100_000)))"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=faults.ROOT, stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_streams_are_restored() -> None:
    before = sys.stdout, sys.stderr
    with lasting_streams(), lasting_streams():
        assert isinstance(sys.stdout, LastingStream)
    assert (sys.stdout, sys.stderr) == before


# --- ranks that stop answering ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_survivor_names_the_rank_that_was_stopped(tmp_path: Path) -> None:
    with Ranks(tmp_path, 3, Fault("step", 6, "stop", rank=1)) as job:
        said = [job.error(rank) for rank in (0, 2)]
        assert job.processes[1].poll() is None  # still stopped: no survivor waited for it
    kept = newest(job.run_dir)
    assert checkpoint.verify(kept)["step"] >= 2
    for rank, line in zip((0, 2), said):
        assert line.startswith(f"error: rank {rank}: rank 1 did not answer")
        assert f"the newest checkpoint, {kept}, is intact" in line
        assert f"; its process {job.processes[1].pid} on {os.uname().nodename} is stopped; " in line
    stacks = [(job.run_dir / "stacks" / f"rank_{rank:05d}.txt").read_text() for rank in range(3)]
    assert stacks[1].endswith(" is stopped\n")
    assert all("train_step" in stacks[rank] for rank in (0, 2))


FROZEN = """
import faulthandler, signal, sys
file = open(sys.argv[1], "a")
faulthandler.register(signal.SIGQUIT, file)
def frozen():
    print("ready", flush=True)
    while True:
        pass
frozen()
"""


@pytest.mark.parametrize("state", ["running", "stopped", "gone"])
def test_a_process_is_asked_for_its_stacks_and_what_it_is_doing_is_known(tmp_path: Path, state: str) -> None:
    path = tmp_path / "rank.txt"
    with subprocess.Popen([sys.executable, "-c", FROZEN, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        member = stacks.Member("host", process.pid, psutil.Process(process.pid).create_time())
        if state != "running":
            process.send_signal(signal.SIGSTOP if state == "stopped" else signal.SIGKILL)
        faults.wait_until(lambda: stacks.state_of(member) == f"its process {process.pid} on host is {state}")
        stacks._ask(member, stacks.state_of(member), path)
        process.kill()
    assert ("in frozen" in path.read_text()) == (state == "running")
    assert path.read_text().startswith("its process ")


@pytest.mark.slow
def test_a_rank_frozen_while_a_checkpoint_is_written_ends_the_others_in_bounded_time(tmp_path: Path) -> None:
    with Ranks(tmp_path, 2, Fault("write", 3, "stop", rank=1)) as job:
        line = job.error(0)
        assert job.processes[1].poll() is None
    assert line.startswith("error: rank 0: rank 1 did not answer")
    assert checkpoint.verify(newest(job.run_dir))["step"] == 4


@pytest.mark.slow
def test_a_rank_frozen_in_the_last_save_does_not_hold_the_others(tmp_path: Path) -> None:
    with Ranks(tmp_path, 2, Fault("write", STEPS // 2, "stop", rank=1)) as job:
        line = job.error(0)
    assert line.startswith("error: rank 0: rank 1 did not answer")
    assert checkpoint.verify(newest(job.run_dir))["step"] == STEPS - 2


@pytest.mark.slow
def test_a_lost_rank_0_is_named_though_it_keeps_the_store(tmp_path: Path) -> None:
    with Ranks(tmp_path, 2, Fault("step", 6, "stop", rank=0)) as job:
        assert job.error(1).startswith("error: rank 1: rank 0 did not answer")


@pytest.mark.slow
def test_an_error_of_one_rank_is_quoted_by_the_others(tmp_path: Path) -> None:
    with Ranks(tmp_path, 2, Fault("step", 6, "raise", rank=1)) as job:
        assert job.error(1) == "error: rank 1: [Errno 5] injected fault"
        assert job.error(0).startswith("error: rank 0: rank 1 failed (OSError: [Errno 5] injected fault); the newest ")


@pytest.mark.slow
def test_the_launcher_quotes_the_survivor_that_explains_a_killed_rank(tmp_path: Path) -> None:
    line = faults.command([Fault("step", 6, "kill", rank=1)], [*SETTINGS, f"run_dir={tmp_path / 'run'}"], processes=2)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=faults.ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    summary = done.stderr.partition("ChildFailedError")[2]
    assert "rank 1 did not answer (killed, stopped or frozen)" in summary
    assert "gloo" not in done.stderr
    assert checkpoint.verify(newest(tmp_path / "run"))["step"] >= 2


def test_errors_of_communication_are_told_from_faults_of_the_program() -> None:
    gloo = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:544] Connection closed by peer [::1]:1")
    assert peers.is_communication_error(gloo)
    wrapped = checkpoint.CheckpointError("x does not fit this model")
    wrapped.__cause__ = gloo
    assert peers.is_communication_error(wrapped)
    assert not peers.is_communication_error(RuntimeError("shapes [2] and [3] do not match"))


def test_ranks_that_never_meet_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = r"the 2 ranks of the job did not find each other \(1/2 clients joined\)"
    with pytest.raises(peers.PeerLost, match=message), peers.watched(tmp_path):
        raise torch.distributed.DistStoreError("1/2 clients joined")
    with pytest.raises(KeyError), peers.watched(tmp_path):
        raise KeyError("a fault of the program")


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    before = set(faults.children_of(os.getpid()))
    yield
    faults.wait_until(lambda: set(faults.children_of(os.getpid())) <= before)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
