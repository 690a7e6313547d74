"""Soak test: random faults for a given time, after which each run must end exactly as an uninterrupted one does.

    python -m tests.soak minutes=10 seed=7 out=soak.json

A round trains a small model in a fresh folder, injects one to three faults of `tests/faults.py` (or damages its files
while it is down) and restarts it without faults. It then checks that the tokens, losses and evaluations of every step
equal those of an uninterrupted run (bit for bit, on the same number of processes), that the same files are left, and
that no process, lock or temporary file remains. The seed determines the faults of every round, but not the moment at
which a kill from outside hits a process. The first round that fails ends the soak with status 1 and keeps its folder.
"""

from __future__ import annotations

import collections
import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from ovq.cli import command
from ovq.errors import Failure
from ovq.files import write_whole
from ovq.machine import describe_machine
from ovq.schema import setting
from ovq.train.metrics import read_rows
from tests import faults
from tests.faults import Fault

STEPS, SAVE_EVERY = 18, 4
PATIENCE_S = 120  # for one start of train.py, which takes about ten seconds
MARK = "OVQ_SOAK"  # environment variable of every process that a round starts
SPEED = ("tokens_per_s", "data_wait", "mfu", "memory_gib")
SETTINGS = [
    *("model=sw_ovq", "model.num_layers=2", "model.dim=32", "model.num_heads=2", "model.num_kv_heads=2"),
    *("model.head_dim=16", "model.ffn_dim=48", "model.mixers.sliding_window.window=16"),
    *("model.mixers.ovq.num_centroids=32", "model.mixers.ovq.chunk_size=32"),
    *(f"trainer.steps={STEPS}", "trainer.context=128", "trainer.global_batch=4", "trainer.micro_batch=2"),
    *(f"trainer.checkpoint_every={SAVE_EVERY}", "trainer.eval_every=9", "trainer.health_every=6"),
    *("trainer.device=cpu", "trainer.timeout_s=20", "trainer.progress=false", "optim.warmup_steps=3"),
    *("eval.context=512", "eval.piece=128", "eval.documents=2"),
]
KILLED_WRITER = """
import os, signal, sys
from ovq.files import replacing
with replacing(sys.argv[1]) as scratch:
    scratch.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
ENDS_WELL = ("term", "usr1", "usr2", "hup", "int")  # the run saves and exits with status 0


@dataclass
class Options:
    minutes: float = setting(1.0, "minutes to go on for", above=0)
    seed: int = setting(0, "of the faults")
    processes: list[int] = setting([1, 1, 1, 2], "numbers of processes to choose from", at_least=1)
    out: str | None = setting(None, "file for the report, JSON")


class Broken(Failure):
    """A promise that did not hold."""


@dataclass
class Round:
    """One run folder and what has been done to it."""

    folder: Path
    data: str
    workers: int
    processes: int
    done: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def note(self, kind: str, text: str = "") -> None:
        """Record a fault before it is injected."""
        self.kinds.append(kind)
        self.done.append(f"{kind}{text}")

    def finished(self, status: int) -> bool:
        """Whether the run ended before it reached the fault, as when an earlier start has taken it past that step."""
        return status == 0 and (self.run_dir / "summary.json").is_file()

    def start(self, planned: list[Fault], kill_after: float | None = None) -> tuple[int, str]:
        """Run train.py with the faults; returns its status and output. `kill_after`: seconds until kill -9 of all.

        Raises:
            Broken: it did not end in time, or left a process behind.
        """
        mark = f"{self.folder}:{len(self.done)}:{time.monotonic_ns()}"
        log = self.folder / f"start{len(self.done)}.log"
        overrides = [*SETTINGS, *self.files(), f"data.num_workers={self.workers}", f"run_dir={self.run_dir}"]
        line = faults.command(planned, overrides, self.processes)
        env = os.environ | {MARK: mark, "OMP_NUM_THREADS": "1"}
        with log.open("wb") as out:
            process = subprocess.Popen(line, stdout=out, stderr=out, env=env, cwd=faults.ROOT, start_new_session=True)
        try:
            status = process.wait(kill_after or PATIENCE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL) if kill_after and self.processes == 1 else kill_all(mark)
            status = process.wait()
            if not kill_after:
                raise Broken(f"a start with {planned} did not end within {PATIENCE_S} s: see {log}") from None
        end = time.monotonic() + 5
        while left := marked(mark):
            if time.monotonic() > end:
                raise Broken(f"processes were left behind: {[(p.pid, p.status()) for p in left]}; see {log}")
            time.sleep(0.05)
        return status, log.read_text(errors="replace")

    def files(self) -> list[str]:
        corpus, suffix = self.folder.parent / "corpus", {"text": "txt", "jsonl": "jsonl", "parquet": "parquet"}
        name = suffix[self.data]
        return [
            f"data={self.data}",
            f"data.train=[{corpus}/train*.{name}]",
            f"data.validation=[{corpus}/held*.{name}]",
        ]


def marked(mark: str) -> list[psutil.Process]:
    """The processes of one start, even those that another process has adopted since."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def kill_all(mark: str) -> None:
    for process in marked(mark):
        process.kill()


# --- the faults ------------------------------------------------------------------------------------------------------


def injure(one: Round, dice: random.Random) -> None:
    """Start the run with a fault, or damage its files while it is down; checks how it ended."""
    rank = dice.randrange(one.processes)
    kind = dice.choice([*4 * ["signal"], *6 * ["crash"], *2 * ["outside", "closed", "full"], *4 * ["damage"], "freeze"])
    if kind == "signal":
        action, step = dice.choice(ENDS_WELL), dice.randrange(1, STEPS + 1)
        one.note(action, f" at step {step} of rank {rank}")
        status, said = one.start([Fault("step", step, action, rank)])
        if one.processes == 1 and (status or "Traceback" in said):  # torchrun reports 1, with a traceback of its own
            raise Broken(f"{one.done[-1]}: status {status}, {said[-300:]}")
    elif kind == "crash":
        moment = dice.choice(["step", "step", "save", "write", "renamed", "evaluate", "start", "row"])
        limit = {"step": STEPS, "start": 1, "evaluate": 2, "row": 4 * STEPS}.get(moment, STEPS // SAVE_EVERY)
        count = dice.randrange(1, limit + 1)
        rank = 0 if moment == "renamed" else rank
        one.note(f"kill at {moment}", f" {count} of rank {rank}")
        one.start([Fault(moment, count, "kill", rank)])  # at a row, this is its worker, if there is one
    elif kind == "outside":
        seconds = dice.uniform(3, 9)
        one.note("kill -9 of all", f" after {seconds:.1f} s")
        one.start([], kill_after=seconds)
    elif kind == "closed":
        step = dice.randrange(1, STEPS + 1)
        one.note("nobody reads stdout and stderr", f" from step {step}")
        status, _ = one.start([Fault("step", step, "closed", None)])
        if status != 0 or not (one.run_dir / "summary.json").is_file():
            raise Broken(f"{one.done[-1]}: status {status}")
        shutil.rmtree(one.run_dir)  # it is finished: the next start would have nothing to do
    elif kind == "full":
        step = dice.randrange(1, STEPS + 1)
        one.note("disk full", f" from step {step}")
        status, said = one.start([Fault("step", step, "full", None)])
        # The log is on the full disk, too.
        if not one.finished(status) and (status == 0 or (one.processes == 1 and "Traceback" in said)):
            raise Broken(f"{one.done[-1]}: status {status}, {said[-300:]}")
    elif kind == "freeze":
        # A frozen single-process trainer is up to whoever started it; the trainer must notice a frozen worker or rank.
        moment = "row" if one.processes == 1 else "step"
        count = dice.randrange(20, 60) if moment == "row" else dice.randrange(3, STEPS)
        one.workers = 1
        one.note(f"freeze at {moment}", f" {count} of rank {rank}")
        status, said = one.start([Fault(moment, count, "freeze", rank)])
        if not one.finished(status) and (status == 0 or "error: " not in said):
            raise Broken(f"{one.done[-1]}: status {status}, {said[-300:]}")
    else:
        damage(one, dice)


def damage(one: Round, dice: random.Random) -> None:
    """Kill the run midway, then damage a file that it must not trust."""
    step = dice.randrange(2 * SAVE_EVERY, STEPS)
    one.start([Fault("step", step, "kill", 0)])
    saved = sorted((one.run_dir / "checkpoints").glob("step_*"))
    if len(saved) < 2:
        one.note("nothing to damage yet")
        return
    what = dice.choice(["flip", "truncate", "metrics", "temporary"])
    if what in ("flip", "truncate"):
        victim = dice.choice([p for p in sorted(saved[-1].iterdir()) if p.stat().st_size])
        if what == "flip":
            faults.flip(victim, dice.randrange(victim.stat().st_size))
        else:
            faults.truncate(victim, dice.randrange(victim.stat().st_size))
        one.note(f"{what} a file of the newest checkpoint", f", {victim.name}, after step {step}")
    elif what == "metrics":
        with (one.run_dir / "metrics.jsonl").open("ab") as log:
            log.write(b'{"step": 999, "lo\xff')
        one.note("half a line that is not UTF-8 in metrics.jsonl", f" after step {step}")
    else:
        subprocess.run([sys.executable, "-c", KILLED_WRITER, one.run_dir / "summary.json"], cwd=faults.ROOT)
        (one.run_dir / "checkpoints" / f"saving_{saved[-1].name}").mkdir(exist_ok=True)
        one.note("temporary files of a killed writer", f" after step {step}")


# --- what must hold --------------------------------------------------------------------------------------------------


def record(run_dir: Path) -> list[dict[str, Any]]:
    rows = read_rows(run_dir / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in SPEED} for row in rows]


def listing(run_dir: Path) -> list[str]:
    """The files of a run folder, without what depends on where it was interrupted or damaged.

    A run that is told to stop saves at that step, and this checkpoint may still be kept at the end as the last but one.
    So only the number of checkpoints and the step of the last are compared.
    """
    names = [str(p.relative_to(run_dir)) for p in run_dir.rglob("*") if not p.is_dir()]
    last = f"step_{STEPS:08d}"
    return sorted(
        re.sub(r"step_\d{8}", lambda found: found[0] if found[0] == last else "step_earlier", name)
        for name in names
        if "aside_" not in name
    )


def check(one: Round, unbroken: Path) -> None:
    """Check that the run ended as the uninterrupted one did.

    Raises:
        Broken: it did not; the message says what differs.
    """
    got, want = record(one.run_dir), record(unbroken)
    if got != want:
        differ = next((a, b) for a, b in zip([*got, None], [*want, None]) if a != b)
        raise Broken(f"{one.folder}: metrics.jsonl differs: {differ[0]} instead of {differ[1]}")
    if listing(one.run_dir) != listing(unbroken):
        odd = set(listing(one.run_dir)) ^ set(listing(unbroken))
        raise Broken(f"{one.folder}: files differ: {sorted(odd)}")
    latest = (one.run_dir / "checkpoints" / "latest").resolve().name
    if latest != f"step_{STEPS:08d}":
        raise Broken(f"{one.folder}: latest is {latest}")
    with (one.run_dir / "checkpoints" / ".lock").open("a") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Broken(f"{one.folder}: the run folder is still locked") from None


def make_corpus(folder: Path) -> None:
    """Write the same made-up documents in every format."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    dice = random.Random(0)
    words = ["".join(dice.choices("abcdefghij", k=dice.randint(2, 7))) for _ in range(60)]
    for split, count in (("train", 12), ("held", 2)):
        texts = [" ".join(dice.choices(words, k=200 if split == "held" else 30 * i + 10)) for i in range(count)]
        for index, text in enumerate(texts):
            (folder / f"{split}{index:02d}.txt").write_text(text)
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (folder / f"{split}.jsonl").write_text("".join(lines))
        pq.write_table(pa.table({"text": texts}), folder / f"{split}.parquet", row_group_size=3)


@command(Options)
def main(options: Options) -> int:
    """The command line in the module's docstring."""
    base = Path(tempfile.mkdtemp(prefix="ovq-soak-"))
    print(f"seed={options.seed} in {base}", flush=True)
    make_corpus(base / "corpus")
    end = time.monotonic() + 60 * options.minutes
    unbroken: dict[tuple[str, int], Path] = {}
    counts: collections.Counter[str] = collections.Counter()
    rounds: list[list[str]] = []
    while time.monotonic() < end:
        dice = random.Random(f"{options.seed}, round {len(rounds)}")
        data, processes = dice.choice(["text", "jsonl", "parquet"]), dice.choice(options.processes)
        if (data, processes) not in unbroken:
            whole = Round(base / f"whole-{data}-{processes}", data, 0, processes)
            whole.folder.mkdir()
            status, said = whole.start([])
            if status:
                raise Broken(f"the unbroken run ended with status {status}: {said[-500:]}")
            unbroken[data, processes] = whole.run_dir
        one = Round(base / f"round{len(rounds):04d}", data, dice.choice([0, 1]), processes)
        one.folder.mkdir()
        try:
            for _ in range(dice.choice([1, 1, 2, 3])):
                injure(one, dice)
            status, said = one.start([])
            if status:
                raise Broken(f"{one.folder}: the last start ended with status {status}: {said[-500:]}")
            check(one, unbroken[data, processes])
        except Broken as error:
            raise Broken(f"seed={options.seed} round {len(rounds)} ({'; '.join(one.done)}): {error}") from None
        rounds.append([f"data={data}, {processes} process(es), {one.workers} worker(s)", *one.done])
        counts.update(one.kinds)
        print(f"round {len(rounds)}: {'; '.join(one.done)}: as the unbroken run", flush=True)
        shutil.rmtree(one.folder)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=faults.ROOT, capture_output=True, text=True
    ).stdout.strip()
    report = {
        "machine": describe_machine(),
        "commit": commit,
        "seed": options.seed,
        "minutes": options.minutes,
        "rounds": len(rounds),
    }
    report |= {"faults": dict(counts.most_common()), "history": rounds}
    if options.out:
        write_whole(options.out, json.dumps(report, indent=1) + "\n")
    shutil.rmtree(base)
    print(f"{len(rounds)} rounds, {sum(counts.values())} faults, every run ended as the unbroken one")
    return 0


if __name__ == "__main__":
    sys.exit(main())
