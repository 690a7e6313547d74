"""Claims about starting from another run's weights, and about training for more steps than planned."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import ovq
import ovq.config
import train
from ovq import cpu, processes
from ovq.compose import compose, run_dir_of
from ovq.config import to_dict
from ovq.errors import ConfigError
from ovq.train import checkpoint_choice, warm_start
from ovq.train.checkpoint_files import prune
from ovq.train.ema import WeightAverage
from ovq.train.schedule import check_extension, lr_at
from tests.helpers import TINY

RUN = [
    *(
        "data=builtin",
        "tokenizer=byte",
        *TINY,
        "trainer.device=cpu",
        "trainer.progress=false",
        "trainer.precision=fp32",
    ),
    *("trainer.context=32", "trainer.global_batch=2", "trainer.micro_batch=2", "eval.at_end=false"),
]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in ovq.load(run_dir).module.state_dict().items()}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("first") / "run"
    assert train.main([*RUN, "model=sw_nope", "trainer.steps=2", f"run_dir={run_dir}"]) == 0
    return run_dir


@pytest.mark.parametrize("source", ["run", "checkpoint"])
def test_a_run_begins_with_the_weights_of_another(
    first: Path, tmp_path: Path, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = first if source == "run" else next((first / "checkpoints").glob("step_*"))
    # A learning rate of 0 leaves the initial weights unchanged; context, batch and rate may differ.
    line = [*RUN, "model=sw_nope", "trainer.steps=1", "optim.lr=0", "trainer.context=64", f"init_from={path}"]
    assert train.main([*line, f"run_dir={tmp_path}/second"]) == 0
    before, after = weights(first), weights(tmp_path / "second")
    assert all(torch.equal(before[name], after[name]) for name in before) and before.keys() == after.keys()
    assert f"began with {len(list(ovq.load(first).module.parameters()))} of " in capsys.readouterr().err
    # From then on it is a run of its own: it resumes from its own checkpoint.
    assert train.main([*line[:-1], "trainer.steps=2", line[-1], f"run_dir={tmp_path}/second"]) == 0
    assert "resumed from" in capsys.readouterr().err


def test_a_swapped_mixer_is_named_and_taken_as_far_as_it_fits(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [*RUN, "model=sw_gdn", "trainer.steps=1", "optim.lr=0", f"init_from={first}"]
    assert train.main([*line, f"run_dir={tmp_path}/strict"]) == 2
    said = capsys.readouterr().err
    assert "do not fit this model" in said and "layers.1.mixer" in said and "init_from.strict=false" in said
    assert said.count("\n") == 1
    assert train.main([*line, "init_from.strict=false", f"run_dir={tmp_path}/loose"]) == 0
    said = capsys.readouterr().err
    assert "began with" in said and "not there: layers.1.mixer.g_proj" in said
    before, after = weights(first), weights(tmp_path / "loose")
    assert torch.equal(before["embed.weight"], after["embed.weight"])
    assert torch.equal(before["layers.1.mlp.out_proj.weight"], after["layers.1.mlp.out_proj.weight"])
    assert not [name for name in after if not torch.isfinite(after[name]).all()]


def test_weights_that_fit_another_mixer_or_come_from_another_seed_are_said_to(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An exchange of mixers whose weights have the same names and shapes would otherwise go unnoticed."""
    line = [*RUN, "trainer.steps=1", f"init_from={first}", "init_from.strict=false"]
    assert train.main([*line, "model=sw_nope", f"run_dir={tmp_path}/same"]) == 0
    said = capsys.readouterr().err
    assert "began with" in said and "they were trained" not in said and "seed of their run" not in said
    assert train.main([*line, "model=sw_fifo", "seed=1", f"run_dir={tmp_path}/other"]) == 0
    said = capsys.readouterr().err
    assert "; they were trained with FullAttention; the seed of their run was 0" in said


def test_what_cannot_be_begun_with_is_one_line(first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = [*RUN, "model=sw_nope", "trainer.steps=1", f"run_dir={tmp_path}/run"]
    assert train.main([*line, f"init_from={tmp_path}/nothing"]) == 2
    said = capsys.readouterr().err
    assert f"init_from={tmp_path}/nothing is neither a run folder nor a checkpoint" in said and said.count("\n") == 1
    card = first / "tokenizer" / "tokenizer.json"
    text = card.read_text()
    try:
        card.write_text(text.replace("byte:1", "byte:2"))
        assert train.main([*line, f"init_from={first}"]) == 2
    finally:
        card.write_text(text)
    assert "was trained with another tokenizer" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named_and_an_older_one_taken(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "damaged"
    shutil.copytree(first, run)
    good = run / "checkpoints" / "step_00000002"
    newer = shutil.copytree(good, good.with_name("step_00000003")) / "__0_0.distcp"
    newer.write_bytes(newer.read_bytes()[:1000])
    line = [*RUN, "model=sw_nope", "trainer.steps=1", f"init_from={run}"]
    assert train.main([*line, f"run_dir={tmp_path}/a"]) == 0
    said = capsys.readouterr().err
    assert f"{newer} is damaged: 1000 bytes" in said and f"weights of {good}\n" in said
    shutil.rmtree(good)
    assert train.main([*line, f"run_dir={tmp_path}/b"]) == 1
    said = capsys.readouterr().err
    assert f"init_from={run} holds no good checkpoint ({newer} is damaged" in said and said.count("\n") == 1


def test_a_checkpoint_that_a_trainer_replaces_meanwhile_is_not_the_one_taken(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(first, tmp_path / "run")
    old = run / "checkpoints" / "step_00000002"
    new, verify = old.with_name("step_00000003"), checkpoint_choice.verify

    def replaced(path: Path) -> dict[str, Any]:
        if path == old:  # between the look at the folder and this one
            old.rename(new)
        return verify(path)

    monkeypatch.setattr(checkpoint_choice, "verify", replaced)
    with contextlib.ExitStack() as lease:
        assert warm_start.find(run, lease) == new
        shutil.copytree(new, new.with_name("step_00000004"))
        prune(run / "checkpoints", keep_last=1)
        assert new.is_dir(), "leased"
    prune(run / "checkpoints", keep_last=1)
    assert not new.is_dir()


def test_a_head_of_its_own_does_not_overwrite_a_shared_embedding(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [*RUN, "model=sw_nope", "trainer.steps=1", "optim.lr=0", "model.tie_embeddings=true", f"init_from={first}"]
    assert train.main([*line, f"run_dir={tmp_path}/strict"]) == 2
    said = capsys.readouterr().err
    assert "has a head other than its embedding, and model.tie_embeddings=true" in said and said.count("\n") == 1
    assert train.main([*line, "init_from.strict=false", f"run_dir={tmp_path}/loose"]) == 0
    before, after = weights(first), weights(tmp_path / "loose")
    assert torch.equal(before["embed.weight"], after["head.weight"])
    # From a run that shares them, too, both are taken without a question.
    line[-1] = f"init_from={tmp_path}/loose"
    assert train.main([*line, f"run_dir={tmp_path}/shared"]) == 0
    assert torch.equal(weights(tmp_path / "shared")["head.weight"], after["head.weight"])


def test_a_rank_without_rows_does_not_take_a_separate_head_for_a_shared_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shards of an embedding are empty on some ranks if it has fewer rows than there are ranks."""
    empty = {name: torch.empty(0, 8) for name in warm_start.TIED}
    assert warm_start._shared(empty)  # as far as this rank can see
    monkeypatch.setattr(processes, "any_flag", lambda flag: True)  # another rank sees more
    assert not warm_start._shared(empty)


def test_averaged_weights_begin_with_those_of_the_other_run(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WeightAverage, "update", lambda *_: None)  # as if the first step were skipped
    line = [*RUN, "model=sw_nope", "trainer.steps=1", "optim.ema=0.9", f"init_from={first}"]
    assert train.main([*line, f"run_dir={tmp_path}/second"]) == 0
    averaged = ovq.load(tmp_path / "second", weights="ema").module.state_dict()
    assert all(torch.equal(value, averaged[name]) for name, value in weights(first).items())


def test_the_short_form_names_the_run_folder_and_is_the_long_one() -> None:
    cfg = compose(["init_from=runs/a"])
    assert cfg.init_from.path == "runs/a" and cfg.init_from.strict
    assert run_dir_of(cfg, ["init_from=runs/a"]) != run_dir_of(cfg, ["init_from=runs/b"])


def test_more_steps_do_not_raise_the_rate_unasked() -> None:
    def config(*settings: str) -> ovq.config.Config:
        return compose(["optim.warmup_steps=10", "optim.lr=1e-3", "trainer.steps=200", *settings])

    def extend(step: int, before: int, *settings: str, was: tuple[str, ...] | None = None) -> None:
        saved = config(f"trainer.steps={before}", *(settings if was is None else was))
        check_extension(config(*settings), to_dict(saved), step)

    with pytest.raises(ConfigError, match="^trainer.steps: 100 -> 200: the learning rate would jump from 0.0001 to"):
        extend(100, 100)
    extend(100, 100, "trainer.allow_rate_jump=true")
    extend(100, 200)
    extend(100, 400), "fewer steps lower the rate"
    extend(0, 100, "optim.schedule=inverse_sqrt", "optim.warmup_steps=0"), "no step has been made"
    extend(100, 100, "optim.schedule=constant")
    extend(80, 100, "optim.schedule=wsd"), "before its decay"
    with pytest.raises(ConfigError, match="wsd"):
        extend(90, 100, "optim.schedule=wsd")
    assert lr_at(100, config()) > 5e-4
    with pytest.raises(ConfigError, match="^trainer.steps=200, but the run is already at step 201; give at least as"):
        extend(201, 400)


def test_a_run_with_a_decay_keeps_the_checkpoint_that_it_can_be_extended_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [*RUN, "model=sw", "optim.warmup_steps=0", "optim.schedule=wsd", "optim.decay_share=0.6"]
    line += ["trainer.checkpoint_every=1", "trainer.keep_last=1"]
    assert train.main([*line, "trainer.steps=5", f"run_dir={tmp_path}/run"]) == 0
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*"))
    assert kept == ["step_00000002", "step_00000005"]
    branch = [f"resume={tmp_path}/run/checkpoints/{kept[0]}", f"run_dir={tmp_path}/longer"]
    capsys.readouterr()
    assert train.main([*line, "trainer.steps=8", *branch]) == 0
    assert "resumed from" in capsys.readouterr().err


def test_a_branch_is_compared_with_the_rates_that_the_run_had() -> None:
    def branch(step: int, was: list[str], now: list[str]) -> None:
        given = ["optim.warmup_steps=10", "optim.lr=1e-3"]
        check_extension(compose([*given, *now]), to_dict(compose([*given, *was])), step)

    constant = ["optim.schedule=constant", "trainer.steps=1000"]
    branch(1000, constant, ["optim.schedule=wsd", "trainer.steps=1200"])  # the rate begins to fall
    branch(1000, ["trainer.steps=1000"], ["optim.lr=1e-4", "trainer.steps=2000"])  # 1e-4 -> 5.9e-5
    branch(1000, constant, [*constant, "optim.lr=2e-3"])  # the rise that was asked for
    with pytest.raises(ConfigError, match=r"cosine -> constant.* jump from 0.0001 to 0.001 at step 1000"):
        branch(1000, ["trainer.steps=1000"], ["optim.schedule=constant", "trainer.steps=2000"])
    with pytest.raises(ConfigError, match=r"^optim.min_lr_ratio: 0.1 -> 1.0: the learning rate would jump from 0.000"):
        branch(900, ["trainer.steps=1000"], ["trainer.steps=1000", "optim.min_lr_ratio=1"])


def test_a_finished_run_with_more_steps_stops_before_the_jump(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [*RUN, "model=sw", "optim.warmup_steps=0", f"run_dir={tmp_path}/run"]
    assert train.main([*line, "trainer.steps=2"]) == 0
    capsys.readouterr()
    assert train.main([*line, "trainer.steps=4"]) == 2
    said = capsys.readouterr().err
    assert "the learning rate would jump" in said and said.count("\n") == 1
    assert train.main([*line, "trainer.steps=4", "trainer.allow_rate_jump=true"]) == 0


def test_a_run_that_goes_on_in_another_precision_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [*RUN, "model=sw", "optim.schedule=constant", "trainer.precision=auto", f"run_dir={tmp_path}/run"]
    for steps, chosen, says in ((1, "fp32", False), (2, "bf16", True), (3, "bf16", False)):
        monkeypatch.setattr(cpu, "choose_precision", lambda _, chosen=chosen: chosen)
        assert train.main([*line, f"trainer.steps={steps}"]) == 0
        said = "trainer.precision=auto is bf16 here, and the run has computed in fp32 so far" in capsys.readouterr().err
        assert said == says
