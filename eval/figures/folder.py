"""The folder of a figure: all that is needed to check it.

fig4.png, fig4.svg    the picture
fig4.csv              every number of it, every seed (`declare.Point`)
rates.csv             every trial of a learning rate, its score, and which one was chosen
plan.json             the commands of all runs, their outcome, the machine, the commit and the date
caption.md            what the picture shows, and how it differs from the paper's
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from data.build import build_task, is_task
from eval import style
from eval.figures import search
from eval.figures.caption import caption
from eval.figures.declare import Panel, Point, Test
from eval.figures.measures import Value
from eval.figures.panels import note_missing
from eval.figures.plan import Line, Plan, tokens_of
from eval.figures.runs import FigureRun
from eval.run_table import as_csv
from ovq.files import write_whole
from ovq.machine import code_commit, describe_machine
from ovq.model import widest_window
from ovq.report import reporting


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
    """The results so far of all tests of the plan's runs, and what is missing."""
    made: list[Point] = []
    missing: list[str] = []
    for panel in plan.figure.panels:
        for model in panel.models:
            named = (panel.subject.name, model.name)
            line = next(line for line in plan.lines if (line.subject.name, line.model) == named)
            for seed in plan.seeds:
                tests = panel.tests(line.cfg, line.own_capacity)
                found = {} if line.rate() is None else tested(line.final(seed), tests)
                made += [p for test, values in found.items() for p in points_of(plan, panel, line, seed, test, values)]
                if lacking := len(tests) - len(found):
                    reason = why_missing(line, seed, lacking, len(tests))
                    missing.append(f"{panel.name}: {model.name}, seed {seed} ({reason})")
    return Results(made, missing)


def tested(run: FigureRun, tests: list[Test]) -> dict[Test, list[Value]]:
    """The tests that were run, with their results."""
    return {test: values for test in tests if (values := run.values(test))}


def why_missing(line: Line, seed: int, lacking: int, tests: int) -> str:
    """In words, why a curve or a part of it is missing."""
    if line.rate() is None:
        return "no learning rate was chosen"
    run = line.final(seed)
    if run.job.status == "failed":
        return "its training failed"
    if not run.trained_here():
        return "its training is not finished" if run.training() else "it has not been trained"
    return f"{lacking} of {tests} tests not made"


def points_of(plan: Plan, panel: Panel, line: Line, seed: int, test: Test, values: list[Value]) -> Iterable[Point]:
    """The points of one test of one run: the total, and one for each index."""
    cfg, run_dir = line.cfg, line.final(seed).run_dir
    numbers, held = line.state(test)
    rate = line.rate()
    assert rate is not None
    floor = build_task(cfg).floor if is_task(cfg) else None
    for value in values:
        yield Point(
            figure=plan.figure.name,
            panel=panel.name,
            test=test.label,
            model=line.model,
            num_centroids=test.num_centroids or line.own_capacity,
            seed=seed,
            length=test.length,
            index=value.index,
            document=value.document,
            value=value.value,
            count=value.count,
            floor=floor,
            parameters=line.parameters,
            state_numbers=numbers,
            state_bytes=held,
            window=widest_window(cfg.model),
            pattern=" ".join(cfg.model.pattern),
            train_length=cfg.trainer.context,
            steps=cfg.trainer.steps,
            tokens=tokens_of(cfg),
            rate=rate,
            task=cfg.data.name,
            run=run_dir.name,
        )


def write(out: Path, plan: Plan, results: Results) -> None:
    """Write all files of the folder, each whole or not at all."""
    machine, commit = describe_machine(), code_commit()
    name = plan.figure.name
    rounded = [[round(v, 6) if isinstance(v, float) else v for v in astuple(point)] for point in results.points]
    write_whole(out / f"{name}.csv", as_csv([item.name for item in fields(Point)], rounded))
    trials = rates(plan)
    write_whole(out / "rates.csv", as_csv(list(trials[0]), [list(row.values()) for row in trials]))
    write_whole(out / "plan.json", json.dumps(record(plan, results, machine, commit), indent=1) + "\n")
    write_whole(out / "caption.md", caption(plan, results.points, results.missing, trials, machine, commit))
    with reporting(f"the picture of {name}", "the same command draws it from the records"):
        picture = plan.figure.draw(plan.figure, results.points)
        note_missing(picture, results.missing)
        for kind in ("png", "svg"):
            style.save(picture, out / f"{name}.{kind}")


def rates(plan: Plan) -> list[dict[str, Any]]:
    """Every trial: its rate, its score (empty if it failed or is not done), whether it was chosen."""
    made = []
    for line in plan.lines:
        for rate, trial in (line.trials if line.own_trials else {}).items():
            found = trial.score() or {}
            row = {"subject": line.subject.name, "model": line.model, "rate": rate}
            row |= {name: found.get(name) for name in ("loss", "accuracy", "answers", "length")}
            cfg = trial.cfg
            row |= {"steps": cfg.trainer.steps, "train_seed": cfg.seed, "scored_on": line.measure.chosen_on}
            row |= {"chosen": rate == line.rate(), "failed": found.get("failed"), "run": trial.run_dir.name}
            made.append(row)
    return made


def record(plan: Plan, results: Results, machine: dict[str, Any], commit: str) -> dict[str, Any]:
    """The contents of plan.json."""
    trials = [trial for line in plan.lines if line.own_trials for trial in line.trials.values()]
    finals = [line.final(seed) for line in plan.lines if line.rate() is not None for seed in plan.seeds]
    first = [run for line in plan.lines if line.first for run in line.first.finals.values()]
    return {
        "figure": plan.figure.name,
        "scale": plan.scale.name,
        "machine": machine,
        "commit": commit,
        "seeds": plan.seeds,
        "search": {"train_seed": search.TRAIN_SEED, "rates": {line.name: list(line.trials) for line in plan.lines}},
        "missing": results.missing,
        **({"first": {run.run_dir.name: outcome(run) for run in first}} if first else {}),
        "trials": {run.run_dir.name: outcome(run) for run in trials},
        "runs": {run.run_dir.name: outcome(run) for run in finals},
    }


def outcome(run: FigureRun) -> dict[str, Any]:
    """How to repeat a run, and how its training went."""
    went = {name: value for name, value in run.training().items() if name != "losses"}
    return {"command": f"python train.py {' '.join(run.job.overrides)}", **went}


def write_records(plan: Plan) -> None:
    """Write the records of all runs that were trained here."""
    for line in plan.lines:
        for first in line.first.finals.values() if line.first else ():
            first.write_record([])
        for trial in line.trials.values() if line.own_trials else ():
            trial.write_record([])
        if line.rate() is not None:
            for seed in plan.seeds:
                line.final(seed).write_record(line.tests)


def report(made: list[Point]) -> str:
    """A table of accuracy in per cent over all answers: a line for each panel, test, model and capacity, the mean over
    seeds; a column for each length. Empty without answers."""
    totals = [point for point in made if point.index is None]
    if not totals:
        return ""
    lengths = sorted({point.length for point in totals})
    shares: dict[str, dict[int, list[float]]] = {}
    for point in totals:
        capacity = f", N = {point.num_centroids}" if point.num_centroids else ""
        words = f"{point.panel}{', ' if point.test else ''}{point.test}: {point.model}{capacity}"
        shares.setdefault(words, {}).setdefault(point.length, []).append(point.value)
    title = "accuracy, %, mean over seeds"
    width = max(map(len, [title, *shares]))
    lines = [f"{title:<{width}}" + "".join(f"{style.short(length):>8}" for length in lengths)]
    for words, by_length in shares.items():
        mean = {length: f"{100 * sum(many) / len(many):8.1f}" for length, many in by_length.items()}
        lines.append(f"{words:<{width}}" + "".join(mean.get(length, " " * 8) for length in lengths))
    return "\n".join(lines)
