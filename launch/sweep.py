"""Run a list of configurations on this machine, one fresh process each, and carry on where an earlier sweep stopped.

    python -m launch sweep -- experiment=cpu_demo model=sw,sw_nope,sw_ovq seed=0,1
    python -m launch sweep --gpus 8 --per-job 2 -- experiment=pg19_70m model=sw_ovq,sw_nope
    python -m launch slurm --gpus-per-node 1 -- experiment=pg19_70m model=sw_ovq,sw_nope     # as an array of jobs

The values use Hydra's sweep syntax. Every job is `train.py` with one combination of them, so its run folder is the one
that the same command uses when it is run by hand: finished jobs are skipped, others resume from their last checkpoint.
A finished job whose settings have changed since is refused before anything starts. A failure does not stop the other
jobs (unless --stop-on-failure); the sweep ends with a table of failures.

A signal that stops the sweep stops its jobs too: they save, the sweep prints where they stand and exits with status
128 + the signal's number, and the same command continues it. After `kill -9` of the sweep its jobs keep running, and
the same command continues it too.

Sweeps that have jobs in common can run at the same time, even on several machines that share the run folders: each job,
and each GPU of a machine, is used by one of them at a time. A sweep ends when all its jobs have, wherever they ran.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch import options as arguments
from launch.claims import claim, claim_gpus, release, trainer_of
from launch.options import positive
from ovq import config, identity
from ovq.bounded import how
from ovq.cli import guarded
from ovq.compose import compose, run_dir_of
from ovq.config import Config
from ovq.cpu import cores
from ovq.errors import ConfigError, Stopped
from ovq.files import write_whole
from ovq.overrides import sweep_values
from ovq.signals import handled
from ovq.train.metrics import training_rows
from ovq.train.summary import read_finished

ROOT = Path(__file__).resolve().parent.parent
POLL_S = 0.2
LOCK, OUTCOME = ".sweep.lock", "sweep.json"  # in a run folder: the lock of whoever uses it, and how its last job ended
LOGS = ("sweep.log", "slurm.log")


@dataclass
class Job:
    """One combination of overrides, the config that they describe, and its state."""

    overrides: list[str]
    cfg: Config
    run_dir: Path
    status: str = "waiting"  # waiting | elsewhere | finished before | running | finished | stopped | failed
    code: int | None = None
    locks: list[int] = field(default_factory=list)  # descriptors that this process holds for it

    @property
    def log(self) -> Path:
        return self.run_dir / LOGS[0]


def expand(overrides: list[str]) -> list[Job]:
    """The jobs of a sweep: the product of all `key=a,b,c`, each checked before the first one starts.

    Raises:
        ConfigError: an override that cannot be read, a job that is not legal, or two jobs with one run folder.
    """
    axes = [sweep_values(text) for text in overrides]
    jobs: list[Job] = []
    for combination in itertools.product(*axes):
        chosen = list(combination)
        cfg = compose(chosen)
        jobs.append(Job(chosen, cfg, run_dir_of(cfg, chosen)))
    folders = [job.run_dir for job in jobs]
    for folder in folders:
        if folders.count(folder) > 1:
            if any(text.startswith("run_dir=") for text in overrides):
                raise ConfigError(f"two jobs of the sweep would share the run folder {folder}; leave run_dir out")
            swept = ", ".join(text.partition("=")[0] for text, values in zip(overrides, axes) if len(values) > 1)
            raise ConfigError(
                f"two jobs of the sweep would share the run folder {folder}: their values of {swept} are the same, or "
                "do not make another run; give each job a name of its own in a command of its own, as in name=a"
            )
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
            stored, requested = config.load(job.run_dir), job.cfg
            changed = identity.changed(stored, requested)
            if stored.trainer.steps != requested.trainer.steps:  # may change at a resume, but this run has finished
                changed.append(f"trainer.steps: {stored.trainer.steps} -> {requested.trainer.steps}")
            if changed:
                raise ConfigError(f"{job.run_dir} was made with other settings ({'; '.join(changed)}); remove it")
            job.status = "finished before"


def run(jobs: list[Job], *, gpus: int, per_job: int, stop_on_failure: bool, at_once: int = 1) -> None:
    """Run the waiting jobs, as many at a time as there are groups of GPUs; without GPUs, `at_once`.

    No job outlives this function: if it ends early, it stops the running jobs and waits for them to save. If another
    sweep is running a job, this one waits for it and adopts its outcome.

    Raises:
        ConfigError: there are fewer GPUs, a job needs more than `gpus`, or `at_once` is given in addition.
        Stopped: by a signal, after the jobs have saved.
    """
    if gpus < per_job and (gpus or per_job > 1):
        raise ConfigError(f"--per-job {per_job} is more than --gpus {gpus}: no job would start; raise --gpus")
    if gpus and at_once > 1:
        raise ConfigError(f"--at-once is for jobs without --gpus; with it, {gpus // per_job} run at a time (--per-job)")
    if idle := gpus % per_job:
        print(f"{idle} of {gpus} GPUs are not used: --per-job {per_job} does not divide --gpus {gpus}", flush=True)
    names = visible_gpus(gpus)
    free = [names[at : at + per_job] for at in range(0, gpus - per_job + 1, per_job)] or [[]] * at_once
    running = dict[subprocess.Popen[bytes], tuple[Job, list[str]]]()
    waiting, began = [job for job in jobs if job.status == "waiting"], time.time()
    with noted_signals() as received:
        passed_on = 0
        try:
            while running or (waiting and not received):
                for slot in list(free):
                    if not received and (job := next_job(waiting, slot, began)):
                        free.remove(slot)
                        running[start(job, slot, at_once)] = (job, slot)
                time.sleep(POLL_S)
                if len(received) > passed_on:
                    passed_on = len(received)
                    print(f"{received[0].name}: waiting for the running jobs to save", flush=True)
                    stop(running)
                for process in [process for process in running if process.poll() is not None]:
                    job, slot = running.pop(process)
                    free.append(slot)
                    end(job, process.returncode, bool(received))
                if stop_on_failure and any(job.status == "failed" for job in jobs):
                    waiting.clear()
        finally:
            if running:  # an error of the sweep itself
                stop(running)
                for process in running:
                    process.wait()
    if received:
        raise Stopped(received[0], f"stopped by {received[0].name}; the same sweep continues from here")


def visible_gpus(wanted: int) -> list[str]:
    """The first `wanted` GPUs that CUDA_VISIBLE_DEVICES shows; without it, GPUs 0, 1, ...

    Raises:
        ConfigError: there are fewer.
    """
    if not wanted:
        return []
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is None:
        from launch.check import gpus_here

        names, where = [str(index) for index in range(len(gpus_here()))], "this machine"
    else:
        names, where = [name for name in shown.split(",") if name], f"CUDA_VISIBLE_DEVICES={shown}"
    if len(names) < wanted:
        raise ConfigError(f"--gpus {wanted}, but {where} shows {len(names)}")
    return names[:wanted]


def next_job(waiting: list[Job], slot: list[str], began: float) -> Job | None:
    """Take the first waiting job that nobody else runs; lock it and its slot's GPUs. None: no job, or a GPU is taken.

    Jobs that another sweep has ended since `began` (seconds since 1970) get its outcome and leave the list.
    """
    if (gpus := claim_gpus(slot)) is None:
        waiting[:] = [job for job in waiting if not ended_elsewhere(job, began)]
        return None
    for job in list(waiting):
        held = claim(job.run_dir / LOCK)
        if held is None or trainer_of(job.run_dir):
            release([held] if held is not None else [])
            if job.status == "waiting":
                job.status = "elsewhere"
                print(f"elsewhere {job.run_dir}: another process trains it", flush=True)
        elif ended_elsewhere(job, began):
            release([held])
            waiting.remove(job)
        else:
            job.locks = [held, *gpus]
            waiting.remove(job)
            return job
    release(gpus)
    return None


def ended_elsewhere(job: Job, began: float) -> bool:
    """Whether another process has finished a job, or another sweep has seen it fail since `began`; records that."""
    outcome: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        outcome = json.loads((job.run_dir / OUTCOME).read_bytes())
    if is_finished(job.run_dir):
        job.status = "finished"
    elif outcome.get("status") == "failed" and outcome.get("ended", 0.0) >= began:
        job.status, job.code = "failed", outcome.get("code")
    else:
        return False
    print(f"{job.status:<9} {job.run_dir} (elsewhere)", flush=True)
    return True


def end(job: Job, code: int, stopped: bool) -> None:
    """Record how a job ended, for this sweep and for others, and unlock it. `stopped`: this sweep told it to stop."""
    job.code = code
    job.status = "finished" if code == 0 and is_finished(job.run_dir) else "stopped" if stopped else "failed"
    outcome = {"status": job.status, "code": code, "ended": time.time()}
    with contextlib.suppress(OSError):  # a full disk: then another sweep will try the job too
        write_whole(job.run_dir / OUTCOME, json.dumps(outcome) + "\n")
    release(job.locks)
    print(f"{job.status:<9} {job.run_dir}", flush=True)


def stop(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """Tell jobs to save and exit, by SIGTERM whatever the sweep received: torchrun handles it, train.py any."""
    for process in processes:
        process.terminate()


@contextlib.contextmanager
def noted_signals() -> Iterator[list[signal.Signals]]:
    """Collect the signals received within the `with` block, in order, instead of letting them act."""
    received: list[signal.Signals] = []
    with handled(lambda number, _: received.append(signal.Signals(number))):
        yield received


def start(job: Job, slot: list[str], at_once: int = 1) -> subprocess.Popen[bytes]:
    """Start one job, with output to <run folder>/sweep.log and its share of the cores if `at_once` jobs share them.

    It gets a session of its own, so that a Ctrl-C in the terminal reaches only the sweep, which passes it on once. It
    inherits the job's locks, and so keeps them if the sweep is killed.
    """
    job.status = "running"
    job.run_dir.mkdir(parents=True, exist_ok=True)
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ",".join(slot)} if slot else {})
    if at_once > 1:
        environment["OMP_NUM_THREADS"] = str(max(1, cores() // at_once))
    command = [sys.executable, str(ROOT / "train.py")]
    if len(slot) > 1:
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", "launch", "run", "--no-check", "--gpus", str(len(slot)), "--"]
    command += [*job.overrides, "trainer.progress=false"]
    print(f"started   {job.run_dir}   log: {job.log}", flush=True)
    with job.log.open("ab") as log:
        return subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            pass_fds=job.locks,
        )


def table(jobs: list[Job]) -> str:
    """One line per job: status, run folder."""
    return "\n".join(f"{job.status:<16} {job.run_dir}" for job in jobs)


def failures(jobs: list[Job]) -> str:
    """The failed jobs: how each ended, and the last line that it printed."""
    failed = [job for job in jobs if job.status == "failed"]
    return "\n".join(f"{how(job.code or 0)}  {job.run_dir}\n    {last_line(job)}" for job in failed)


def last_line(job: Job) -> str:
    """The last line that a job printed, here or under SLURM."""
    logs = [job.run_dir / name for name in LOGS if (job.run_dir / name).exists()]
    newest = max(logs, key=lambda log: log.stat().st_mtime, default=None)
    printed = newest.read_text(errors="replace").strip().splitlines() if newest else []
    return printed[-1] if printed else "(printed nothing)"


def reached(job: Job) -> str:
    """Its last step, the loss there, and how long ago that was; empty before the first step. A job of a sweep prints no
    steps, so that its log ends with what is worth reading."""
    if not (rows := training_rows(job.run_dir)):
        return ""
    row = rows[-1]
    minutes = (time.time() - (job.run_dir / "metrics.jsonl").stat().st_mtime) / 60
    return f", at step {row['step']:,} of {job.cfg.trainer.steps:,} (loss {row['loss']:.4f}, {minutes:.0f} minutes ago)"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launch sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [options] -- key=value,value ...",
    )
    parser.add_argument(
        "--gpus", type=int, default=0, help="GPUs of this machine to use (0: run on what train.py picks)"
    )
    parser.add_argument("--per-job", type=positive, default=1, help="GPUs per job")
    parser.add_argument("--at-once", type=positive, default=1, help="without GPUs: jobs at a time, sharing the cores")
    parser.add_argument("--stop-on-failure", action="store_true", help="start no further job after a failure")
    parser.add_argument("--config-dir", action="append", default=[], help="folder with options of your own")
    parser.add_argument("--plan", action="store_true", help="only show the jobs, and how the unfinished ones stand")
    return guarded(lambda: sweep(arguments.read(parser, argv)))


def sweep(options: argparse.Namespace) -> int:
    """Show the jobs, run those that are not finished, and list the failures."""
    jobs = expand([*(f"--config-dir={folder}" for folder in options.config_dir), *options.overrides])
    mark_finished(jobs)
    print(table(jobs), flush=True)
    if options.plan:
        for job in jobs:
            if job.status == "waiting" and any((job.run_dir / name).exists() for name in LOGS):
                print(f"\n{job.run_dir} is not finished{reached(job)}; its last line is:\n    {last_line(job)}")
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
