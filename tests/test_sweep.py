"""Claims about sweeps: every combination is run, failures do not stop a sweep, and finished jobs are not rerun."""

from __future__ import annotations

import json
import signal

import pytest

from launch import sweep
from ovq import config
from ovq.errors import ConfigError

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


# Stands for a train.py in the middle of a run: sends the sweep a signal, and saves when it is stopped itself.
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
