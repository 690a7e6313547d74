"""Claims about checks before the first step: what is certain to fail is refused, the rest is reported in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

import train
from data.build import build_tokenizer
from data.describe import describe
from data.prepare import prepare
from data.sources import find_files
from eval import preflight
from eval.overlap import trained_on
from ovq import machine, report
from ovq.compose import compose
from ovq.config import Config
from ovq.errors import ConfigError
from ovq.model import build_model
from ovq.plan import disk_bytes, format_bytes, lacking_room
from ovq.train import claim, loop, summary
from ovq.train.checkpoint import Checkpointer
from ovq.train.ema import WeightAverage
from ovq.train.optim import build_optimizer
from tests.data_helpers import write_parquet
from tests.helpers import TINY, small_config, small_model, started

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
BASE = [
    *("model=sw", *TINY, "data=jsonl", "data.train=[books.jsonl]", "data.validation=[held-out.jsonl]"),
    *("trainer.context=16", "trainer.global_batch=2", "trainer.micro_batch=2", "trainer.device=cpu"),
    *(
        "trainer.steps=2",
        "trainer.progress=false",
        "trainer.peak_tflops=1000",
        "trainer.precision=fp32",
        "eval.context=16",
    ),
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small data sets in the current folder, and no training: a run that gets as far as training has passed."""
    monkeypatch.chdir(tmp_path)
    for name, key in (("books", "text"), ("held-out", "text"), ("no-text", "body")):
        lines = [json.dumps({key: f"document {i} " * 5}) + "\n" for i in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    (tmp_path / "file").write_text("")
    (tmp_path / "empty.jsonl").write_text("")
    monkeypatch.setattr(loop.Trainer, "fit", lambda self: {"stopped_by": "test"})
    monkeypatch.setattr(summary, "summary_text", lambda *_: "")
    report._told.clear()
    return tmp_path


@pytest.fixture(scope="module")
def base() -> Config:
    return compose(BASE)


# What is wrong -> the settings, the exit status of train.py, and what it and a dry run print.
WRONG: dict[str, tuple[list[str], int, str]] = {
    "a mistyped validation path": (["data.validation=[held-uot.jsonl]"], 2, "held-uot.jsonl"),
    "no validation files": (["data.validation=[]"], 2, "data.validation is empty"),
    "an empty validation file": (["data.validation=[empty.jsonl]"], 2, "data.validation holds no documents"),
    "a mistyped training path": (["data.train=[boks.jsonl]"], 2, "boks.jsonl"),
    "a field that is not in the validation files": (
        ["data.validation=[no-text.jsonl]"],
        2,
        "data.text_field=text is not a field of no-text.jsonl",
    ),
    "a field that is not in the training files": (
        ["data.train=[no-text.jsonl]"],
        2,
        "data.text_field=text is not a field of no-text.jsonl",
    ),
    "a run folder within a file": (["run_dir=file/run"], 2, "file/run cannot be the run folder: file is a file"),
    "more checkpoints than the disk holds": (
        ["trainer.keep_last=1000000000000"],
        2,
        "of free disk, and the checkpoints need",
    ),
    "documents shorter than what is measured": (
        ["eval.context=4096"],
        0,
        "no validation document has eval.context=4096",
    ),
    "validation documents that are trained on": (
        ["data.validation=[./books.jsonl,held-out.jsonl]"],
        0,
        "books.jsonl, is also trained on (data.train), so the loss would not be that of unseen text",
    ),
    "a vocabulary of another size": (
        ["tokenizer.vocab_size=300"],
        2,
        "tokenizer.vocab_size=300, but tokenizer=byte has 257 pieces",
    ),
    "a schedule longer than the data": (["trainer.steps=90"], 0, "trainer.steps=90 is longer than the data: about 1"),
    "a schedule longer than the documents": (
        ["trainer.steps=3", "data.packing=document"],
        0,
        "trainer.steps=3 is longer than the data: about 2 epochs of data.train (3 documents)",
    ),
    "no run to begin with": (
        ["init_from.path=nowhere"],
        2,
        "init_from=nowhere is neither a run folder nor a checkpoint",
    ),
    "no checkpoint to branch from": (["resume=nowhere"], 1, "resume=nowhere: there is no checkpoint"),
    "nothing": ([], 0, ""),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_start_finds_it_before_the_first_step_and_a_dry_run_says_it(
    wrong: str, base: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, status, says = WRONG[wrong]
    line = ["run_dir=run", *settings]
    assert started(base, *line, start=train.dry_run) == 0
    planned = capsys.readouterr()
    assert says in planned.out and planned.out.count("before it starts: ") <= 1 and planned.err == ""
    assert started(base, *line, start=train.train) == status
    shown = capsys.readouterr().err
    assert says in shown and "Traceback" not in shown
    assert len(shown.splitlines()) == (1 if says else 0)
    assert Path("run/config.yaml").exists() == (status == 0), "what is refused claims nothing"


def test_documents_of_unknown_length_are_read_until_one_is_long_enough(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(folder / "held-out.parquet", ["a" * 10, "b" * 60, "c" * 20] * 3)
    files = ["data.train=[books.parquet]", f"data.validation=[{path}]", "tokenizer=byte"]
    cfg = compose(["model=sw", "data=parquet", *files, "eval.context=60"])
    tokenizer = build_tokenizer(cfg)
    assert preflight.check_held_out(cfg, tokenizer) == []
    cfg.eval.context = 61
    (line,) = preflight.check_held_out(cfg, tokenizer)
    assert line.startswith("no validation document has eval.context=61 tokens") and "the longest has 60" in line
    monkeypatch.setattr(preflight, "LOOKED_AT", 4)
    (line,) = preflight.check_held_out(cfg, tokenizer)
    assert line.startswith("none of the first 4 validation documents has eval.context=61 tokens (the longest: 60)")


def test_a_run_folder_without_permission_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert claim.unwritable(folder / "new" / "run") == ""
    monkeypatch.setattr(claim.os, "access", lambda *_: False)  # root in a container may write anywhere
    assert claim.unwritable(folder / "new" / "run").startswith(
        f"{folder}/new/run cannot be the run folder: no permission"
    )


@pytest.mark.parametrize(
    "settings",
    [[], ["optim=muon"], ["optim.ema=0.9"], ["optim=muon", "optim.ema=0.9"], ["model.tie_embeddings=true"]],
)
def test_checkpoints_take_as_much_room_as_planned(folder: Path, settings: list[str]) -> None:
    cfg = small_config("sw", "model.dim=64", "model.ffn_dim=128", *settings)
    model = build_model(cfg.model, 500)
    model.init_weights(0)
    optimizer = build_optimizer(model, cfg)
    model(tokens := torch.arange(16)[None], targets_BT=tokens).loss.backward()
    optimizer.step()
    average = WeightAverage(model, cfg.optim.ema) if cfg.optim.ema else None
    checkpointer = Checkpointer(folder / "run")
    checkpointer.save(1, model, optimizer, {}, average)
    checkpointer.wait()
    saved = sum(file.stat().st_size for file in folder.glob("run/checkpoints/step_*/*"))
    each, most = disk_bytes(cfg, model)
    assert each <= saved <= 1.2 * each, "the rest is names and hashes"
    assert most == each * (cfg.trainer.keep_last + 1)


def test_checkpoints_that_are_there_count_as_room(base: Config, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir, model = folder / "run", small_model("sw")
    each, most = map(int, disk_bytes(base, model))
    free = shutil.disk_usage(folder)._replace(free=most - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    sizes = [format_bytes(number) for number in (most - 1, most, each)]
    assert "{} of free disk, and the checkpoints need {} ({} each".format(*sizes) in lacking_room(base, model, run_dir)
    (run_dir / "checkpoints" / "step_00000001").mkdir(parents=True)
    (run_dir / "checkpoints" / "step_00000001" / "data").write_bytes(bytes(each))
    assert lacking_room(base, model, run_dir) == ""


def test_large_files_are_looked_for_but_not_read_twice(base: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "OPENED", 10)
    monkeypatch.setattr(preflight, "build_tokens", lambda *_: pytest.fail("opened"))
    assert preflight.open_split(base, build_tokenizer(base), "validation") is None
    base = OmegaConf.merge(base, {"data": {"validation": ["held-uot.jsonl"]}})  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"held-uot\.jsonl"):
        preflight.open_split(base, build_tokenizer(base), "validation")


def test_the_held_out_files_of_every_data_set_of_a_mixture_are_opened() -> None:
    parts = [
        f"{name}: {{data: jsonl, train: [books.jsonl], validation: [{held}]}}"
        for name, held in (("a", "held-out.jsonl"), ("b", "held-uot.jsonl"), ("c", ""))
    ]
    cfg = compose(["data=mixture", f"data.mixture={{{', '.join(parts)}}}"])
    with pytest.raises(ConfigError, match=r"^data.mixture.b: data.validation: .*held-uot.jsonl: missing.*at_end=false"):
        preflight.check_held_out(cfg, build_tokenizer(cfg))
    cfg.data.mixture.b.validation = ["held-out.jsonl"]
    assert preflight.check_held_out(cfg, build_tokenizer(cfg)) == []


def test_a_dry_run_speaks_once_from_rank_0(
    base: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    spoken = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert started(base, "run_dir=run", "trainer.micro_batch=1", start=train.dry_run) == 0
        spoken.append(len(capsys.readouterr().out.splitlines()))
    assert spoken[0] > 10 and spoken[1] == 0


def test_a_hub_out_of_reach_is_asked_and_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def unreachable(repo: str, revision: Any) -> Any:
        asked.append(repo)
        raise OSError("no network")

    monkeypatch.setattr("data.sources._list_hub", unreachable)
    names = [f"data.{split}=[hf://datasets/a/b/{split}/*.parquet]" for split in ("train", "validation", "test")]
    found = describe(compose(["data=parquet", *names]))
    assert asked == ["a/b"]
    assert "no network" in found["train"]["error"]
    assert found["validation"] == found["test"] == {"error": "not looked for, see data train"}
    with pytest.raises(Exception, match="no network"):  # only `describe` does not raise
        find_files(compose(["data=parquet", *names]).data, "test")


@pytest.mark.parametrize(
    ("source", "measured_again", "achieved", "share", "told"),
    [
        (machine.MEASURED, None, 5e11, 0.5, ""),
        (machine.MEASURED, 4e12, 2e12, 0.5, ""),  # the cores were busy at the first measurement
        (machine.MEASURED, 1e12, 12.09e12, None, "so its share is left out; set trainer.peak_tflops"),
        ("trainer.peak_tflops", None, 2e12, None, "(trainer.peak_tflops), so its share is left out; it is too low"),
    ],
)
def test_no_share_of_the_peak_is_above_one(
    source: str,
    measured_again: float | None,
    achieved: float,
    share: float | None,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls = []

    def measure(*_: Any) -> float | None:
        calls.append(1)
        return measured_again

    monkeypatch.setattr(machine.measured_flops, "__wrapped__", measure)
    peak = (1e12, source)
    for _ in range(3):
        found, peak = machine.share_of_peak(achieved, peak, torch.device("cpu"), "fp32")
        assert found == share
    assert len(calls) == (measured_again is not None), "measured again once, not at every step"
    assert (shown := capsys.readouterr().err).count("left out") == bool(told) and told in shown


@pytest.mark.parametrize(
    ("train", "held_out", "meet"),
    [
        ("train", "train[90%:]", True),
        ("train[:95%]", "train[90%:]", True),
        ("train[:90%]", "train[90%:]", False),
        ("train[:100]", "train[99:]", True),
        ("train[:100]", "train[100:]", False),
        ("train[:100]", "train[90%:]", False),  # depends on the size of the split
        ("train+validation", "validation[:5%]", True),
        ("train", "validation", False),
    ],
)
def test_slices_that_share_documents_are_noticed(train: str, held_out: str, meet: bool) -> None:
    cfg = compose(["data=datasets", "data.path=x", f"data.train=['{train}']", f"data.validation=['{held_out}']"])
    assert ("are also trained on (data.train)" in trained_on(cfg, "validation")) == meet


def test_a_file_of_one_data_set_of_a_mixture_may_be_held_out_by_another(folder: Path) -> None:
    (folder / "inside").mkdir()
    (folder / "inside" / "link.jsonl").symlink_to("../held-out.jsonl")
    sources = "a: {data: jsonl, train: [inside]}, b: {data: jsonl, train: [books.jsonl], validation: [held-out.jsonl]}"
    cfg = compose(["data=mixture", f"data.mixture={{{sources}}}"])
    assert trained_on(cfg, "validation").startswith(f"1 of the 1 validation files, such as {folder}/held-out.jsonl, is")
    assert trained_on(compose(BASE), "validation") == ""


def test_copies_of_a_document_in_other_files_are_noticed_once_prepared(folder: Path) -> None:
    (folder / "others.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in ("new", "document 2 " * 5, ""))
    )
    (folder / "books.jsonl").write_text((folder / "books.jsonl").read_text() + json.dumps({"text": ""}) + "\n")
    cfg = compose(["data=jsonl", "data.train=[books.jsonl]", "data.validation=[others.jsonl]"])
    assert trained_on(cfg, "validation") == ""
    prepare(cfg, "prepared", processes=1)
    cfg = compose(["data=memmap", "data.train=[prepared]"])
    line = trained_on(cfg, "validation")
    assert line.startswith("1 of the 3 validation documents, such as prepared/validation-00000.tokens document 1, is")
    mixture = "a: {data: memmap, train: [only]}, b: {data: memmap, train: [only], validation: [prepared]}"
    prepare(compose(["data=jsonl", "data.train=[books.jsonl]"]), "only", processes=1)
    assert trained_on(compose(["data=mixture", f"data.mixture={{{mixture}}}"]), "validation") == line
    prepare(compose(["data=jsonl", "data.train=[no-text.jsonl]", "data.text_field=body"]), "another", processes=1)
    assert (
        trained_on(compose(["data=memmap", "data.train=[another]", "data.validation=[prepared]"]), "validation") == line
    )
