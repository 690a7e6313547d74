"""Claims about the report over several runs: its numbers are those of the run folders, and it is self-contained."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from eval import loss_table, report
from eval.accuracy import TABLE as ACCURACY
from eval.run_table import Row
from ovq import config
from ovq.compose import compose
from ovq.train.summary import FILE, finish

CONTEXT = 4096
EDGES = (0, 1024, 2048, 4096)
LEVEL = {"sw": 3.0, "sw_ovq": 2.9}  # nats per token


def make_run(
    folder: Path, model: str, seed: int, *, steps: int = 20, finished: bool = True, document: float = 0.1
) -> Path:
    """A run folder with a made-up history: losses rise by `document` per document and by 0.01 per seed."""
    cfg = compose(["experiment=cpu_demo", f"model={model}", f"seed={seed}", f"trainer.steps={steps}"])
    config.save(cfg, folder)
    done = steps if finished else steps // 2
    rows = [
        {"step": n, "loss": 5 - n / steps, "tokens": 100 * n, "tokens_per_s": 1000.0 + n, "memory_gib": 0.5}
        for n in range(1, done + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if not finished:
        return folder
    summary = {"step": done, "stopped_by": None, "tokens": 100 * done, "last_loss": 4.0, "first_loss": 5.0}
    finish(summary | {"checkpoint": "", "tokens_per_s": 1000.0, "memory_gib": 0.5, "evaluation": {}}, cfg, folder)
    common = {"step": done, "context": CONTEXT, "num_centroids": None, "split": "validation", "changes": ""}
    by_document: list[Row] = []
    by_position: list[Row] = []
    for start, end in zip(EDGES, EDGES[1:]):
        losses = [LEVEL[model] + 0.01 * seed + document * d - start / 1e5 for d in range(3)]
        bounds = {"position_start": start, "position_end": end}
        more = {"run": "x", "stderr": 0.05, "tokens": 3 * (end - start), "buckets": "log"}
        by_position.append(common | bounds | more | {"loss": sum(losses) / 3})
        kind = {"restart": None, "asked": 4}
        by_document += [common | kind | bounds | {"document": d, "loss": loss} for d, loss in enumerate(losses)]
    loss_table.write(folder, by_position)
    loss_table.BY_DOCUMENT.write(folder, by_document)
    return folder


def report_of(tmp_path: Path, *arguments: str) -> str:
    out = tmp_path / "report.html"
    assert report.main([*arguments, f"out={out}"]) == 0
    return out.read_text()


def data_of(html: str) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found
    return json.loads(found[1])


def rows_of(html: str, title: str) -> list[list[str]]:
    """The cells of the table under the heading that begins with `title`."""
    table = html.split(f"<h2>{title}")[1].split("</table>")[0]
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in table.split("</tr>")[:-1]]


def test_the_file_needs_nothing_else_and_runs_nothing(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"a{seed}", "sw", seed) for seed in (0, 1)]
    html = report_of(tmp_path, f"runs=[{','.join(map(str, runs))}]")
    own_names = re.sub(r'xmlns(:\w+)?="[^"]*"', "", html)
    assert not re.search(r"https?:|//\w|@import|src=|href=\"[^#]|url\([^#]", own_names)
    assert re.findall(r"<script[^>]*>", html) == ['<script type="application/json" id="data">']
    assert html.count("<svg") == 2 and len(html) < report.LARGEST
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids)), "two pictures must not share ids"


def test_numbers_are_those_of_the_run_folders(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", "sw", 0), make_run(tmp_path / "b", "sw_ovq", 0)]
    html = report_of(tmp_path, f"runs=[{runs[0]},{runs[1]}]", "positions=[2048,4096,65536]")
    head, first, second = rows_of(html, "Runs")
    assert head[7:9] == ["loss at 2k", "loss at 4k"] and "loss at 64k" not in head
    # The mean over three documents: the level, plus 0.1, minus the fall with position.
    assert first[7:9] == ["3.0898 ± 0.0500", "3.0795 ± 0.0500"] and second[8] == "2.9795 ± 0.0500"
    assert first[:4] == ["sw", "finished", "20", "2,000"] and first[6] == "4.0000"
    assert first[9:] == ["3 validation documents of 4,096 tokens, at step 20", "1,010", "0.50 GiB"]
    assert "no loss at 64k; python -m eval.per_position run=" in html
    of = {run["label"]: run for run in data_of(html)}
    assert of["sw"]["parameters"] < of["sw_ovq"]["parameters"]
    assert of["sw"]["training"][-1] == [20, 4.025]  # the mean of the last two steps


def test_models_are_compared_document_by_document_and_seed_by_seed(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"{model}{seed}", model, seed) for model in LEVEL for seed in (0, 1)]
    html = report_of(tmp_path, f"runs=[{','.join(map(str, runs))}]")
    head, row = rows_of(html, "Difference from sw on the same documents")
    assert head[1:4] == ["0 to 128", "512 to 2,048", "2,048 to 4,096"]
    # The differences between documents, 0.1 to 0.2, cancel: only that between the models is left, without any error.
    assert row[0] == "sw_ovq" and [cell.strip() for cell in row[1:4]] == ["-100.0 ± 0.0"] * 3


def test_a_seed_of_the_base_that_was_tested_on_other_documents_is_left_out(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"{model}{seed}", model, seed) for model in LEVEL for seed in (0, 1)]
    for file in (loss_table, loss_table.BY_DOCUMENT):
        rows = file.read(runs[1])
        (runs[1] / (loss_table.FILE if file is loss_table else loss_table.BY_DOCUMENT.file)).unlink()
        file.write(runs[1], [row | {"split": "test", "loss": row["loss"] - 1} for row in rows])
    row = rows_of(report_of(tmp_path, f"runs=[{','.join(map(str, runs))}]"), "Difference from sw")[1]
    assert [cell.strip() for cell in row[1:4]] == ["-100.0 ± 0.0"] * 3


def test_models_that_were_evaluated_at_different_steps_are_said_to_be(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", "sw", 0), make_run(tmp_path / "b", "sw_ovq", 0)]
    note = rows_of(report_of(tmp_path, f"runs=[{runs[0]},{runs[1]}]"), "Difference from sw")[1][-1]
    for table in (loss_table, loss_table.BY_DOCUMENT):
        rows = table.read(runs[1])
        (runs[1] / (loss_table.FILE if table is loss_table else loss_table.BY_DOCUMENT.file)).unlink()
        table.write(runs[1], [row | {"step": 10} for row in rows])
    html = report_of(tmp_path, f"runs=[{runs[0]},{runs[1]}]")
    row = rows_of(html, "Difference from sw")[1]
    assert not note and row[1].strip() == "-100.0 ± 0.0" and row[-1] == "evaluated at step 10, the base at step 20"
    assert "documents of 4,096 tokens, at step 10" in html


def test_evaluations_of_a_changed_model_or_text_are_not_the_runs_own(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", "sw", 0), make_run(tmp_path / "b", "sw_ovq", 0)]
    before = report_of(tmp_path, f"runs=[{runs[0]},{runs[1]}]")
    for table in (loss_table, loss_table.BY_DOCUMENT):
        changed = "data.validation=[other/*.txt]"
        table.write(runs[1], [row | {"loss": 9.0, "changes": changed} for row in table.read(runs[1])])
    after = report_of(tmp_path, f"runs=[{runs[0]},{runs[1]}]")
    assert data_of(after) == data_of(before)
    for title in ("Runs", "Difference from sw"):
        assert rows_of(after, title) == rows_of(before, title)


def test_a_run_that_is_evaluated_with_a_larger_dictionary_is_shown_with_it(tmp_path: Path) -> None:
    run, base = make_run(tmp_path / "a", "sw_ovq", 0), make_run(tmp_path / "b", "sw", 0)
    cfg = config.load(run)
    cfg.eval.num_centroids = 4096
    config.save(cfg, run)
    for table in (loss_table, loss_table.BY_DOCUMENT):
        table.write(run, [row | {"num_centroids": 4096, "loss": row["loss"] - 1} for row in table.read(run)])
    html = report_of(tmp_path, f"runs=[{base},{run}]", "positions=[2048]")
    assert rows_of(html, "Runs")[2][7] == "1.9898 ± 0.0500"
    assert rows_of(html, "Difference from sw")[1][1].strip() == "-1100.0 ± 0.0"


def test_seeds_that_began_with_weights_of_their_own_seed_are_one_model(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"{model}{seed}", model, seed) for model in LEVEL for seed in (0, 1)]
    for run in runs:
        cfg = config.load(run)
        cfg.init_from.path = f"runs/copying,model={cfg.model.name},seed={cfg.seed},lr=0.003-0000000{cfg.seed}"
        config.save(cfg, run)
    head, *rows = rows_of(report_of(tmp_path, f"runs=[{','.join(map(str, runs))}]"), "Difference from")
    assert len(rows) == 1 and [cell.strip() for cell in rows[0][1:4]] == ["-100.0 ± 0.0"] * 3


def test_runs_of_other_lengths_are_not_one_model(tmp_path: Path) -> None:
    short, long = (make_run(tmp_path / name, "sw", 0) for name in ("short", "long"))
    cfg = config.load(long)
    cfg.trainer.steps *= 2
    config.save(cfg, long)
    for table in (loss_table, loss_table.BY_DOCUMENT):
        table.write(long, [row | {"loss": row["loss"] - 1} for row in table.read(long)])
    runs = [short, long, make_run(tmp_path / "other", "sw_ovq", 0)]
    head, *rows = rows_of(report_of(tmp_path, f"runs=[{','.join(map(str, runs))}]"), "Difference from")
    assert [row[1].strip() for row in rows] == ["-1000.0 ± 0.0", "-100.0 ± 0.0"]
    assert "sw (short)" in head[0] or "sw (long)" in rows[0][0]


MIXED = {"one": {"name": "text", "kind": "text", "train": ["a"], "validation": ["b"], "weight": 1.0}}


@pytest.mark.parametrize(
    "both, of_second, differs",
    [
        ({"kind": "text", "validation": ["a"]}, {"validation": ["b"]}, "data.validation"),
        ({}, {"kind": "text", "validation": ["a"]}, "data.kind"),
        ({"kind": "memmap", "train": ["a"]}, {"train": ["b"]}, "data.train"),
        ({"kind": "datasets", "path": "a", "validation": ["v"]}, {"config_name": "b"}, "data.config_name"),
        ({"kind": "datasets", "path": "a", "validation": ["v"]}, {"text_field": "b"}, "data.text_field"),
        (
            {"kind": "mixture", "mixture": MIXED},
            {"mixture": {"one": {**MIXED["one"], "validation": ["c"]}}},
            "data.mixture.one.validation",
        ),
        # What a run is trained on does not matter.
        ({"kind": "text", "train": ["a"], "validation": ["v"]}, {"train": ["b"]}, None),
        ({"kind": "mixture", "mixture": MIXED}, {"mixture": {"one": {**MIXED["one"], "weight": 2.0}}}, None),
    ],
)
def test_documents_of_other_text_are_not_compared(
    tmp_path: Path, both: dict[str, Any], of_second: dict[str, Any], differs: str | None
) -> None:
    runs = [make_run(tmp_path / "a", "sw", 0), make_run(tmp_path / "b", "sw_ovq", 0)]
    for run, settings in zip(runs, (both, {**both, **of_second})):
        cfg = config.load(run)
        for name, value in settings.items():
            setattr(cfg.data, name, value)
        config.save(cfg, run)
    row = rows_of(report_of(tmp_path, f"runs=[{runs[0]},{runs[1]}]"), "Difference from sw")[1]
    assert [cell.strip() for cell in row[1:4]] == ([""] * 3 if differs else ["-100.0 ± 0.0"] * 3)
    assert row[-1] == (f"another {differs}" if differs else "")


def test_unfinished_failed_and_missing_runs_are_listed_with_the_reason(tmp_path: Path) -> None:
    done = make_run(tmp_path / "a", "sw", 0)
    failed = make_run(tmp_path / "b", "sw_ovq", 0, finished=False)
    (failed / "sweep.log").write_text("step 9\nerror: loss is NaN <b>\n")
    damaged = make_run(tmp_path / "c", "sw_ovq", 1)
    (damaged / loss_table.FILE).write_bytes(b"not parquet")
    (tmp_path / "d").mkdir()
    silent = make_run(tmp_path / "e", "sw_ovq", 2, finished=False)
    html = report_of(tmp_path, f"runs=[{done},{failed},{damaged},{tmp_path / 'd'},{silent}]")
    _, *rows = rows_of(html, "Not finished, or not readable")
    assert [row[1] for row in rows] == ["unfinished", "finished", "not begun", "unfinished"]
    assert rows[0][2] == "sweep.log ends with: error: loss is NaN &lt;b&gt;"
    assert rows[3][2].startswith("no log in its folder")
    assert "is not a table of loss by position" in rows[1][2] and rows[2][2] == "no config.yaml in its folder"
    assert rows_of(html, "Runs")[2][2] == "10 of 20"


def test_accuracies_stand_by_length_with_their_error(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", "sw", 0)
    common = {"run": "a", "step": 20, "task": "recall", "settings": "{}", "changes": "", "index": None, "model": "sw"}
    common |= {"answers": 1600, "state_numbers": 1, "state_bytes": 2, "train_context": 128}
    common |= {"sequences": 1, "standard_error": None}
    of = {(None, 128): 0.9, (None, 2048): 0.5, (4096, 2048): 0.8}
    rows = [common | {"num_centroids": n, "length": at, "accuracy": value} for (n, at), value in of.items()]
    ACCURACY.write(run, [{name: row[name] for name in ACCURACY.schema.names} for row in rows])
    assert rows_of(report_of(tmp_path, f"runs=[{run}]"), "Accuracy") == [
        ["run", "128 tokens", "2,048 tokens"],
        ["sw", "90.0 ± 0.8", "50.0 ± 1.2"],
        ["sw, N = 4,096", "", "80.0 ± 1.0"],
    ]
    old = common | {"step": 10, "num_centroids": None, "length": 128, "accuracy": 0.1}
    other = common | {"settings": "functions=4", "num_centroids": None, "length": 128, "accuracy": 0.7}
    other |= {"sequences": 4, "standard_error": 0.025}
    ACCURACY.write(run, [{name: row[name] for name in ACCURACY.schema.names} for row in (old, other)])
    found = [row[:2] for row in rows_of(report_of(tmp_path, f"runs=[{run}]"), "Accuracy")[1:]]
    assert ["sw, functions=4", "70.0 ± 2.5"] in found and ["sw, {}", "90.0 ± 0.8"] in found
    assert not [row for row in found if row[1].startswith("10.0")], "an older step"


def test_a_sweep_is_named_by_its_own_words(tmp_path: Path) -> None:
    words = ["experiment=cpu_demo", "model=sw,sw_ovq", "trainer.steps=20", f"runs_root={tmp_path}"]
    for job in report.sweep.expand(words)[:1]:
        make_run(job.run_dir, "sw", 0)
    html = report_of(tmp_path, *words)
    assert [row[1] for row in rows_of(html, "Runs")[1:]] == ["finished", "not begun"]


def test_a_report_of_many_long_runs_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [make_run(tmp_path / f"r{seed}", "sw", seed, steps=3000, finished=False) for seed in range(3)]
    monkeypatch.setattr(report, "POINTS", 6000)
    wide = report_of(tmp_path, f"runs=[{','.join(map(str, runs))}]")
    monkeypatch.setattr(report, "LARGEST", len(wide) - 1)
    thin = report_of(tmp_path, f"runs=[{','.join(map(str, runs))}]")
    assert len(thin) < 0.7 * len(wide)
    assert data_of(thin)[0]["training"][-1][0] == data_of(wide)[0]["training"][-1][0] == 1500


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give run folders, runs=[a,b], or the settings of a sweep"),
        (["runs=[nowhere]"], "runs: there is no folder nowhere"),
        (["runs=[.]"], "none of the 1 folders is a run that has begun"),
    ],
)
def test_a_wrong_call_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert report.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / FILE).exists()
