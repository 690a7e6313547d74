"""Claims about whole runs: train.py in separate processes that are killed, stopped, resumed, or given a full disk.

Runs are stopped when their metrics reach a given step, never after a given time.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from ovq.train import checkpoint
from ovq.train.checkpoint_files import step_of
from ovq.train.metrics import read_rows
from tests.helpers import TINY, chosen
from tests.training import losses, trainer_for

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]
ROOT = Path(__file__).resolve().parent.parent
STEPS, EVAL_EVERY = 40, 20
SETTINGS = [
    "model=sw_ovq",
    *TINY,
    "model.mixers.sliding_window.window=16",
    "model.mixers.ovq.num_centroids=32",
    "model.mixers.ovq.chunk_size=32",
    "data=text",
    "data.num_workers=0",
    f"trainer.steps={STEPS}",
    "trainer.context=128",
    "trainer.global_batch=4",
    "trainer.micro_batch=2",
    "trainer.device=cpu",
    "trainer.checkpoint_every=5",
    f"trainer.eval_every={EVAL_EVERY}",
    "trainer.health_every=10",
    "eval.context=1024",
    "eval.piece=128",
    "eval.documents=2",
    "optim.lr=1e-2",
    "optim.warmup_steps=5",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that name a small corpus of made-up words, in documents of very different lengths."""
    folder, generator = tmp_path_factory.mktemp("corpus"), random.Random(0)
    words = ["".join(generator.choices("abcdefghij", k=generator.randint(2, 7))) for _ in range(60)]
    for index in range(12):
        (folder / f"train{index:02d}.txt").write_text(" ".join(generator.choices(words, k=30 * index + 10)))
    for index in range(2):
        (folder / f"held{index}.txt").write_text(" ".join(generator.choices(words, k=400)))
    return [f"data.train=[{folder}/train*.txt]", f"data.validation=[{folder}/held*.txt]"]


class Job:
    """train.py on `run_dir` in separate processes; `lines()` is what it has printed."""

    def __init__(self, run_dir: Path, overrides: list[str], processes: int = 1, **how: Any) -> None:
        self.run_dir = run_dir
        self.log = run_dir.parent / f"{run_dir.name}.{time.monotonic_ns()}.log"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [sys.executable, *(launcher if processes > 1 else []), str(ROOT / "train.py")]
        how["env"] = {**os.environ, "OMP_NUM_THREADS": "1", **how.get("env", {})}
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                [*command, *SETTINGS, *overrides, f"run_dir={run_dir}"], stdout=out, stderr=out, cwd=ROOT, **how
            )

    def lines(self) -> str:
        return self.log.read_text()

    def when(self, reached: Callable[[list[dict[str, Any]]], bool], number: signal.Signals) -> int:
        """Send a signal as soon as the rows of metrics.jsonl satisfy `reached`; returns the exit status."""
        while not reached(read_rows(self.run_dir / "metrics.jsonl")):
            assert self.process.poll() is None, self.lines()
            time.sleep(0.002)
        self.process.send_signal(number)
        return self.status()

    def status(self) -> int:
        return self.process.wait(timeout=240)


def at_step(step: int) -> Callable[[list[dict[str, Any]]], bool]:
    return lambda rows: any(row["step"] >= step for row in rows)


def record(run_dir: Path) -> list[dict[str, Any]]:
    """The parts of metrics.jsonl that must be the same however a run was computed: all but speed and memory."""
    varies = ("tokens_per_s", "data_wait", "mfu", "memory_gib")
    return [{k: v for k, v in row.items() if k not in varies} for row in read_rows(run_dir / "metrics.jsonl")]


def copy_of(run_dir: Path, to: Path) -> Path:
    shutil.copytree(run_dir, to, symlinks=True)
    return to


def last_error(text: str) -> str:
    return [line for line in text.splitlines() if line.startswith("error: ")][-1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, corpus: list[str]) -> Path:
    """The run folder of an uninterrupted run of one process."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    job = Job(run_dir, corpus)
    assert job.status() == 0, job.lines()
    return run_dir


def test_an_uninterrupted_run_writes_everything_it_promises(whole: Path) -> None:
    assert len(losses(whole)) == STEPS and losses(whole)[-1] < losses(whole)[0] - 1
    names = {path.name for path in whole.iterdir()}
    assert names >= {"config.yaml", "metrics.jsonl", "per_position_loss.parquet", "plots", "summary.json", "tokenizer"}
    assert checkpoint.main(["verify", str(whole)]) == 0
    assert [path.name for path in checkpoint.complete(whole / "checkpoints")] == ["step_00000035", "step_00000040"]
    assert json.loads((whole / "summary.json").read_text())["step"] == STEPS
    assert [row["step"] for row in record(whole) if "eval/loss" in row] == [20, 40]


def test_a_run_killed_twice_resumes_bit_exact(whole: Path, tmp_path: Path, corpus: list[str]) -> None:
    run_dir = tmp_path / "run"
    latest = run_dir / "checkpoints" / "latest"
    resumed_at = [0]
    for kill_at in (8, 23):
        job = Job(run_dir, corpus)
        there = at_step(kill_at)
        least = f"step_{kill_at // 5 * 5:08d}"  # steps may be ahead of the checkpoint still being written
        reached = lambda rows: there(rows) and latest.exists() and latest.resolve().name >= least  # noqa: B023, E731
        assert job.when(reached, signal.SIGKILL) == -signal.SIGKILL
        resumed_at.append(step_of(latest.resolve()))
        assert resumed_at[-2] < resumed_at[-1] < max(row["step"] for row in record(run_dir)) < STEPS
    job = Job(run_dir, corpus)
    assert job.status() == 0, job.lines()
    assert f"at step {resumed_at[-1]}\n" in job.lines()
    assert record(run_dir) == record(whole)


def test_changing_the_number_of_processes_keeps_losses_and_token_order(
    whole: Path, tmp_path: Path, corpus: list[str]
) -> None:
    """One process, then two, then one; stopped during an evaluation, which is then repeated, and during training."""
    run_dir = tmp_path / "run"
    first = Job(run_dir, [*corpus, "eval.piece=8"])  # slow enough for the signal to arrive during it
    assert first.when(at_step(EVAL_EVERY), signal.SIGTERM) == 0, first.lines()
    assert [row["step"] for row in record(run_dir)] == list(range(1, EVAL_EVERY + 1))
    assert f"stopped by SIGTERM at step {EVAL_EVERY} of {STEPS}" in first.lines()
    assert checkpoint.complete(run_dir / "checkpoints")[-1].name == f"step_{EVAL_EVERY:08d}"
    assert not (run_dir / "summary.json").exists()

    second = Job(run_dir, corpus, processes=2)
    second.when(at_step(27), signal.SIGTERM)
    stopped_at = max(row["step"] for row in record(run_dir))
    assert f"at step {stopped_at} of {STEPS}" in second.lines() and 27 <= stopped_at < STEPS
    manifest = checkpoint.verify(checkpoint.complete(run_dir / "checkpoints")[-1])
    assert (manifest["step"], manifest["processes"]) == (stopped_at, 2)

    third = Job(run_dir, corpus)
    assert third.status() == 0, third.lines()
    got, want = record(run_dir), record(whole)
    assert [row["step"] for row in got] == [row["step"] for row in want]
    for a, b in zip(got, want):
        assert a.keys() == b.keys()  # including each layer's health
        if "loss" in b:
            assert (a["token_hash"], a["tokens"]) == (b["token_hash"], b["tokens"])
            assert a["loss"] == pytest.approx(b["loss"], rel=2e-5)
        else:
            assert a["eval/loss"] == pytest.approx(b["eval/loss"], rel=2e-5)


def test_bf16_with_workers_and_wandb_offline_runs_without_a_network(
    whole: Path, tmp_path: Path, corpus: list[str]
) -> None:
    run_dir, nowhere = tmp_path / "run", "http://127.0.0.1:9"
    settings = ["trainer.precision=bf16", "data.num_workers=1", "logger=wandb", "trainer.eval_every=0"]
    job = Job(run_dir, [*corpus, *settings], env={"HTTPS_PROXY": nowhere, "HTTP_PROXY": nowhere, "HOME": str(tmp_path)})
    assert job.status() == 0, job.lines()
    assert list((run_dir / "wandb").glob("offline-run-*/*.wandb")), job.lines()
    assert "continuing without it" not in job.lines()
    bf16, fp32 = record(run_dir), [row for row in record(whole) if row["step"] != EVAL_EVERY or "loss" in row]
    assert [row.get("token_hash") for row in bf16] == [row.get("token_hash") for row in fp32]
    assert losses(run_dir) == pytest.approx(losses(whole), rel=1e-2) and losses(run_dir) != losses(whole)


def test_a_full_disk_ends_a_run_with_one_line_and_loses_nothing_saved(
    whole: Path, tmp_path: Path, corpus: list[str]
) -> None:
    run_dir = copy_of(whole, tmp_path / "run")
    longer = [*corpus, "trainer.steps=50", "trainer.allow_rate_jump=true", "eval.at_end=false"]

    def full() -> None:  # limits the size of every file
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))

    job = Job(run_dir, longer, preexec_fn=full)
    assert job.status() == 1
    error = last_error(job.lines())
    assert "the checkpoint of step 50 could not be written" in error and "the disk is full" in error
    assert "warning: the checkpoint of step 45 could not be written" in job.lines()
    assert "step_00000040 is intact" in error and "Traceback" not in job.lines()
    assert chosen(run_dir) == run_dir / "checkpoints" / "step_00000040"


# --- in this process: runs that end before or soon after they start --------------------------------------------------


def test_an_absurd_learning_rate_stops_with_step_documents_and_last_good_checkpoint(
    tmp_path: Path, corpus: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    settings = ["optim.lr=1e30", "optim.warmup_steps=0", "trainer.checkpoint_every=1", f"run_dir={run_dir}"]
    assert train.main([*SETTINGS, *corpus, *settings]) == 1
    error = last_error(capsys.readouterr().err)
    last = max(row["step"] for row in record(run_dir))
    assert f"step {last}: loss " in error and "nan" in error and "optim.lr" in error
    assert "documents: train" in error
    assert f"the last good checkpoint is {run_dir / 'checkpoints' / checkpoint.name_of(last - 1)}" in error
    assert checkpoint.verify(chosen(run_dir) or "")["step"] == last - 1


def test_restarting_a_finished_run_trains_no_step(
    whole: Path, tmp_path: Path, corpus: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = copy_of(whole, tmp_path / "run")
    assert train.main([*SETTINGS, *corpus, f"run_dir={run_dir}"]) == 0
    assert f"finished: {STEPS} steps" in capsys.readouterr().out
    assert (run_dir / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    again, first = (json.loads((folder / "summary.json").read_text()) for folder in (run_dir, whole))
    assert again["tokens_per_s"] == first["tokens_per_s"] > 0 and again["memory_gib"] >= 0.9 * first["memory_gib"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("optim.lr=2e-2", "optim.lr: 0.01 -> 0.02"),
        ("model.mixers.ovq.num_centroids=64", "model.mixers.ovq.num_centroids: 32 -> 64"),
        ("seed=1", "seed: 0 -> 1"),
        ("resume=never", "resume=never, but"),
    ],
)
def test_a_different_config_in_the_same_run_folder_is_rejected_by_setting(
    whole: Path, corpus: list[str], capsys: pytest.CaptureFixture[str], change: str, named: str
) -> None:
    def written() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.name != ".lock"}

    before = written()
    assert train.main([*SETTINGS, *corpus, change, f"run_dir={whole}"]) == 2
    assert named in last_error(capsys.readouterr().err)
    assert written() == before


def test_sharded_training_on_triton_kernels_equals_one_process_on_torch(corpus: list[str], tmp_path: Path) -> None:
    """FSDP over two processes, blocks recomputed in the backward pass, and packed documents."""
    pytest.importorskip("triton")
    settings = ["trainer.steps=2", "trainer.context=64", "trainer.global_batch=2", "trainer.micro_batch=1"]
    settings += ["data.isolate_documents=true", "trainer.activation_checkpointing=full", "optim.lr=1e-4"]
    settings += ["trainer.eval_every=0", "eval.at_end=false", *corpus]
    interpreter = {"TRITON_INTERPRET": "1"}
    kernels = Job(tmp_path / "triton", [*settings, "model.mixers.ovq.backend=triton"], 2, env=interpreter)
    alone = Job(tmp_path / "torch", [*settings, "model.mixers.ovq.backend=torch"])
    assert alone.status() == 0, alone.lines()
    assert kernels.status() == 0, kernels.lines()
    got, want = (record(job.run_dir) for job in (kernels, alone))
    assert [row["loss"] for row in got] == pytest.approx([row["loss"] for row in want], rel=1e-5)
    assert [row["grad_norm"] for row in got] == pytest.approx([row["grad_norm"] for row in want], rel=1e-3)


# --- two processes, many claims in one launch: tests/two_ranks.py ----------------------------------------------------


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two_ranks")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launch, "tests/two_ranks.py", str(folder)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one_rank")
    for model in ("sw_ovq", "sw_vq"):
        trainer_for(folder / model, model=model).fit()
    trainer_for(folder / "muon", "optim=muon", "optim.ema=0.9").fit()
    return folder


@pytest.mark.parametrize("sharding", ["full", "hybrid", "none", "accumulating", "vq"])
def test_two_processes_equal_one_however_sharded(two_ranks: Any, one_rank: Path, sharding: str) -> None:
    model = "sw_vq" if sharding == "vq" else "sw_ovq"
    assert losses(two_ranks[0] / sharding) == pytest.approx(losses(one_rank / model), rel=1e-5)
    norms = [
        [row["grad_norm"] for row in read_rows(folder / "metrics.jsonl")]
        for folder in (two_ranks[0] / sharding, one_rank / model)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_muon_and_the_average_are_the_same_on_two_processes(two_ranks: Any, one_rank: Path) -> None:
    assert losses(two_ranks[0] / "muon") == pytest.approx(losses(one_rank / "muon"), rel=1e-4)
    how = ("optim=muon", "optim.ema=0.9")
    a, b = (trainer_for(folder / "muon", *how) for folder in (two_ranks[0], one_rank))
    assert a.ema is not None and b.ema is not None
    for (name, x), y in zip(a.ema.weights.items(), b.ema.weights.values()):
        assert float((x - y).norm()) <= 3e-2 * float(y.norm()), name  # Muon amplifies the rounding of sums in bf16
    assert two_ranks[1]["orthogonalised"] == [True, True]
    momenta = [state["momentum_buffer"] for state in a.optimizer.state.values() if "momentum_buffer" in state]
    assert len(momenta) == sum(p.ndim == 2 for p in a.model.layers.parameters())
    probe = torch.arange(20)[None]
    with torch.no_grad(), b.ema.in_place(b.model):
        averaged = b.model(probe, targets_BT=probe).loss.item()
    before, during, after = two_ranks[1]["averaged"]
    assert during == pytest.approx(averaged, rel=1e-4) and before == after != during


def test_bf16_on_two_processes_is_near_float32(two_ranks: Any, one_rank: Path) -> None:
    assert losses(two_ranks[0] / "bf16") == pytest.approx(losses(one_rank / "sw_ovq"), rel=2e-2)


@pytest.mark.parametrize("model", ["sw_ovq", "sw_vq"])
def test_a_checkpoint_of_two_processes_equals_that_of_one(two_ranks: Any, one_rank: Path, model: str) -> None:
    shards = two_ranks[0] / {"sw_ovq": "full", "sw_vq": "vq"}[model]
    assert checkpoint.verify(shards / "checkpoints" / "step_00000006")["processes"] == 2
    a, b = (trainer_for(folder, model=model) for folder in (shards, one_rank / model))
    assert a.step == b.step == 6
    for (name, x), (_, y) in zip(a.model.state_dict().items(), b.model.state_dict().items()):
        assert float((x - y).norm()) <= 2e-3 * float(y.norm()), name
    assert len(a.optimizer.state) == len(b.optimizer.state) > 0


def test_the_codebook_is_the_same_on_every_rank(two_ranks: Any) -> None:
    assert two_ranks[1]["buffers"] == {"count": 3, "equal": True}


def test_a_signal_to_one_process_stops_all_after_the_same_step(two_ranks: Any) -> None:
    assert two_ranks[1]["stopped"] == [[2, "a signal to another process"], [2, "SIGTERM"]]


def test_a_full_disk_on_one_process_is_the_same_error_on_all(two_ranks: Any) -> None:
    first, second = two_ranks[1]["full"]
    assert first == second and first.startswith("CheckpointError: the checkpoint of step 3 could not be written")
    assert "the disk is full" in first and "step_00000002 is intact" in first
    assert two_ranks[1]["choice"] == [str(two_ranks[0] / "signal" / "checkpoints" / "step_00000003")] * 2


def test_an_error_on_rank_0_is_raised_on_every_rank(two_ranks: Any) -> None:
    said = ["ValueError: invalid literal for int() with base 10: 'no number'"] * 2
    assert two_ranks[1]["on_main"] == two_ranks[1]["failed slowly"] == said


def test_rank_0_may_read_files_for_longer_than_a_collective_waits(two_ranks: Any) -> None:
    assert two_ranks[1]["slowly"] == [0, 0]


def test_only_collectives_that_training_waits_for_get_the_short_timeout(two_ranks: Any) -> None:
    assert two_ranks[1]["timeouts"] == [77, 6 * 3600]
