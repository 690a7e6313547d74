"""Claims about the tools that compare models: counts match what models hold, and one failure does not stop the rest."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from eval.bench import compare as compare_models
from eval.bench import models as bench_models
from ovq.compose import CONFIG_DIR
from ovq.errors import ConfigError
from ovq.train.loop import Trainer
from tests.helpers import MIXERS, MODELS, TINY
from tests.test_mixers import make

PNG = b"\x89PNG"
OPTIMIZER_BYTES = 3 * 4  # per parameter: the gradient and two moments, in float32


@pytest.mark.parametrize("name", MIXERS)
def test_state_bytes_in_bf16_match_what_is_held(name: str) -> None:
    mixer = make(name).to(torch.bfloat16)
    x = torch.randn(1, 45, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        for length in (5, 16, 45):
            state = mixer(x[:, :length], return_state=True)[1]
            held = sum(leaf.nbytes for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor))
            claimed = 2 * mixer.state_size(length) + 2 * mixer.float32_state(length)
            # Positions of kept entries are int64: at most a twentieth more at these narrow heads.
            assert claimed <= held <= 1.05 * claimed, f"holds {held} bytes after {length} tokens, claims {claimed}"


def test_the_table_has_every_model_and_counts_what_the_formulas_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare_models.main(["size=tiny", "context=3000", "vocab_size=100", f"out={tmp_path}"]) == 0
    shown = capsys.readouterr().out
    record = json.loads((tmp_path / "compare_models.json").read_text())
    models = {row["name"]: row for row in record["models"]}
    assert set(models) == set(MODELS) and record["models"][0]["name"] == "std_att"
    for name in MODELS:
        assert sum(line.startswith(f"{name} ") for line in shown.splitlines()) == 2  # elements and bytes
    full = models["std_att"]
    dim, layers, ffn = 128, 4, 384
    body = layers * (4 * dim * dim + 3 * dim * ffn + 2 * dim) + dim
    assert full["parameters_body"] == body and full["parameters"] == body + 2 * 100 * dim
    weights = layers * (4 * dim * dim + 3 * dim * ffn) + 100 * dim
    assert full["flops_forward"] == 2 * weights + layers * 4 * dim * 3001 / 2
    assert full["flops_training"] == 3 * full["flops_forward"]
    assert full["state_numbers"]["3000"] == layers * 2 * dim * 3000
    assert full["state_bytes"]["65536"] == 2 * layers * 2 * dim * 65536
    window, dictionary = 2 * dim * 255, 2 * 2048 * (2 * 64 + 1)  # elements per layer
    assert models["sw_ovq"]["state_bytes"]["65536"] == 2 * (2 * window + 4 * dictionary)
    assert (tmp_path / "state_size.png").read_bytes().startswith(PNG)


def test_models_of_unequal_size_are_named_and_fail_the_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["size=tiny", "models=[std_att,sw,gdn,mamba2]", f"out={tmp_path}"]
    assert compare_models.main(command) == 0
    assert compare_models.main([*command, "tolerance=0.007"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "mamba2 +0.8%" in error and "gdn" not in error and "sw" not in error


def test_the_readme_table_describes_the_current_models() -> None:
    """If this fails, run: python -m eval.bench.compare readme=true"""
    table = compare_models.readme_table()
    for name in MODELS:
        assert table.count(f"| `{name}` |") == 1
    assert compare_models.BEGIN + table + compare_models.END in compare_models.README.read_text()


def test_rewriting_a_readme_changes_only_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_models, "readme_table", lambda: "| new |\n")
    path = tmp_path / "README.md"
    path.write_text(f"before\n{compare_models.BEGIN}| old |\n{compare_models.END}after\n")
    compare_models.write_readme(path)
    assert path.read_text() == f"before\n{compare_models.BEGIN}| new |\n{compare_models.END}after\n"
    path.write_text("nothing\n")
    with pytest.raises(ConfigError, match="models: begin"):
        compare_models.write_readme(path)
    assert path.read_text() == "nothing\n"


@pytest.mark.parametrize(
    "tool,argument,words",
    [
        (compare_models, "size=7b", "size=7b is not a legal value; legal: .*tiny"),
        (compare_models, "models=[sw,sw_nop]", "'sw_nop' does not exist; legal: .*sw_nope"),
        (compare_models, "context=0", "context=0 must be"),
        (compare_models, "colour=3", "no option 'colour'; legal: size"),
        (bench_models, "models=[sw_nop]", "'sw_nop' does not exist"),
        (bench_models, "contexts=[]", r"contexts=\[\] must not be empty"),
        (bench_models, "steps=0", "steps=0 must be"),
        (bench_models, "trainer.contexts=3", "no setting 'trainer.contexts'; did you mean trainer.context"),
    ],
)
def test_bad_options_fail_in_one_line(
    tool: Any, argument: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main([argument, f"out={tmp_path}/none"]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and not captured.out and not (tmp_path / "none").exists()
    assert re.search(words, captured.err), captured.err


# --- the benchmark ---------------------------------------------------------------------------------------------------


def test_a_model_is_trained_in_its_own_process_and_measured(tmp_path: Path) -> None:
    command = ["models=[sw_ovq]", "contexts=[96]", "steps=2", "batch=2", "vocab_size=61", f"out={tmp_path}"]
    assert bench_models.main([*command, *TINY, "trainer.peak_tflops=0.5", "trainer.device=cpu"]) == 0
    record = json.loads((tmp_path / "bench_models.json").read_text())
    (row,) = record["measured"]
    assert len(row["step_s"]) == 2 and row["first_step_s"] > 0
    assert row["tokens_per_s"] == pytest.approx(2 * 96 / (sum(row["step_s"]) / 2))
    assert row["mfu"] == pytest.approx(row["tokens_per_s"] * row["flops_per_token"] / 0.5e12)
    parameters = 2 * 61 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 48)
    assert OPTIMIZER_BYTES * parameters < row["peak_memory_bytes"] < 2**30
    assert (row["model"], row["context"], row["precision"]) == ("sw_ovq", 96, "fp32")
    assert record["machine"]["torch"] == torch.__version__
    assert (tmp_path / "bench_models.png").read_bytes().startswith(PNG)


def test_one_failure_is_recorded_and_does_not_end_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"tokens_per_s": 10.0, "mfu": 0.5, "peak_memory_bytes": 2**20, "step_s": [1.0], "first_step_s": 2.0}
    good |= {"peak_tflops": 3.0, "peak_is_from": "a test", "device": "none", "precision": "fp32"}
    outcomes = {512: good, 1024: {"error": bench_models.OUT_OF_MEMORY}, 2048: good}
    calls = []

    def run_child(settings: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        calls.append((settings["context"], settings["peak_tflops"]))
        return outcomes[settings["context"]]

    monkeypatch.setattr(bench_models, "run_child", run_child)
    command = ["models=[sw]", "contexts=[512,1024,2048]", f"out={tmp_path}"]
    assert bench_models.main(command) == 0  # running out of memory is a result, not a failure
    assert calls == [(512, None), (1024, 3.0), (2048, 3.0)]  # the first child's peak is used for all
    rows = json.loads((tmp_path / "bench_models.json").read_text())["measured"]
    assert [row.get("error") for row in rows] == [None, "out of memory", None]
    outcomes[1024] = {"error": "ValueError: broken"}
    assert bench_models.main(command) == 1
    captured = capsys.readouterr()
    assert "1 of 3 failed" in captured.err and "ValueError: broken" in captured.out


@pytest.mark.parametrize(
    "outcome,error",
    [
        (subprocess.CompletedProcess([], -9, "", ""), "out of memory"),
        (
            subprocess.CompletedProcess([], 1, "", "Traceback\nImportError: no torch\n"),
            "status 1: ImportError: no torch",
        ),
        (subprocess.CompletedProcess([], 0, "", ""), "nothing on stderr"),
        (subprocess.TimeoutExpired([], 7), "timeout_s=7"),
    ],
)
def test_a_child_that_dies_says_why(outcome: Any, error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any, **__: Any) -> Any:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(subprocess, "run", run)
    assert error in bench_models.run_child({}, 7)["error"]


def settings_of(*overrides: str) -> dict[str, Any]:
    """The settings that a child process is given."""
    settings = {"model": "sw", "size": "tiny", "context": 64, "batch": 2, "vocab_size": 16, "steps": 2}
    return settings | {"peak_tflops": 1.0, "overrides": [*TINY, "trainer.device=cpu", *overrides]}


@pytest.mark.parametrize(
    "override,error",
    [
        ("model.mixers.sliding_window.window=0", "window=0 of sliding_window must be at least 1"),
        ("optim.lr=1e30", "TrainingError: step 2: loss "),
    ],
)
def test_an_error_in_the_child_is_one_line_of_json(
    override: str, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_models.child(settings_of(override)) == 0
    assert error in json.loads(capsys.readouterr().out)["error"]


def test_the_step_that_is_timed_is_the_training_loops_with_all_its_micro_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, train_step = [0.0], Trainer.train_step
    monkeypatch.setattr(bench_models.time, "perf_counter", lambda: clock[0])
    labels = []

    def half_a_second(self: Trainer, batches: Any) -> None:
        train_step(self, batches)
        labels.append(self.pending[-1].valid)
        clock[0] += 0.5

    monkeypatch.setattr(Trainer, "train_step", half_a_second)
    measured = bench_models.measure(settings_of("trainer.micro_batch=1"))
    assert labels == [2 * 64] * 3
    assert measured["step_s"] == [0.5, 0.5] and measured["first_step_s"] == 0.5
    assert measured["tokens_per_s"] == 2 * 64 / 0.5


def test_every_model_has_a_comment_that_describes_it() -> None:
    for name in MODELS:
        assert (CONFIG_DIR / "model" / f"{name}.yaml").read_text().startswith("# "), name
