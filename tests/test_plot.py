"""Claims about plots of runs: which curves are drawn, how runs are labelled, and how a figure is saved."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import pytest

from eval import loss_table, plot, style
from eval.accuracy_table import TABLE, task_settings
from eval.plot import Curve, curves_of, running_mean
from eval.run_labels import labels
from ovq import config
from ovq.compose import compose
from ovq.values import split_paths

EVALUATION = {"run": "r", "num_centroids": None, "split": "validation", "changes": ""}


def table(step: int, context: int = 1024, level: float = 2.0, **changes: Any) -> list[loss_table.Row]:
    """Rows of a made-up evaluation in both kinds of bucket: losses that fall from `level` + 1 towards `level`."""
    rows = []
    for kind, width in (("log", 256), ("linear", 128)):
        for start in range(0, context, width):
            row = {**EVALUATION, "step": step, "context": context, "buckets": kind, "tokens": 4 * width, **changes}
            row |= {"position_start": start, "position_end": start + width, "stderr": 0.125}
            rows.append({name: ({"loss": level + 1 - start / context} | row)[name] for name in loss_table.SCHEMA.names})
    return rows


def make_run(folder: Path, overrides: list[str], *tables: list[loss_table.Row]) -> Path:
    config.save(compose(overrides), folder)
    for rows in tables:
        loss_table.write(folder, rows)
    return folder


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures saved so far."""
    figures: list[Any] = []
    save = style.save
    monkeypatch.setattr(style, "save", lambda fig, path: (figures.append(fig), save(fig, path))[1])
    return figures


def curves_in(fig: Any) -> dict[str, tuple[list[float], list[float]]]:
    """Label -> (x, y) of the curves in the figure."""
    lines = [line for line in fig.axes[0].lines if not line.get_label().startswith("_")]
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in lines}


def png_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])  # type: ignore[return-value]


# --- the style -------------------------------------------------------------------------------------------------------


def test_a_figure_is_saved_atomically(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.png"
    fig, (ax,) = style.figure()
    ax.plot([1, 2], [1, 2])
    assert style.save(fig, path) == path and png_size(path)[0] > 600
    before = path.read_bytes()
    fig.savefig = lambda target, **_: (Path(target).write_text("half"), 1 / 0)  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        style.save(fig, path)
    assert path.read_bytes() == before and [entry.name for entry in path.parent.iterdir()] == ["a.png"]


def test_a_curve_that_ends_before_the_first_position_shown_is_drawn_whole(tmp_path: Path) -> None:
    long = table(1)[:4]
    short = [{**row, "position_start": 4 * i, "position_end": 4 * i + 4} for i, row in enumerate(long)]
    assert short[-1]["position_end"] <= plot.FIRST_SHOWN < long[-1]["position_end"] / 16
    plot.loss_by_position([Curve("long", long), Curve("short", short)], tmp_path / "a.png")


def test_same_data_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        plot.loss_by_position([Curve("x", table(1)[:4])], tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(("number", "shown"), [(0, "0"), (1, "1"), (1024, "1k"), (65536, "64k"), (1 << 20, "1M")])
def test_powers_of_two_are_abbreviated(number: int, shown: str) -> None:
    assert style.short(number) == shown


@pytest.mark.parametrize("number", [1000, 3000, 1023, 100_000])
def test_numbers_that_would_lose_digits_are_not_abbreviated(number: int) -> None:
    assert style.short(number) == str(number)


@pytest.mark.parametrize(("scale", "shown"), [("log", {"16", "1k", "64k"}), ("linear", {"8k", "16k", "64k"})])
def test_a_token_axis_has_ticks_at_multiples_of_powers_of_two(scale: str, shown: set[str]) -> None:
    fig, (ax,) = style.figure()
    ax.plot([16, 65536], [3, 2])
    style.token_axis(ax, "position", scale)
    fig.canvas.draw()
    assert shown <= {tick.get_text() for tick in ax.get_xticklabels()}


# --- one run ---------------------------------------------------------------------------------------------------------


def test_a_curve_is_drawn_at_its_buckets_with_a_band_of_one_error(tmp_path: Path, drawn: list[Any]) -> None:
    rows = [row for row in table(5) if row["buckets"] == "log"]
    plot.loss_by_position([Curve("step 5", rows, train_context=512)], tmp_path / "a.png", scale="log")
    ax = drawn[0].axes[0]
    x, y = curves_in(drawn[0])["step 5"]
    # The first bucket begins before position 16 and is not shown.
    assert y == [2.75, 2.5, 2.25] and x == [math.sqrt(257 * 512), math.sqrt(513 * 768), math.sqrt(769 * 1024)]
    corners = ax.collections[0].get_paths()[0].vertices
    assert (corners[:, 1].min(), corners[:, 1].max()) == (2.125, 2.875)
    assert [text.get_text() for text in ax.texts] == ["trained at 512"]
    assert ax.get_title(loc="left") == "step 5: 4 validation documents"


def test_a_single_document_is_drawn_without_a_standard_error(tmp_path: Path, drawn: list[Any]) -> None:
    plot.loss_by_position([Curve("a", table(5, stderr=None)[:4])], tmp_path / "a.png")
    assert len(curves_in(drawn[0])["a"][1]) == 3


def test_a_runs_plot_shows_only_earlier_steps_of_the_same_evaluation() -> None:
    rows = [row for step in (10, 20, 30) for row in table(step)]
    rows += table(20, context=2048) + table(20, num_centroids=64) + table(40) + table(20, split="test")
    curves = curves_of(rows, scale="log", train_context=512, key=(30, 1024, None, "validation", ""))
    assert [curve.label for curve in curves] == ["step 10", "step 20", "step 30"]
    assert {len(curve.rows) for curve in curves} == {4}


def test_many_evaluations_are_thinned_to_five_with_the_first_and_the_last() -> None:
    rows = [row for step in range(1, 42) for row in table(step)]
    curves = curves_of(rows, scale="linear", train_context=512, key=(41, 1024, None, "validation", ""))
    assert [curve.label for curve in curves] == ["step 1", "step 11", "step 21", "step 31", "step 41"]


# --- several runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ([["model=sw"], ["model=sw_ovq"]], ["sw", "sw_ovq"]),
        ([["model=sw", "seed=0"], ["model=sw_ovq", "seed=1"]], ["sw, seed=0", "sw_ovq, seed=1"]),
        (
            [["model=sw_ovq", f"model.mixers.ovq.num_centroids={n}"] for n in (512, 1024)],
            ["sw_ovq, num_centroids=512", "sw_ovq, num_centroids=1024"],
        ),
        ([["model=sw", "model/size=tiny"], ["model=sw", "model/size=70m"]], ["sw, size=tiny", "sw, size=70m"]),
        ([["model=sw", "data=pg19"], ["model=sw", "data=builtin"]], ["sw, data=pg19", "sw, data=builtin"]),
        ([["model=sw", "trainer.log_every=1"], ["model=sw", "trainer.log_every=9"]], ["sw (a)", "sw (b)"]),
    ],
)
def test_runs_are_labelled_by_what_differs(runs: list[list[str]], expected: list[str]) -> None:
    assert labels([compose(overrides) for overrides in runs], ["a", "b"]) == expected


def test_overlay_draws_the_newest_evaluation_of_each_run_at_the_context_they_share(
    tmp_path: Path, drawn: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    a = make_run(tmp_path / "p,model=sw", ["model=sw"], table(10), table(20, level=3.0), table(20, context=4096))
    b = make_run(tmp_path / "p,model=sw_ovq", ["model=sw_ovq"], table(15, level=4.0), table(15, num_centroids=64))
    out = tmp_path / "both.png"
    assert plot.main([f"runs=[{a},{b}]", f"out={out}", "x=linear"]) == 0
    assert capsys.readouterr().out.strip() == str(out) and png_size(out)
    found = {label: y[0] for label, (_, y) in curves_in(drawn[0]).items()}
    assert found == {"sw, step 20": 4.0, "sw_ovq, step 15": 5.0, "sw_ovq, N=64 in evaluation, step 15": 3.0}
    assert len(curves_in(drawn[0])["sw, step 20"][0]) == 8  # linear buckets of 128

    changed = "model.mixers.ovq.chunk_size=64"
    loss_table.write(b, table(15, level=6.0, changes=changed))
    assert plot.main([f"runs=[{a},{b}]", f"out={out}", "x=linear"]) == 0
    found = {label: y[0] for label, (_, y) in curves_in(drawn.pop()).items()}
    assert found["sw_ovq, step 15"] == 5.0 and found[f"sw_ovq, {changed}, step 15"] == 7.0

    assert plot.main([f"runs={a}", f"out={out}", "step=10"]) == 0
    assert list(curves_in(drawn[1])) == ["sw"]


def test_training_loss_is_drawn_with_its_running_mean(tmp_path: Path, drawn: list[Any]) -> None:
    run = make_run(tmp_path / "r", ["model=sw"])
    lines = [f'{{"step": {step}, "loss": {100 - step}}}' for step in range(1, 101)]
    lines.insert(50, '{"step": 50, "eval/loss": 7.0}')
    (run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 101, "lo')
    assert plot.main([f"runs=[{run}]", f"out={tmp_path / 't.png'}", "kind=training"]) == 0
    x, y = curves_in(drawn[0])["sw"]
    assert x == list(range(1, 101)) and y[50] == 49.0 and y[0] == 98.0


def test_running_mean_equals_a_hand_computed_example() -> None:
    assert running_mean([1.0, 2.0, 6.0, 7.0], 1) == [1.5, 3.0, 5.0, 6.5]


def test_run_folder_names_may_contain_commas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pg19", "pg19,model=sw", "pg19,model=sw,seed=1"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert split_paths("[pg19,model=sw,pg19,pg19,model=sw,seed=1]") == [
        "pg19,model=sw",
        "pg19",
        "pg19,model=sw,seed=1",
    ]
    assert split_paths("'pg19,model=sw'") == ["pg19,model=sw"]
    assert split_paths("[missing,pg19]") == ["missing", "pg19"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "runs= is required: run folders to plot"),
        (["runs=[no/run]"], "no/run is not a run folder"),
        (["runs=[RUN]", "context=999"], "no such evaluation at context=999 (contexts it has: 1024, 4096)"),
        (["runs=[RUN]", "split=test", "context=512"], "python -m eval.per_position run=RUN context=512 split=test"),
        (["runs=[RUN]", "step=20", "context=4096"], "run=RUN context=4096 checkpoint=20"),
        (["runs=[RUN,OTHER]"], "no such evaluation at a context that all runs share"),
        (["runs=[RUN]", "x=cubic"], "x=cubic is not a legal value; legal: log, linear"),
        (["runs=[RUN]", "kind=loss"], "kind=loss is not a legal value; legal: position, training"),
        (["runs=[RUN]", "kind=training", "step=10"], "step=10 has no effect with kind=training; leave it out"),
        (["runs=[RUN]", "kind=accuracy", "x=linear"], "x=linear has no effect with kind=accuracy; leave it out"),
        (["runs=[RUN]", "contxt=5"], "there is no option 'contxt'; did you mean context? legal:"),
        (["runs=[RUN]", "kind=training"], "has no training loss yet"),
    ],
)
def test_errors_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    run = make_run(tmp_path / "r,model=sw", ["model=sw"], table(10), table(10, context=4096))
    other = make_run(tmp_path / "o,model=sw", ["model=sw"], table(10, context=512))
    named = [arg.replace("RUN", str(run)).replace("OTHER", str(other)) for arg in arguments]
    assert plot.main([*named, f"out={tmp_path / 'x.png'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and says.replace("RUN", str(run)) in line and not (tmp_path / "x.png").exists()


def accuracies(
    folder: Path, *, settings: str = "{}", capacity: int | None = None, step: int = 1, **by_length: float
) -> None:
    """Add made-up accuracies to a run: a total for each length, and one for a single index, which is not drawn."""
    rows = []
    for name, value in by_length.items():
        row: dict[str, Any] = dict.fromkeys(TABLE.schema.names)
        row |= {"run": folder.name, "step": step, "task": "repeat", "settings": settings, "num_centroids": capacity}
        row |= {"changes": "", "length": int(name[1:]), "accuracy": value, "answers": 1000, "train_context": 128}
        row |= {"sequences": 4, "standard_error": value / 10}
        rows += [row, row | {"index": 3, "accuracy": 0.0}]
    TABLE.write(folder, rows)


def test_accuracies_of_runs_are_curves_by_length_and_a_sentence(
    tmp_path: Path, drawn: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    a = make_run(tmp_path / "a", ["data=task", "data/task=repeat", "model=sw_ovq"])
    b = make_run(tmp_path / "b", ["data=task", "data/task=repeat", "model=sw"])
    accuracies(a, n128=1.0, n1024=0.75, n2048=0.5)
    accuracies(a, capacity=99, n128=1.0, n1024=0.875)
    accuracies(b, n1024=0.0078, n128=0.25)
    line = [f"runs=[{a},{b}]", "kind=accuracy", f"out={tmp_path}/a.png"]
    assert plot.main(line) == 0
    assert curves_in(drawn[-1]) == {
        "sw_ovq": ([128, 1024, 2048], [100, 75, 50]),
        "sw_ovq, N=99 in the test": ([128, 1024], [100, 87.5]),
        "sw": ([128, 1024], [25, pytest.approx(0.78)]),
    }
    band = drawn[-1].axes[0].collections[0].get_paths()[0].vertices
    assert sorted({round(y, 6) for x, y in band if x == 1024}) == [67.5, 82.5]
    assert capsys.readouterr().out.splitlines()[0] == (
        "at 1,024 tokens, sw_ovq: 75.0% of 1,000 answers; sw_ovq, N=99 in the test: 87.5% of 1,000 answers; "
        "sw: 0.8% of 1,000 answers"
    )
    other = make_run(tmp_path / "other", ["data=task", "data/task=repeat", "model=sw_ovq", "seed=1"])
    accuracies(other, n128=0.5, n1024=0.25)
    assert plot.main([f"runs=[{a},{other}]", "kind=accuracy", f"out={tmp_path}/a.png"]) == 0
    assert curves_in(drawn[-1])["sw_ovq (2 seeds)"] == ([128, 1024], [75, 50])
    assert "at 1,024 tokens, sw_ovq: 75.0%, 25.0% of 1,000 answers" in capsys.readouterr().out
    words = ["data=task", "data/task=repeat", "model=sw_ovq", "seed=1", "trainer.steps=77"]
    longer = make_run(tmp_path / "longer", words)
    accuracies(longer, n128=1.0, n1024=1.0)
    assert plot.main([f"runs=[{a},{longer}]", "kind=accuracy", f"out={tmp_path}/a.png"]) == 0
    assert curves_in(drawn[-1]).keys() >= {"sw_ovq", "sw_ovq, seed=1"}
    accuracies(longer, settings='{"symbols": 9}', n128=0.0)
    accuracies(longer, settings=task_settings(config.load(longer)), n128=0.5)
    assert plot.main([f"runs=[{longer}]", "kind=accuracy", f"out={tmp_path}/a.png"]) == 0
    assert list(curves_in(drawn[-1]).values()) == [([128], [50])], (
        "the settings of training, if it was tested with them"
    )
    accuracies(b, settings='{"symbols": 9}', n128=0.5)
    assert plot.main(line) == 2
    assert f"{a} and {b} were tested on different tasks" in capsys.readouterr().err
    c = make_run(tmp_path / "c", ["data=task", "data/task=repeat"])
    assert plot.main([f"runs=[{c}]", "kind=accuracy"]) == 2
    assert f"make them with: python -m eval.accuracy run={c}" in capsys.readouterr().err
    assert plot.main([f"runs=[{c}]"]) == 2
    assert f"{c} was trained on a generated task; plot its accuracy with kind=accuracy" in capsys.readouterr().err


def test_a_curve_of_accuracies_is_of_one_checkpoint(tmp_path: Path, drawn: list[Any]) -> None:
    run = make_run(tmp_path / "a", ["data=task", "data/task=repeat", "model=sw_ovq"])
    accuracies(run, step=2, n128=1.0)
    accuracies(run, n128=0.25, n1024=0.5)
    accuracies(run, capacity=99, n1024=0.75)
    assert plot.main([f"runs=[{run}]", "kind=accuracy", f"out={tmp_path}/a.png"]) == 0
    assert curves_in(drawn[-1]) == {"sw_ovq": ([128], [100]), "sw_ovq, N=99 in the test": ([1024], [75])}
