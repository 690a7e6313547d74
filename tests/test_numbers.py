"""Claims about numbers shown to people: few digits, and words where a plot alone would mislead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eval import loss_table, per_position, perplexity, plot, style
from eval.plot import Curve, best_steps, equal_curves
from ovq.compose import compose
from ovq.report import figures, readable
from tests.test_plot import curves_in, make_run, table


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures passed to `style.save` so far, which are not written."""
    kept: list[Any] = []
    monkeypatch.setattr(style, "save", lambda fig, path: (kept.append(fig), Path(path))[1])
    return kept


# A result, and how it is shown.
SHOWN = {
    3.85e15: "over a million",  # word perplexity of a byte-level model
    float("inf"): "over a million",
    20.085536923187668: "20.086",
    2.9957322735539909: "2.9957",
    0.00012345: "0.00012345",
    4.0: "4",
    123456.789: "1.2346e+05",
    2048: "2,048",
    1234567890: "1,234,567,890",
    "validation": "validation",
    None: "None",
}


@pytest.mark.parametrize("value", SHOWN)
def test_a_result_is_shown_in_few_digits(value: Any) -> None:
    assert readable(value) == SHOWN[value]


def test_an_evaluation_of_a_model_of_bytes_has_no_powers_of_ten(tmp_path: Path) -> None:
    results = {"loss": 2.9957322735, "word_perplexity": 3.85e15, "documents": 1.0}
    assert figures(results) == "loss 2.9957  word_perplexity over a million  documents 1"
    run_dir = make_run(tmp_path, ["model=sw"], [row | {"stderr": None} for row in short_buckets(4096)])
    cfg = compose(["eval.context=4096"])
    shown = per_position.report(run_dir, cfg, 10, results)
    assert "e+" not in shown and "word_perplexity over a million" in shown
    assert "one document, so without its standard error" in shown
    rows = [line.split()[0] for line in shown.splitlines() if line.lstrip()[:1].isdigit()]
    assert rows == ["16-32", "32-4096"], "buckets of a token or two, all noise, are left to the file"
    assert "+- its standard error" in per_position.report(run_dir, cfg, 10, results | {"documents": 2.0})


def short_buckets(context: int) -> list[loss_table.Row]:
    """Rows of an evaluation of one document at step 10; the first buckets hold a single token each."""
    edges = [0, 1, 2, 4, 16, 32, context]
    like = table(10, context=context)[0]
    spans = list(zip(edges, edges[1:]))
    return [like | {"position_start": a, "position_end": b, "tokens": b - a} for a, b in spans]


def test_perplexity_is_printed_in_few_digits_and_stored_with_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = {"split": "test", "tokens": 12345, "perplexity": 20.085536923187668, "word_perplexity": 3.85e15}
    path = perplexity.save(tmp_path, results)
    perplexity.show(results, path)
    words = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert words[:3] == [["split", "test"], ["tokens", "12,345"], ["perplexity", "20.086"]]
    assert words[3:] == [["word_perplexity", "over a million"], [str(path)]]
    assert "20.085536923187668" in path.read_text()


# Name -> evaluations as (step, documents), the step that is drawn, and what is printed about a newer one.
CHOICES: dict[str, tuple[list[tuple[int, int]], int, str]] = {
    "the newest of the same size": ([(10, 4), (20, 4)], 20, ""),
    "more documents before the newest": ([(10, 32), (20, 4)], 10, "for step 20, over 4: step=20"),
    "more documents in the newest": ([(10, 4), (20, 32)], 20, ""),
    "the newest of those with most": ([(10, 32), (20, 32), (30, 4)], 20, "for step 30, over 4: step=30"),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_the_best_evaluation_is_drawn_and_a_newer_one_is_named(
    choice: str, tmp_path: Path, drawn: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    evaluations, step, says = CHOICES[choice]
    tables = [table(at, level=float(at), tokens=256 * documents) for at, documents in evaluations]
    logs = [[row for row in rows if row["buckets"] == "log"] for rows in tables]
    assert {chosen for chosen, _ in best_steps([row for rows in logs for row in rows]).values()} == {step}
    run_dir = make_run(tmp_path / "run", ["model=sw"], *logs)
    for words in ([], [f"step={evaluations[-1][0]}"]):  # the advice is followed in the second round
        assert plot.main([f"runs=[{run_dir}]", f"out={tmp_path}/a.png", *words]) == 0
    levels = [max(y) for fig in drawn for _, y in curves_in(fig).values()]
    assert levels == [step + 0.75, evaluations[-1][0] + 0.75]
    shown = capsys.readouterr().err
    assert says in shown and len(shown.splitlines()) == bool(says)


def test_a_longer_evaluation_is_drawn_before_a_newer_one(tmp_path: Path, drawn: list[Any]) -> None:
    run_dir = make_run(tmp_path / "run", ["model=sw"], table(10, context=4096, level=7.0), table(20))
    assert plot.main([f"runs=[{run_dir}]", f"out={tmp_path}/a.png"]) == 0
    assert [7 < max(y) < 8 for _, y in curves_in(drawn[0]).values()] == [True]


def test_curves_that_lie_upon_each_other_are_said_to_and_all_can_be_seen(drawn: list[Any]) -> None:
    level = {"a": 2.0, "b": 2.0, "c": 2.0005, "d": 3.0}
    plot.loss_by_position([Curve(name, table(10, level=at)[:4]) for name, at in level.items()], "x.png")
    lines = {line.get_label(): line.get_linestyle() for line in drawn[0].axes[0].lines}
    assert list(lines) == ["a", "b (the same curve as a)", "c (the same curve as a)", "d"]
    assert lines["a"] == lines["d"] == "-" != lines["b (the same curve as a)"]
    patterns = [line._unscaled_dash_pattern for line in drawn[0].axes[0].lines]
    assert len({str(pattern) for pattern in patterns[:3]}) == 3, "solid, and dots between the dots"


def test_curves_of_other_lengths_are_not_equal() -> None:
    assert equal_curves([[1.0, 2.0], [1.0, 2.0, 3.0], [1.0, 2.0]]) == {2: 0}
