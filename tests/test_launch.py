"""Claims about `launch run`: what it refuses before the start, what it starts, and how it ends."""

from __future__ import annotations

import datetime
import os
import shutil
import signal
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.elastic.rendezvous import RendezvousParameters

import train
from launch import __main__ as launch_main
from launch import check, claims, run
from ovq.errors import ConfigError
from ovq.train import checkpoint
from ovq.train.checkpoint_files import hold
from tests import faults
from tests.helpers import TINY

QUICK = ["experiment=cpu_demo", *TINY, "trainer.global_batch=4", "trainer.micro_batch=2"]
ROOT = Path(__file__).resolve().parent.parent

# Stands in for train.py: each rank executes the Python text in FAKE_RANK.
FAKE_TRAIN = """
import os, pathlib, signal, sys, time
sys.path.insert(0, os.environ["FAKE_ROOT"])
here, rank = pathlib.Path(__file__).parent, int(os.environ["RANK"])
exec(os.environ["FAKE_RANK"])
"""


@pytest.fixture
def fake_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "train.py").write_text(FAKE_TRAIN)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setenv("FAKE_ROOT", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", "")  # torchrun changes it; monkeypatch restores it
    return tmp_path


def launched(monkeypatch: pytest.MonkeyPatch, rank: str) -> int:
    """The exit status of a launch of two ranks that each run this Python text."""
    monkeypatch.setenv("FAKE_RANK", rank)
    return run.main(["--cpu-ranks", "2", "--no-check"])


def forked(body: Callable[[], int]) -> int:
    """Run `body` in a fork of this process, which has imported torch already, and return the child's process id."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            status = body()
        finally:
            os._exit(status)
    return child


# --- how it ends -----------------------------------------------------------------------------------------------------

FAILING = """
from ovq import peers
signal.signal(signal.SIGTERM, signal.SIG_IGN)
(here / f"ready{rank}").touch()
while not (here / "ready0").exists() or not (here / "ready1").exists():
    time.sleep(0.01)
try:
    if rank == 0:
        raise peers.PeerLost("rank 1 failed (KeyError: 'x')")
    {}["x"]
except Exception as error:
    peers.tell_launcher(error, 1 if rank == 0 else None)
    time.sleep(0.2 * rank)  # its peer has ended first
    os._exit(1 + 6 * rank)
"""


def test_the_cause_of_a_failure_is_shown_with_its_traceback_and_its_status_is_forwarded(
    fake_train: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launched(monkeypatch, FAILING) == 7
    said = capfd.readouterr().err
    assert said.startswith("\nrank 1 failed first:\nTraceback (most recent call last):\n")
    assert said.endswith("KeyError: 'x'\nerror: rank 1 failed first (exit status 7): 'x'\n")
    assert "ChildFailedError" not in said


def test_a_rank_that_is_killed_is_named_with_its_signal(
    fake_train: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launched(monkeypatch, "rank == 1 and os.kill(os.getpid(), 9); signal.pause()") == 128 + 9
    assert capfd.readouterr().err == "error: rank 1 failed first (killed by SIGKILL)\n"


SAVING = """
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), (here / f"saved{rank}").touch(), sys.exit(0)))
(here / f"ready{rank}").touch()
while not (here / "ready0").exists() or not (here / "ready1").exists():
    time.sleep(0.01)
rank == 0 and os.kill(os.getppid(), signal.SIGUSR1)
while True:
    signal.pause()
"""


def test_ranks_that_save_on_a_signal_are_not_killed_and_the_status_is_theirs(
    fake_train: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "SHUTDOWN_S", 0)  # how long torchrun itself waits for its ranks
    assert launched(monkeypatch, SAVING) == 0
    assert (fake_train / "saved0").exists() and (fake_train / "saved1").exists()
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


def test_a_signal_before_the_ranks_can_save_is_not_called_a_failure(
    fake_train: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    status = launched(monkeypatch, "rank == 0 and os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)")
    assert status == 128 + signal.SIGTERM
    assert capfd.readouterr().err == "stopped by SIGTERM before the ranks could save\n"


MEETING = """
port, mine, theirs = os.environ["MASTER_PORT"], *os.environ["FAKE_NAMES"].split()
(here / f"{mine}{rank}").write_text(port)
end = time.monotonic() + 60
while not (here / f"{theirs}{rank}").exists():
    assert time.monotonic() < end
    time.sleep(0.01)
time.sleep(0.1)
sys.exit((here / f"{theirs}{rank}").read_text() == port)
"""


def test_two_launches_at_once_on_one_machine_do_not_clash(fake_train: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_NAMES", "b a")
    other = forked(lambda: launched(monkeypatch, MEETING))
    monkeypatch.setenv("FAKE_NAMES", "a b")
    assert launched(monkeypatch, MEETING) == 0
    assert os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) == 0
    assert len({(fake_train / name).read_text() for name in ("a0", "b0")}) == 2


# --- what is refused before it starts --------------------------------------------------------------------------------


@pytest.fixture
def nothing_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of a run folder; starting a launch fails the test."""
    monkeypatch.setattr(run, "launch", lambda *_, **__: pytest.fail("a run was started"))
    return tmp_path / "run"


THREE_HEADS = ("model.num_heads=3", "model.num_kv_heads=3")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--cpu-ranks", "2", "--", "trainer.stepz=1"], "did you mean trainer.steps?"),
        (["--cpu-ranks", "3"], "3 processes: trainer.global_batch=4 is not a multiple of trainer.micro_batch=2 x 3;"),
        (["--cpu-ranks", "1", "--nodes", "2", "--rendezvous", "a:1", "--", "trainer.global_batch=2"], "2 x 2;"),
        (["--cpu-ranks", "1", "--", "data=text", "data.train=[no/*.txt]", f"data.validation=[{__file__}]"], "no/*.txt"),
        (["--cpu-ranks", "1", "--", "data=text", "data.train=[no/*.txt]"], "data.validation is empty"),
        (
            ["--cpu-ranks", "1", "--", "tokenizer=sentencepiece", "tokenizer.model_path=a.model"],
            "a.model does not exist",
        ),
        (["--cpu-ranks", "2", "--", "trainer.replicas=2"], "is only used with trainer.shard=hybrid; set both\n"),
        (["--cpu-ranks", "2", "--", "trainer.context_parallel=2", "model=sw_vq", *THREE_HEADS], "context_parallel=2"),
        (["--gpus", "1", "--cpu-ranks", "1"], "give --gpus or --cpu-ranks, not both"),
        (["--cpu-ranks", "1", "--nodes", "2"], "--nodes 2 needs --rendezvous HOST:PORT"),
        (["--gpus", "99"], "--gpus 99, but this machine shows"),
    ],
)
def test_what_cannot_run_is_one_line_before_anything_starts(
    nothing_starts: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    own, _, settings = " ".join(words).partition(" -- ")
    assert run.main([*own.split(), "--", *QUICK, f"run_dir={nothing_starts}", *settings.split()]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and said in err
    assert not nothing_starts.exists()


def test_a_dry_run_shows_the_run_and_the_command_and_starts_nothing(
    nothing_starts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main([*QUICK, f"run_dir={nothing_starts}", "--cpu-ranks", "2", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "2, micro-batch 2, accumulation 1" in said and "--nproc-per-node=2 --standalone" in said
    assert not nothing_starts.exists()


def test_a_run_folder_that_is_in_use_is_refused_and_looking_does_not_disturb_its_owner(tmp_path: Path) -> None:
    assert claims.trainer_of(tmp_path) == ""
    (ready, tell), (wait, end) = os.pipe(), os.pipe()

    def own() -> int:
        os.close(end)
        hold(tmp_path / "checkpoints")
        os.write(tell, b"held")
        return len(os.read(wait, 1))

    owner = forked(own)
    try:
        assert os.read(ready, 4) == b"held"
        for _ in range(2):
            with pytest.raises(ConfigError, match=f"is in use by another process .process {owner} on "):
                check.check([*QUICK, f"run_dir={tmp_path}"], 1)
    finally:
        os.close(end)
        assert os.waitpid(owner, 0)[1] == 0
    assert claims.trainer_of(tmp_path) == ""


def test_the_first_node_may_start_as_late_as_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own limit for a connection to it is 60 s."""
    from torch.distributed.elastic.rendezvous import c10d_rendezvous_backend as backend

    made: list[dict[str, Any]] = []
    monkeypatch.setattr(backend, "TCPStore", lambda *_, **how: made.append(how))
    words = run.torchrun_words(Namespace(nodes=2, rendezvous="far:29400", id="a"), 1)
    conf = dict([next(word for word in words if word.startswith("--rdzv-conf=")).partition("=")[2].split("=")])
    backend._create_tcp_store(RendezvousParameters("c10d", "far:29400", "a", 2, 2, is_host=False, **conf))
    assert made[0]["timeout"] == datetime.timedelta(seconds=run.JOIN_S)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["init_from=nowhere"], "init_from=nowhere is neither a run folder nor a checkpoint"),
        (["optim.groups={nope:{lr:2}}"], "optim.groups"),
        (["optim=custom", "+optim.custom._target_=torch.optim.Nope"], "torch.optim.Nope"),
        (["model=sw", "eval.num_centroids=4096"], "eval.num_centroids=4096: no layer has a dictionary"),
        (
            ["data=task", "data/task=recall", "data.task.key_vocab=20", "trainer.context=512"],
            "different keys in 512 tokens",
        ),
    ],
)
def test_settings_that_cannot_be_used_are_refused_before_a_gpu_is_taken(
    tmp_path: Path, settings: list[str], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        check.check([*QUICK, f"run_dir={tmp_path}", *settings], 1)


def test_a_checkpoint_that_cannot_be_continued_is_refused_before_a_gpu_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [*QUICK, "trainer.steps=2", "optim.warmup_steps=1", "eval.at_end=false", f"run_dir={tmp_path / 'run'}"]
    assert train.main([*line, "trainer.checkpoint_every=1"]) == 0
    assert check.check(line, 1)
    with pytest.raises(ConfigError, match="trainer.steps: 2 -> 9: the learning rate would jump"):
        check.check([*line, "trainer.steps=9"], 1)
    assert check.check([*line, "trainer.steps=9", "trainer.allow_rate_jump=true"], 1)
    capsys.readouterr()
    for more, says in (("trainer.steps=9", "trainer.steps: 2 -> 9: "), ("seed=1", f"{tmp_path / 'run'} was made with")):
        assert train.main([*line, more, "dry_run=true"]) == 0
        said = capsys.readouterr().out
        assert f"before it starts: {says}" in said and said.count("before it starts: ") == 1
    faults.truncate(tmp_path / "run" / "checkpoints" / "step_00000002" / "extra.pt", 9)
    assert check.check(line, 1), "the start takes the checkpoint before"


def test_a_branch_is_checked_as_it_would_continue(tmp_path: Path) -> None:
    line = [*QUICK, "trainer.steps=2", "optim.schedule=constant", "eval.at_end=false"]
    assert train.main([*line, f"run_dir={tmp_path / 'run'}"]) == 0
    branch = [*line, f"resume={tmp_path / 'run'}", f"run_dir={tmp_path / 'new'}", "trainer.steps=4"]
    with pytest.raises(ConfigError, match="was made with other settings .seed: 0 -> 1"):
        check.check([*branch, "seed=1"], 1)
    assert train.main(branch) == 0
    shutil.rmtree(tmp_path / "run")
    assert check.check(branch, 1), "it goes on from its own checkpoints"
    shutil.rmtree(tmp_path / "new")
    with pytest.raises(checkpoint.CheckpointError, match="there is no checkpoint"):
        check.check(branch, 1)


def test_what_a_start_would_refuse_is_refused_before_a_gpu_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    books = "data=jsonl", "data.train=[books.jsonl]", "data.validation=[held-out.jsonl]"
    monkeypatch.chdir(tmp_path)
    Path("books.jsonl").write_text('{"text": "a book"}\n')
    Path("held-out.jsonl").write_text('{"text": "short"}\n')
    (warning,) = check.check([*QUICK, *books], 1).warnings
    assert "no validation document has eval.context=" in warning
    Path("held-out.jsonl").write_text("")
    with pytest.raises(ConfigError, match="data.validation holds no documents"):
        check.check([*QUICK, *books], 1)
    with pytest.raises(ConfigError, match="books.jsonl is a file; name a folder"):
        check.check([*QUICK, "run_dir=books.jsonl"], 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(ConfigError, match="has 0 B of free disk"):
        check.check([*QUICK, "run_dir=new"], 1)


def test_a_mixture_has_training_data(tmp_path: Path) -> None:
    parts = "{a: {data: builtin, weight: 1}, b: {data: builtin, weight: 1}}"
    settings = [*QUICK, f"run_dir={tmp_path}", "data=mixture"]
    assert check.check([*settings, f"data.mixture={parts}"], 1).warnings == ()
    parts = "{a: {data: builtin, weight: 1}, b: {data: text, train: [gone.txt], weight: 1}}"
    with pytest.raises(ConfigError, match="^data.mixture.b: data.train: .*gone.txt"):
        check.check([*settings, f"data.mixture={parts}"], 1)
    with pytest.raises(ConfigError, match="data.train is empty; give it files"):
        check.check([*QUICK, f"run_dir={tmp_path}", "data=jsonl", "eval.at_end=false", "trainer.eval_every=0"], 1)


def test_memory_that_cannot_suffice_is_refused_and_memory_that_may_not_is_a_warning(tmp_path: Path) -> None:
    settings = [*QUICK, f"run_dir={tmp_path}", "trainer.context=4096"]
    with pytest.raises(ConfigError, match="weights, gradients and moments need .* on each GPU and each GPU has 1 KiB"):
        check.check(settings, 1, 2**10)
    (warning,) = check.check(settings, 1, 2**22).warnings
    assert "each GPU has 4 MiB; lower trainer.micro_batch" in warning
    assert check.check(settings, 1, 2**40).warnings == ()


def test_a_launch_command_that_does_not_exist_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch_main.main(["rnu"]) == 2
    assert capsys.readouterr().err.startswith("error: 'rnu' is not a command; legal: run, slurm, sweep, plan;")
