"""In-context recall accuracy by length for several models: the paper's figure 4 in miniature.

    python -m eval.figures.recall                                        the figure: every default model, one seed
    python -m eval.figures.recall seeds=[0,1] models=[sw_ovq,sw_fifo] out=/tmp/recall trainer.steps=1000

Settings of train.py are passed on to every run.

Each model and seed is a separate run (`python train.py experiment=recall model=M seed=S`), trained one after the other
by `launch.sweep`, which reuses finished runs and resumes interrupted ones. Each is then tested on fresh sequences of
`lengths` times its training length, the same sequences for every model. A model with a dictionary is also tested at
other capacities, which it did not see in training.

Writes recall.csv, recall.json (what was run, where and when) and recall.png to `out`.
"""

from __future__ import annotations

import csv
import io
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data.build import build_task
from eval import style
from eval.answers import test
from launch import sweep
from ovq import config
from ovq.cli import command
from ovq.errors import ConfigError
from ovq.files import write_whole
from ovq.inference.run import load_run
from ovq.machine import describe_machine
from ovq.mixers.base import other_capacity
from ovq.schema import setting
from ovq.train.metrics import read_rows


@dataclass
class Options:
    models: list[str] = setting(["sw", "sw_nope", "sw_ovq", "sw_vq", "sw_gdn"], "models to train and test")
    seeds: list[int] = setting([0], "training seeds")
    lengths: list[int] = setting(
        [1, 2, 4, 8, 16], "lengths of test sequences, in multiples of the training length", at_least=1
    )
    num_centroids: list[int] = setting(
        [256, 1024, 2048], "test-time capacities of a model with a dictionary, besides its own", at_least=1
    )
    answers: int = setting(16384, "minimum answers per point; 16384 keep the standard error below 0.4%", at_least=1)
    out: str = setting("docs/results/recall", "folder for the figure")


INSTEAD = {
    "experiment": "it is always recall",
    "model": "use models=[a,b]",
    "seed": "use seeds=[0,1]",
    "run_dir": "use runs_root=FOLDER",
}


class Point(NamedTuple):
    """A row of recall.csv. `accuracy` is in 0 to 1; `num_centroids` is None for a model without a dictionary."""

    model: str
    seed: int
    train_length: int
    length: int
    num_centroids: int | None
    accuracy: float
    answers: int


@command(Options, overrides=True)
def main(options: Options, overrides: list[str]) -> int:
    """The command line shown in the module docstring."""
    jobs = plan(options, overrides)
    began = time.monotonic()
    print(sweep.table(jobs), flush=True)
    sweep.run(jobs, gpus=0, per_job=1, stop_on_failure=False)
    if broken := sweep.failures(jobs):
        print(f"\nfailed; rerun the same command to resume:\n{broken}", file=sys.stderr)
        return 1
    points = [point for job in jobs for point in test_run(job.run_dir, options)]
    out = Path(options.out)
    write_whole(out / "recall.csv", table(points))
    style.save(draw(points), out / "recall.png")
    write_whole(out / "recall.json", facts(jobs, time.monotonic() - began))
    print(f"\n{report(points)}\n\n{out}/recall.csv, recall.png, recall.json")
    return 0


def plan(options: Options, overrides: list[str]) -> list[sweep.Job]:
    """The training runs, with finished ones marked as such.

    Raises:
        ConfigError: an illegal setting, a setting that an option replaces, or a finished run whose settings are no
            longer those of the experiment.
    """
    for text in overrides:
        if (key := text.partition("=")[0]) in INSTEAD:
            raise ConfigError(f"{text} cannot be given here; {INSTEAD[key]}")
    axes = [f"{key}={','.join(map(str, many))}" for key, many in (("model", options.models), ("seed", options.seeds))]
    jobs = sweep.expand(["experiment=recall", *axes, *overrides])
    sweep.mark_finished(jobs)
    return jobs


def test_run(run_dir: Path, options: Options) -> list[Point]:
    """Test one trained run at every length and capacity."""
    run = load_run(run_dir, ["trainer.precision=fp32"])
    cfg, task = run.cfg, build_task(run.cfg)
    model = run.model
    own = next((mixer.capacity for mixer in model.mixers() if mixer.capacity), None)
    capacities = [None] if own is None else sorted({own, *options.num_centroids})
    points = []
    for capacity in capacities:
        for factor in options.lengths:
            length = factor * cfg.trainer.context
            with other_capacity(model.mixers(), capacity):
                right, answers = test(model, run.world.device, task, length, options.answers).total
            share = right / answers
            points.append(Point(cfg.model.name, cfg.seed, cfg.trainer.context, length, capacity, share, answers))
            print(line(points[-1]), flush=True)
    return points


def table(points: list[Point]) -> str:
    """The points as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Point._fields)
    for point in points:
        writer.writerow(["" if value is None else value for value in point._replace(accuracy=round(point.accuracy, 5))])
    return text.getvalue()


def line(point: Point) -> str:
    capacity = "" if point.num_centroids is None else f"  N {point.num_centroids}"
    return f"{point.model:<14} seed {point.seed}  length {point.length:>6}{capacity:<8}  {point.accuracy:7.2%}"


def curves(points: list[Point]) -> dict[tuple[str, int | None], dict[int, list[Point]]]:
    """(model, capacity) -> seed -> points by length, in the order of the points."""
    made: dict[tuple[str, int | None], dict[int, list[Point]]] = {}
    for point in points:
        made.setdefault((point.model, point.num_centroids), {}).setdefault(point.seed, []).append(point)
    return made


def label(model: str, capacity: int | None) -> str:
    return model if capacity is None else f"{model}, N = {capacity}"


def report(points: list[Point]) -> str:
    """A table of accuracy in per cent: one line per model, capacity and seed, one column per length."""
    lengths = sorted({point.length for point in points})
    lines = [f"{'accuracy, %':<26}{'seed':>5}" + "".join(f"{length:>8}" for length in lengths)]
    for (model, capacity), seeds in curves(points).items():
        for seed, curve in seeds.items():
            at = {point.length: f"{100 * point.accuracy:8.1f}" for point in curve}
            lines.append(f"{label(model, capacity):<26}{seed:>5}" + "".join(at.get(n, " " * 8) for n in lengths))
    return "\n".join(lines)


def draw(points: list[Point]) -> Any:
    """Accuracy by length: one colour per model, one line style per capacity, one curve per seed."""
    fig, (ax,) = style.figure()
    models = list(dict.fromkeys(point.model for point in points))
    capacities: dict[str, list[int | None]] = {name: [] for name in models}
    for (model, capacity), seeds in curves(points).items():
        capacities[model].append(capacity)
        dashes = style.LINES[(len(capacities[model]) - 1) % len(style.LINES)]
        for index, curve in enumerate(seeds.values()):
            x, y = [point.length for point in curve], [100 * point.accuracy for point in curve]
            name = label(model, capacity) if index == 0 else None
            ax.plot(x, y, dashes, color=style.color(models.index(model)), label=name, marker="o", markersize=3)
    for length in {point.train_length for point in points}:
        ax.axvline(length, color="#999999", linewidth=0.8, linestyle=":")
    ax.set_ylim(-2, 102)
    ax.set_ylabel("correct answers, %")
    ax.set_title("In-context recall; dotted line: training length")
    style.token_axis(ax, "tokens in the sequence")
    style.legend(ax)
    return fig


def facts(jobs: list[sweep.Job], seconds: float) -> str:
    """The contents of recall.json: how the figure was made, and the outcome of each run's training."""
    runs = {}
    for job in jobs:
        rows = read_rows(job.run_dir / "metrics.jsonl")
        cfg = config.load(job.run_dir)
        tokens = cfg.trainer.global_batch * cfg.trainer.context
        runs[job.run_dir.name] = {
            "steps": len(rows),
            "first_loss": rows[0]["loss"],
            "last_loss": rows[-1]["loss"],
            "training_minutes": round(sum(tokens / row["tokens_per_s"] for row in rows) / 60, 2),
            "reused": job.status == "finished before",
        }
    made = {
        "machine": describe_machine(),
        "minutes": round(seconds / 60, 1),
        "runs": runs,
    }
    return json.dumps(made, indent=1) + "\n"


if __name__ == "__main__":
    sys.exit(main())
