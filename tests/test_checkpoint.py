"""Claims about checkpoints: each is complete and verified or absent, whatever happens while one is written."""

from __future__ import annotations

import concurrent.futures
import errno
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import train
from ovq import processes
from ovq.train import checkpoint, checkpoint_choice, checkpoint_files
from ovq.train.checkpoint import Checkpointer, CheckpointError, load, verify
from ovq.train.optim import build_optimizer
from tests.helpers import TINY, chosen, small_config, small_model

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
NAME = "sw_vq"  # has buffers that change in training
EXTRA = {"step": 3, "data": {"lanes": {0: {"ordinal": 7}}}, "none": None, "share": 0.5}


def trained(seed: int, steps: int = 1) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = small_model(NAME, seed=seed, vocab_size=31)
    optimizer = build_optimizer(model, small_config(NAME))
    for step in range(steps):
        learn(model, optimizer, step)
    return model, optimizer


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    tokens = torch.randint(31, (2, 40), generator=torch.Generator().manual_seed(seed))
    model(tokens, targets_BT=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    moments = [value for p in model.parameters() for value in optimizer.state[p].values()]
    return [tensor.detach().clone() for tensor in [*model.parameters(), *model.buffers(), *moments]]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def steps_on_disk(run_dir: Path) -> list[int]:
    return [checkpoint_files.step_of(path) for path in sorted((run_dir / "checkpoints").glob("step_*"))]


def folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / checkpoint.name_of(step)


def saved(run_dir: Path, *steps: int, **settings: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Fill a run folder with checkpoints of these steps; returns the model and the optimizer of the last."""
    model, optimizer = trained(0)
    checkpointer = Checkpointer(run_dir, **settings)
    for step in steps:
        learn(model, optimizer, step)
        checkpointer.save(step, model, optimizer, {**EXTRA, "step": step})
    checkpointer.wait()
    return model, optimizer


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("run")
    saved(run_dir, 1, 2)
    return run_dir


@pytest.fixture
def run_dir(two_checkpoints: Path, tmp_path: Path) -> Path:
    """A copy of a run folder with checkpoints of steps 1 and 2."""
    subprocess.run(["cp", "-a", str(two_checkpoints), str(tmp_path / "run")], check=True)
    return tmp_path / "run"


# --- saving and loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [True, False])
def test_loading_restores_every_bit_and_the_next_step_is_the_same(tmp_path: Path, asynchronous: bool) -> None:
    model, optimizer = saved(tmp_path, 3, asynchronous=asynchronous)
    other, other_optimizer = trained(1, steps=2)
    extra = load(folder(tmp_path, 3), other, other_optimizer)
    assert {key: extra[key] for key in EXTRA} == EXTRA
    assert same(everything(model, optimizer), everything(other, other_optimizer))
    learn(model, optimizer, 9)
    learn(other, other_optimizer, 9)
    assert same(everything(model, optimizer), everything(other, other_optimizer))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_checkpoint_before_the_first_step_has_no_moments(tmp_path: Path, name: str) -> None:
    """torch's get_state_dict makes a step of zeros where there is no state yet, which would count as the first one."""

    def fresh(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = small_model(NAME, seed=seed, vocab_size=31)
        return model, build_optimizer(model, small_config(NAME, f"optim={name}"))

    model, optimizer = fresh(0)
    saver = Checkpointer(tmp_path)
    saver.save(0, model, optimizer, EXTRA)
    saver.wait()
    other, other_optimizer = fresh(1)
    load(folder(tmp_path, 0), other, other_optimizer)
    unsaved, unsaved_optimizer = fresh(0)
    for pair in ((model, optimizer), (other, other_optimizer), (unsaved, unsaved_optimizer)):
        for step in range(2):
            learn(*pair, step)
    assert same(everything(unsaved, unsaved_optimizer), everything(other, other_optimizer))
    assert same(everything(unsaved, unsaved_optimizer), everything(model, optimizer)), "nor does saving change the run"


def test_an_optimizer_that_has_not_stepped_yet_gets_the_moments(tmp_path: Path) -> None:
    model, optimizer = saved(tmp_path, 3)
    other, other_optimizer = trained(1, steps=0)
    load(folder(tmp_path, 3), other, other_optimizer)
    assert same(everything(model, optimizer), everything(other, other_optimizer))


def test_every_random_generator_continues_where_it_was(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    processes.seed_everything(5)
    draw()
    model, optimizer = saved(tmp_path, 3)
    want = draw()
    extra = load(folder(tmp_path, 3), model, optimizer)
    processes.seed_everything(6)
    processes.set_rng_state(extra["rng"][0])
    assert draw() == want


def test_a_checkpoint_is_the_state_at_save_while_training_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = trained(0)
    go, write = threading.Event(), checkpoint.dcp.save
    monkeypatch.setattr(checkpoint.dcp, "save", lambda *args, **kwargs: (go.wait(60), write(*args, **kwargs)))
    before = everything(model, optimizer)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(3, model, optimizer, EXTRA)  # returns although nothing can be written yet
    learn(model, optimizer, 1)
    assert chosen(tmp_path) is None
    (tmp_path / "checkpoints" / "saving_step_00000003").mkdir(exist_ok=True)  # choose removed it as a leftover
    go.set()
    checkpointer.wait()
    assert not same(before, everything(model, optimizer))
    load(folder(tmp_path, 3), model, optimizer)
    assert same(before, everything(model, optimizer))


def test_loading_into_another_model_is_an_error_that_names_the_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path, 3)
    model = small_model("sw", vocab_size=31)
    with pytest.raises(CheckpointError, match="step_00000003 does not fit this model"):
        load(folder(tmp_path, 3), model, build_optimizer(model, small_config("sw")))


# --- retention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep_last", "on_disk"),
    [(1, [[5], [10], [15], [20]]), (2, [[5], [5, 10], [10, 15], [15, 20]]), (9, [[5], [5, 10], [5, 10, 15]])],
)
def test_the_last_k_are_kept(tmp_path: Path, keep_last: int, on_disk: list[list[int]]) -> None:
    model, optimizer = trained(0)
    checkpointer = Checkpointer(tmp_path, keep_last=keep_last)
    for index, want in enumerate(on_disk):
        checkpointer.save(5 * (index + 1), model, optimizer, EXTRA)
        checkpointer.wait()
        assert steps_on_disk(tmp_path) == want
        assert (tmp_path / "checkpoints" / "latest").resolve() == folder(tmp_path, want[-1]).resolve()
        assert checkpointer.last == folder(tmp_path, want[-1])


def test_the_newest_of_at_most_so_many_steps_is_kept_as_well(tmp_path: Path) -> None:
    model, optimizer = trained(0)
    checkpointer = Checkpointer(tmp_path, keep_last=1, keep_at=12)
    for step, want in ((5, [5]), (10, [10]), (15, [10, 15]), (20, [10, 20])):
        checkpointer.save(step, model, optimizer, EXTRA)
        checkpointer.wait()
        assert steps_on_disk(tmp_path) == want


# --- damage ----------------------------------------------------------------------------------------------------------


def damages(path: Path) -> Iterator[str]:
    """Damage each file of a checkpoint in turn, yield a description of the damage, and repair it."""
    generator = random.Random(0)
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        for position in (
            0,
            len(content) // 2,
            len(content) - 1,
            *(generator.randrange(len(content)) for _ in range(3)),
        ):
            changed = bytearray(content)
            changed[position] ^= 1 << generator.randrange(8)
            file.write_bytes(changed)
            yield f"{file.name}, byte {position}"
        file.write_bytes(content[:-1])
        yield f"{file.name}, truncated"
        file.write_bytes(content + b"\0")
        yield f"{file.name}, longer"
        file.unlink()
        yield f"{file.name}, missing"
        file.write_bytes(content)


def test_any_damage_to_any_file_is_an_error_that_names_the_file(run_dir: Path) -> None:
    path = folder(run_dir, 2)
    tried = set()
    for damage in damages(path):
        name = damage.partition(",")[0]
        tried.add(name)
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            verify(path)
            print(damage)
    assert tried == {".metadata", "__0_0.distcp", "extra.pt", "manifest.json"}
    assert verify(path)["step"] == 2


def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder(run_dir, 2) / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    file.write_bytes(content)
    assert chosen(run_dir) == folder(run_dir, 1)
    assert "step_00000002/__0_0.distcp is damaged" in capsys.readouterr().err
    # The run saves step 2 again, in place of the damaged one.
    model, optimizer = trained(0)
    checkpointer = Checkpointer(run_dir)
    checkpointer.save(2, model, optimizer, EXTRA)
    checkpointer.wait()
    assert chosen(run_dir) == folder(run_dir, 2)
    assert (run_dir / "checkpoints" / "aside_step_00000002").is_dir()


def test_a_checkpoint_without_a_manifest_is_not_complete(run_dir: Path) -> None:
    (folder(run_dir, 2) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        chosen(run_dir, str(folder(run_dir, 2)))
    assert chosen(run_dir) == folder(run_dir, 1)


def test_no_good_checkpoint_left_is_an_error_and_not_a_fresh_start(run_dir: Path) -> None:
    for step in (1, 2):
        (folder(run_dir, step) / "extra.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="every checkpoint in .* is damaged"):
        chosen(run_dir)


# --- choosing --------------------------------------------------------------------------------------------------------


def test_auto_takes_the_newest_and_never_takes_none(run_dir: Path) -> None:
    assert chosen(run_dir, "auto") == folder(run_dir, 2)
    assert chosen(run_dir, "never") is None
    assert chosen(run_dir.parent / "another", "auto") is None


def test_a_named_checkpoint_sets_newer_ones_aside(run_dir: Path) -> None:
    assert chosen(run_dir, str(folder(run_dir, 1))) == folder(run_dir, 1)
    assert steps_on_disk(run_dir) == [1]
    assert (run_dir / "checkpoints" / "aside_step_00000002").is_dir()
    assert chosen(run_dir, "auto") == folder(run_dir, 1)


def test_a_named_checkpoint_that_is_damaged_or_missing_is_an_error(run_dir: Path) -> None:
    (folder(run_dir, 2) / "extra.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"step_00000002/extra\.pt is damaged"):
        chosen(run_dir, str(folder(run_dir, 2)))
    with pytest.raises(CheckpointError, match="^resume=.*step_00000007: there is no checkpoint .*; name one"):
        chosen(run_dir, str(folder(run_dir, 7)))


def test_rank_0_chooses_and_the_others_do_not_look(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "distributed", lambda: True)
    monkeypatch.setattr(processes, "rank", lambda: 1)
    says = checkpoint_choice.Choice(Path("what rank 0 says"))
    monkeypatch.setattr(processes, "broadcast_object", lambda value, group=None: (True, says))
    monkeypatch.setattr(checkpoint_choice, "_choose", None)
    monkeypatch.setattr(checkpoint_choice, "_settle", None)
    assert chosen(run_dir) == Path("what rank 0 says")


def test_a_run_folder_in_use_by_another_process_is_rejected(run_dir: Path) -> None:
    holder = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); f.write('process 7'); "
    holder += "f.flush(); print('held', flush=True); input()"
    lock = str(run_dir / "checkpoints" / ".lock")
    with subprocess.Popen(
        [sys.executable, "-c", holder, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        checkpoint_files._HELD.pop(Path(lock).resolve(), None)
        with pytest.raises(CheckpointError, match=r"in use by another process \(process 7\)"):
            chosen(run_dir)
        process.communicate("\n")
    assert chosen(run_dir) == folder(run_dir, 2)


# --- interrupted -----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Passes through every handler, as a kill would: nothing is cleaned up."""


def killed_at(nth: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make every disk operation of a save after the nth raise `Killed`; returns the list of those completed."""
    done: list[str] = []

    def guarded(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if len(done) >= nth:
                raise Killed
            result = function(*args, **kwargs)
            done.append(name)
            return result

        return call

    monkeypatch.setattr(checkpoint.dcp, "save", guarded("write", checkpoint.dcp.save))
    monkeypatch.setattr(checkpoint, "fingerprints", guarded("hash", checkpoint.fingerprints))
    monkeypatch.setattr(checkpoint, "write_manifest", guarded("manifest", checkpoint.write_manifest))
    monkeypatch.setattr(checkpoint, "sync", guarded("sync", checkpoint.sync))
    monkeypatch.setattr(checkpoint.os, "replace", guarded("rename", os.replace))
    monkeypatch.setattr(checkpoint.shutil, "rmtree", guarded("remove", checkpoint.shutil.rmtree))
    return done


def test_a_save_killed_at_any_moment_leaves_a_good_checkpoint(run_dir: Path, tmp_path: Path) -> None:
    model, optimizer = trained(0)
    reached: list[str] = []
    for nth in range(1, 30):
        copy = tmp_path / f"copy{nth}"
        subprocess.run(["cp", "-a", str(run_dir), str(copy)], check=True)
        with pytest.MonkeyPatch.context() as patch:
            reached = killed_at(nth, patch)
            checkpointer = Checkpointer(copy)
            try:
                checkpointer.save(3, model, optimizer, EXTRA)
                checkpointer.wait()
                finished = True
            except Killed:
                finished = False
        pointed_at = (copy / "checkpoints" / "latest").resolve()
        found = chosen(copy)
        assert found in (folder(copy, 2), folder(copy, 3)), (nth, reached)
        assert verify(pointed_at)["step"] in (2, 3), (nth, reached)
        assert found == folder(copy, 3) or not finished
        assert not [*(copy / "checkpoints").glob("saving_*"), *(copy / "checkpoints").glob("removing_*")]
        if finished:
            break
    assert finished and reached.count("rename") == 3 and {"write", "hash", "manifest", "remove"} <= set(reached)


def test_leftovers_of_killed_saves_are_removed_at_the_next_start(run_dir: Path) -> None:
    root = run_dir / "checkpoints"
    for name in ("saving_step_00000003", "removing_step_00000001"):
        (root / name).mkdir()
        (root / name / "__0_0.distcp").write_bytes(b"half")
    (root / "saving_latest").symlink_to("step_00000003")
    assert chosen(run_dir) == folder(run_dir, 2)
    assert sorted(path.name for path in root.iterdir()) == [".lock", "latest", "step_00000001", "step_00000002"]


# --- a full disk -----------------------------------------------------------------------------------------------------


def test_a_full_disk_is_one_clear_line_and_keeps_the_previous_checkpoint(run_dir: Path) -> None:
    model, optimizer = trained(0)
    checkpointer = Checkpointer(run_dir)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # larger files fail while being written
    try:
        checkpointer.save(3, model, optimizer, EXTRA)
        with pytest.raises(CheckpointError) as caught:
            checkpointer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = str(caught.value)
    assert "the checkpoint of step 3 could not be written" in message and "the disk is full" in message
    assert "step_00000002 is intact" in message and "\n" not in message
    assert steps_on_disk(run_dir) == [1, 2] and not list((run_dir / "checkpoints").glob("saving_*"))
    assert chosen(run_dir) == folder(run_dir, 2)
    checkpointer.save(3, model, optimizer, EXTRA)  # there is room again, and the error was reported only once
    checkpointer.wait()
    assert chosen(run_dir) == folder(run_dir, 3)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_failure_in_the_background_is_reported_and_the_next_save_is_made(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    model, optimizer = trained(0)
    checkpointer = Checkpointer(run_dir)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_manifest", fail)
        checkpointer.save(3, model, optimizer, EXTRA)
        with pytest.raises(CheckpointError, match=f"step 4 could not .*{os.strerror(number)}.* start the same command"):
            checkpointer.save(4, model, optimizer, EXTRA)  # fails, too, and waits to see it
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("warning: the checkpoint of step 3 could not be written") and line.endswith("is intact")
        assert steps_on_disk(run_dir) == [1, 2] and chosen(run_dir) == folder(run_dir, 2)
        checkpointer.save(5, model, optimizer, EXTRA)
        assert not checkpointer.wait_for_previous()
        checkpointer.save(6, model, optimizer, EXTRA)
        concurrent.futures.wait([checkpointer._writing])
    checkpointer.save(7, model, optimizer, EXTRA)  # there is room again
    assert steps_on_disk(run_dir) == [2, 7] and chosen(run_dir) == folder(run_dir, 7)
    assert "step 6 could not be written" in capsys.readouterr().err


def test_the_last_checkpoint_is_tried_again_if_its_first_write_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, failing = checkpoint.write_manifest, [4]

    def fail_once(path: Path, *rest: Any) -> None:
        if failing and path.name.endswith(f"{failing[0]:08d}"):
            failing.clear()
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(path, *rest)

    monkeypatch.setattr(checkpoint, "write_manifest", fail_once)
    run = [*TINY, "model=sw", "trainer.steps=4", "trainer.checkpoint_every=2", "eval.at_end=false"]
    run += ["trainer.context=64", "trainer.global_batch=2", "trainer.micro_batch=2", "trainer.progress=false"]
    assert train.main([*run, f"run_dir={tmp_path}/run"]) == 0
    assert not failing and steps_on_disk(tmp_path / "run") == [2, 4]
    assert "warning: the checkpoint of step 4 could not be written" in capsys.readouterr().err


def test_a_run_goes_on_where_latest_is_a_folder_or_cannot_be_a_link(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    latest = run_dir / "checkpoints" / "latest"
    latest.unlink()
    shutil.copytree(folder(run_dir, 2), latest)  # as scp -r and rsync -L do
    assert chosen(run_dir) == folder(run_dir, 2) and latest.resolve() == folder(run_dir, 2).resolve()
    assert capsys.readouterr().err == f"{latest} is a folder instead of a link, set aside as aside_latest\n"

    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Path, "symlink_to", refuse)
    model, optimizer = trained(0)
    checkpointer = Checkpointer(run_dir)
    checkpointer.save(3, model, optimizer, EXTRA)
    checkpointer.wait()
    assert f"warning: {latest} does not lead to the newest checkpoint (" in capsys.readouterr().err
    assert steps_on_disk(run_dir) == [2, 3] and chosen(run_dir) == folder(run_dir, 3)


# --- the command line ------------------------------------------------------------------------------------------------


def test_verify_exits_with_0_or_1_and_names_the_damaged_file(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for target in (run_dir, run_dir / "checkpoints", folder(run_dir, 1), run_dir / "checkpoints" / "latest"):
        assert checkpoint.main(["verify", str(target)]) == 0
    assert capsys.readouterr().out.count("good, step") == 6
    content = bytearray((folder(run_dir, 1) / "extra.pt").read_bytes())
    content[50] ^= 128
    (folder(run_dir, 1) / "extra.pt").write_bytes(content)
    assert checkpoint.main(["verify", str(run_dir)]) == 1
    out, err = capsys.readouterr()
    assert "step_00000001/extra.pt is damaged" in err and "step_00000002: good" in out
    assert checkpoint.main(["verify", str(folder(run_dir, 2))]) == 0
    assert checkpoint.main(["verify", str(run_dir / "nothing")]) == 1
    assert checkpoint.main(["list", str(run_dir)]) == 0
    assert checkpoint.main([]) == 2
