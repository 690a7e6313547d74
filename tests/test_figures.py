"""Claims about the figures: rates are chosen on separate sequences, runs are shared, and missing results are named."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import random
import shutil
import signal
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import train
from data.builtin import BuiltinCorpus
from data.tasks.base import TEST
from data.train_tokenizer import train_sentencepiece
from eval import answers
from eval.accuracy import TABLE
from eval.figures import (
    caption,
    declare,
    equal_bytes,
    fig4,
    fig5,
    fig6,
    fig6_code,
    fig7,
    fig8,
    make,
    measures,
    memory,
    memory_pg19,
    panels,
    search,
    sensitivity,
)
from eval.figures.declare import (
    COPYING,
    LABELS,
    LOOKUP,
    PG19,
    POSITIONAL,
    RECALL,
    REGRESSION_4,
    REGRESSION_16,
    Figure,
    Model,
    Panel,
    Point,
    RecallOptions,
)
from eval.figures.measures import Accuracy
from eval.figures.plan import make_plan
from eval.figures.runs import SCORE, FigureRun, minutes_of
from launch import sweep
from ovq import config, identity
from ovq.cli import parse
from ovq.compose import compose
from ovq.errors import ConfigError

SMALL = [
    *("model.num_layers=2", "model.dim=16", "model.num_heads=1", "model.num_kv_heads=1", "model.head_dim=16"),
    *("model.ffn_dim=16", "data.task.short_steps=0", "trainer.steps=2", "trainer.global_batch=4"),
    *("trainer.micro_batch=4", "trainer.device=cpu", "trainer.precision=fp32", "optim.warmup_steps=1"),
]
COPYING_SMALL = replace(COPYING, overrides=("trainer.steps=2", "data.task.symbols=128", "trainer.device=cpu"))
LABELS_SMALL = replace(LABELS, overrides=("trainer.steps=2", "data.task.short_steps=0", "trainer.device=cpu"))
LOOKUP_SMALL = replace(LOOKUP, overrides=("trainer.steps=2", "data.task.short_steps=0", "trainer.device=cpu"))
KEYS = ["data.task.key_vocab=64", "data.task.value_vocab=8", "trainer.context=64"]
FEW = ["seeds=[0]", "rates=[0.001,0.01]", "search_share=0.5", "answers=20"]
BASIC = [*FEW, "lengths=[64,128]", "num_centroids=[8]", "models=[sw,sw_ovq]"]


OPTIONS = [*(f"Figure{number}Options" for number in (8, 6, 5)), "RecallOptions"]
FOLDERS = {"out": "out", "runs_root": "runs", "records": "records"}


class Ended:
    """A process that has ended."""

    def __init__(self, status: int) -> None:
        self.returncode = status

    def poll(self) -> int:
        return self.returncode


@pytest.fixture
def trained_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains in this process, which takes a tenth of the time that a new process takes."""

    def start(job: sweep.Job, slot: list[int], at_once: int) -> Ended:
        job.status = "running"
        job.run_dir.mkdir(parents=True, exist_ok=True)
        with job.log.open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            return Ended(train.main([*job.overrides, "trainer.progress=false"]))

    monkeypatch.setattr(sweep, "start", start)
    monkeypatch.setattr(sweep, "POLL_S", 0)


def line_of(tmp_path: Path, *options: str) -> list[str]:
    folders = [f"{name}={tmp_path}/{folder}" for name, folder in FOLDERS.items()]
    return [*folders, *options, *SMALL]


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


def files(folder: Path) -> dict[str, bytes]:
    """Contents of the runs' metrics.jsonl, by run folder; training a run again changes them."""
    return {path.parent.name: path.read_bytes() for path in folder.glob("*/metrics.jsonl")}


@pytest.mark.slow
@pytest.mark.usefixtures("trained_here")
def test_figure_4_leaves_a_folder_that_can_be_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fig4, "POSITIONAL", replace(POSITIONAL, first={"cpu": LOOKUP_SMALL}))
    used: list[int] = []
    sequences = answers.sequences_for_test

    def noted(task: Any, length: int, *, seed: int, rows: int, batch: int) -> Any:
        used.append(seed)
        return sequences(task, length, seed=seed, rows=rows, batch=batch)

    monkeypatch.setattr(answers, "sequences_for_test", noted)
    monkeypatch.setattr(measures, "ANSWERS", 20)
    with monkeypatch.context() as stopped:
        stopped.setattr(measures.accuracy, "measure", interrupted_after(3))
        assert fig4.main(line_of(tmp_path, *BASIC, *KEYS)) == 130
    assert used == [measures.CHOOSING_SEED] * 8 + [answers.TEST_SEED] * 3
    trained = files(tmp_path / "runs")
    assert {path.stem for path in (tmp_path / "records").iterdir()} == set(trained), "what was done before is recorded"
    made = {path: TABLE.read(path) for path in (tmp_path / "runs").iterdir()}
    assert sum(row["index"] is None for rows in made.values() for row in rows) == 3

    used.clear()
    out = tmp_path / "out"
    assert fig4.main(line_of(tmp_path, *BASIC, *KEYS, "only_draw=true")) == 1 and not used
    text = (out / "caption.md").read_text()
    assert "## Missing" in text and "- basic recall: sw_ovq, seed 0 (3 of 4 tests not made)" in text
    assert len([row for row in rows_of(out / "fig4.csv") if not row["index"]]) == 3

    assert fig4.main(line_of(tmp_path, *BASIC, *KEYS)) == 0
    assert used == [answers.TEST_SEED] * 9, "a test is made once: 12 of them, 3 before the interruption"
    assert files(tmp_path / "runs") == trained
    assert all(TABLE.read(path)[: len(rows)] == rows for path, rows in made.items())
    used.clear()
    picture = (out / "fig4.svg").read_bytes()
    assert fig4.main(line_of(tmp_path, *BASIC, *KEYS)) == 0 and not used
    assert (out / "fig4.svg").read_bytes() == picture

    rows = [row for row in rows_of(out / "fig4.csv") if not row["index"]]
    assert [(r["model"], r["length"], r["num_centroids"]) for r in rows if r["panel"] == "basic recall"] == [
        *(("sw", "64", ""), ("sw", "128", "")),
        *(("sw_ovq", "64", "256"), ("sw_ovq", "128", "256"), ("sw_ovq", "64", "8"), ("sw_ovq", "128", "8")),
    ]
    assert {row["panel"] for row in rows} == {"basic recall", "positional recall"} and len(rows) == 12
    ovq = next(row for row in rows if row["model"] == "sw_ovq")
    assert (ovq["window"], ovq["pattern"], ovq["train_length"], ovq["tokens"]) == (
        "4",
        "sliding_window ovq",
        "64",
        "512",
    )
    assert int(ovq["parameters"]) > 1000 and int(ovq["state_bytes"]) > 2 * int(ovq["state_numbers"])
    assert ovq["seed"] == "0" and float(ovq["rate"]) in (0.001, 0.01) and int(ovq["count"]) >= 20

    trials = rows_of(out / "rates.csv")
    assert len(trials) == 8 and all(row["scored_on"] == Accuracy.chosen_on for row in trials)
    assert {row["train_seed"] for row in trials} == {str(search.TRAIN_SEED)}
    for first, second in zip(trials[::2], trials[1::2]):
        lower = first if float(first["loss"]) <= float(second["loss"]) else second
        assert [row["chosen"] for row in (first, second)] == [str(row is lower) for row in (first, second)]
        shown = [r for r in rows if (r["panel"], r["model"]) == (lower["subject"], lower["model"])]
        assert {float(row["rate"]) for row in shown} == {float(lower["rate"])}
    plan = json.loads((out / "plan.json").read_text())
    assert len(plan["trials"]) == 8 and len(plan["runs"]) == 4 and not plan["missing"]
    assert all(run["command"].startswith("python train.py experiment=") for run in plan["runs"].values())
    assert plan["machine"]["command"] and plan["machine"]["date"] and plan["commit"]
    text = (out / "caption.md").read_text()
    for words in ("Scale cpu", "training seed 0", plan["commit"], plan["machine"]["date"], "differs from the paper"):
        assert words in text
    assert "| 64 | 2 | 512 |" in text and "Missing" not in text and "At an edge of the grid" in text
    assert (out / "fig4.png").stat().st_size > 20000 and "<svg" in (out / "fig4.svg").read_text()

    stored = tmp_path / "runs" / ovq["run"] / "config.yaml"
    stored.write_text(stored.read_text().replace("value_vocab: 8", "value_vocab: 9"))
    assert fig4.main(line_of(tmp_path, *BASIC, *KEYS)) == 2
    assert "was made with other settings (data.task.value_vocab: 9 -> 8)" in capsys.readouterr().err


def interrupted_after(count: int) -> Any:
    """`measure`, but as if Ctrl-C were pressed after `count` calls."""
    measure, calls = measures.accuracy.measure, iter(range(count))

    def measured(*args: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return measure(*args)

    return measured


@pytest.mark.slow
@pytest.mark.usefixtures("trained_here")
def test_figure_8_shares_its_runs_with_figure_4_and_names_a_failed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measures, "ANSWERS", 20)
    monkeypatch.setattr(fig8, "REGRESSION_4", replace(REGRESSION_4, first={"cpu": LABELS_SMALL}))
    monkeypatch.setattr(fig4, "POSITIONAL", replace(POSITIONAL, first={"cpu": LOOKUP_SMALL}))
    one = [*FEW, "lengths=[64]", "num_centroids=[]"]
    assert fig4.main(line_of(tmp_path, *one, "models=[sw_ovq]", "trainer.context=192")) == 0
    before = files(tmp_path / "runs")
    tested = {path: TABLE.read(path) for path in (tmp_path / "runs").glob("recall_64k*")}
    begin = sweep.start

    def start(job: sweep.Job, slot: list[int], at_once: int) -> Any:
        if "model=sw_linear" in job.overrides and "seed=0" in job.overrides:
            job.overrides = [*job.overrides, "trainer.no_such_setting=1"]
        return begin(job, slot, at_once)

    monkeypatch.setattr(sweep, "start", start)
    line = line_of(tmp_path, *one, "models=[sw_ovq,sw_linear]", "functions=[4,16]", "trainer.context=192")
    assert fig8.main(line) == 1
    said = capsys.readouterr()
    assert "basic recall: sw_linear, seed 0 (its training failed)" in said.err and "no_such_setting" in said.err
    after = files(tmp_path / "runs")
    assert before and {name: after[name] for name in before} == before
    assert all(TABLE.read(path) == rows for path, rows in tested.items())
    rows = rows_of(tmp_path / "out" / "fig8.csv")
    assert {row["model"] for row in rows} == {"sw_ovq"}
    assert {row["run"] for row in rows if row["panel"] == "basic recall"} <= set(before)
    assert [row["test"] for row in rows if row["panel"].startswith("regression") and not row["index"]] == [
        "4 functions", "16 functions"
    ]  # fmt: skip
    text = (tmp_path / "out" / "caption.md").read_text()
    assert "- regression, 4 functions: sw_linear, seed 0 (its training failed)" in text
    assert "missing: regression, 4 functions: sw_linear, seed 0" in (tmp_path / "out" / "fig8.svg").read_text()

    monkeypatch.setattr(sweep, "start", begin)
    assert fig8.main(line) == 0
    assert {row["model"] for row in rows_of(tmp_path / "out" / "fig8.csv")} == {"sw_ovq", "sw_linear"}


@pytest.mark.slow
@pytest.mark.usefixtures("trained_here")
def test_figure_5_draws_accuracy_by_example_for_every_number_of_functions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measures, "ANSWERS", 20)
    monkeypatch.setattr(fig5, "REGRESSION_16", replace(REGRESSION_16, first={"cpu": LABELS_SMALL}))
    line = line_of(tmp_path, *FEW, "models=[sw,std_att]", "seeds=[0,1]", "functions=[4,20]", "trainer.context=432")
    assert fig5.main([*line, "data.task.dimensions=4", "data.task.distinct=false"]) == 0
    begun = begun_with(tmp_path / "runs")
    assert len(begun) == 2 * (2 + 2) and len({*begun.values()}) == 2 * 3, "trials, runs; by model and seed"
    assert all(config.load(first).data.task["distinct"] is False for first in begun.values())
    rows = rows_of(tmp_path / "out" / "fig5.csv")
    assert {(row["test"], row["length"]) for row in rows} == {("4 functions", "108"), ("20 functions", "540")}
    for test in ("4 functions", "20 functions"):
        for model in ("sw", "std_att"):
            for seed in ("0", "1"):
                found = [r for r in rows if (r["test"], r["model"], r["seed"]) == (test, model, seed)]
                assert [row["index"] for row in found] == ["", "1", "2"]
    assert "without earlier examples" in (tmp_path / "out" / "fig5.svg").read_text()  # in a comment, above its paths


def test_minutes_of_training_count_all_tokens_of_a_step() -> None:
    rows = [{"tokens": 10 * step, "tokens_per_s": speed} for step, speed in ((1, 50.0), (2, 100.0), (3, None))]
    assert minutes_of(rows, 6000) == 2 + 1  # most tokens of a task have no label


@pytest.mark.slow
@pytest.mark.usefixtures("trained_here")
def test_records_replace_runs_of_the_same_settings_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measures, "ANSWERS", 20)
    line = line_of(tmp_path, *FEW, "lengths=[64]", "num_centroids=[8]", "models=[sw_ovq,random_seeding]", *KEYS)
    assert fig7.main(line) == 0
    out, records = tmp_path / "out", tmp_path / "records"
    shown = (out / "fig7.csv").read_text(), (out / "rates.csv").read_text()
    written = [json.loads(path.read_text()) for path in records.iterdir()]
    record = next(record for record in written if "seeding=random" in record["command"])
    assert record["command"].startswith("python train.py experiment=recall_64k") and record["training"]["commit"]
    assert len(record["tests"]) == 2 and record["training"]["losses"][-1] == [2, record["training"]["last_loss"]]

    shutil.rmtree(tmp_path / "runs")
    for path in records.iterdir():  # as if it had been written before these settings existed
        older = json.loads(path.read_text())
        assert older["settings"].pop("model.mixers.ovq.seed") == 0 and older["settings"].pop("optim.eps") > 0
        path.write_text(json.dumps(older))
    with monkeypatch.context() as nothing:
        nothing.setattr(sweep, "start", lambda *_: pytest.fail("nothing may start"))
        assert fig7.main(line) == 0
        assert ((out / "fig7.csv").read_text(), (out / "rates.csv").read_text()) == shown
        assert not (tmp_path / "runs").exists()

    started: list[list[str]] = []
    begin = sweep.start

    def start(job: sweep.Job, slot: list[int], at_once: int) -> Any:
        started.append(job.overrides)
        return begin(job, slot, at_once)

    monkeypatch.setattr(sweep, "start", start)
    assert fig7.main([*line, "answers=40"]) == 0
    assert len(started) == 2, "a record with too few answers is not enough, but its learning rate is"
    assert all("seed=0" in overrides for overrides in started)
    started.clear()
    shutil.rmtree(tmp_path / "runs")
    assert fig7.main([*line, "data.task.value_vocab=9"]) == 0
    assert len(started) == 4, "a record of other settings counts for nothing"


def begun_with(runs: Path) -> dict[Path, Path]:
    """Run folder -> the run folder whose weights it started from, for the runs that have one."""
    found = {path.parent: config.load(path.parent).init_from.path for path in runs.glob("*/config.yaml")}
    return {run: Path(first) for run, first in found.items() if first}


def test_a_model_may_need_more_steps_for_its_initial_weights() -> None:
    slow = Model("std_att", first=("trainer.steps=1500",))
    panel = Panel(POSITIONAL.name, POSITIONAL, (Model("sw"), Model("sw_nope"), slow), lambda cfg, own: [])
    figure = Figure("a", "A", (panel,), {"cpu": 1}, (), lambda figure, points: None)
    plan = make_plan(figure, declare.Options(), [])
    steps = [line.first.cfg.trainer.steps for line in plan.lines if line.first]
    assert steps == [500, 500, 1500]
    names = {line.model: first.run_dir.name for line in plan.lines if (first := line.beginning(0))}
    assert names["std_att"] == "lookup,model=std_att,seed=0,lr=0.003,steps=1500"
    (sentence, _) = caption.beginnings(plan)
    assert sentence.count("`std_att`") == 1 and "500 steps, 4,096,000 tokens" in sentence
    assert "; for `std_att`, on lookup (`experiment=lookup`: 1,500 steps" in sentence


def test_figure_6_tests_the_committed_capacities_unless_told_otherwise() -> None:
    with (Path(__file__).parents[1] / "docs/results/fig6/fig6.csv").open(newline="") as file:
        shown = {int(row["num_centroids"]) for row in csv.DictReader(file) if row["model"] == "sw_ovq"}
    for arguments, wanted in (([], shown), (["num_centroids=[64]"], {512, 64})):
        options = parse(fig6.Figure6Options, ["models=[sw_ovq]", *arguments])
        (panel,) = fig6.figure(options).only(None, options.models).panels
        tests = panel.tests(compose(["experiment=pg19_cpu", "model=sw_ovq"]), 512)
        assert {test.num_centroids or 512 for test in tests} == wanted


@pytest.mark.slow
@pytest.mark.usefixtures("trained_here")
def test_figure_6_pairs_models_document_by_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "DOCUMENTS", 2)
    settings = [text for text in SMALL if "task" not in text]
    folders = [f"{name}={tmp_path}/{folder}" for name, folder in FOLDERS.items()]
    few = ["seeds=[0]", "rates=[0.001,0.01]", "search_share=0.5", "length=256", "documents=3", "num_centroids=[8]"]
    few.append("restart=16")
    monkeypatch.setattr(fig6, "PG19", replace(PG19, first={"cpu": COPYING_SMALL}))
    pieces = tmp_path / "pieces.model"
    train_sentencepiece(iter(BuiltinCorpus("train").read(0).text.split("\n")), 384, pieces)
    text = ["data=builtin", f"tokenizer.model_path={pieces}", "trainer.context=64"]
    line = [*folders, *few, "models=[sw,sw_nope,sw_ovq]", *text, *settings]
    assert fig6.main(line) == 0
    begun = begun_with(tmp_path / "runs")
    assert len(begun) == 3 * (2 + 1) and len({*begun.values()}) == 3 * 2, "trials, runs; by model and seed"
    for run, first in begun.items():
        assert first.parent == tmp_path / "runs"
        own, of_first = (config.load(folder) for folder in (run, first))
        assert (own.model.pattern, own.seed) == (of_first.model.pattern, of_first.seed)
        assert f"weights of {first}" in (run / "sweep.log").read_text()
    before = files(tmp_path / "runs")
    assert fig6.main(line) == 0 and files(tmp_path / "runs") == before
    rows = rows_of(tmp_path / "out" / "fig6.csv")
    assert {row["document"] for row in rows} == {"0", "1", "2"}
    assert {(row["model"], row["num_centroids"]) for row in rows} == {
        ("sw", ""), ("sw_nope", ""), ("sw_ovq", "512"), ("sw_ovq", "8")
    }  # fmt: skip
    by_hand: dict[str, dict[str, float]] = {"sw": {}, "sw_nope": {}}
    assert {row["test"] for row in rows} == {"", "context withheld"}
    for row in rows:
        if row["model"] in by_hand and int(row["index"]) >= 128 and not row["test"]:
            of = by_hand[row["model"]]
            of[row["document"]] = of.get(row["document"], 0.0) + float(row["value"]) * int(row["count"]) / 128
    gains = [by_hand["sw_nope"][document] - by_hand["sw"][document] for document in ("0", "1", "2")]
    text_of_caption = (tmp_path / "out" / "caption.md").read_text()
    row = next(row for row in text_of_caption.splitlines() if row.startswith("| sw_nope |") and "±" in row)
    shown = [float(cell.strip(" *").split(" ±")[0]) for cell in row.split("|")[2:-1]]
    errors = [float(cell.strip(" *").split(" ± ")[1]) for cell in row.split("|")[2:-1]]
    assert shown[-1] == pytest.approx(1000 * statistics.fmean(gains), abs=0.06)
    assert errors[-1] == pytest.approx(1000 * statistics.stdev(gains) / 3**0.5, abs=0.06)
    assert "What the context is worth" in text_of_caption
    trials = rows_of(tmp_path / "out" / "rates.csv")
    assert {row["scored_on"] for row in trials} == {"documents of the validation split"}


def test_a_text_needs_a_tokenizer_of_the_size_of_the_weights_that_its_runs_begin_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fig6.main([f"out={tmp_path}", "data=builtin", "tokenizer=byte", "dry_run=true"]) == 2
    assert "has 257 ids, but runs on PG19 begin with weights for 2,048; train one with" in capsys.readouterr().err
    assert fig6_code.main([f"out={tmp_path}", "scale=gpu"]) == 2
    assert "scale=gpu: fig6_code is made at cpu only" in capsys.readouterr().err


def test_differences_between_documents_cancel_in_pairs() -> None:
    generator = random.Random(0)
    books = [generator.gauss(0, 1) for _ in range(20)]

    def point(model: str, document: int, seed: int, loss: float) -> Point:
        blank: dict[str, Any] = {item.name: 0 for item in dataclasses.fields(Point)}
        here = {"model": model, "document": document, "seed": seed, "value": loss, "index": 0, "count": 2, "test": ""}
        return Point(**(blank | {"num_centroids": None} | here))

    points = [point("sw", d, s, 4 + book + 0.1 * s) for d, book in enumerate(books) for s in (0, 1)]
    gains = [0.01 + generator.gauss(0, 0.001) for _ in books]
    points += [
        point("sw_nope", d, s, 4 + book + 0.1 * s - gain)
        for d, (book, gain) in enumerate(zip(books, gains))
        for s in (0, 1)
    ]
    points.append(point("sw_nope", 99, 0, 100.0))
    mean = fig6.differences(points, (0, 128))["sw_nope", None]
    assert mean.documents == 20, "a document that sw was not tested on is left out"
    assert mean.value == pytest.approx(-statistics.fmean(gains))
    assert mean.error == pytest.approx(statistics.stdev(gains) / 20**0.5)
    assert fig6.differences(points, (128, 512)) == {}

    points += [point("sw_ovq", d, s, 4 + book + 0.3 * s) for d, book in enumerate(books) for s in (0, 1)]
    lines = [line.split(" | ") for line in fig6.findings(points) if ", seed " in line]
    assert [line[0] for line in lines] == [f"| {m}, seed {s}" for m in ("sw_nope", "sw_ovq") for s in (0, 1)]
    assert [line[1] for line in lines[2:]] == ["+0.0 ± 0.0 |", "+200.0 ± 0.0 |"]
    assert not [line for line in fig6.findings([p for p in points if p.seed == 0]) if ", seed " in line]
    without = [p for p in points if (p.model, p.seed) != ("sw_ovq", 1)]
    assert list(fig6.labels(points).values()) == ["sw", "sw_nope", "sw_ovq"]
    assert list(fig6.labels(without).values()) == ["sw", "sw_nope", "sw_ovq (seed 0)"]
    assert any(line.startswith("| sw_ovq (seed 0) | ") for line in fig6.findings(without))

    withheld = [replace(p, test=fig6.WITHHELD, value=p.value + (0.02 if p.model == "sw_nope" else 0)) for p in points]
    worth = fig6.worth(points + withheld, (0, 128))
    assert worth["sw_nope", None].value == pytest.approx(0.02) and worth["sw", None].value == 0
    assert fig6.differences(points + withheld, (0, 128))["sw_nope", None] == mean


def test_a_model_may_have_trials_as_long_as_its_runs() -> None:
    options = replace(parse(fig8.Figure8Options, []), panels=["basic recall"], models=["sw_gdn", "gdn_sw"])
    behind, before = make_plan(fig8.figure(options), options, []).lines
    assert behind.cfg.trainer.steps == before.cfg.trainer.steps == 800
    assert (behind.trial_cfg.trainer.steps, before.trial_cfg.trainer.steps) == (240, 800)
    assert behind.trial_cfg.data.task.short_steps == 108 and before.trial_cfg == before.cfg
    assert list(before.cfg.model.pattern) == [*reversed(behind.cfg.model.pattern)]


def test_shares_of_full_attentions_gain_take_the_same_seeds() -> None:
    blank: dict[str, Any] = {item.name: 0 for item in dataclasses.fields(Point)} | {"num_centroids": None, "test": ""}

    def points(model: str, *gains: float) -> list[Point]:
        here = [(document, seed, gain) for document in range(4) for seed, gain in enumerate(gains)]
        return [
            Point(**(blank | {"model": model, "document": d, "seed": s, "value": 4 + d - gain + 0.001 * d, "count": 2}))
            for d, s, gain in here
        ]

    made = points("sw", 0, 0) + points("sw_nope", 0.2, 0.4) + points("sw_ovq", 0.1, 0.2) + points("sw_vq", 0.05)
    found = fig6.shares(made, (0, 128), "sw")
    assert found == {("sw_ovq", None): "50%", ("sw_vq", None): "25%"}, "of the gain of seed 0 for a single seed"
    assert fig6.shares(made, (0, 128), fig6.RECENT) == {}
    assert any(line.startswith("The gain over `sw` as a share of `sw_nope`'s") for line in fig6.findings(made))
    losing = points("sw", 0, 0) + points("sw_nope", -0.2, -0.2) + points("sw_ovq", 0.1, 0.1)
    assert fig6.shares(losing, (0, 128), "sw") == {("sw_ovq", None): "-"}
    assert not any("as a share" in line for line in fig6.findings(losing))


@pytest.mark.parametrize("scale", ["cpu", "gpu", "paper"])
def test_all_memories_are_trained_with_ovqs_number_of_entries(scale: str) -> None:
    options = parse(RecallOptions, [f"scale={scale}"])
    lines = make_plan(memory.figure(options), options, []).lines
    held = {
        mixer[key]
        for line in lines
        for mixer in line.cfg.model.mixers.values()
        for key in ("num_centroids", "num_codes", "capacity")
        if key in mixer
    }
    assert len(lines) == 6 and len(held) == 1


def test_memories_of_equal_bytes_take_at_most_those_of_ovq() -> None:
    options = parse(RecallOptions, [])
    plan = make_plan(memory.figure(options), options, [])
    by_name = {line.model: line for line in plan.lines}
    for capacity in equal_bytes.capacities_of_ovq(RECALL, options.scale, None):
        (of_ovq,) = {
            by_name["sw_ovq"].state(test)[1]
            for test in by_name["sw_ovq"].tests
            if (test.num_centroids or 256) == capacity and test.length == 65536
        }
        for name in ("sw_fifo", "sw_reservoir", "sw_compression", "sw_kvm"):
            equal = [test for test in by_name[name].tests if test.label == equal_bytes.label(capacity)]
            (held,) = {by_name[name].state(test)[1] for test in equal if test.length == 65536}
            assert held <= of_ovq
            if (name, capacity) == ("sw_compression", 16384):
                continue  # one slot per four of the 65,536 tokens: more capacity would stay empty
            assert held > 0.99 * of_ovq
            assert equal[0].num_centroids == pytest.approx((1 if name == "sw_kvm" else 2) * capacity, rel=0.02)


@pytest.mark.parametrize("figure", [fig7, sensitivity])
def test_variants_change_the_model_and_take_the_rate_of_sw_ovq(figure: Any) -> None:
    plan = make_plan(figure.figure(options := parse(RecallOptions, [])), options, [])
    base, *others = plan.lines
    settings = [identity.digest(line.cfg) for line in plan.lines]
    assert base.model == "sw_ovq" and len(set(settings)) == len(settings)
    assert all(line.trials is base.trials and not line.own_trials for line in others)
    assert [unit.line for unit in plan.work if unit.stage == "search"] == [base.name] * len(base.trials)
    with pytest.raises(ConfigError, match="takes its rate from 'sw_ovq'; name that too"):
        make_plan(figure.figure(options), replace(options, models=[others[0].model]), [])


def test_a_plan_names_runs_tokens_and_minutes_and_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [f"runs_root={tmp_path}/runs", f"out={tmp_path}/out", "models=[sw,sw_ovq]", "seeds=[0,1]", "records=null"]
    assert fig4.main([*line, "dry_run=true"]) == 0
    said = capsys.readouterr().out
    assert "sw_ovq, positional recall" in said and "13,107,200" in said and "minutes" in said
    assert fig4.main([*line, "scale=paper"]) == 0
    said = capsys.readouterr().out
    assert "optim.lr=0.001,0.003,0.01" in said and "scale=paper" in said and "hours of one 80 GB GPU" in said
    assert not list(tmp_path.iterdir())


def test_a_plan_for_another_machine_needs_no_text_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["scale=paper", "models=[sw]", f"runs_root={tmp_path}/runs", "tokenizer.model_path=gone.model"]
    assert fig6.main(line) == 0
    assert "hours of one 80 GB GPU" in capsys.readouterr().out


@pytest.mark.parametrize("figure", [fig4, fig5, fig6, fig7, fig8, memory, memory_pg19, sensitivity])
def test_parts_hold_all_the_work_within_their_time(figure: Any) -> None:
    schema = next(vars(figure)[name] for name in OPTIONS if name in vars(figure))
    plan = make_plan(figure.figure(options := parse(schema, ["scale=gpu"])), options, [])
    parts, work = plan.parts(), plan.work
    assert {unit for part in parts for unit in part} == set(work)
    begun: set[Any] = set()
    for part in parts:  # if an earlier part began a unit, only its last few minutes are left
        minutes = [unit.minutes % 9 if unit in begun else unit.minutes for unit in part]
        assert len(part) == 1 or sum(minutes) <= 9
        begun.update(part)
    assert len(parts) * 9 >= sum(unit.minutes for unit in work)
    first = {unit: number for number, part in reversed(list(enumerate(parts))) for unit in part}
    assert [first[unit] for unit in work] == sorted(first.values()), "trials come before the runs that need them"


def test_a_part_is_told_to_stop_at_the_end_of_its_time() -> None:
    with sweep.noted_signals() as received, make.time_limit(0.0):
        while not received:
            pass
    assert received == [signal.SIGTERM]


def test_a_part_whose_rates_are_not_chosen_names_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = parse(RecallOptions, ["scale=gpu", "models=[sw]"])
    parts = make_plan(fig4.figure(options), options, []).parts()
    number = next(k for k, part in enumerate(parts, 1) if part[0].stage == "train")
    monkeypatch.setattr(sweep, "start", lambda *_: pytest.fail("nothing may start"))
    line = ["scale=gpu", "models=[sw]", f"part={number}", f"runs_root={tmp_path}", f"out={tmp_path}/out"]
    assert fig4.main(line) == 2
    said = capsys.readouterr().err
    assert f"part={number} needs the learning rate of sw, basic recall, which is not chosen yet" in said
    assert said.count("\n") == 1 and f"{tmp_path}/recall_64k" in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["seed=1"], "seed=1 cannot be given here; use seeds=[0,1]"),
        (["optim.lr=1"], "optim.lr=1 cannot be given here; use rates=[0.001,0.01]"),
        (["seeds=[1000]"], "seeds: 1000 is the seed of the runs that choose learning rates; use another"),
        (["models=[gdn]"], "models: 'gdn' is not in fig4; legal: std_att, sw_nope, sw, sw_vq, sw_ovq"),
        (["lengths=[2]"], "a recall sequence of 2 tokens has no room for a pair and its query"),
        (["part=1"], "part=1: scale=cpu is not made in parts"),
        (["scale=gpu", "part=9999"], "part=9999 does not exist; legal: 1 to "),
        (["scale=gpu", "part=1", "only_draw=true"], "part=1 does work, and only_draw=true does none"),
        (["rates=[a]"], "rates=[a] must be a list of numbers, like [0.1,0.2]"),
        (["trainer.stepz=1"], "there is no setting 'trainer.stepz'"),
    ],
)
def test_impossible_requests_are_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    few = [] if any(a.startswith("models=") for a in arguments) else ["models=[sw]"]
    assert fig4.main([f"runs_root={tmp_path}", *few, *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_rates_are_chosen_with_seeds_of_their_own() -> None:
    assert len({measures.CHOOSING_SEED, answers.TEST_SEED}) == 2 and TEST != 0
    options = parse(RecallOptions, ["models=[sw]"])
    plan = make_plan(fig4.figure(options), options, [])
    for line in plan.lines:
        for trial in line.trials.values():
            assert f"seed={search.TRAIN_SEED}" in trial.job.overrides
    assert search.TRAIN_SEED not in plan.seeds


def test_a_subject_says_how_rates_are_chosen_unless_the_command_does() -> None:
    def searched(*words: str) -> set[tuple[str, int, float]]:
        """(subject, steps, rate) of every trial."""
        options = parse(fig8.Figure8Options, ["models=[sw_ovq,gdn_sw]", *words])
        lines = make_plan(fig8.figure(options), options, []).lines
        assert {line.cfg.trainer.steps for line in lines} == {800, 2400}
        return {
            (f"{line.subject.name}: {line.model}", trial.cfg.trainer.steps, rate)
            for line in lines
            for rate, trial in line.trials.items()
        }

    regression, recall, first = "regression, 4 functions: sw_ovq", "basic recall: sw_ovq", "basic recall: gdn_sw"
    both = {(regression, 800, rate) for rate in (3e-3, 1e-2)} | {(recall, 240, rate) for rate in (1e-3, 3e-3, 1e-2)}
    assert searched() == both | {(first, 800, rate) for rate in (1e-3, 3e-3, 1e-2)}
    assert searched("rates=[0.1]", "search_share=0.5") == {
        (regression, 1200, 0.1),
        (recall, 400, 0.1),
        (first, 800, 0.1),
    }


def test_the_best_rate_is_known_once_every_trial_is_scored_or_has_failed(tmp_path: Path) -> None:
    cfg = compose(["experiment=recall"])
    trials = {
        rate: FigureRun(sweep.Job([], cfg, tmp_path / str(rate)), Accuracy(), None) for rate in (0.1, 0.01, 0.001)
    }
    assert search.best(trials) is None
    search.note_failure(trials[0.1], "diverged")
    write_score(trials[0.01], 2.0)
    assert search.best(trials) is None
    write_score(trials[0.001], 2.0)
    assert search.best(trials) == 0.001
    write_score(trials[0.1], float("nan"))
    write_score(trials[0.01], 1.5)
    assert search.best(trials) == 0.01
    write_score(trials[0.01], 1.5, on="sequences of seed 1")
    assert search.best(trials) is None, "a score on the figure's own sequences does not count"


def test_a_failed_trial_still_needs_its_initial_weights(tmp_path: Path) -> None:
    options = parse(RecallOptions, ["panels=[positional recall]", "models=[sw]", "records=null"])
    plan = make_plan(fig4.figure(options).only(options.panels, options.models), options, [f"runs_root={tmp_path}"])
    begin = next(unit for unit in plan.work if (unit.stage, unit.which) == ("begin", search.TRAIN_SEED))
    first, *others = plan.lines[0].trials.values()
    for trial in (first, *others):
        trial.run_dir.mkdir(parents=True)
        write_score(trial, 2.0)
    assert plan.done(begin)
    search.note_failure(first, "diverged")
    assert not plan.done(begin)


def write_score(trial: FigureRun, loss: float, on: str = Accuracy.chosen_on) -> None:
    trial.run_dir.mkdir(exist_ok=True)
    (trial.run_dir / SCORE).write_text(json.dumps({"on": on, "loss": loss}))


def test_a_curve_far_from_the_others_leaves_the_frame_to_them() -> None:
    _, (near, far) = panels.picture_of(2)
    for ax, last in ((near, 2.5), (far, 9.0)):
        curves = [[1.0, 2.0], [1.2, 1.9], [], [1.5, last]]
        for curve in curves:
            ax.plot(range(len(curve)), curve)
        panels.frame(ax, curves)
        panels.frame(ax, [[], []])  # a model alone has no differences
    assert near.get_ylim()[1] > 2.5 and near.get_ylim()[0] < 1
    assert far.get_ylim() == pytest.approx((0.92, 2.08))
