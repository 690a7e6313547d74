"""Plot one or several runs: loss by position with its standard error, training loss by step, or accuracy by length.

    python -m eval.plot runs=[runs/a,runs/b] out=both.png                 the best evaluation of each run
    python -m eval.plot runs=[runs/pg19*] context=65536 x=linear          at one context, on a linear axis
    python -m eval.plot runs=[runs/a,runs/b] kind=training out=train.png
    python -m eval.plot runs=[runs/a,runs/b] kind=accuracy out=recall.png     of a generated task (eval.accuracy)

Runs are labelled by the settings in which they differ.
"""

from __future__ import annotations

import math
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from eval import loss_table, style
from eval.accuracy_table import TABLE, task_settings
from eval.run_labels import by_seeds, labels
from eval.run_table import mark
from ovq import config
from ovq.cli import command
from ovq.errors import ConfigError
from ovq.schema import REQUIRED, one_of, setting
from ovq.train.metrics import training_rows
from ovq.values import expand

FIRST_SHOWN = 16  # earlier positions have almost no context, and their high losses would flatten the rest of the curve
SEEN = 0.002  # of the picture's height: a smaller difference is hidden by the line
SHOWN_STEPS = 5  # at most this many evaluations of one run in a figure


@dataclass
class Curve:
    """The rows of one evaluation in one kind of bucket, with a label; `train_context` is marked if given."""

    label: str
    rows: list[loss_table.Row]
    train_context: int | None = None


def loss_by_position(curves: list[Curve], out: Path | str, *, scale: str = "log") -> Path:
    """Draw loss +- one standard error over documents against position; returns `out`.

    Args:
        scale: "log" or "linear": the scale of the axis, and the kind of bucket in every curve's rows.
    """
    fig, (ax,) = style.figure()
    longest = max(row["position_end"] for curve in curves for row in curve.rows)
    drawn = [after_the_first(curve.rows, longest) if scale == "log" else curve.rows for curve in curves]
    same = equal_curves([[row["loss"] for row in rows] for rows in drawn])
    for index, (curve, rows) in enumerate(zip(curves, drawn)):
        x = [_middle(row, scale) for row in rows]
        loss = [row["loss"] for row in rows]
        error = [row["stderr"] or 0.0 for row in rows]
        ax.plot(x, loss, color=style.color(index), **_told_apart(index, same, [curve.label for curve in curves]))
        low, high = ([y + sign * e for y, e in zip(loss, error)] for sign in (-1, 1))
        ax.fill_between(x, low, high, color=style.color(index), alpha=0.15, linewidth=0)
    for trained in sorted({curve.train_context for curve in curves if curve.train_context}):
        ax.axvline(trained, color="#555555", linewidth=1, linestyle=(0, (1, 2)))
        ax.annotate(
            f"trained at {style.short(trained)}",
            (trained, 0.02),
            xycoords=ax.get_xaxis_transform(),
            xytext=(3, 0),
            textcoords="offset points",
            fontsize=8,
            color="#555555",
            va="bottom",
        )
    ax.set_ylabel("loss (nats per token)")
    ax.set_title(_title(curves), loc="left")
    style.token_axis(ax, "position in the document (tokens)", scale)
    style.legend(ax)
    return style.save(fig, out)


def after_the_first(rows: list[loss_table.Row], longest: int | None = None) -> list[loss_table.Row]:
    """Rows of logarithmic buckets without those of a token or two at the beginning, if the curve is long; all rows of
    one that ends there."""
    longest = longest or max((row["position_end"] for row in rows), default=0)
    first = FIRST_SHOWN if longest > 16 * FIRST_SHOWN else 0
    return [row for row in rows if row["position_start"] >= first] or rows


def equal_curves(curves: list[list[float]]) -> dict[int, int]:
    """Index of a curve -> that of the first curve it coincides with, to within a line's width in the whole picture."""
    height = max(max(values) for values in curves) - min(min(values) for values in curves)
    found: dict[int, int] = {}
    for index, values in enumerate(curves):
        for earlier in range(index):
            other = curves[earlier]
            near = len(other) == len(values) and all(abs(a - b) <= SEEN * height for a, b in zip(values, other))
            if near and earlier not in found:
                found[index] = earlier
                break
    return found


def _told_apart(index: int, same: dict[int, int], names: list[str]) -> dict[str, Any]:
    """Line style and label of a curve. One that equals another is dotted in its own colour, and its label says so."""
    if index not in same:
        return {"linestyle": style.line(index), "label": names[index]}
    above = sum(1 for other, first in same.items() if first == same[index] and other <= index)
    dots = (4 * (above - 1), (2, 4 * sum(1 for first in same.values() if first == same[index])))
    return {"linestyle": dots, "label": f"{names[index]} (the same curve as {names[same[index]]})"}


def _middle(row: loss_table.Row, scale: str) -> float:
    """Where a bucket is drawn: its midpoint, or on a log axis the geometric mean of the numbers of tokens seen."""
    start, end = row["position_start"], row["position_end"]
    return math.sqrt((start + 1) * end) if scale == "log" else (start + end) / 2


def _title(curves: list[Curve]) -> str:
    """'4 validation documents', or a range where curves differ; a single curve's label comes first (no legend)."""
    counts = [loss_table.documents_of(row) for curve in curves for row in curve.rows]
    number = str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)}-{max(counts)}"
    splits = sorted({row["split"] for curve in curves for row in curve.rows})
    documents = f"{number} {' / '.join(splits)} document{'s' if number != '1' else ', so no standard error'}"
    return documents if len(curves) > 1 else f"{curves[0].label}: {documents}"


def curves_of(rows: list[loss_table.Row], *, scale: str, train_context: int, key: tuple[Any, ...]) -> list[Curve]:
    """A run's evaluation `key` and earlier ones at the same context, capacity, split and changes, a curve per step."""
    step, *same = key
    of_step: dict[int, list[loss_table.Row]] = {}
    for row in rows:
        if row["buckets"] == scale and list(loss_table.key_of(row)[1:]) == same and row["step"] <= step:
            of_step.setdefault(row["step"], []).append(row)
    steps = sorted(of_step)
    if len(steps) > SHOWN_STEPS:  # the first, the last, and evenly spaced ones between
        steps = [steps[round(i * (len(steps) - 1) / (SHOWN_STEPS - 1))] for i in range(SHOWN_STEPS)]
    changed = f", {same[-1]}" if same[-1] else ""
    return [Curve(f"step {number:,}{changed}", of_step[number], train_context) for number in steps]


def picture_name(context: int, split: str, num_centroids: int | None, changed: str = "") -> str:
    """File name of an evaluation's plot in its run folder. That of a changed model or another text has a hash of the
    changes."""
    parts = ["loss_by_position", style.short(context), *(["test"] if split == "test" else [])]
    parts += [f"N{num_centroids}"] if num_centroids else []
    return "_".join(parts) + mark(changed) + ".png"


# --- several runs ----------------------------------------------------------------------------------------------------


def compare(
    run_dirs: list[Path], out: Path, *, context: int | None, step: int | None, split: str | None, scale: str
) -> Path:
    """Overlay the best evaluation of each run (one for each capacity and change it was evaluated with): see
    `best_steps`.

    Args:
        context: context of the evaluations; None: the longest that all runs have.
        step: step of the evaluations; None: the one over the most documents, the newest among equals.
        split: split of the evaluations; None: any.

    Raises:
        ConfigError: a folder is not a run, or has no such evaluation.
    """
    configs = [config.load(run_dir) for run_dir in run_dirs]
    tables = [
        [
            row
            for row in loss_table.read(run_dir)
            if row["buckets"] == scale and split in (None, row["split"]) and step in (None, row["step"])
        ]
        for run_dir in run_dirs
    ]
    contexts = [{row["context"] for row in table} for table in tables]
    if context is None:
        context = max(set.intersection(*contexts), default=None)
    curves: list[Curve] = []
    for run_dir, cfg, table, label in zip(run_dirs, configs, tables, labels(configs, [d.name for d in run_dirs])):
        rows = [row for row in table if row["context"] == context]
        if not rows:
            have = ", ".join(map(str, sorted({row["context"] for row in loss_table.read(run_dir)}))) or "none"
            wanted = "at a context that all runs share" if context is None else f"at context={context}"
            if cfg.data.kind == "task":
                raise ConfigError(f"{run_dir} was trained on a generated task; plot its accuracy with kind=accuracy")
            asked = {"context": context or cfg.eval.context, "split": split, "checkpoint": step}
            words = [f"run={run_dir}", *(f"{name}={value}" for name, value in asked.items() if value is not None)]
            raise ConfigError(
                f"{run_dir} has no such evaluation {wanted} (contexts it has: {have}); "
                f"make one with: python -m eval.per_position {shlex.join(words)}"
            )
        best = best_steps(rows)
        for same, (at, newer) in best.items():
            capacity, of_split, changed = same[1:]
            if newer:
                print(f"{run_dir}: {newer}", file=sys.stderr)
            parts = [label, *([f"N={capacity} in evaluation"] if capacity else []), *([changed] if changed else [])]
            parts += [of_split] if len(best) > 1 and len({other[2] for other in best}) > 1 else []
            chosen = [row for row in rows if loss_table.key_of(row) == (at, *same)]
            curves.append(Curve(", ".join(parts), chosen, cfg.trainer.context))
    if len({curve.rows[0]["step"] for curve in curves}) > 1:
        curves = [replace(curve, label=f"{curve.label}, step {curve.rows[0]['step']:,}") for curve in curves]
    return loss_by_position(curves, out, scale=scale)


def best_steps(rows: list[loss_table.Row]) -> dict[tuple[Any, ...], tuple[int, str]]:
    """The evaluation to draw for each context, capacity, split and changes: the newest over the most documents.

    Returns:
        (context, num_centroids, split, changes) -> its step, and a note if there is a newer one over fewer documents.
    """
    documents: dict[tuple[Any, ...], dict[int, int]] = {}
    for row in rows:
        documents.setdefault(loss_table.key_of(row)[1:], {})[row["step"]] = loss_table.documents_of(row)
    found = {}
    for same, of_step in documents.items():
        step = max(of_step, key=lambda step: (of_step[step], step))
        newest = max(of_step)
        line = f"step {step:,} is drawn, over {of_step[step]} documents; for step {newest:,}, over {of_step[newest]}"
        found[same] = step, "" if newest == step else f"{line}: step={newest}"
    return found


def training(run_dirs: list[Path], out: Path, *, scale: str) -> Path:
    """Draw each run's training loss by step, both as logged and as a running mean.

    Raises:
        ConfigError: a folder is not a run, or has no metrics yet.
    """
    fig, (ax,) = style.figure()
    configs = [config.load(run_dir) for run_dir in run_dirs]
    names, means = labels(configs, [d.name for d in run_dirs]), []
    for index, run_dir in enumerate(run_dirs):
        rows = training_rows(run_dir)
        if not rows:
            raise ConfigError(f"{run_dir} has no training loss yet: its metrics.jsonl has no steps")
        steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
        ax.plot(steps, losses, color=style.color(index), alpha=0.25, linewidth=0.8)
        means.append((steps, running_mean(losses, max(1, len(losses) // 50))))
    same = equal_curves([mean for _, mean in means])
    for index, (steps, mean) in enumerate(means):
        ax.plot(steps, mean, color=style.color(index), **_told_apart(index, same, names))
    if scale == "log":
        ax.set_xscale("log")
    ax.set_xlabel("step")
    ax.set_ylabel("training loss (nats per token)")
    style.legend(ax)
    return style.save(fig, out)


def accuracy(run_dirs: list[Path], out: Path) -> tuple[Path, str]:
    """Draw each run's accuracy on its generated task by length, at each capacity from the tests of its newest step with
    the settings of the task in training, if there are any.
    Runs that differ only in the seed are thin lines of one colour, and their mean is a thick one; the band of a single
    run is one standard error over test sequences.

    Returns:
        `out`, and a sentence with the accuracies at the longest length that all curves have.

    Raises:
        ConfigError: a folder is not a run, has no accuracies, or was tested on another task, or with other settings of
            the task, than the first.
    """
    configs = [config.load(run_dir) for run_dir in run_dirs]
    curves: dict[str, dict[Path, dict[int, loss_table.Row]]] = {}  # label -> run -> length
    tested: dict[str, Path] = {}
    groups = by_seeds(configs, labels(configs, [d.name for d in run_dirs]))
    for index, run_dir in enumerate(run_dirs):
        label = next(label for label, members in groups if index in members)
        rows = sorted((row for row in TABLE.read(run_dir) if row["index"] is None), key=lambda row: row["step"])
        own = task_settings(configs[index])
        rows = [row for row in rows if row["settings"] == own] or rows
        if not rows:
            raise ConfigError(f"{run_dir} has no accuracies; make them with: python -m eval.accuracy run={run_dir}")
        newest = {(row["num_centroids"], row["changes"]): row["step"] for row in rows}
        for row in (row for row in rows if row["step"] == newest[row["num_centroids"], row["changes"]]):
            capacity = f", N={row['num_centroids']} in the test" if row["num_centroids"] else ""
            changed = f", {row['changes']}" if row["changes"] else ""
            curves.setdefault(label + capacity + changed, {}).setdefault(run_dir, {})[row["length"]] = row
            tested.setdefault(f"{row['task']} {row['settings']}", run_dir)
    if len(tested) > 1:
        raise ConfigError(
            f"{' and '.join(map(str, tested.values()))} were tested on different tasks: {'; '.join(tested)}"
        )
    fig, (ax,) = style.figure()
    shared = set.intersection(*(set(found) for runs in curves.values() for found in runs.values()))
    said = []
    for index, (label, runs) in enumerate(curves.items()):
        look: dict[str, Any] = {"color": style.color(index), "linestyle": style.line(index)}
        lengths = sorted(set.intersection(*map(set, runs.values())))
        each = [[100 * found[length]["accuracy"] for length in lengths] for found in runs.values()]
        for y in each if len(each) > 1 else ():
            ax.plot(lengths, y, linewidth=0.6, alpha=0.6, **look)
        if len(each) == 1:
            errors = [100 * (found[length]["standard_error"] or 0.0) for found in runs.values() for length in lengths]
            low, high = ([y + side * error for y, error in zip(each[0], errors)] for side in (-1, 1))
            ax.fill_between(lengths, low, high, color=style.color(index), alpha=0.15, linewidth=0)
        seeds = f" ({len(each)} seeds)" if len(each) > 1 else ""
        ax.plot(lengths, [fmean(ys) for ys in zip(*each)], label=label + seeds, marker="o", markersize=3, **look)
        if shared:
            at = [found[max(shared)] for found in runs.values()]
            shares = ", ".join(f"{row['accuracy']:.1%}" for row in at)
            said.append(f"{label}: {shares} of {at[0]['answers']:,} answers")
    tests = [row for runs in curves.values() for found in runs.values() for row in found.values()]
    for context in sorted({row["train_context"] for row in tests}):
        ax.axvline(context, color="#999999", linewidth=0.8, linestyle=":")
    style.token_axis(ax, "tokens in the sequence; dotted line: training length")
    ax.set_ylim(-2, 102)
    ax.set_ylabel("correct answers, %")
    ax.set_title(next(iter(tested)).partition(" ")[0], loc="left")
    style.legend(ax)
    line = f"at {max(shared):,} tokens, {'; '.join(said)}" if shared else "the runs share no length"
    return style.save(fig, out), line


def running_mean(values: list[float], width: int) -> list[float]:
    """The mean of each value and up to `width` neighbours on either side (fewer at the ends)."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    spans = [(max(0, i - width), min(len(values), i + width + 1)) for i in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in spans]


@dataclass
class Options:
    runs: list[str] = setting(REQUIRED, "run folders to plot, [a,b] or a pattern as in [runs/*]", paths=True)
    out: str = setting("runs.png", "file to write; its ending selects the format", endings=style.ENDINGS, writes="file")
    kind: str = one_of(
        "position", "training", "accuracy", help="loss by position, training loss by step, or accuracy by length"
    )
    x: str | None = setting(None, "scale of the axis; null: log by position, linear by step", choices=("log", "linear"))
    context: int | None = setting(None, "context of the evaluations; null: the longest that all runs have", at_least=1)
    step: int | None = setting(
        None, "step of the evaluations; null: the one over most documents, and of those the newest", at_least=0
    )
    split: str | None = setting(None, "split of the evaluations; null: any", choices=("validation", "test"))


UNREAD = {"training": ("context", "step", "split"), "accuracy": ("context", "step", "split", "x")}  # kind -> options


@command(Options)
def main(options: Options) -> int:
    """The command line shown in the module docstring."""
    for name in UNREAD.get(options.kind, ()):
        if (value := getattr(options, name)) is not None:
            raise ConfigError(f"{name}={value} has no effect with kind={options.kind}; leave it out")
    run_dirs, out = [Path(run) for run in expand(options.runs, holding="config.yaml")], Path(options.out)
    if options.kind == "training":
        path = training(run_dirs, out, scale=options.x or "linear")
    elif options.kind == "accuracy":
        path, said = accuracy(run_dirs, out)
        print(said)
    else:
        path = compare(
            run_dirs,
            out,
            context=options.context,
            step=options.step,
            split=options.split,
            scale=options.x or "log",
        )
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
