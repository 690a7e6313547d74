"""The folder of a figure: what it takes to check it.

fig4.png, fig4.svg    the picture
fig4.csv              every number of it, every seed (`declare.Point`)
rates.csv             every trial of a learning rate, its score, and which one was chosen
plan.json             the commands of all runs, their outcome, the machine, the commit and the date
caption.md            what the picture shows, and how it differs from the paper's
"""

from __future__ import annotations

import csv
import io
import json
import subprocess
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from eval import style
from eval.figures import points, search
from eval.figures.caption import caption
from eval.figures.declare import Panel, Point, Test
from eval.figures.panels import note_missing
from eval.figures.plan import Line, Plan, tokens_of
from eval.run_table import Row
from launch.sweep import Job, is_finished
from ovq import config
from ovq.files import write_whole
from ovq.machine import describe_machine
from ovq.train.metrics import read_rows

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Results:
    """All points of a figure, and in words what is missing: "basic recall: sw_vq, seed 1 (its training failed)"."""

    points: list[Point]
    missing: list[str]


def default(plan: Plan) -> Path:
    """Where a figure goes unless `out` says otherwise."""
    suffix = "" if plan.scale.name == "cpu" else f"_{plan.scale.name}"
    return Path("docs/results") / f"{plan.figure.name}{suffix}"


def names(plan: Plan) -> list[str]:
    """The files of the folder."""
    return [*(f"{plan.figure.name}.{kind}" for kind in ("png", "svg", "csv")), "rates.csv", "plan.json", "caption.md"]


def gather(plan: Plan) -> Results:
    """What all runs of the plan have been tested with so far."""
    made: list[Point] = []
    missing: list[str] = []
    for panel in plan.figure.panels:
        for model in panel.models:
            line = next(line for line in plan.lines if (line.subject.name, line.model) == (panel.subject.name, model))
            for seed in plan.seeds:
                tests = panel.tests(line.cfg, line.own_capacity)
                found = {} if line.rate() is None else tested(plan, line, seed, tests)
                made += [p for test, rows in found.items() for p in points_of(plan, panel, line, seed, test, rows)]
                if lacking := len(tests) - len(found):
                    reason = why_missing(line, seed, lacking, len(tests))
                    missing.append(f"{panel.name}: {model}, seed {seed} ({reason})")
    return Results(made, missing)


def tested(plan: Plan, line: Line, seed: int, tests: list[Test]) -> dict[Test, list[Row]]:
    return points.find(line.final(seed).run_dir, tests, plan.options.answers)


def why_missing(line: Line, seed: int, lacking: int, tests: int) -> str:
    """In words, why a curve or a part of it is missing."""
    if line.rate() is None:
        return "no learning rate was chosen"
    job = line.final(seed)
    if job.status == "failed":
        return "its training failed"
    if not is_finished(job.run_dir):
        return "its training is not finished"
    return f"{lacking} of {tests} tests not made"


def points_of(plan: Plan, panel: Panel, line: Line, seed: int, test: Test, rows: list[Row]) -> Iterable[Point]:
    """The points of one test of one run: the total, and one for each index."""
    cfg, run_dir = line.cfg, line.final(seed).run_dir
    numbers, held = line.state(test)
    rate = line.rate()
    assert rate is not None
    for row in rows:
        yield Point(
            figure=plan.figure.name,
            panel=panel.name,
            test=test.label,
            model=line.model,
            num_centroids=test.num_centroids or line.own_capacity,
            seed=seed,
            length=test.length,
            index=row["index"],
            accuracy=row["accuracy"],
            answers=row["answers"],
            parameters=line.parameters,
            state_numbers=numbers,
            state_bytes=held,
            window=cfg.model.mixers.get("sliding_window", {}).get("window"),
            pattern=" ".join(cfg.model.pattern),
            train_length=cfg.trainer.context,
            steps=cfg.trainer.steps,
            tokens=tokens_of(cfg),
            rate=rate,
            task=row["settings"],
            run=run_dir.name,
        )


def write(out: Path, plan: Plan, results: Results) -> None:
    """Write all files of the folder, each whole or not at all."""
    machine, commit = describe_machine(), commit_of_this_code()
    name = plan.figure.name
    rounded = [[round(v, 6) if isinstance(v, float) else v for v in astuple(point)] for point in results.points]
    write_whole(out / f"{name}.csv", as_csv([item.name for item in fields(Point)], rounded))
    trials = rates(plan)
    write_whole(out / "rates.csv", as_csv(list(trials[0]), [list(row.values()) for row in trials]))
    write_whole(out / "plan.json", json.dumps(record(plan, results, machine, commit), indent=1) + "\n")
    write_whole(out / "caption.md", caption(plan, results.points, results.missing, trials, machine, commit))
    picture = plan.figure.draw(plan.figure, results.points)
    note_missing(picture, results.missing)
    for kind in ("png", "svg"):
        style.save(picture, out / f"{name}.{kind}")


def as_csv(head: list[str], rows: list[list[Any]]) -> str:
    """A table as CSV; an empty field is a None."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows([["" if value is None else value for value in row] for row in rows])
    return text.getvalue()


def rates(plan: Plan) -> list[dict[str, Any]]:
    """Every trial: its rate, its score (empty if it failed or is not done), whether it was chosen."""
    made = []
    for line in plan.lines:
        for rate, job in line.trials.items():
            found = search.read(job.run_dir) or {}
            row = {"subject": line.subject.name, "model": line.model, "rate": rate}
            row |= {name: found.get(name) for name in ("loss", "accuracy", "answers", "length")}
            cfg = line.trial_cfg
            row |= {"steps": cfg.trainer.steps, "train_seed": cfg.seed, "test_seed": search.TEST_SEED}
            row |= {"chosen": rate == line.rate(), "failed": found.get("failed"), "run": job.run_dir.name}
            made.append(row)
    return made


def record(plan: Plan, results: Results, machine: dict[str, Any], commit: str) -> dict[str, Any]:
    """The contents of plan.json."""
    jobs = [job for line in plan.lines for job in line.trials.values()]
    finals = [line.final(seed) for line in plan.lines if line.rate() is not None for seed in plan.seeds]
    return {
        "figure": plan.figure.name,
        "scale": plan.scale.name,
        "machine": machine,
        "commit": commit,
        "grid": plan.options.rates,
        "seeds": plan.seeds,
        "search": {"train_seed": search.TRAIN_SEED, "test_seed": search.TEST_SEED, "share": plan.options.search_share},
        "answers": plan.options.answers,
        "missing": results.missing,
        "trials": {job.run_dir.name: outcome(job) for job in jobs},
        "runs": {job.run_dir.name: outcome(job) for job in finals},
    }


def outcome(job: Job) -> dict[str, Any]:
    """How a run is repeated, and how its training went."""
    made: dict[str, Any] = {"command": f"python train.py {' '.join(job.overrides)}", "status": job.status}
    rows = [row for row in read_rows(job.run_dir / "metrics.jsonl") if "loss" in row]
    if rows:
        cfg = config.load(job.run_dir)
        tokens = cfg.trainer.global_batch * cfg.trainer.context
        made |= {
            "settings": config.digest(cfg),
            "steps": len(rows),
            "tokens": tokens * len(rows),
            "first_loss": rows[0]["loss"],
            "last_loss": rows[-1]["loss"],
            "training_minutes": round(sum(tokens / row["tokens_per_s"] for row in rows) / 60, 2),
        }
    return made


def commit_of_this_code() -> str:
    """The git commit of this code, "+ changes" if files differ from it; "unknown" outside a checkout."""
    try:
        commit, changed = (
            subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "-uno", "--", ".", ":!docs"])
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + (" + changes" if changed else "")


def report(made: list[Point]) -> str:
    """A table of accuracy in per cent over all answers: a line for each panel, test, model and capacity, the mean over
    seeds; a column for each length."""
    totals = [point for point in made if point.index is None]
    lengths = sorted({point.length for point in totals})
    lines = [f"{'accuracy, %, mean over seeds':<44}" + "".join(f"{style.short(length):>8}" for length in lengths)]
    shares: dict[str, dict[int, list[float]]] = {}
    for point in totals:
        capacity = f", N = {point.num_centroids}" if point.num_centroids else ""
        words = f"{point.panel}{', ' if point.test else ''}{point.test}: {point.model}{capacity}"
        shares.setdefault(words, {}).setdefault(point.length, []).append(point.accuracy)
    for words, by_length in shares.items():
        mean = {length: f"{100 * sum(many) / len(many):8.1f}" for length, many in by_length.items()}
        lines.append(f"{words:<44}" + "".join(mean.get(length, " " * 8) for length in lengths))
    return "\n".join(lines)
