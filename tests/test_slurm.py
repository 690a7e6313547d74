"""Claims about jobs under SLURM: the script that is submitted, what is requeued, and that no work is lost.

SLURM is replaced by tests/fake_slurm.py, which runs the ranks on this machine.
"""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train
from launch import options as arguments
from launch import slurm, sweep
from ovq import config
from ovq.compose import compose
from ovq.train.metrics import read_rows
from ovq.train.summary import read_finished
from tests.fake_slurm import Cluster, warn
from tests.helpers import TINY
from tests.training import losses

QUICK = ["experiment=cpu_demo", *TINY, "trainer.global_batch=4", "trainer.micro_batch=2"]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.chdir(tmp_path)
    return Cluster(tmp_path / "slurm", monkeypatch)


def launcher(folder: Path, body: str) -> list[str]:
    """Options that put a shell script in place of `python`."""
    (folder / "launcher.sh").write_text(body)
    return ["--python", f"bash {shlex.quote(str(folder / 'launcher.sh'))}"]


FINISHED = '{"step": 1, "stopped_by": null, "tokens": 1, "last_loss": 1.0, "checkpoint": ""}'
AGAIN = f"test -e run/once && echo '{FINISHED}' > run/summary.json"


@pytest.mark.parametrize(
    ("body", "state", "statuses"),
    [
        (f"echo '{FINISHED}' > run/summary.json", "RUNNING", [0]),
        (f"{AGAIN}; touch run/once", "RUNNING", [0, 0]),
        ("exit 1", "RUNNING", [1]),
        ("exit 2", "RUNNING", [2]),
        ("exit 137", "RUNNING", [137]),  # killed: out of memory, for instance
        (f"{AGAIN} && exit; touch run/once; exit 143", "RUNNING", [0, 0]),
        ("exit 0", "CANCELLED", [0]),
    ],
)
def test_a_job_is_queued_again_when_it_was_stopped_and_not_when_it_finished_failed_or_was_cancelled(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, state: str, statuses: list[int]
) -> None:
    monkeypatch.setenv("FAKE_STATE", state)
    (tmp_path / "run").mkdir()
    options = arguments.read(slurm.parser(), ["--cpu-ranks", "2", *launcher(tmp_path, body)])
    job = sweep.Job(["seed=0"], compose(["seed=0"]), tmp_path / "run")
    cluster.submit(slurm.script([job], options, "name", job.run_dir / "job.sbatch", swept=False))
    assert cluster.run() == statuses
    log = (tmp_path / "run" / "slurm.log").read_text()
    assert log.count("job 100: ") == (0 if state == "CANCELLED" else len(statuses)), log


ONCE = """
n=$(cat n || echo 0); echo $((n + 1)) > n
[ $n = 2 ] && { mkdir -p run/checkpoints/step_9; touch run/checkpoints/step_9/manifest.json; }
[ $n = 5 ] && exit 3
exit 0
"""


@pytest.mark.parametrize(("body", "statuses"), [("exit 143", [0, 0, 1]), (ONCE, [0, 0, 0, 0, 0, 3])])
def test_a_job_that_never_gets_to_save_is_not_queued_for_ever(
    cluster: Cluster, tmp_path: Path, body: str, statuses: list[int]
) -> None:
    """As where --time is hardly longer than --grace: every start is told to end before its first step."""
    options = arguments.read(slurm.parser(), ["--cpu-ranks", "2", *launcher(tmp_path, body)])
    job = sweep.Job(["seed=0"], compose(["seed=0"]), tmp_path / "run")
    job.run_dir.mkdir()
    cluster.submit(slurm.script([job], options, "name", job.run_dir / "job.sbatch", swept=False))
    assert cluster.run() == statuses
    said = "3 starts in a row saved nothing (status 143). It is not queued again; it may need more --time"
    assert (said in (job.run_dir / "slurm.log").read_text()) == (statuses[-1] == 1), "only starts in a row count"


def test_a_finished_run_is_not_submitted_again_unless_it_gets_more_steps(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(slurm, "check", lambda *_: None)
    line = ["--cpu-ranks", "1", "--", *QUICK, "run_dir=run", "trainer.steps=7"]
    config.save(compose(line[3:]), "run")
    Path("run/summary.json").write_text(json.dumps(json.loads(FINISHED) | {"step": 7}))
    assert slurm.main(line) == 0
    assert capsys.readouterr().out.startswith("finished already:\n")
    assert slurm.main([*line, "trainer.steps=8"]) == 0
    assert capsys.readouterr().out.startswith("Submitted batch job 1: 1 run(s)")


def test_a_python_in_a_folder_with_a_space_is_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "executable", "/home/me/my env/bin/python")
    assert slurm.main(["--print", "--cpu-ranks", "1", "--", *QUICK, f"run_dir={tmp_path}/a"]) == 0
    assert "'/home/me/my env/bin/python' -m launch run" in capsys.readouterr().out


def test_the_file_is_what_the_options_say_and_print_writes_nothing(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--print", "--nodes", "2", "--gpus-per-node", "8", "--cpus-per-node", "64", "--time", "12:00:00"]
    words += ["--grace", "120", "--sbatch", "--partition=long", "--setup", "module load x", "--", *QUICK, "run_dir=a b"]
    settings = ["trainer.global_batch=64", "trainer.micro_batch=4"]
    assert slurm.main([*words, *settings]) == 0
    text, warned = capsys.readouterr()
    assert "--cpus-per-node" not in warned
    for line in ("--nodes=2", "--gpus-per-node=8", "--cpus-per-task=64", "--time=12:00:00", "--signal=TERM@120"):
        assert f"\n#SBATCH {line}\n" in text
    for line in ("--requeue", "--open-mode=append", "--partition=long", "--dependency=singleton"):
        assert f"\n#SBATCH {line}\n" in text
    assert f"\n# Written by: python -m launch slurm {shlex.join([*words, *settings])}\n" in text
    assert "\nmodule load x\n" in text and "--gpus 8" in text and f"run='{tmp_path}/a b'\n" in text
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    assert not (tmp_path / "a b").exists() and not list(cluster.folder.glob("job*"))
    assert slurm.main(["--print", "--gpus-per-node", "2", "--", *QUICK, f"run_dir={tmp_path}/a"]) == 0
    assert "without --cpus-per-node a job gets the cluster's default" in capsys.readouterr().err


def test_an_array_hands_every_run_its_settings_whatever_is_in_them(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "check", lambda *_: None)
    odd = ["'a/b,c=d'", '"it\'s $HOME"']
    body = 'while [ "$1" != -- ]; do shift; done; shift; printf "%s\\n" "$@"; exit 3'
    line = ["--cpu-ranks", "2", *launcher(tmp_path, body), "--", *QUICK, f"name={','.join(odd)}", "seed=0"]
    assert slurm.main(line) == 0
    assert cluster.run() == [3, 3]
    logs = [path.read_text() for path in tmp_path.glob("runs/*/slurm.log")]
    assert len(logs) == 2
    for value in odd:
        assert [f"\nname={value}\nseed=0\n" in log for log in logs].count(True) == 1, logs


def test_a_stopped_task_of_an_array_queues_only_itself_again(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "check", lambda *_: None)
    body = f"""
    for word in "$@"; do case $word in seed=*) seed=$word ;; esac; done
    if [ -e "$seed" ]; then echo '{FINISHED}' > "$(echo runs/*,$seed,*)/summary.json"; fi
    touch "$seed"
    """
    line = ["--cpu-ranks", "1", *launcher(tmp_path, body), "--", *QUICK, "seed=1,2"]
    assert slurm.main(line) == 0
    assert cluster.run() == [0, 0, 0, 0]


def test_a_sweep_that_is_queued_is_not_submitted_twice(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(slurm, "check", lambda *_: None)
    line = ["--cpu-ranks", "2", "--", *QUICK, "seed=0,1"]
    assert slurm.main(line) == 0
    assert slurm.main(line) == 2
    assert "the sweep is queued or running as 1; wait for it" in capsys.readouterr().err
    (script,) = tmp_path.glob("runs/*.sbatch")
    assert "--array=0-1\n" in script.read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--", "seed=0"], "give one of --gpus-per-node N and --cpu-ranks N"),
        (["--cpu-ranks", "3", "--", "seed=0"], "trainer.global_batch=4 is not a multiple of"),
        (["--cpu-ranks", "2", "--", "seed=0"], "sbatch refused"),
    ],
)
def test_what_cannot_be_submitted_is_one_line(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    (cluster.folder / "bin" / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2; exit 1\n")
    at = words.index("--")
    assert slurm.main([*words[:at], "--", *QUICK, *words[at + 1 :]]) in (1, 2)
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and said in err


def test_a_save_that_takes_longer_than_the_grace_allows_is_a_warning(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run" / "checkpoints" / "latest"
    folder.mkdir(parents=True)
    line = ["--print", "--cpu-ranks", "2", "--grace", "60", "--", *QUICK, "run_dir=run"]
    for seconds, count in ((29.0, 0), (31.0, 1)):
        (folder / "manifest.json").write_text(f'{{"seconds": {seconds}}}')
        assert slurm.main(line) == 0
        assert capsys.readouterr().err.count("took 31 s and --grace is 60 s") == count


def test_what_is_worth_knowing_about_a_run_is_said_when_it_is_queued(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["--print", "--cpu-ranks", "1", "--", *QUICK, "run_dir=run", "eval.at_end=true", "eval.context=100000000"]
    assert slurm.main(line) == 0
    assert "warning: run: no validation document has eval.context=100000000 tokens" in capsys.readouterr().err


@pytest.mark.slow
def test_a_preempted_job_saves_is_queued_again_and_ends_with_the_losses_of_an_unbroken_run(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Two nodes with one CPU rank each. The unbroken run has one process: equal up to the rounding of sums."""
    settings = [*QUICK, "model=sw_ovq", "trainer.steps=40", "trainer.context=64", "trainer.micro_batch=1"]
    settings += ["trainer.health_every=0", "eval.at_end=false", "trainer.eval_every=0", "trainer.device=cpu"]
    assert train.main([*settings, f"run_dir={tmp_path / 'whole'}"]) == 0
    run = tmp_path / "run"

    def preempt(batch: subprocess.Popen[bytes]) -> None:
        while len(read_rows(run / "metrics.jsonl")) < 3:
            assert batch.poll() is None, (run / "slurm.log").read_text()
            time.sleep(0.005)
        warn(batch, signal.SIGUSR1)

    line = ["--nodes", "2", "--cpu-ranks", "1", "--python", f"env OMP_NUM_THREADS=1 {sys.executable}", "--"]
    assert slurm.main([*line, *settings, f"run_dir={run}"]) == 0
    assert cluster.run(meanwhile=preempt) == [0, 0]
    log = (run / "slurm.log").read_text()
    # The ranks get the signal itself and, from their launcher, SIGTERM: they report whichever comes first.
    assert re.search("stopped by SIG(USR1|TERM) at step", log), log
    assert "resumed from" in log and log.endswith("job 100: finished\n")
    assert read_finished(run) is not None
    assert losses(run) == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    rows = [read_rows(path / "metrics.jsonl") for path in (run, tmp_path / "whole")]
    assert [row["token_hash"] for row in rows[0]] == [row["token_hash"] for row in rows[1]]
