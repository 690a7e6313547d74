"""Claims about data under faults: no process is left behind, no wait is endless, no changed file is silently read."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from data.lanes import LaneReader
from data.prepare import prepare
from data.prepared import SUFFIXES
from data.sources import DataError
from ovq.config import Config
from tests.data_helpers import config, loader, steps, text_of, tokens_of, write_jsonl, write_parquet
from tests.faults import Fault, children_of, command, running, truncate, wait_until

LONG = 1 << 17  # tokens per row: more than fits into a pipe's buffer


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("books")
    return write_parquet(folder / "train.parquet", [text_of(9000, i) for i in range(12)])


def parquet(books: Path, *overrides: str) -> Config:
    return config("data=parquet", f"data.train=[{books}]", "data.num_workers=1", *overrides)


def workers() -> list[Any]:
    return multiprocessing.active_children()


def command_of(books: Path, run_dir: Path, faults: list[Fault], *overrides: str) -> list[str]:
    """The command of a run whose loader has one worker, a few rows ahead of the trainer."""
    settings = [
        "data=parquet", f"data.train=[{books}]", "model/size=tiny", "model.num_layers=1", "model.dim=32",
        "trainer.device=cpu", "trainer.context=2048", "trainer.global_batch=1", "trainer.micro_batch=1",
        "trainer.steps=1000000", "trainer.log_every=1", "trainer.progress=false", "trainer.checkpoint_every=1000000",
        "eval.at_end=false", "data.prefetch=1", "tokenizer=byte", f"run_dir={run_dir}",
    ]  # fmt: skip
    return command(faults, [*settings, *overrides])


def gone(pids: list[int]) -> bool:
    return not any(map(running, pids))


def steps_of(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


# --- workers end with their trainer, and not before ------------------------------------------------------------------


def test_workers_of_a_killed_trainer_are_gone_at_once(books: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(command_of(books, tmp_path, []), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    wait_until(lambda: steps_of(tmp_path) >= 1, 120)
    children = children_of(process.pid)
    process.kill()
    process.wait()
    assert children
    wait_until(lambda: gone(children), 3)


ORPHAN = """
import multiprocessing, os, sys, time
from data import workers

def child(platform):
    workers.sys.platform = platform
    workers._begin_worker(0)
    os.write(1, f"{os.getpid()}{os.linesep}".encode())  # in one call: the siblings share the pipe
    time.sleep(3600)

if __name__ == "__main__":
    for _ in range(2):
        multiprocessing.get_context(sys.argv[1]).Process(target=child, args=(sys.argv[2],)).start()
    time.sleep(3600)
"""


@pytest.mark.parametrize("method,platform", [("fork", sys.platform), ("spawn", sys.platform), ("fork", "another")])
def test_a_child_dies_with_its_parent_whatever_it_waits_for(tmp_path: Path, method: str, platform: str) -> None:
    """Killed by the kernel or a watching thread, even though siblings hold each other's pipes open."""
    (tmp_path / "orphan.py").write_text(ORPHAN)
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "orphan.py"), method, platform],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    assert parent.stdout is not None
    children = [int(parent.stdout.readline()) for _ in range(2)]
    for child in children:
        os.kill(child, signal.SIGTERM)  # workers ignore it: it reaches every process of a job
    parent.kill()
    parent.wait()
    wait_until(lambda: gone(children), 10)


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_workers_outlive_the_signals_that_stop_a_job(books: Path, number: str) -> None:
    batches = iter(loader(parquet(books)))
    next(batches)
    (worker,) = workers()
    os.kill(worker.pid, getattr(signal, number))
    assert len(list(islice(batches, 20))) == 20 and worker.is_alive()
    batches.close()


@pytest.mark.parametrize("context", [16, LONG])
def test_a_stopped_worker_is_ended_with_the_loader(books: Path, context: int) -> None:
    batches = iter(loader(parquet(books, f"trainer.context={context}")))
    next(batches)
    (worker,) = workers()
    os.kill(worker.pid, signal.SIGSTOP)
    batches.close()
    assert not workers()


# --- waiting for data ------------------------------------------------------------------------------------------------


def stop_worker(made: Any) -> Any:
    """(an iterator after two steps, its only worker); the worker has been stopped, with long rows while sending one."""
    batches = iter(made)
    list(islice(batches, 2 * made.micro_batches_per_step))
    (worker,) = workers()
    os.kill(worker.pid, signal.SIGSTOP)
    return batches, worker


@pytest.mark.parametrize("context", [16, LONG])
def test_a_stopped_worker_is_named_after_timeout_s(books: Path, context: int) -> None:
    made = loader(parquet(books, f"trainer.context={context}", "trainer.timeout_s=1"))
    batches, worker = stop_worker(made)
    with pytest.raises(DataError) as error:
        list(batches)
    said = str(error.value)
    assert f"loader worker 0 of 1 on rank 0, process {worker.pid} (stopped)" in said and "\n" not in said
    assert "nothing for 1 s (trainer.timeout_s) while making row" in said and f"{books} document" in said
    assert not workers()


@pytest.mark.parametrize("context", [16, LONG])
def test_a_request_to_stop_ends_the_wait_and_the_step_is_rewound(books: Path, context: int) -> None:
    cfg = parquet(books, f"trainer.context={context}")
    made = loader(cfg)
    batches, _ = stop_worker(made)
    made.should_stop = lambda: True
    done = 2 + len(list(batches)) // made.micro_batches_per_step
    made.rewind()
    assert {state["rows"] for state in made.lanes.values()} == {done}, "all lanes stand at the same step"
    whole = tokens_of(parquet(books, f"trainer.context={context}", "data.num_workers=0"), done + 1)
    assert torch.equal(next(steps(cfg, 1, made.state_dict()))[0], whole[-1, 0])


@pytest.mark.parametrize("context", [16, LONG])
def test_a_killed_worker_is_one_line_with_its_signal(books: Path, context: int) -> None:
    batches = iter(loader(parquet(books, f"trainer.context={context}")))
    next(batches)
    (worker,) = workers()
    worker.kill()
    with pytest.raises(DataError) as error:
        list(batches)
    said = str(error.value)
    assert f"loader worker 0 of 1 on rank 0, process {worker.pid} was killed by SIGKILL, as happens when" in said
    assert "while making row" in said and "\n" not in said


def test_a_signal_handler_that_raises_while_a_row_is_awaited_is_one_line(
    books: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, waits = queue.Queue.get, []

    def interrupted(self: Any, *args: Any, **how: Any) -> Any:
        waits.append(how)
        if len(waits) == 1:
            raise RuntimeError("DataLoader worker (pid 7) exited unexpectedly with exit code 3.")
        return usual(self, *args, **how)

    made = loader(parquet(books))
    monkeypatch.setattr("data.workers.queue.Queue.get", interrupted)
    with pytest.raises(
        DataError, match=r"^loader workers on rank 0 cannot be read: DataLoader worker \(pid 7\) exited"
    ):
        next(iter(made))


def test_a_worker_that_dies_while_starting_is_one_line(books: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.workers.die_with_parent", lambda: os._exit(3))
    with pytest.raises(DataError, match=r"^loader workers on rank 0 cannot be read: .* exited unexpectedly"):
        next(iter(loader(parquet(books))))
    assert not workers()


def test_an_exception_in_a_worker_is_one_line_with_its_place(books: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def row(self: LaneReader, lane: int, state: Any) -> Any:
        raise {}["no such key"]

    monkeypatch.setattr(LaneReader, "row", row)
    with pytest.raises(DataError) as error:
        next(iter(loader(parquet(books))))
    said = str(error.value)
    assert "worker 0 of 1 on rank 0" in said and "KeyError: 'no such key' at test_faults_data.py:" in said
    assert "while making row 1 of lane 0" in said and "\n" not in said


def test_a_data_error_in_a_worker_reads_as_without_one(books: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def row(self: LaneReader, lane: int, state: Any) -> Any:
        raise DataError("a.parquet is gone; put it back")

    monkeypatch.setattr(LaneReader, "row", row)
    with pytest.raises(DataError, match=r"^a.parquet is gone; put it back \(loader worker 0 of 1 on rank 0.*\)$"):
        next(iter(loader(parquet(books))))


def test_a_run_whose_worker_hangs_saves_on_sigterm_and_resumes(books: Path, tmp_path: Path) -> None:
    frozen = command_of(books, tmp_path, [Fault("row", 6, "freeze")])
    process = subprocess.Popen(frozen, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: steps_of(tmp_path) >= 5, 120)
    children = children_of(process.pid)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 0, said
    assert gone(children) and (tmp_path / "checkpoints" / "step_00000005").is_dir()
    late = command_of(books, tmp_path, [Fault("row", 3, "freeze")], "trainer.timeout_s=2", "trainer.steps=20")
    ended = subprocess.run(late, capture_output=True, text=True, timeout=120)
    lines = ended.stderr.strip().splitlines()
    assert ended.returncode == 1 and steps_of(tmp_path) == 7, ended.stderr
    assert lines[-1].startswith("error: loader worker 0 of 1 on rank 0, process ") and "Traceback" not in ended.stderr
    assert "has delivered nothing for 2 s (trainer.timeout_s) while making row 8 of lane 0" in lines[-1]


# --- files that change during a run ----------------------------------------------------------------------------------


def write_shard(kind: str, path: Path, letter: str) -> Path:
    """Four documents of equal length; another letter changes their bytes but no size, offset or count."""
    if kind == "text":
        path.write_text(letter * 40)
    elif kind == "jsonl":
        write_jsonl(path, [letter * 40] * 4)
    else:
        write_parquet(path, [letter * 40] * 4)
    return path


def replace(kind: str, path: Path, letter: str) -> None:
    os.replace(write_shard(kind, path.with_suffix(".new"), letter), path)


def overwrite(kind: str, path: Path, letter: str) -> None:
    path.write_bytes(write_shard(kind, path.with_suffix(".new"), letter).read_bytes())
    path.with_suffix(".new").unlink()
    os.utime(path, (1, 1))  # a different mtime, however coarse the file system's clock


def reading(kind: str, folder: Path, *overrides: str) -> Any:
    for name in ("a", "b"):
        write_shard(kind, folder / f"{name}.{kind}", name)
    files = f"data.train=[{folder}/a.{kind},{folder}/b.{kind}]"
    made = loader(config(f"data={kind}", files, "data.num_workers=0", "data.shuffle=false", *overrides))
    batches = iter(made)
    next(batches)  # now one shard is open and the other is not
    return batches


@pytest.mark.parametrize("change", [replace, overwrite])
@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("bad_shard", ["error", "skip"])
@pytest.mark.parametrize("kind", ["parquet", "jsonl", "text"])
def test_a_shard_that_changes_in_mid_run_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, bad_shard: str, name: str, change: Any
) -> None:
    """Not a single wrong token is returned, whether the shard was open or not, replaced or overwritten."""
    monkeypatch.setattr("data.corpus._OPEN_FILES", 1)
    batches = reading(kind, tmp_path, f"data.on_bad_shard={bad_shard}")
    change(kind, tmp_path / f"{name}.{kind}", "z")
    read = []
    with pytest.raises(DataError, match=rf"{name}.{kind} has changed since this run opened its data .*; put the orig"):
        for batch in islice(batches, 400):
            read.append(batch.inputs)
    assert not any((inputs == ord("z")).any() for inputs in read)


@pytest.mark.parametrize("change", [replace, overwrite])
@pytest.mark.parametrize("kind", ["parquet", "jsonl", "text"])
def test_a_shard_replaced_by_an_equal_one_is_the_same_shard(tmp_path: Path, kind: str, change: Any) -> None:
    batches = reading(kind, tmp_path)
    for name in ("a", "b"):
        change(kind, tmp_path / f"{name}.{kind}", name)
    assert len(list(islice(batches, 400))) == 400


def test_a_shard_cut_short_in_mid_run_is_refused_by_name(tmp_path: Path) -> None:
    batches = reading("parquet", tmp_path)
    truncate(tmp_path / "b.parquet", 100)
    with pytest.raises(DataError, match=r"b.parquet has changed .*not a whole Parquet file"):
        list(islice(batches, 400))


def test_a_prepared_part_replaced_in_mid_run_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records and tokens of another preparation match each other, so only the records' own hash reveals the change."""
    monkeypatch.setattr("data.prepared._OPEN_PARTS", 1)
    for name in "ab":
        source = write_jsonl(tmp_path / f"{name}.jsonl", [name * 40, name * 40])
        prepare(config("data=jsonl", f"data.train=[{source}]"), tmp_path / name, processes=1, part_mb=40 / 2**20)
    batches = iter(loader(config("data=memmap", f"data.train=[{tmp_path}/a]", "data.shuffle=false")))
    list(islice(batches, 40))
    for suffix in SUFFIXES:
        os.replace(tmp_path / "b" / f"train-00000.{suffix}", tmp_path / "a" / f"train-00000.{suffix}")
    with pytest.raises(DataError, match=r"train-00000.(documents|tokens) is damaged"):
        list(islice(batches, 400))
