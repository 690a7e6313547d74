"""Claims about reports: a plot, table, print or service that fails is reported in one line and does not end the run."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train
from eval import loss_table, per_position, plot
from ovq import config, report
from ovq.errors import TrainingError
from ovq.processes import World
from ovq.train import loop, metrics, summary
from ovq.train.metrics import read_rows
from tests.helpers import TINY, small_config

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
ROOT = Path(__file__).resolve().parent.parent
RUN = [
    *("model=sw", *TINY, "data=text", "trainer.context=16", "trainer.global_batch=2", "trainer.micro_batch=2"),
    *("trainer.steps=2", "trainer.eval_every=1", "trainer.device=cpu", "trainer.progress=false"),
    *("eval.context=16", "eval.documents=2", "eval.piece=16", "trainer.peak_tflops=1000", "trainer.precision=fp32"),
]


@pytest.fixture(autouse=True)
def nothing_told() -> Iterator[None]:
    report._told.clear()
    yield
    report._told.clear()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A training command without its run folder; the current folder holds only the data."""
    monkeypatch.chdir(tmp_path)
    for name in ("train", "held-out"):
        (tmp_path / f"{name}.txt").write_text("a text that is long enough for a row of it, " * 9)
    return [*RUN, "data.train=[train.txt]", "data.validation=[held-out.txt]"]


def fail(error: BaseException) -> Any:
    def failing(*_: Any, **__: Any) -> None:
        raise error

    return failing


class Throws:
    """A wandb run that accepts the first row and raises `error` from then on."""

    def __init__(self, error: BaseException) -> None:
        self.error, self.rows = error, 0

    def log(self, *_: Any, **__: Any) -> None:
        self.rows += 1
        if self.rows > 1:
            raise self.error

    finish = log


# What fails while an evaluation is stored, with which error, and the one line that reports it.
PLOT, TABLES = "the plot of the evaluation: not made", "the tables of the evaluation: not made"
FAULTS: dict[str, tuple[Any, str, BaseException, str]] = {
    "a plot raises": (plot, "loss_by_position", RuntimeError("no fonts"), f"{PLOT} (no fonts)"),
    "a plot lacks a library": (plot.style, "figure", ImportError("no matplotlib"), f"{PLOT} (no matplotlib)"),
    "a plot finds a full disk": (
        plot.style,
        "save",
        OSError(28, "No space left"),
        f"{PLOT} ([Errno 28] No space left)",
    ),
    "wandb ends the process": (per_position, "show_in_wandb", SystemExit("no key"), f"{PLOT} (no key)"),
    "a table raises": (loss_table, "write", ValueError("bad schema"), f"{TABLES} (bad schema)"),
    "a table finds a full disk": (loss_table, "write", OSError(28, "No space left"), f"{TABLES} ([Errno 28] No space"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_evaluation_that_cannot_be_stored_is_told_once_and_its_numbers_are_kept(
    fault: str, run: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, name, error, told = FAULTS[fault]
    cfg = small_config("sw", *run)
    config.save(cfg, "run")
    means = {kind: np.ones((1, len(make(16)) - 1)) for kind, make in per_position.EDGES.items()}
    monkeypatch.setattr(per_position, "measure", lambda *_, **__: per_position.Measurement(means, 1, 16, 16.0, 9, 0))
    with monkeypatch.context() as broken:
        broken.setattr(module, name, fail(error))
        for step in (1, 2):
            results = per_position.evaluate(None, cfg, None, World(), Path("run"), step, lambda: False)  # type: ignore[arg-type]
            assert results is not None and results["loss"] == 1.0
    shown = capsys.readouterr().err
    assert shown.count(told) == 1 == len(shown.splitlines())
    assert "make it later: python -m eval." in shown
    if told.startswith(PLOT):
        assert followed(shown) == [0] and Path("run/plots/loss_by_position_16.png").is_file()


def test_an_evaluation_without_memory_names_what_to_change(run: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(per_position, "measure", fail(torch.OutOfMemoryError("CUDA out of memory")))
    cfg = small_config("sw", *run, "eval.batch=3")
    with pytest.raises(TrainingError, match=r"smaller eval.batch \(now 3\) or eval.piece \(now 16\), or with eval.at"):
        per_position.evaluate(None, cfg, None, World(), Path("run"), 1, lambda: False)  # type: ignore[arg-type]


def followed(shown: str) -> list[int]:
    """Run the eval.plot commands that lines of stderr recommend; returns their exit statuses."""
    advice = [line.partition("make it later: python -m eval.plot ")[2] for line in shown.splitlines()]
    return [plot.main(shlex.split(words)) for words in advice if words]


def test_a_run_whose_every_report_fails_finishes(
    run: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(plot, "loss_by_position", fail(RuntimeError("no fonts")))
        broken.setattr(metrics, "start_wandb", lambda *_: Throws(RuntimeError("429")))
        broken.setattr(summary, "summary_text", fail(KeyError("memory")))
        assert train.main([*run, "run_dir=run", "logger=wandb"]) == 0
    shown = capsys.readouterr().err
    for told in (PLOT, "logger=wandb failed, continuing without it: 429", "the summary on the screen: not made"):
        assert shown.count(told) == 1
    assert json.loads(Path("run/summary.json").read_bytes())["evaluation"]["eval/documents"] == 1
    assert [row["step"] for row in read_rows("run/metrics.jsonl") if "eval/loss" in row] == [1, 2]
    assert followed(shown) == [0] and Path("run/plots/loss_by_position_16.png").is_file()


def test_a_summary_is_stored_before_it_is_printed(run: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary, "summary_text", fail(UnicodeEncodeError("ascii", "\xf6", 0, 1, "not ASCII")))
    summary.finish({"stopped_by": None, "step": 1}, None, Path("größe"))  # type: ignore[arg-type]
    assert json.loads(Path("größe/summary.json").read_bytes())["step"] == 1


@pytest.mark.parametrize("error", [RuntimeError("no key"), SystemExit("no key")])
def test_wandb_that_fails_in_mid_run_is_left_behind_in_one_line(
    error: BaseException, run: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(metrics, "start_wandb", lambda *_: Throws(error))
    log = metrics.Metrics("run", small_config("sw", *run, "logger=wandb"))
    for step in range(1, 5):
        log.log({"step": step, "loss": 1.0})
    log.close()
    assert capsys.readouterr().err == "logger=wandb failed, continuing without it: no key\n"
    assert [row["step"] for row in read_rows("run/metrics.jsonl")] == [1, 2, 3, 4]


def test_a_logger_that_never_finishes_is_not_waited_for(
    run: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    released, codes = threading.Event(), []

    class Uploading:
        def log(self, *_: Any, **__: Any) -> None:
            pass

        def finish(self, exit_code: int) -> None:
            codes.append((exit_code, Path("run/summary.json").exists()))
            released.wait()

    monkeypatch.setattr(metrics, "start_wandb", lambda *_: Uploading())
    monkeypatch.setattr(metrics, "FINISH_S", 0.1)
    monkeypatch.setattr(metrics, "FAILED_S", 0.1)
    line = [*run, "run_dir=run", "logger=wandb", "trainer.progress=false"]
    with monkeypatch.context() as broken:
        broken.setattr(loop.Trainer, "_run", fail(TrainingError("lost")))
        assert train.main(line) == 1
    assert train.main(line) == 0
    released.set()
    assert codes == [(1, False), (0, True)]
    assert capsys.readouterr().err.count("logger=wandb has not finished within 0 s; not waiting\n") == 2


def test_a_run_folder_that_stdout_cannot_encode_is_trained_in_and_summed_up(tmp_path: Path) -> None:
    """With PYTHONIOENCODING=ascii, and MPLBACKEND as Jupyter exports it, without its package."""
    code = (
        "import sys; from pathlib import Path; from ovq.cli import guarded; from eval import report_page, style\n"
        "def work():\n"
        "    assert '<svg' in report_page.svg(lambda path: style.save(style.figure()[0], path))\n"
        "    fig, _ = style.figure()\n"
        "    print(style.save(fig, Path('gr\\u00f6\\u00dfe') / 'a.png'))\n"
        "sys.exit(guarded(work))"
    )
    env = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT), "MPLBACKEND": "module://no.such.backend"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.strip() == "gr\\xf6\\xdfe/a.png"
    assert (tmp_path / "größe" / "a.png").is_file()


def test_an_interruption_is_no_failure_of_a_report() -> None:
    with pytest.raises(KeyboardInterrupt), report.reporting("a plot"):
        raise KeyboardInterrupt
