"""Make a figure: choose learning rates, train, test, draw. Every stage skips what is done already."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from eval.figures import folder, search
from eval.figures.declare import Figure, Options
from eval.figures.plan import Line, Plan, make_plan, table
from eval.figures.runs import FigureRun
from launch import sweep
from ovq.errors import ConfigError, Stopped
from ovq.signals import handled

Wanted = set[tuple[str, str, float]]


def make(figure: Figure, options: Options, overrides: list[str]) -> int:
    """Make a figure and write its folder; returns the exit status: 1 if something failed or is missing.

    Args:
        overrides: settings of train.py that all runs get.

    Raises:
        ConfigError: see `make_plan`; or a part needs what an earlier part has not done.
        Stopped: by a signal, or at the end of a part's time; the same command continues.
    """
    plan = make_plan(figure, options, overrides)
    wanted = plan.wanted()
    print(table(plan), flush=True)
    if options.dry_run or plan.scale.only_plan:
        return 0
    try:
        with stopping(), time_limit(plan.scale.piece_minutes if options.part else None):
            failed = begin(plan, wanted)
            failed += choose_rates(plan, wanted)
            failed += train(plan, wanted)
            test(plan, wanted)
    finally:  # also what was done before a signal is not done again, even without the run folders
        folder.write_records(plan)
    results = folder.gather(plan)
    out = Path(options.out) if options.out else folder.default(plan)
    folder.write(out, plan, results)
    print(f"\n{folder.report(results.points)}\n\n{out}: {', '.join(folder.names(plan))}")
    if failed:
        print(f"\nfailed; the same command tries again:\n{sweep.failures(failed)}", file=sys.stderr)
    if results.missing and not options.part:
        print("\nmissing from the figure:", *results.missing, sep="\n  ", file=sys.stderr)
    return 1 if failed or (results.missing and not options.part) else 0


def begin(plan: Plan, wanted: Wanted) -> list[sweep.Job]:
    """Train the runs whose weights other runs start from; returns those that failed."""
    units = [unit for unit in plan.work if unit.stage == "begin" and not plan.done(unit)]
    lines = {line.name: line for line in plan.lines}
    runs = [lines[u.line].beginning(int(u.which)) for u in units if (u.stage, u.line, u.which) in wanted]
    return run([first for first in runs if first], plan)


def choose_rates(plan: Plan, wanted: Wanted) -> list[sweep.Job]:
    """Train and score the trials; returns those that failed."""
    trials = [
        trial
        for line in plan.lines
        for rate, trial in line.trials.items()
        if ("search", line.name, rate) in wanted and trial.loss() in (None, math.inf)
    ]
    failed = run(trials, plan)
    for trial in trials:
        if trial.job in failed:
            search.note_failure(trial, sweep.failures([trial.job]).splitlines()[-1].strip())
        else:
            search.score(trial)
    return failed


def train(plan: Plan, wanted: Wanted) -> list[sweep.Job]:
    """Train the runs of the figure with the chosen rates; returns those that failed.

    Raises:
        ConfigError: in a part, a learning rate has not been chosen.
    """
    runs = []
    for line in plan.lines:
        units = [unit for unit in plan.work if (unit.stage, unit.line) == ("train", line.name)]
        units = [unit for unit in units if (unit.stage, unit.line, unit.which) in wanted]
        if units and line.rate() is None and plan.options.part:
            raise ConfigError(
                f"part={plan.options.part} needs the learning rate of {line.name}, which is not chosen yet; run the "
                f"parts before it (missing: {', '.join(unscored(line))})"
            )
        if line.rate() is not None:
            runs += [line.final(int(unit.which)) for unit in units if not plan.done(unit)]
    return run(runs, plan)


def unscored(line: Line) -> list[str]:
    """The run folders of trials without a finite score."""
    return [str(trial.run_dir) for trial in line.trials.values() if trial.loss() in (None, math.inf)]


def run(runs: list[FigureRun], plan: Plan) -> list[sweep.Job]:
    """Train those runs that are not finished; returns the jobs that failed."""
    jobs = [run.job for run in runs]
    sweep.run(jobs, gpus=0, per_job=1, stop_on_failure=False, at_once=plan.options.at_once)
    return [job for job in jobs if job.status == "failed"]


def test(plan: Plan, wanted: Wanted) -> None:
    """Run the missing tests of the runs that were trained here."""
    for line in plan.lines:
        for seed in plan.seeds:
            if ("test", line.name, seed) in wanted and line.rate() is not None:
                run = line.final(seed)
                missing = [test for test in line.tests if not run.values(test)]
                if missing and run.trained_here():
                    print(f"testing   {run.run_dir}", flush=True)
                    for test in missing:
                        line.measure.make(run.run_dir, test)


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """Within the `with` block, a SIGTERM outside of training raises Stopped; sweeps have a handler of their own."""

    def stop(number: int, _frame: object) -> None:
        raise Stopped(number, f"stopped by {signal.Signals(number).name}; the same command continues from here")

    with handled(stop, [signal.SIGTERM]):
        yield


@contextlib.contextmanager
def time_limit(minutes: float | None) -> Iterator[None]:
    """After `minutes` within the `with` block, this process gets a SIGTERM, so that runs save and stop."""
    if minutes is None:
        yield
        return
    timer = threading.Timer(60 * minutes, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
