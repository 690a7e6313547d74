"""Accuracy of a trained run on its generated task, by length and by the index of the answer.

    python -m eval.accuracy run=runs/a lengths=[128,1024,65536] num_centroids=4096
    python -m eval.accuracy run=runs/b lengths=[2048] data.task.functions=128    regression with other settings
    python -m eval.accuracy run=runs/a answers=100000

A run is tested on fresh sequences of its own task, the same for every model. Settings of the task may be changed if its
vocabulary stays the same. The index is what the task counts, for instance the number of earlier examples of a function
(`Task.indices`).

Writes accuracy.parquet and accuracy.csv (a row per length and index, and a row of totals per length, whose index is
null) and a plot to the run folder: accuracy by index if the task has one, else by length. The standard error of a total
is that of the mean over sequences, so it needs two of them (`answers`). With several processes, each runs every
sequence on its shard of the model.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data.build import build_task, is_task
from data.tasks.base import Task
from eval import style
from eval.accuracy_table import TABLE, task_settings
from eval.answers import test
from eval.run_table import Row, changes, mark
from ovq import peers, processes
from ovq.cli import command
from ovq.errors import ConfigError
from ovq.files import write_whole
from ovq.inference.run import Run, RunOptions, at_capacity
from ovq.model import state_bytes, state_size
from ovq.report import reporting
from ovq.schema import setting

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class Options(RunOptions):
    lengths: list[int] | None = setting(
        None,
        "tokens of test sequences; null: 1, 2, 4, 8 and 16 times the training context, as far as the task allows",
        at_least=1,
    )
    answers: int = setting(16384, "minimum answers per length, from whole sequences", at_least=1)


@command(Options, overrides=True, leave=peers.leave)
def main(options: Options, overrides: list[str]) -> int:
    """The command line shown in the module docstring."""
    with peers.watched(Path(options.run) / "checkpoints"):
        run = options.open(overrides)
        if not is_task(run.cfg):
            raise ConfigError(f"{options.run} was not trained on a generated task; see python -m eval.per_position")
        task = build_task(run.cfg)
        rows = measure(run, task, options, changes(overrides))

        def publish() -> None:
            TABLE.write(run.run_dir, rows)
            write_whole(run.run_dir / "accuracy.csv", TABLE.as_csv(run.run_dir))
            print(run.run_dir / TABLE.file, run.run_dir / "accuracy.csv", sep="\n")
            with reporting("the plot of the accuracy"):
                print(style.save(draw(rows, task), run.run_dir / "plots" / picture_name(rows[0], overrides)))

        processes.on_main(publish)
        processes.shutdown()
    return 0


def possible(task: Task, lengths: list[int], report: bool) -> list[int]:
    """The lengths of which the task has sequences, up to the first of which it has none; always the first."""
    for index, length in enumerate(lengths[1:], 1):
        try:
            task.describe(length)
        except ConfigError as error:
            if report:
                print(f"lengths of {length:,} tokens and more are left out: {error}", file=sys.stderr)
            return lengths[:index]
    return lengths


def measure(run: Run, task: Task, options: Options, changed: str = "") -> list[Row]:
    """The rows of all lengths: for each, the total and then every index that has answers. Collective.

    Args:
        changed: value of the table's "changes" column.

    Raises:
        ConfigError: the task has no sequence of a length, or no layer has a dictionary for eval.num_centroids.
    """
    cfg, model = run.cfg, run.model
    context, itemsize = cfg.trainer.context, run.world.itemsize
    lengths = options.lengths or possible(task, [factor * context for factor in (1, 2, 4, 8, 16)], run.world.is_main)
    for length in lengths:
        task.describe(length)  # raises now, not after an hour's work
    rows = []
    with at_capacity(model, cfg):
        for length in lengths:
            tally = test(model, run.world.device, task, length, options.answers)
            right, answers = tally.total
            error, sequences = tally.standard_error, len(tally.by_sequence)
            common = {
                "run": run.run_dir.resolve().name,
                "step": run.step,
                "task": task.name,
                "settings": task_settings(cfg),
                "num_centroids": cfg.eval.num_centroids,
                "changes": changed,
                "length": length,
                "sequences": sequences,
                "model": cfg.model.name,
                "state_numbers": state_size(model, length),
                "state_bytes": state_bytes(model, length, itemsize),
                "train_context": context,
            }
            curve = tally.curve() if task.index_name else []
            for index, accuracy, count in [(None, right / answers, answers), *curve]:
                row = common | {"index": index, "accuracy": accuracy, "answers": count}
                row["standard_error"] = error if index is None else None
                rows.append({name: row[name] for name in TABLE.schema.names})
            if run.world.is_main:
                spread = "" if error is None else f" ± {100 * error:.2f}"
                where = "in one sequence" if sequences == 1 else f"in {sequences} sequences"
                said = f"{right / answers:7.2%}{spread} of {answers} answers {where}"
                print(f"length {length:>7}: {said}", file=sys.stderr, flush=True)
    return rows


def picture_name(row: Row, overrides: list[str]) -> str:
    """File name of the plot of a test, given one of its rows. Other settings than the run's add a hash of them."""
    capacity = f"_N{row['num_centroids']}" if row["num_centroids"] else ""
    return f"accuracy_{row['task']}{capacity}{mark(changes(overrides, text=True))}.png"


def draw(rows: list[Row], task: Task) -> Figure:
    """Accuracy by index, a curve per length, if the task has an index; otherwise by length."""
    fig, (ax,) = style.figure()
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    if task.index_name:
        for number, length in enumerate(lengths):
            curve = [row for row in rows if row["length"] == length and row["index"] is not None]
            x, y = [row["index"] for row in curve], [100 * row["accuracy"] for row in curve]
            look = {"color": style.color(number), "linestyle": style.line(number), "marker": "o", "markersize": 3}
            ax.plot(x, y, label=f"{style.short(length)} tokens", **look)  # type: ignore[arg-type]
        ax.set_xlabel(task.index_name)
    else:
        ax.plot(lengths, [100 * row["accuracy"] for row in rows], color=style.color(0), marker="o", markersize=3)
        ax.axvline(rows[0]["train_context"], color="#999999", linewidth=0.8, linestyle=":")
        style.token_axis(ax, "tokens in the sequence; dotted line: training length")
    ax.set_ylim(-2, 102)
    ax.set_ylabel("correct answers, %")
    changed = f", {rows[0]['changes']}" if rows[0]["changes"] else ""
    ax.set_title(f"{rows[0]['model']}, step {rows[0]['step']:,}: {task.name}{changed}")
    style.legend(ax)
    return fig


if __name__ == "__main__":
    sys.exit(main())
