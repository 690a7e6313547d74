"""Claims about what a figure reuses from earlier work: only results for the same settings and text, and never fewer."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from data.tasks.recall import RecallTask
from eval.figures import declare, equal_bytes, fig4, fig5, fig7, make, measures, memory, runs, search
from eval.figures.declare import RecallOptions
from eval.figures.measures import Accuracy, Loss, Value
from eval.figures.plan import make_plan
from eval.figures.runs import FigureRun
from launch import sweep
from ovq.cli import parse
from ovq.compose import compose
from ovq.errors import ConfigError, Stopped

SHORT, LONG = declare.Test(128, 20), declare.Test(256, 20)


class Known(Accuracy):
    """A measure with given test results, on text with a given fingerprint."""

    def __init__(self, fingerprint: str, **found: float) -> None:
        self.fingerprint, self.found = fingerprint, found

    def text(self, cfg: Any) -> dict[str, str]:
        return {"train": self.fingerprint}

    def find(self, run_dir: Path, cfg: Any, step: int, test: declare.Test) -> list[Value]:
        value = self.found.get(f"at_{test.length}")
        return [] if value is None else [Value(None, document, value, 20) for document in (None, 0, 1, 2)]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run counts as trained."""
    monkeypatch.setattr(runs, "read_finished", lambda run_dir: {"step": 2, "commit": "abc"})


def run_in(folder: Path, measure: Accuracy, *settings: str) -> FigureRun:
    cfg = compose(["experiment=recall", "tokenizer=byte", *settings])
    run = FigureRun(sweep.Job([], cfg, folder / "run"), measure, folder / "records")
    run.__dict__["stored_cfg"] = cfg
    return run


def train(run: FigureRun, loss: float) -> None:
    run.run_dir.mkdir(parents=True, exist_ok=True)
    row = {"step": 1, "loss": loss, "tokens": 10, "tokens_per_s": 100.0}
    (run.run_dir / "metrics.jsonl").write_text(json.dumps(row) + "\n")


def recorded(run: FigureRun) -> dict[str, float]:
    record = run.record()
    assert record is not None
    return {name.split(":")[0]: row["values"][0][2] for name, row in record["tests"].items()}


def test_other_tests_of_a_run_are_added_to_its_record(tmp_path: Path, trained: None) -> None:
    run = run_in(tmp_path, Known("a", at_128=0.5))
    train(run, 1.0)
    run.write_record([SHORT, LONG])
    assert recorded(run) == {"accuracy at 128": 0.5}
    run = run_in(tmp_path, Known("a", at_256=0.25))
    run.write_record([SHORT, LONG])
    assert recorded(run) == {"accuracy at 128": 0.5, "accuracy at 256": 0.25}
    run = run_in(tmp_path, Known("a", at_128=0.75))
    run.write_record([declare.Test(128, 10)])
    assert recorded(run)["accuracy at 128"] == 0.5, "a test with fewer answers does not replace one with more"


def test_a_record_of_another_training_is_replaced_only_by_all_its_tests(tmp_path: Path, trained: None) -> None:
    run = run_in(tmp_path, Known("a", at_128=0.5, at_256=0.25))
    train(run, 1.0)
    run.write_record([SHORT, LONG])
    again = run_in(tmp_path, Known("a", at_128=0.75))
    train(again, 2.0)
    again.write_record([SHORT, LONG])
    assert recorded(again) == {"accuracy at 128": 0.5, "accuracy at 256": 0.25}
    again = run_in(tmp_path, Known("a", at_128=0.75, at_256=0.5))
    again.write_record([SHORT, LONG])
    assert recorded(again) == {"accuracy at 128": 0.75, "accuracy at 256": 0.5}


def test_a_record_of_other_text_or_settings_counts_for_nothing(
    tmp_path: Path, trained: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_in(tmp_path, Known("a", at_128=0.5))
    train(run, 1.0)
    run.write_record([SHORT])
    monkeypatch.setattr(runs, "read_finished", lambda run_dir: None)
    assert [value.value for value in run_in(tmp_path, Known("a")).values(SHORT)] == [0.5] * 4
    assert run_in(tmp_path, Known("b")).values(SHORT) == []
    assert run_in(tmp_path, Known("a"), "data.task.key_vocab=99").values(SHORT) == []


def test_a_record_is_found_under_another_name_and_path_of_the_same_text(
    tmp_path: Path, trained: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_in(tmp_path, Known("a", at_128=0.5))
    run.cfg.data.train = ["here"]
    train(run, 1.0)
    run.write_record([SHORT])
    monkeypatch.setattr(runs, "read_finished", lambda run_dir: None)

    def elsewhere(fingerprint: str, *settings: str) -> list[float]:
        other = run_in(tmp_path, Known(fingerprint), *settings)
        other.cfg.data.train = ["there"]
        other.job.run_dir = tmp_path / "another"
        return [value.value for value in other.values(SHORT)]

    assert elsewhere("a") == [0.5] * 4
    assert elsewhere("b") == elsewhere("a", "seed=7") == []


def test_a_run_folder_of_other_text_is_refused(tmp_path: Path, trained: None) -> None:
    class Text(Known):
        def text(self, cfg: Any) -> dict[str, str]:
            return {"test": str(cfg.data.test)}

    run = run_in(tmp_path, Text("", at_128=0.5))
    run.run_dir.mkdir()
    run.job.cfg = compose(["experiment=recall", "tokenizer=byte"])
    run.job.cfg.data.test = ["other"]
    with pytest.raises(ConfigError, match=r"was made with other text \(test\); remove it, or use another runs_root"):
        run.values(SHORT)


def test_a_run_folder_is_refused_once_its_files_hold_another_text(tmp_path: Path, trained: None) -> None:
    run = run_in(tmp_path, Known("a", at_128=0.5))
    train(run, 1.0)
    assert run.values(SHORT) and run_in(tmp_path, Known("a", at_128=0.5)).values(SHORT)
    with pytest.raises(ConfigError, match=r"was made with other text \(train\)"):
        run_in(tmp_path, Known("b", at_128=0.5)).values(SHORT)


def test_a_record_does_not_replace_that_of_another_text(tmp_path: Path, trained: None) -> None:
    run = run_in(tmp_path, Known("a", at_128=0.5))
    train(run, 1.0)
    run.write_record([SHORT])
    (run.run_dir / runs.TEXT).unlink()  # as if trained anew in a folder of the same name
    other = run_in(tmp_path, Known("b", at_128=0.25))
    other.write_record([SHORT])
    assert recorded(run) == {"accuracy at 128": 0.5}
    assert recorded(run_in(tmp_path, Known("b"))) == {"accuracy at 128": 0.25}
    assert len(list((tmp_path / "records").glob("*.json"))) == 2


def test_fewer_documents_are_the_first_ones(tmp_path: Path, trained: None) -> None:
    run = run_in(tmp_path, Known("a", at_128=0.5))
    assert [value.document for value in run.values(declare.Test(128, 2))] == [None, 0, 1]


def test_runs_that_began_with_the_same_run_elsewhere_are_the_same() -> None:
    here, there = {"init_from.path": "runs/copying,seed=0"}, {"init_from.path": "/tmp/r/copying,seed=0"}
    assert runs.same_settings(here, there)
    assert not runs.same_settings(here, {"init_from.path": "runs/copying,seed=1"})
    assert not runs.same_settings(here, {"init_from.path": None})


def test_a_task_is_identified_by_its_version_once_its_sequences_have_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = compose(["experiment=recall_64k"])
    assert Accuracy().text(cfg) == {}  # as in records from before versions were kept
    monkeypatch.setattr(RecallTask, "version", 2)
    assert Accuracy().text(cfg) == {"version of the task": "2"}


def test_text_is_identified_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one text")
    (tmp_path / "b.txt").write_text("another")

    def text(train: str) -> dict[str, str]:
        files = [f"data.{split}=[{tmp_path}/{name}.txt]" for split, name in (("train", train), ("validation", "b"))]
        return Loss().text(compose(["data=text", "tokenizer=byte", *files, f"data.test=[{tmp_path}/b.txt]"]))

    first = text("a")
    (tmp_path / "c.txt").write_text("one text")
    assert first.keys() == {"tokenizer", "train", "validation", "test"} and first["validation"] == first["test"]
    (tmp_path / "a.txt").write_text("a text changed")
    assert {name for name in first if first[name] != text("a")[name]} == {"train"}


def test_no_setting_of_the_training_reaches_a_test() -> None:
    cfg = compose(["experiment=cpu_demo", "eval.restart=64", "eval.num_centroids=32"])
    whole = measures.changed(cfg, measures.overrides(Loss(), SHORT)).eval
    assert whole.restart is None and whole.num_centroids is None
    other = declare.Test(128, 20, 8, overrides=("eval.restart=16",))
    assert measures.changed(cfg, measures.overrides(Loss(), other)).eval.restart == 16
    assert measures.changed(cfg, measures.overrides(Loss(), other)).eval.num_centroids == 8


def test_a_rate_that_changes_takes_its_run_with_it(tmp_path: Path) -> None:
    options = parse(RecallOptions, ["models=[sw]", "panels=[basic recall]", "rates=[0.001,0.01]", "records=null"])
    (line,) = make_plan(fig4.figure(options), options, [f"runs_root={tmp_path}"]).lines
    for trial in line.trials.values():
        trial.run_dir.mkdir(parents=True)
    search.note_failure(line.trials[0.01], "diverged")
    line.trials[0.001].write_score({"on": Accuracy.chosen_on, "loss": 2.0})
    assert line.final(0).cfg.optim.lr == 0.001
    line.trials[0.01].write_score({"on": Accuracy.chosen_on, "loss": 1.0})
    assert line.rate() == 0.01 and line.final(0).cfg.optim.lr == 0.01


def test_a_number_of_functions_that_is_asked_for_twice_is_tested_once() -> None:
    options = parse(fig5.Figure5Options, ["functions=[4,4]", "models=[sw]"])
    (line,) = make_plan(fig5.figure(options), options, []).lines
    assert len(line.panels[0].tests(line.cfg, line.own_capacity)) == len(line.tests) == 1


def test_what_is_compared_with_ovq_has_the_settings_of_all_runs() -> None:
    options = parse(RecallOptions, ["models=[sw_ovq,sw_fifo]"])
    overrides = ["model.num_layers=4", "model.mixers.ovq.num_centroids=128"]
    lines = make_plan(memory.figure(options, overrides), options, overrides).lines
    assert equal_bytes.capacities_of_ovq(declare.RECALL, "cpu", None, overrides)[0] == 128
    held = {line.model: [line.state(test)[1] for test in line.tests if test.length == 65536] for line in lines}
    equal = [test for test in lines[1].tests if test.label == equal_bytes.label(128) and test.length == 65536]
    assert 0.98 < lines[1].state(equal[0])[1] / min(held["sw_ovq"]) <= 1
    of_context = ["trainer.context=256"]
    chosen = parse(RecallOptions, [])
    grown = next(m for m in fig7.figure(chosen, of_context).panels[0].models if m.name == "linear_growth")
    assert "model.mixers.ovq.growth_tokens=256" in grown.overrides


def test_bytes_that_hold_no_entry_are_refused() -> None:
    wide = compose(["experiment=recall_64k", "model=sw_fifo", "model.mixers.sliding_window.window=128"])
    with pytest.raises(ConfigError, match="sw_fifo has no capacity whose state is as small as sw_ovq's with 32; ask"):
        equal_bytes.equal_capacities(declare.RECALL, "cpu", [32], wide, 256)


def test_a_part_whose_time_ends_in_a_test_stops_in_order() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="stopped by SIGTERM; the same command continues from here"), make.stopping():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_figure_5_tests_a_dictionary_as_trained_and_grown() -> None:
    options = parse(fig5.Figure5Options, ["models=[sw_ovq,sw]", "functions=[16]", "num_centroids=[1024,256]"])
    ovq, sw = sorted(make_plan(fig5.figure(options), options, []).lines, key=lambda line: line.model != "sw_ovq")
    assert [test.num_centroids for test in ovq.tests] == [None, 1024], "256 is its own"
    assert [test.num_centroids for test in sw.tests] == [None]
