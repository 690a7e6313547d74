"""Run a list of configurations, one fresh process each, and carry on where an earlier sweep stopped.

    python -m launch.sweep experiment=cpu_demo model=sw,sw_nope,sw_ovq seed=0,1
    python -m launch.sweep --gpus 8 --per-job 2 experiment=pg19_70m model=sw_ovq,sw_nope

The values use Hydra's sweep syntax. Every job is `train.py` with one combination of them, so its run folder is the one
that the same command uses when it is run by hand: finished jobs are skipped, others resume from their last checkpoint.
A finished job whose settings have changed since is refused before anything starts. A failure does not stop the other
jobs (unless --stop-on-failure); the sweep ends with a table of failures.

A signal that stops the sweep stops its jobs too: they save, the sweep prints where they stand and exits with status
128 + the signal's number, and the same sweep continues.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from ovq import config, identity
from ovq.cli import guarded
from ovq.compose import compose, run_dir_of
from ovq.errors import ConfigError, Stopped
from ovq.train.stop import SIGNALS
from ovq.train.summary import read_finished

ROOT = Path(__file__).resolve().parent.parent
POLL_S = 0.2


@dataclass
class Job:
    """One combination of overrides and its state."""

    overrides: list[str]
    run_dir: Path
    status: str = "waiting"  # waiting | finished before | running | finished | stopped | failed
    code: int | None = None

    @property
    def log(self) -> Path:
        return self.run_dir / "sweep.log"


def expand(overrides: list[str]) -> list[Job]:
    """The jobs of a sweep: the product of all `key=a,b,c`, each checked before the first one starts.

    Raises:
        ConfigError: an override that cannot be read, a job that is not legal, or two jobs with one run folder.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        raise ConfigError(" ".join(str(error).split("\n")[0].split())) from None
    axes = []
    for text, override in zip(overrides, parsed):
        if override.is_sweep_override():
            key = text.partition("=")[0]
            axes.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            axes.append([text])
    jobs: list[Job] = []
    for combination in itertools.product(*axes):
        chosen = list(combination)
        jobs.append(Job(chosen, run_dir_of(compose(chosen), chosen)))
    folders = [job.run_dir for job in jobs]
    for folder in folders:
        if folders.count(folder) > 1:
            raise ConfigError(f"two jobs of the sweep would share the run folder {folder}; leave run_dir out")
    return jobs


def is_finished(run_dir: Path) -> bool:
    """Whether training finished here: summary.json is the last file that train.py writes."""
    return read_finished(run_dir) is not None


def mark_finished(jobs: list[Job]) -> None:
    """Mark the jobs that are finished already.

    Raises:
        ConfigError: a finished run has other settings than its job: the experiment was edited in between.
    """
    for job in jobs:
        if is_finished(job.run_dir):
            stored, requested = config.load(job.run_dir), compose(job.overrides)
            changed = identity.changed(stored, requested)
            if stored.trainer.steps != requested.trainer.steps:  # may change at a resume, but this run has finished
                changed.append(f"trainer.steps: {stored.trainer.steps} -> {requested.trainer.steps}")
            if changed:
                raise ConfigError(f"{job.run_dir} was made with other settings ({'; '.join(changed)}); remove it")
            job.status = "finished before"


def run(jobs: list[Job], *, gpus: int, per_job: int, stop_on_failure: bool, at_once: int = 1) -> None:
    """Run the waiting jobs, as many at a time as there are groups of GPUs; without GPUs, `at_once`.

    No job outlives this function: if it ends early, it stops the running jobs and waits for them to save.

    Raises:
        Stopped: by a signal, after the jobs have saved.
    """
    slots = [list(range(at, at + per_job)) for at in range(0, gpus - per_job + 1, per_job)] or [[]] * at_once
    free, running = list(slots), dict[subprocess.Popen[bytes], tuple[Job, list[int]]]()
    waiting = [job for job in jobs if job.status == "waiting"]
    with noted_signals() as received:
        passed_on = 0
        try:
            while running or (waiting and not received):
                while waiting and free and not received:
                    job, slot = waiting.pop(0), free.pop(0)
                    running[start(job, slot, at_once)] = (job, slot)
                time.sleep(POLL_S)
                if len(received) > passed_on:
                    passed_on = len(received)
                    print(f"{received[0].name}: waiting for the running jobs to save", flush=True)
                    stop(running)
                for process in [process for process in running if process.poll() is not None]:
                    job, slot = running.pop(process)
                    free.append(slot)
                    job.code = process.returncode
                    job.status = "finished" if job.code == 0 and is_finished(job.run_dir) else "failed"
                    if received and job.status == "failed":
                        job.status = "stopped"
                    print(f"{job.status:<9} {job.run_dir}", flush=True)
                    if job.status == "failed" and stop_on_failure:
                        waiting.clear()
        finally:
            if running:  # an error of the sweep itself
                stop(running)
                for process in running:
                    process.wait()
    if received:
        raise Stopped(received[0], f"stopped by {received[0].name}; the same sweep continues from here")


def stop(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """Tell jobs to save and exit. SIGTERM, whatever the sweep received: torchrun handles it, and train.py takes any."""
    for process in processes:
        process.terminate()


@contextlib.contextmanager
def noted_signals() -> Iterator[list[signal.Signals]]:
    """The signals received within the `with` block, in order, in place of their effect."""
    received: list[signal.Signals] = []
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if number != signal.SIGHUP or handler is not signal.SIG_IGN:  # nohup
            signal.signal(number, lambda number, _: received.append(signal.Signals(number)))
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start(job: Job, slot: list[int], at_once: int = 1) -> subprocess.Popen[bytes]:
    """Start one job, its output in <run folder>/sweep.log, with its share of the cores if `at_once` jobs share them.

    In a session of its own: a Ctrl-C in the terminal reaches the sweep alone, which passes it on once.
    """
    job.status = "running"
    job.run_dir.mkdir(parents=True, exist_ok=True)
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ",".join(map(str, slot))} if slot else {})
    if at_once > 1:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // at_once))
    launcher = [sys.executable]
    if len(slot) > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(len(slot))]
    print(f"started   {job.run_dir}   log: {job.log}", flush=True)
    with job.log.open("ab") as log:
        command = [*launcher, str(ROOT / "train.py"), *job.overrides, "trainer.progress=false"]
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)


def table(jobs: list[Job]) -> str:
    """One line a job: status, run folder."""
    return "\n".join(f"{job.status:<16} {job.run_dir}" for job in jobs)


def failures(jobs: list[Job]) -> str:
    """The failed jobs, each with the last line that it printed."""
    lines = []
    for job in jobs:
        if job.status == "failed":
            printed = job.log.read_text(errors="replace").strip().splitlines() if job.log.exists() else []
            lines.append(f"exit {job.code}  {job.run_dir}\n    {printed[-1] if printed else '(printed nothing)'}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.sweep", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("overrides", nargs="*", help="settings in Hydra's syntax; key=a,b sweeps")
    parser.add_argument(
        "--gpus", type=int, default=0, help="GPUs of this machine to use (0: run on what train.py picks)"
    )
    parser.add_argument("--per-job", type=int, default=1, help="GPUs a job")
    parser.add_argument("--at-once", type=int, default=1, help="without GPUs: jobs at a time, sharing the cores")
    parser.add_argument("--stop-on-failure", action="store_true", help="start no further job after a failure")
    parser.add_argument("--plan", action="store_true", help="only show what would run")
    return guarded(lambda: sweep(parser.parse_args(argv)))


def sweep(options: argparse.Namespace) -> int:
    """Show the jobs, run those that are not finished, and list the failures."""
    jobs = expand(options.overrides)
    mark_finished(jobs)
    print(table(jobs), flush=True)
    if options.plan:
        return 0
    try:
        run(
            jobs,
            gpus=options.gpus,
            per_job=options.per_job,
            stop_on_failure=options.stop_on_failure,
            at_once=options.at_once,
        )
    finally:
        print(f"\n{table(jobs)}")
    if broken := failures(jobs):
        print(f"\nfailed; the same sweep resumes them:\n{broken}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
