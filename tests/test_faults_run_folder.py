"""Claims about run folders that are damaged, half repaired or untrusted: nothing is lost, and nothing in them runs."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch.distributed.checkpoint.state_dict import get_state_dict

import train
from data.build import build_tokenizer
from eval import per_position
from eval.run_facts import facts_of
from ovq import config, files, identity
from ovq.compose import compose
from ovq.errors import ConfigError, TrainingError
from ovq.inference import run as inference
from ovq.inference.run import RunOptions, load_run
from ovq.instantiate import is_ours
from ovq.train import checkpoint, checkpoint_choice, loop
from ovq.train.checkpoint import Checkpointer, CheckpointError, verify, write_manifest
from ovq.train.checkpoint_files import fingerprints, manifest_text, reading, step_of
from ovq.train.metrics import Metrics, read_rows, start_wandb
from tests import faults
from tests.faults import Fault
from tests.helpers import TINY, chosen, extra_of, small_config, small_model
from tests.test_toy_mixer import ADDED, MODULE
from tests.training import trainer_for

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
TASK = [
    *("data=recall", "data.task.key_vocab=16", "data.task.value_vocab=4", "eval.at_end=false"),
    *("trainer.context=32", "trainer.global_batch=4", "trainer.micro_batch=4", "trainer.device=cpu"),
    *("trainer.progress=false", "trainer.checkpoint_every=1", "optim.lr=1e-2", "optim.warmup_steps=1"),
]
RUN = ["model=sw", *TINY, *TASK]
VOCAB = 21  # vocabulary size of TASK


def folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / checkpoint.name_of(step)


def steps_on_disk(run_dir: Path) -> list[int]:
    return [step_of(path) for path in checkpoint.complete(run_dir / "checkpoints")]


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def trained(run_dir: Path, steps: int, *overrides: str, **how: Any) -> Path:
    """A run folder after `steps` steps, each with a checkpoint."""
    settings = (
        "trainer.checkpoint_every=1",
        "trainer.keep_last=9",
        f"trainer.steps={steps}",
        "optim.schedule=constant",
    )
    trainer_for(run_dir, *settings, *overrides, model="sw", **how).fit()
    return run_dir


def seal(path: Path) -> None:
    """Rewrite a checkpoint's manifest, as someone who tampers with the checkpoint would."""
    written = json.loads((path / "manifest.json").read_bytes())
    files = {k: v for name in written["files"] for k, v in fingerprints(path, name).items()}
    write_manifest(path, written["step"], files, written["seconds"])
    verify(path)


@pytest.fixture
def recall_run(tmp_path: Path) -> Path:
    """A run folder as train.py leaves it."""
    return saved(tmp_path / "run")


def saved(run_dir: Path, *overrides: str) -> Path:
    """A run folder with a checkpoint of step 1, whose weights are untrained."""
    cfg = small_config("sw", *RUN, *overrides)
    config.save(cfg, run_dir)
    tokenizer = build_tokenizer(cfg)
    tokenizer.save(run_dir / "tokenizer")
    model = small_model("sw", *RUN, vocab_size=tokenizer.vocab_size)
    extra = extra_of(1) | {"config": config.to_dict(cfg)}
    Checkpointer(run_dir, asynchronous=False).save(1, model, torch.optim.AdamW(model.parameters()), extra)
    return run_dir


# --- only data is loaded ---------------------------------------------------------------------------------------------


class Trap:
    """Creates a folder when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.made),)


def metadata_trap(run_dir: Path, made: Path) -> Path:
    file = folder(run_dir, 1) / ".metadata"
    content = pickle.loads(file.read_bytes())
    content.planner_data = Trap(made)
    file.write_bytes(pickle.dumps(content))
    return file


def extra_trap(run_dir: Path, made: Path) -> Path:
    file = folder(run_dir, 1) / "extra.pt"
    torch.save({"step": 1, "tokens": 24 * 1, "data": Trap(made)}, file)
    return file


def value_trap(run_dir: Path, made: Path) -> Path:
    """A trap in place of an optimizer value, which PyTorch's own planner unpickles without restriction."""
    model = small_model("sw", *RUN, vocab_size=VOCAB)
    model_state, optimizer_state = get_state_dict(model, torch.optim.AdamW(model.parameters()))
    moments = next(iter(optimizer_state["state"].values()))
    moments["exp_avg"] = Trap(made)  # type: ignore[index]
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder(run_dir, 1))
    return folder(run_dir, 1)


@pytest.mark.parametrize("trap", [metadata_trap, extra_trap, value_trap])
def test_a_trap_in_a_checkpoint_is_refused_by_name_at_resume_and_nothing_runs(
    recall_run: Path, tmp_path: Path, trap: Any
) -> None:
    made = tmp_path / "made"
    file = trap(recall_run, made)
    seal(folder(recall_run, 1))
    model = small_model("sw", *RUN, vocab_size=VOCAB)
    path = chosen(recall_run)
    assert path is not None  # the checksums match: only reading the file reveals the trap
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(file))} names (posix|os)\.mkdir"):
        checkpoint.load(path, model, torch.optim.AdamW(model.parameters()))
    assert not made.exists()


@pytest.mark.parametrize("trap", [metadata_trap, extra_trap])
def test_a_trap_in_a_checkpoint_is_refused_by_name_at_evaluation_and_nothing_runs(
    recall_run: Path, tmp_path: Path, trap: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "made"
    file = trap(recall_run, made)
    seal(folder(recall_run, 1))
    assert per_position.main([f"run={recall_run}"]) == 1
    assert f"error: {file} names posix.mkdir" in capsys.readouterr().err
    assert not made.exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", b"no pickle", pickle.dumps({"a": 1}), pickle.dumps([])])
def test_metadata_that_is_none_is_refused_by_name(recall_run: Path, content: bytes) -> None:
    (folder(recall_run, 1) / ".metadata").write_bytes(content)
    seal(folder(recall_run, 1))
    with pytest.raises(CheckpointError, match=r"step_00000001/\.metadata"):
        load_run(recall_run)


def test_metadata_that_points_out_of_the_checkpoint_is_refused(recall_run: Path) -> None:
    file = folder(recall_run, 1) / ".metadata"
    content = pickle.loads(file.read_bytes())
    next(iter(content.storage_data.values())).relative_path = "../../elsewhere"
    file.write_bytes(pickle.dumps(content))
    seal(folder(recall_run, 1))
    with pytest.raises(CheckpointError, match=r"\.metadata is not the metadata of a checkpoint in one folder"):
        load_run(recall_run)


def test_a_manifest_of_another_shape_is_damage(recall_run: Path) -> None:
    path = folder(recall_run, 1) / "manifest.json"
    for content in ({}, {"format": 1, "step": "1", "files": {}}, {"format": 1, "step": 1, "files": {"../x": {}}}):
        path.write_text(manifest_text(content))
        with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
            verify(folder(recall_run, 1))


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    """It has the same shapes, and what was measured with it would count as this run's."""
    runs = [saved(tmp_path / f"seed{seed}", f"seed={seed}") for seed in (0, 1)]
    with pytest.raises(ConfigError, match=r"step_00000001 is not of .*seed0; these settings differ: seed: 1 -> 0"):
        load_run(runs[0], checkpoint_at=str(folder(runs[1], 1)))
    copied = shutil.copytree(folder(runs[0], 1), tmp_path / "kept")
    assert load_run(runs[0], checkpoint_at=str(copied)).step == 1


# --- classes named by a stored config --------------------------------------------------------------------------------


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run folder whose config names a mixer of an outside module on the import path; importing it leaves a trace."""
    outside, run_dir = tmp_path / "outside", tmp_path / "run"
    outside.mkdir()
    trace = f"import pathlib\npathlib.Path({str(tmp_path / 'imported')!r}).touch()\n"
    (outside / "toy_mixer.py").write_text(trace + MODULE)
    monkeypatch.setattr(sys, "path", [str(outside), *sys.path])
    config.save(compose([*ADDED, *TINY, *TASK]), run_dir)
    yield run_dir
    sys.modules.pop("toy_mixer", None)


def test_a_class_from_outside_that_a_stored_config_names_is_not_imported(stranger: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"leaky\._target_=toy_mixer\.Leaky, which is not .* trust=\[toy_mixer\.Leaky\]"
    ):
        RunOptions(run=str(stranger)).open()
    assert not (tmp_path / "imported").exists()
    with pytest.raises(CheckpointError, match="holds no good checkpoint"):  # the config itself is accepted
        RunOptions(run=str(stranger), trust=["toy_mixer.Leaky"]).open()
    with pytest.raises(ConfigError, match="not part of this project"):
        RunOptions(run=str(stranger), trust=["toy_mixer.Other"]).open()


def test_a_report_imports_no_class_from_outside_that_is_not_trusted(stranger: Path, tmp_path: Path) -> None:
    found = facts_of(stranger)
    assert found.parameters is None and "toy_mixer.Leaky, which is not part of this project" in found.why
    assert not (tmp_path / "imported").exists()
    assert facts_of(stranger, ["toy_mixer.Leaky"]).parameters


def test_train_py_resumes_a_mixer_from_outside_as_its_command_line_names_it(stranger: Path) -> None:
    line = [*ADDED, *TINY, *TASK, f"run_dir={stranger}"]
    assert train.main([*line, "trainer.steps=1"]) == 0
    assert train.main([*line, "trainer.steps=2"]) == 0
    assert steps_on_disk(stranger) == [1, 2]
    run = load_run(stranger, trust=["toy_mixer.Leaky"])
    assert [type(mixer).__name__ for mixer in run.model.mixers()] == ["SlidingWindow", "Leaky"]


def test_what_lies_in_the_run_folder_cannot_be_imported_even_from_within(
    stranger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.move(tmp_path / "outside" / "toy_mixer.py", stranger / "toy_mixer.py")
    monkeypatch.chdir(stranger)
    for entry in ("", str(stranger), str(stranger / "checkpoints" / "..")):
        sys.path.insert(0, entry)
    model = small_model("sw", *TINY, vocab_size=VOCAB)
    Checkpointer(stranger, asynchronous=False).save(1, model, torch.optim.SGD(model.parameters()), extra_of(1))
    with pytest.raises(ConfigError, match=r"toy_mixer\.Leaky cannot be imported"):
        load_run(stranger, trust=["toy_mixer.Leaky"])
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize(
    ("target", "ours"),
    [
        ("ovq.mixers.ovq.OVQ", True),
        ("data.tasks.recall.RecallTask", True),
        ("data.tasks.RecallTask", True),
        ("os.system", False),
        ("ovq_like.mixers.OVQ", False),
        ("ovq.mixers.nothing.OVQ", False),
        ("ovq.files.os.PathLike", False),
        ("data.runs.stranger.Mixer", False),
        ("eval.plot.Curve", False),
        ("ovq./tmp/evil.Mixer", False),
        ("OVQ", False),
        ("", False),
    ],
)
def test_ours_is_what_lies_in_the_packages(target: str, ours: bool, tmp_path: Path) -> None:
    assert is_ours(target, tmp_path) == ours


def test_a_run_folder_among_the_packages_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ovq.instantiate.ROOT", tmp_path)
    run_dir = tmp_path / "data" / "runs"
    run_dir.mkdir(parents=True)
    for file in (
        tmp_path / "data/__init__.py",
        tmp_path / "data/mine.py",
        run_dir / "__init__.py",
        run_dir / "evil.py",
    ):
        file.touch()
    assert is_ours("data.mine.Task", run_dir)
    assert not is_ours("data.runs.evil.Task", run_dir)
    (run_dir / "__init__.py").unlink()
    assert not is_ours("data.runs.evil.Task", tmp_path / "another run")  # not one of our packages


# --- secrets ---------------------------------------------------------------------------------------------------------


def test_text_from_the_environment_is_stored_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("SEED", "7")
    monkeypatch.setenv("TEAM", "team")
    line = ["logger.project=${oc.env:HF_TOKEN}", "logger.entity=${logger.project}", "seed=${oc.env:SEED}"]
    cfg = compose([*line, "logger.tags=['${oc.env:TEAM}',${name}]"])
    assert cfg.logger.project == cfg.logger.entity == "hf_secret"
    stored = config.save(cfg, tmp_path).read_text()
    assert "hf_secret" not in stored and "${oc.env:HF_TOKEN}" in stored and "hf_secret" not in str(config.to_dict(cfg))
    assert config.to_dict(cfg)["logger"]["tags"] == ["${oc.env:TEAM}", "default"]
    assert config.to_dict(cfg)["seed"] == 7  # a number is no secret, and affects the results
    made = config.load(tmp_path)
    assert identity.changed(made, cfg) == []
    assert list(made.logger.tags) == ["${oc.env:TEAM}", "default"]


def test_a_stored_config_reads_nothing_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgres://secret")
    monkeypatch.setenv("TEAM", "team")
    config.save(compose(["logger.project=${oc.env:DATABASE_URL}", "logger.entity=x-${oc.env:TEAM}"]), tmp_path)
    allowed = config.load(tmp_path, trust=["oc.env:TEAM"])
    assert (allowed.logger.project, allowed.logger.entity) == ("${oc.env:DATABASE_URL}", "x-team")
    monkeypatch.delenv("TEAM")
    made = config.load(tmp_path)
    assert (made.logger.project, made.logger.entity) == ("${oc.env:DATABASE_URL}", "x-${oc.env:TEAM}")
    again = copy.deepcopy(made)
    assert again.logger.project == "${oc.env:DATABASE_URL}"


@pytest.mark.parametrize(
    "text",
    [
        r"http://evil/\${oc.env:HF_TOKEN}${oc.env:HF_TOKEN}",
        r"${oc.decode:'\${oc.env:HF_TOKEN}'}${oc.env:HF_TOKEN}",
        r"a\\${oc.env:HF_TOKEN}",
        r"${oc.select:${oc.env:HF_TOKEN},x}",
        r"${oc.env:${oc.env:HF_TOKEN},${oc.env:HF_TOKEN}}",
    ],
)
def test_no_nesting_or_escaping_makes_a_stored_config_read_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", "sekret")
    values = config.to_dict(compose(["model=sw"]))
    values["data"]["validation"] = [text]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    try:
        made = config.load(tmp_path, trust=())
    except ConfigError as error:
        assert "sekret" not in str(error)
    else:
        assert "sekret" not in str(list(made.data.validation)) + str(config.to_dict(made))
        assert "sekret" not in str(list(copy.deepcopy(made).data.validation))


def test_no_secret_is_in_a_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret_7f3a")
    run_dir = tmp_path / "run"
    assert train.main([*RUN, "trainer.steps=1", "logger.tags=['${oc.env:HF_TOKEN}']", f"run_dir={run_dir}"]) == 0
    assert checkpoint.read_extra(folder(run_dir, 1))["config"]["logger"]["tags"] == ["${oc.env:HF_TOKEN}"]
    for file in run_dir.rglob("*"):
        assert not file.is_file() or b"hf_secret_7f3a" not in file.read_bytes(), file


def test_wandb_is_shown_the_config_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    shown: dict[str, Any] = {}
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=shown.update))  # type: ignore[arg-type]
    start_wandb(tmp_path, compose(["logger=wandb", "runs_root=${oc.env:HF_TOKEN}"]))
    assert shown["config"]["runs_root"] == "${oc.env:HF_TOKEN}" and "hf_secret" not in str(shown)


def test_an_unset_variable_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*RUN, "logger.project=${oc.env:NOT_SET_ANYWHERE}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "logger.project" in line and "NOT_SET_ANYWHERE" in line


# --- no good checkpoint ----------------------------------------------------------------------------------------------


def test_all_damaged_is_refused_at_every_start_and_the_record_stays(tmp_path: Path) -> None:
    run_dir = trained(tmp_path / "run", 3)
    for step in (1, 2, 3):
        faults.flip(folder(run_dir, step) / "__0_0.distcp", 900)
    before, record = names(run_dir), (run_dir / "metrics.jsonl").read_bytes()
    for _ in range(3):  # as a requeued job does
        with pytest.raises(
            CheckpointError, match=r"every checkpoint in .* is damaged \(the newest: .*step_00000003/__0_0\.distcp"
        ):
            trained(run_dir, 4)
        assert names(run_dir) == before and (run_dir / "metrics.jsonl").read_bytes() == record


def test_only_set_aside_ones_is_refused_and_following_the_advice_works(tmp_path: Path) -> None:
    run_dir = trained(tmp_path / "run", 2)
    for step in (1, 2):
        checkpoint.set_aside(folder(run_dir, step))
    record = (run_dir / "metrics.jsonl").read_bytes()
    for _ in range(2):
        with pytest.raises(CheckpointError, match="holds only checkpoints that were set aside .*aside_step_00000002"):
            trained(run_dir, 3)
    assert (run_dir / "metrics.jsonl").read_bytes() == record
    trained(run_dir, 3, resume=str(run_dir / "checkpoints" / "aside_step_00000002"))
    assert steps_on_disk(run_dir) == [3]
    assert read_rows(run_dir / "metrics.jsonl")[:2] == [json.loads(line) for line in record.splitlines()]


def test_resume_never_is_refused_where_checkpoints_were_set_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [*RUN, "trainer.steps=1", f"run_dir={tmp_path}"]
    assert train.main(line) == 0
    checkpoint.set_aside(folder(tmp_path, 1))
    assert train.main([*line, "resume=never"]) == 2
    assert "resume=never, but" in capsys.readouterr().err and (tmp_path / "metrics.jsonl").stat().st_size


# --- branching -------------------------------------------------------------------------------------------------------


def test_a_requeued_branch_goes_on_from_its_own_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = trained(tmp_path / "run", 6)
    whole = [row["loss"] for row in read_rows(run_dir / "metrics.jsonl")]
    for resume in (str(folder(run_dir, 2)), str(run_dir / "checkpoints" / "latest" / ".." / "step_00000002")):
        branch = tmp_path / f"branch {len(resume)}"
        trained(branch, 3, resume=resume)
        capsys.readouterr()
        trained(branch, 5, resume=resume)
        assert f"has branched from {resume} already and resumes from {folder(branch, 3)}" in capsys.readouterr().err
        trained(branch, 6, resume=resume)
        assert names(branch) == [".lock", "latest", "origin.json", *(f"step_{n:08d}" for n in (3, 4, 5, 6))]
        assert [row["loss"] for row in read_rows(branch / "metrics.jsonl")] == whole[2:]


def test_a_requeued_branch_in_its_own_folder_goes_on_from_what_it_made(tmp_path: Path) -> None:
    run_dir = trained(tmp_path / "run", 4)
    resume = str(folder(run_dir, 2))
    assert chosen(run_dir, resume) == folder(run_dir, 2)
    assert steps_on_disk(run_dir) == [1, 2]
    trained(run_dir, 3, resume=resume)
    assert chosen(run_dir, resume) == chosen(run_dir) == folder(run_dir, 3)
    assert [name for name in names(run_dir) if name.startswith("aside")] == [
        "aside_step_00000003",
        "aside_step_00000004",
    ]
    # The same after the checkpoint it branched from is removed, as keep_last does, and after the run is moved.
    shutil.rmtree(folder(run_dir, 1))
    shutil.rmtree(folder(run_dir, 2))
    assert chosen(run_dir, resume) == folder(run_dir, 3)
    moved = run_dir.rename(tmp_path / "moved")
    assert chosen(moved) == folder(moved, 3)


def test_a_branch_from_a_moving_latest_is_made_once(tmp_path: Path) -> None:
    other = trained(tmp_path / "other", 2)
    latest = str(other / "checkpoints" / "latest")
    branch = trained(tmp_path / "branch", 3, resume=latest)
    trained(other, 5)
    assert chosen(branch, latest) == folder(branch, 3) and steps_on_disk(branch) == [3]


def test_a_branch_killed_before_its_first_checkpoint_starts_from_its_origin_again(tmp_path: Path) -> None:
    run_dir, branch = trained(tmp_path / "run", 2), tmp_path / "branch"
    assert chosen(branch, str(folder(run_dir, 2))) == folder(run_dir, 2)
    assert chosen(branch, "auto") == folder(run_dir, 2)  # not step 0
    shutil.rmtree(folder(run_dir, 2))
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        chosen(branch, "auto")


def test_a_branch_never_falls_back_to_another_history(tmp_path: Path) -> None:
    run_dir, other = trained(tmp_path / "run", 4), trained(tmp_path / "other", 3, "seed=1")
    trained(other, 5, resume=str(folder(run_dir, 3)))
    assert steps_on_disk(other) == [4, 5]  # its own checkpoints, from another history, were set aside
    for step in (4, 5):
        faults.truncate(folder(other, step) / "extra.pt", 10)
    assert chosen(other) == folder(run_dir, 3)


def test_a_branch_killed_before_it_is_recorded_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = trained(tmp_path / "run", 4)
    resume = str(folder(run_dir, 2))
    with monkeypatch.context() as patch:
        patch.setattr("ovq.train.checkpoint_choice.write_whole", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            chosen(run_dir, resume)
    assert chosen(run_dir, resume) == folder(run_dir, 2) and steps_on_disk(run_dir) == [1, 2]


def test_a_damaged_record_of_the_origin_is_named(tmp_path: Path) -> None:
    run_dir = trained(tmp_path / "run", 2)
    chosen(run_dir, str(folder(run_dir, 1)))
    faults.truncate(run_dir / "checkpoints" / "origin.json", 20)
    with pytest.raises(CheckpointError, match=r"origin\.json is damaged"):
        chosen(run_dir)


# --- metrics.jsonl ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("byte", [0xFF, 0x00, ord("\n")])
def test_a_damaged_line_of_the_metrics_is_dropped_and_reported_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], byte: int
) -> None:
    run_dir = trained(tmp_path / "run", 4)
    path = run_dir / "metrics.jsonl"
    content = bytearray(path.read_bytes())
    content[content.index(b'"step": 2') + 1] = byte
    path.write_bytes(content)
    capsys.readouterr()
    trained(run_dir, 5)
    damaged = 2 if byte == ord("\n") else 1
    reported = [line for line in capsys.readouterr().err.splitlines() if "metrics.jsonl" in line]
    assert reported == [
        f"{path}: {damaged} damaged line(s) dropped; 1 step(s) up to step 4 have no line (2); training is not affected"
    ]
    assert [row["step"] for row in read_rows(path)] == [1, 3, 4, 5]
    trained(run_dir, 6)
    assert "damaged line" not in capsys.readouterr().err


def test_lines_missing_from_the_metrics_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(1, 21)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines[:4] + lines[10:18]) + "\n" + lines[19][:7])
    Metrics(tmp_path, small_config("sw"), start_step=20).close()
    assert "8 step(s) up to step 20 have no line (5, 6, 7, 8, 9, ...)" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 20, "eval/loss": 1.0}\n{"step": 21, "lo')
    Metrics(tmp_path, small_config("sw"), start_step=20).close()
    assert capsys.readouterr().err == ""  # a last line cut short by a kill is expected


# --- non-finite states are not saved ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [["trainer.checkpoint_every=1"], ["trainer.nonfinite=skip", "trainer.checkpoint_every=3"]]
)
def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, settings: list[str]) -> None:
    trained(tmp_path, 2)
    overrides = ["trainer.keep_last=9", "trainer.steps=6", "optim.lr=1e39", "optim.warmup_steps=0", *settings]
    with pytest.raises(TrainingError) as caught:
        trainer_for(tmp_path, *overrides, model="sw").fit()
    message = str(caught.value)
    assert re.search(r"^after step 3, embed\.weight \(and \d+ more\) is not finite\. This state was not saved", message)
    assert f"the last good checkpoint is {folder(tmp_path, 2)}" in message
    assert steps_on_disk(tmp_path) == [1, 2] and chosen(tmp_path) == folder(tmp_path, 2)


def test_a_moment_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, "trainer.steps=1", model="sw")
    trainer.fit()
    parameter = next(iter(trainer.model.parameters()))
    trainer.optimizer.state[parameter]["exp_avg_sq"].view(-1)[-1] = float("inf")
    with pytest.raises(TrainingError, match=r"^after step 2, exp_avg_sq of embed\.weight is not finite"):
        trainer.checkpointer.save(2, trainer.model, trainer.optimizer, extra_of(2))
    assert steps_on_disk(tmp_path) == [1] and not list((tmp_path / "checkpoints").glob("saving_*"))


def test_large_finite_weights_are_saved(tmp_path: Path) -> None:
    model = small_model("sw")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(3e38)
    Checkpointer(tmp_path, asynchronous=False).save(1, model, torch.optim.SGD(model.parameters()), extra_of(1))
    assert steps_on_disk(tmp_path) == [1]


def test_the_advice_after_a_divergence_can_be_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "default,lr=1e-2"  # a name like those that train.py generates
    line = [*RUN, "trainer.steps=4"]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "lr_at", lambda step, cfg: 1e38 if step > 2 else 1e-2)
        assert train.main([*line, f"run_dir='{run_dir}'"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    resume = next(word for word in shlex.split(error) if word.startswith("resume="))
    assert "optim.lr" in error and "another run_dir" in error
    new = tmp_path / "new"
    assert train.main([*line, "optim.lr=1e-3", resume, f"run_dir={new}"]) == 0, capsys.readouterr().err
    assert [row["step"] for row in read_rows(new / "metrics.jsonl")] == [3, 4]
    assert train.main([*line, "trainer.nonfinite=skip", f"run_dir='{run_dir}'"]) == 0  # the error's other suggestion


# --- repaired at the next start --------------------------------------------------------------------------------------


def run(command: list[str], **how: Any) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=faults.ROOT, env=environment, capture_output=True, text=True, **how)


def test_a_kill_between_rename_and_link_is_repaired_at_the_next_start(tmp_path: Path) -> None:
    settings = [*RUN, "trainer.steps=4", "trainer.keep_last=1", f"run_dir={tmp_path}"]
    killed = run(faults.command([Fault("renamed", 3, "kill")], settings))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    root = tmp_path / "checkpoints"
    assert steps_on_disk(tmp_path) == [2, 3] and os.readlink(root / "latest") == "step_00000002"
    (root / "latest").unlink()
    (root / "latest").symlink_to("step_00000001")  # older still, and dangling
    assert chosen(tmp_path, keep_last=1) == folder(tmp_path, 3)
    assert steps_on_disk(tmp_path) == [3] and os.readlink(root / "latest") == "step_00000003"


def test_temporary_files_of_killed_writers_are_removed_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    run_dir = trained(tmp_path / "run", 1)
    writer = "import sys, time; from ovq.files import replacing\n"
    writer += "with replacing(sys.argv[1]) as p: p.write_text('half'); print(p.name, flush=True); input()"
    (run_dir / "plots").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", writer, str(run_dir / "plots" / "a.png")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=faults.ROOT,
    ) as process:
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        chosen(run_dir)
        assert (run_dir / "plots" / name).exists()
        process.kill()
    (run_dir / "metrics.jsonl.0123abcd.tmp").touch()  # from an earlier version: its name has no writer
    (run_dir / "mine.tmp").touch()
    chosen(run_dir)
    assert sorted(path.name for path in run_dir.rglob("*.tmp")) == ["metrics.jsonl.0123abcd.tmp", "mine.tmp"]
    os.utime(run_dir / "metrics.jsonl.0123abcd.tmp", (0, 0))
    chosen(run_dir)
    assert [path.name for path in run_dir.rglob("*.tmp")] == ["mine.tmp"]


# --- diagnosis -------------------------------------------------------------------------------------------------------


def test_a_disk_full_on_both_of_two_ranks_is_called_so_with_the_ranks(tmp_path: Path) -> None:
    settings = [*RUN, "trainer.micro_batch=2", "trainer.steps=2", f"run_dir={tmp_path}"]
    ended = run(faults.command([Fault("write", 2, "full", rank=None)], settings, processes=2), timeout=120)
    assert ended.returncode != 0
    assert "unexpected pos" not in ended.stderr and "inline_container" not in ended.stderr
    assert re.search(
        r"error: rank \d: the checkpoint of step 2 .*\(rank 0, 1: the disk is full: .*step_00000001 is intact",
        ended.stderr,
    )
    assert steps_on_disk(tmp_path) == [1]


@pytest.mark.parametrize(
    "content", ["", "model: [", "- 1", "model: {pattern: 3}", "seed: zero", "a: 1", "data: {kind: 2}"]
)
def test_a_damaged_config_is_named_and_following_the_advice_works(
    recall_run: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    path = recall_run / "config.yaml"
    before = path.read_text()
    path.write_text(content)
    assert per_position.main([f"run={recall_run}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {path} cannot be used: ") and "move it away: the command that trained" in line
    if content == "":
        path.unlink()
        small_config("sw", *RUN)
        assert train.main([*RUN, "trainer.steps=1", f"run_dir={recall_run}", "dry_run=true"]) == 0
        config.save(small_config("sw", *RUN), recall_run)
        assert path.read_text() == before


def test_a_checkpoint_that_is_being_evaluated_is_not_removed_by_the_trainer(recall_run: Path) -> None:
    with contextlib.ExitStack() as lease:
        assert inference.choose(recall_run, None, lease) == folder(recall_run, 1)
        trainer = Checkpointer(recall_run, keep_last=1, asynchronous=False)
        model = small_model("sw", *RUN, vocab_size=VOCAB)
        optimizer = torch.optim.AdamW(model.parameters())
        trainer.save(2, model, optimizer, extra_of(2))
        assert steps_on_disk(recall_run) == [1, 2]
        checkpoint.load(folder(recall_run, 1), model)
    trainer.save(3, model, optimizer, extra_of(3))
    assert steps_on_disk(recall_run) == [3]


def test_a_checkpoint_removed_while_it_is_chosen_gives_way_to_the_newer_one(
    recall_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """keep_last=1: between finding and locking, the trainer saves its next checkpoint and removes the one found."""
    model = small_model("sw", *RUN, vocab_size=VOCAB)

    @contextlib.contextmanager
    def slow(path: Path) -> Iterator[None]:
        if path == folder(recall_run, 1):
            trainer = Checkpointer(recall_run, keep_last=1, asynchronous=False)
            trainer.save(2, model, torch.optim.AdamW(model.parameters()), extra_of(2))
        with reading(path):
            yield

    monkeypatch.setattr(checkpoint_choice, "reading", slow)
    assert load_run(recall_run).step == 2
    assert steps_on_disk(recall_run) == [2]


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_work(
    recall_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(inference, "load_run", None)  # the work: calling it would fail
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        status = per_position.main([f"run={recall_run}"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 2
    assert f"the results would go to {recall_run}, which cannot be written to" in capsys.readouterr().err
    assert not list(recall_run.glob("*.tmp")) and not list(recall_run.glob(".writable*"))
    with pytest.raises(OSError, match="No such file|Permission|Read-only"):
        files.check_writable("/proc/self")
