"""Claims about sweeps: every combination is run, failures do not stop a sweep, and finished jobs are not rerun."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from launch import claims, sweep
from ovq import config
from ovq.errors import ConfigError
from tests.faults import wait_until

# Stands in for train.py: fails for seed=1 until the file `repaired` exists, otherwise saves its config and finishes;
# records its starts.
FAKE_TRAIN = """
import pathlib, sys
here = pathlib.Path(__file__).parent
from ovq import config
from ovq.compose import compose, run_dir_of
overrides = [o for o in sys.argv[1:] if o != "trainer.progress=false"]
cfg = compose(overrides)
folder = run_dir_of(cfg, overrides)
with (here / "starts").open("a") as starts:
    print(folder.name, file=starts)
if "seed=1" in overrides and not (here / "repaired").exists():
    sys.exit("error: the disk is full")
config.save(cfg, folder)
from ovq.train.summary import finish
summary = {"step": 1, "stopped_by": None, "first_loss": None, "last_loss": None, "tokens": 1, "tokens_per_s": None}
finish({**summary, "memory_gib": 0.0, "evaluation": {}, "checkpoint": ""}, cfg, folder)
"""


@pytest.fixture
def fake_train(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text(FAKE_TRAIN)
    monkeypatch.setenv("PYTHONPATH", str(sweep.ROOT))
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    return tmp_path


def test_a_sweep_is_the_cartesian_product_of_its_lists() -> None:
    jobs = sweep.expand(["experiment=cpu_demo", "model=sw,sw_ovq", "seed=0,1", "model.pattern=[sliding_window]"])
    assert [job.overrides[1:3] for job in jobs] == [
        ["model=sw", "seed=0"],
        ["model=sw", "seed=1"],
        ["model=sw_ovq", "seed=0"],
        ["model=sw_ovq", "seed=1"],
    ]
    assert len({job.run_dir for job in jobs}) == 4


def test_jobs_that_would_be_the_same_run_are_refused_with_a_mend_that_fits() -> None:
    with pytest.raises(ConfigError, match="would share .*: their values of trainer.micro_batch are the"):
        sweep.expand(["model=sw_ovq", "trainer.micro_batch=1,2"])
    with pytest.raises(ConfigError, match="would share the run folder here; leave run_dir out"):
        sweep.expand(["seed=0,1", "run_dir=here"])


def test_a_wrong_job_is_rejected_before_the_first_one_starts() -> None:
    with pytest.raises(ConfigError, match="model=nope"):
        sweep.expand(["model=sw,nope"])
    with pytest.raises(ConfigError, match="share the run folder"):
        sweep.expand(["model=sw,sw_ovq", "run_dir=x"])


def test_a_failed_job_does_not_stop_the_others_and_alone_is_resumed(fake_train, capsys) -> None:
    line = [f"runs_root={fake_train}/runs", "seed=0,1,2"]
    assert sweep.main(line) == 1
    assert "error: the disk is full" in capsys.readouterr().err
    starts = fake_train / "starts"
    assert starts.read_text().split() == ["default,seed=0", "default,seed=1", "default,seed=2"]
    (fake_train / "repaired").touch()
    assert sweep.main(line) == 0
    assert starts.read_text().split()[3:] == ["default,seed=1"]


def test_stop_on_failure_starts_no_further_job(fake_train) -> None:
    assert sweep.main(["--stop-on-failure", f"runs_root={fake_train}/runs", "seed=1,2"]) == 1
    assert (fake_train / "starts").read_text().split() == ["default,seed=1"]


def test_a_finished_job_with_changed_settings_is_rejected_before_anything_starts(fake_train, capsys) -> None:
    line = [f"runs_root={fake_train}/runs", "seed=0,2"]
    assert sweep.main(line[:1] + ["seed=2"]) == 0
    run_dir = fake_train / "runs" / "default,seed=2"
    cfg = config.load(run_dir)
    steps = f"trainer.steps: {cfg.trainer.steps + 1} -> {cfg.trainer.steps}"
    cfg.optim.weight_decay, cfg.trainer.steps = cfg.optim.weight_decay + 1, cfg.trainer.steps + 1
    config.save(cfg, run_dir)
    capsys.readouterr()
    for command in (line, ["--plan", *line]):
        assert sweep.main(command) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {run_dir} was made with other settings (optim.weight_decay: ")
        assert said.endswith(f"; {steps}); remove it\n")
    assert (fake_train / "starts").read_text().split() == ["default,seed=2"]


# Stands in for train.py in the middle of a run: sends the sweep a signal, and saves when it is itself stopped.
FAKE_RUNNING = """
import os, pathlib, signal, sys
here = pathlib.Path(__file__).parent
def save(*_):
    (here / "saved").write_text(str(os.getsid(0)))
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
with (here / "starts").open("a") as starts:
    print("started", file=starts)
os.kill(os.getppid(), int((here / "number").read_text()))
while True:
    signal.pause()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stopped_sweep_has_its_jobs_save_and_says_where_they_stand(fake_train, capsys, number) -> None:
    (fake_train / "train.py").write_text(FAKE_RUNNING)
    (fake_train / "number").write_text(str(int(number)))
    assert sweep.main([f"runs_root={fake_train}/runs", "seed=0,1"]) == 128 + number
    assert (fake_train / "saved").is_file()
    assert (fake_train / "starts").read_text().split() == ["started"]
    printed = capsys.readouterr()
    table = printed.out.split("\n\n")[-1].split()
    assert table == ["stopped", f"{fake_train}/runs/default,seed=0", "waiting", f"{fake_train}/runs/default,seed=1"]
    assert printed.err == f"stopped by {number.name}; the same sweep continues from here\n"


def test_an_error_of_the_sweep_itself_leaves_no_job_behind(fake_train, monkeypatch) -> None:
    (fake_train / "train.py").write_text(FAKE_RUNNING)
    (fake_train / "number").write_text("0")
    started = fake_train / "starts"
    monkeypatch.setattr(sweep.time, "sleep", lambda _: 1 / (not started.exists()))
    with pytest.raises(ZeroDivisionError):
        sweep.run(sweep.expand([f"runs_root={fake_train}/runs"]), gpus=0, per_job=1, stop_on_failure=False)
    assert (fake_train / "saved").is_file()


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"step": 40, "stopped', b'"step"'])
def test_a_summary_that_is_damaged_does_not_count_as_finished(fake_train, content: bytes) -> None:
    line = [f"runs_root={fake_train}/runs", "seed=0"]
    assert sweep.main(line) == 0 and sweep.main(line) == 0
    starts = fake_train / "starts"
    assert len(starts.read_text().split()) == 1
    path = fake_train / "runs" / "default,seed=0" / "summary.json"
    path.write_bytes(content)
    assert sweep.main(line) == 0
    assert len(starts.read_text().split()) == 2
    assert json.loads(path.read_text())["stopped_by"] is None


# --- concurrent sweeps -----------------------------------------------------------------------------------------------

# Stands in for train.py: records its start, and ends once the file `go` exists, with an error if `status` exists too.
FAKE_WAITING = """
import os, pathlib, sys, time
here, overrides = pathlib.Path(__file__).parent, sys.argv[1:]
folder = next(o for o in overrides if o.startswith("run_dir=") or o.startswith("seed="))
with (here / "starts").open("a") as starts:
    print(folder, os.environ.get("CUDA_VISIBLE_DEVICES"), file=starts)
while not (here / "go").exists():
    time.sleep(0.01)
if (here / "status").exists():
    sys.exit("error: as told")
run = here / "runs" / f"default,{folder}"
(run / "summary.json").write_text((here / "summary").read_text())
"""
SUMMARY = {"step": 1, "stopped_by": None, "tokens": 1, "last_loss": 1.0, "checkpoint": ""}


@pytest.fixture
def waiting_train(fake_train: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (fake_train / "train.py").write_text(FAKE_WAITING)
    (fake_train / "summary").write_text(json.dumps(SUMMARY))
    monkeypatch.setattr(sweep, "mark_finished", lambda jobs: None)  # it would compose every job again
    return fake_train


def other_sweep(folder: Path, line: list[str]) -> subprocess.Popen[bytes]:
    """A sweep in another process, with the same stand-in for train.py."""
    code = f"import pathlib, sys; from launch import sweep; sweep.ROOT = pathlib.Path({str(folder)!r}); "
    return subprocess.Popen([sys.executable, "-c", code + "sys.exit(sweep.main(sys.argv[1:]))", *line])


def starts(folder: Path) -> list[str]:
    return [line.split()[0] for line in (folder / "starts").read_text().splitlines()]


def end_the_jobs(folder: Path) -> None:
    wait_until(lambda: len(starts(folder)) == 2)
    (folder / "go").touch()


@pytest.mark.parametrize("failing", [False, True])
def test_two_sweeps_at_once_share_the_jobs_and_agree_on_the_outcome(
    waiting_train: Path, capsys: pytest.CaptureFixture[str], failing: bool
) -> None:
    line = [f"runs_root={waiting_train}/runs", "seed=0,1"]
    if failing:
        (waiting_train / "status").touch()
    with other_sweep(waiting_train, line) as other:
        wait_until(lambda: (waiting_train / "starts").exists())
        ending = threading.Thread(target=end_the_jobs, args=(waiting_train,))
        ending.start()  # ends the jobs once each sweep runs one
        assert sweep.main(line) == int(failing)
        assert other.wait(timeout=60) == int(failing)
        ending.join()
    assert sorted(starts(waiting_train)) == ["seed=0", "seed=1"]
    said = capsys.readouterr()
    assert said.out.count("(elsewhere)") == 1
    assert said.err.count("exit status 1") == (2 if failing else 0)  # the failure elsewhere is listed too


def test_a_sweep_that_was_killed_is_continued_by_the_same_command_while_its_job_goes_on(waiting_train: Path) -> None:
    line = [f"runs_root={waiting_train}/runs", "seed=0,1"]
    with other_sweep(waiting_train, line) as other:
        wait_until(lambda: (waiting_train / "starts").exists())
        other.kill()
    jobs = sweep.expand(line)
    assert claims.claim(jobs[0].run_dir / sweep.LOCK) is None  # its job still holds the lock
    (waiting_train / "go").touch()
    assert sweep.main(line) == 0
    assert starts(waiting_train) == ["seed=0", "seed=1"]


def test_a_gpu_is_used_by_one_job_at_a_time_and_only_those_that_are_visible(
    waiting_train: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-a/b")
    held = claims.claim_gpus(["GPU-a/b"])
    assert held and claims.claim_gpus(["5", "GPU-a/b"]) is None
    (waiting_train / "go").touch()
    assert sweep.main(["--gpus", "2", f"runs_root={waiting_train}/runs", "seed=0,1"]) == 0
    assert (waiting_train / "starts").read_text().splitlines() == ["seed=0 5", "seed=1 5"]
    claims.release(held)
    held = claims.claim_gpus(["5", "GPU-a/b"])  # a sweep whose jobs have all ended elsewhere does not wait for a GPU
    jobs = sweep.expand([f"runs_root={waiting_train}/runs", "seed=0,1"])
    sweep.run(jobs, gpus=1, per_job=1, stop_on_failure=False)
    assert [job.status for job in jobs] == ["finished", "finished"]
    claims.release(held or [])
    free = claims.claim_gpus(["5", "GPU-a/b"])
    assert free
    claims.release(free)
    with pytest.raises(ConfigError, match="--gpus 3, but CUDA_VISIBLE_DEVICES=5,GPU-a/b shows 2"):
        sweep.visible_gpus(3)
    with pytest.raises(ConfigError, match="--per-job 4 is more than --gpus 2: no job would start"):
        sweep.run([], gpus=2, per_job=4, stop_on_failure=False)
    with pytest.raises(ConfigError, match="--per-job 4 is more than --gpus 0"):
        sweep.run([], gpus=0, per_job=4, stop_on_failure=False)
    with pytest.raises(ConfigError, match="--at-once is for jobs without --gpus; with it, 1 run at a time"):
        sweep.run([], gpus=2, per_job=2, stop_on_failure=False, at_once=2)


def test_the_plan_says_how_far_an_unfinished_job_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--plan", "experiment=cpu_demo", f"run_dir={tmp_path}"]
    (tmp_path / "sweep.log").write_text("compiling kernels\n")
    assert sweep.main(line) == 0
    assert f"{tmp_path} is not finished; its last line is:\n    compiling kernels" in capsys.readouterr().out
    rows = [{"step": 7, "loss": 3.25}, {"step": 7, "eval/loss": 3.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert sweep.main(line) == 0
    assert "is not finished, at step 7 of 100 (loss 3.2500, 0 minutes ago); its last line" in capsys.readouterr().out


def test_a_job_that_somebody_trains_by_hand_is_waited_for(
    waiting_train: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = waiting_train / "runs" / "default,seed=0"
    run_dir.mkdir(parents=True)
    asked: list[Path] = []

    def trainer_of(folder: Path) -> str:
        asked.append(folder)
        if len(asked) == 3:
            (run_dir / "summary.json").write_text(json.dumps(SUMMARY))
        return "process 1 on host" if len(asked) < 3 else ""

    monkeypatch.setattr(sweep, "trainer_of", trainer_of)
    assert sweep.main([f"runs_root={waiting_train}/runs", "seed=0"]) == 0
    assert not (waiting_train / "starts").exists()
    assert capsys.readouterr().out.count(f"elsewhere {run_dir}: another process trains it") == 1


def test_names_survive_slashes_commas_and_equals_signs(tmp_path: Path) -> None:
    values = ["'a/b,c=d'", '"e=f,g/h"', "plain"]
    jobs = sweep.expand([f"runs_root={tmp_path}", f"name={','.join(values)}", "seed=0"])
    assert [job.overrides[1] for job in jobs] == [f"name={value}" for value in values]
    assert all(job.run_dir.parent == tmp_path for job in jobs) and len({job.run_dir for job in jobs}) == 3
    assert jobs[0].run_dir.name.startswith("a_b,c=d")
