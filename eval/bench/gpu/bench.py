"""All measurements of OVQ-attention that need a GPU, in one command of at most nine minutes.

    python -m eval.bench.gpu                            results under $OUT, or docs/results/gpu/<card>/
    python -m eval.bench.gpu seconds=300 out=/tmp/gpu

In order of importance: every kernel alone, with 1, 2, 4 and 16 programs per head; checks of correctness; the shape that
the bars refer to, at 64k tokens; stages against the cost model's floor; a profile, where ncu is installed; other
lengths, decoding, float32, rivals, other widths and capacities. Each group of tasks runs in a process of its own,
killed after 25 to 60 seconds, so that a hang, an illegal access or a lack of memory costs only one task. If programs
that share a head fail, the rest is measured with as many as work. This process itself never uses the GPU.

Every result is a line of results.jsonl as soon as it is known; results.json and the plots sum them up. Needs torch,
Triton and numpy only: no network, no pip, no Hydra.

Exit status: 0 if all measured bars hold, 1 if one does not or a process had to be killed, 2 if there is no GPU.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.bench.gpu import bars
from eval.bench.gpu.group import SPOILT
from eval.bench.gpu.tasks import CHECK, SANITIZER, START, Bench, Group, Row, Task, setting_at
from eval.bench.rivals import SDPA
from ovq.bounded import how, stream_bounded
from ovq.errors import ConfigError
from ovq.files import write_whole
from ovq.report import reporting
from ovq.schema import describe, setting

RESERVED = 15  # seconds set aside for plots and the summary
KINDS = {"check": "checks", "measurement": "measurements", "stage": "stages", "decode": "decode", "kernel": "kernels"}
ROOT = Path(__file__).resolve().parents[3]
Child = Callable[[dict[str, Any], Group, float, Callable[[Row], None]], int | None]


class Record:
    """The results so far, on disk: a line per row, and all of them in results.json with the bars' verdicts."""

    def __init__(self) -> None:
        self.out: Path | None = None  # known once the card is known, and then written to
        self.rows: list[Row] = []
        self.began = time.monotonic()
        self.results: dict[str, Any] = {"status": "running", "machine": {}, "rates": {}, "skipped": [], "bars": []}
        self.results |= {name: [] for name in KINDS.values()}

    def open(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out = out
        write_whole(out / "results.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows))
        self.write()

    def add(self, row: Row) -> None:
        self.rows.append({"s": round(time.monotonic() - self.began, 1), **row})
        if self.out is not None:
            with (self.out / "results.jsonl").open("a") as file:
                file.write(json.dumps(self.rows[-1]) + "\n")
        kind, rest = row["kind"], {name: value for name, value in row.items() if name != "kind"}
        if kind in ("machine", "rates"):
            self.results[kind] = rest
        elif kind == "skipped" and rest not in self.results["skipped"]:
            self.results["skipped"].append(rest)
        elif kind in KINDS:
            self.results[KINDS[kind]].append(rest)
        if line := told(row):
            print(f"{self.rows[-1]['s']:6.1f}s  {line}", flush=True)
        if kind != "begin":
            self.write()

    def write(self) -> None:
        if self.out is not None:
            self.results["seconds"] = round(time.monotonic() - self.began, 1)
            self.results["bars"] = bars.evaluate(self.results)
            write_whole(self.out / "results.json", json.dumps(self.results, indent=1) + "\n")

    def best_sdpa(self) -> str | None:
        rows = [row for row in self.results["measurements"] if row["op"] in SDPA and row["total_median_ms"]]
        longest = max((row["tokens"] * row["batch"] for row in rows), default=0)
        rows = [row for row in rows if row["tokens"] * row["batch"] == longest]
        return min(rows, key=lambda row: row["total_median_ms"])["op"] if rows else None


class Runner:
    """Runs the groups in order, each in a process of its own, while time is left."""

    def __init__(self, seconds: float, out: Path | None, *, where: str, child: Child | None = None) -> None:
        """`where`: the setting, as "module:name". `child`: runs one process; tests put a fake in its place."""
        self.end = time.monotonic() + seconds - RESERVED
        self.out, self.where, self.child = out, where, child or in_a_process
        self.record = Record()
        self.programs: int | None = None  # the most that may share a head; None: as many as the kernels choose
        self.killed = False

    def run(self) -> int:
        """Returns 1 if a bar fails or a process had to be killed, else 0.

        Raises:
            ConfigError: there is no GPU.
        """
        record, setting = self.record, setting_at(self.where)
        for group in Bench(setting, record.add).groups():
            if group.programs is not None and self.programs is not None:
                self.skip(group.tasks, f"{self.programs} programs per head are the most that work")
                continue
            if group.under == SANITIZER and self.programs is not None:
                self.skip(group.tasks, "programs that share a head fail")
                continue
            good = self.run_group(group)
            if group.programs is not None and not good:
                works = [row["programs"] for row in record.results["kernels"] if row["programs"] < group.programs]
                self.programs = max(works, default=1)
            if group.name == "machine":
                machine = record.results["machine"]
                if setting.device == "cuda" and not machine.get("gpu"):
                    why = next((f" ({row['why']})" for row in record.results["skipped"]), "")
                    raise ConfigError(
                        f"there is no GPU here{why}, so nothing was measured; on a CPU, use python -m eval.bench.ops"
                    )
                record.open(self.out or folder_of(machine.get("accelerator") or machine["processor"]))
        skipped = record.results["skipped"]
        record.results["status"] = "complete" if not skipped else "complete except for skipped tasks"
        record.write()
        failed = any(bar["verdict"] == "FAIL" for bar in record.results["bars"])
        return int(failed or self.killed)

    def run_group(self, group: Group) -> bool:
        """Whether all tasks that ran ended without an error. A process that dies or hangs is replaced by a new one."""
        if group.under and shutil.which(group.under[0]) is None:
            self.skip(group.tasks, f"{group.under[0]} is not installed")
            return True
        begun: list[str] = []
        errors = len(self.record.results["skipped"])
        while tasks := [task for task in group.tasks if task.name not in begun]:
            left = self.end - time.monotonic()
            if left < START + tasks[0].seconds:
                self.skip(tasks, "no time left")
                return True
            before, running = len(begun), None

            def hear(row: Row) -> None:
                nonlocal running
                if row["kind"] == "begin":
                    running = row["task"]
                    begun.append(row["task"])
                elif row["kind"] == "end":
                    running = None
                self.record.add(row)

            limit = min(group.limit, left)
            status = self.child(self.given(group, begun, limit), group, limit, hear)
            if status == 0:
                break
            self.killed |= not group.optional
            why = f"killed after {limit:.0f} s: it hung, or was too slow" if status is None else f"died: {how(status)}"
            if running is not None:
                self.record.add({"kind": "skipped", "task": running, "why": why})
                if running.startswith(CHECK):
                    failed = {"check": running.removeprefix(CHECK), "passed": False, "found": why}
                    self.record.add({"kind": "check", **failed})
            elif status != SPOILT:
                self.record.add({"kind": "skipped", "task": group.name, "why": f"{why}, between tasks"})
            if len(begun) == before:  # it does not even start
                self.skip([task for task in tasks if task.name not in begun], f"its process {why}")
                return False
        return len(self.record.results["skipped"]) == errors

    def given(self, group: Group, skip: list[str], limit: float) -> dict[str, Any]:
        """The arguments of a group's process."""
        return {
            "group": group.name,
            "skip": list(skip),
            "setting": self.where,
            "programs": self.programs,
            "seconds": limit,
            "rates": self.record.results["rates"],
            "best_sdpa": self.record.best_sdpa(),
            "out": None if self.record.out is None else str(self.record.out),
        }

    def skip(self, tasks: list[Task], why: str) -> None:
        for task in tasks:
            self.record.add({"kind": "skipped", "task": task.name, "why": why})


def in_a_process(given: dict[str, Any], group: Group, seconds: float, hear: Callable[[Row], None]) -> int | None:
    """Run a group in a process; returns its exit status, None if it was killed. `hear` is called with every row."""
    command = program(given)
    if group.under:
        log = Path(given["out"] or ".") / f"{group.under[0]}.txt"
        command = [*group.under, "--log-file", str(log), *command]

    def line(text: str) -> None:
        try:
            row = json.loads(text)
        except ValueError:  # something that a library printed
            print(text, file=sys.stderr, flush=True)
            return
        if isinstance(row, dict) and "kind" in row:
            hear(row)

    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return stream_bounded(command, seconds, line, os.environ | {"PYTHONPATH": path})


def program(given: dict[str, Any]) -> list[str]:
    """The command that runs a group."""
    return [sys.executable, "-P", "-m", "eval.bench.gpu.group", json.dumps(given)]


def told(row: Row) -> str:
    """A row as a line of progress output; "" for one that is not shown."""
    kind = row["kind"]
    if kind == "rates":
        return f"bf16 matmul {row['matmul_flops'] / 1e12:.3g} TFLOP/s, copy {row['copy_bytes'] / 1e12:.3g} TB/s"
    if kind == "kernel":
        return f"ok    {row['stage']} alone, {row['programs']} programs per head"
    if kind == "check":
        return f"{'ok   ' if row['passed'] else 'WRONG'} {row['check']}: {row['found']}"
    if kind == "measurement":
        forward, total = row["forward_median_ms"], row["total_median_ms"]
        what = row["error"] if total is None else f"forward {forward:.3f} ms, with backward {total:.3f} ms"
        shape = f"BH {row['batch'] * row['heads']} D {row['width']} N {row['num_centroids']} T {row['tokens']}"
        return f"{row['op']:18} {shape}: {what}"
    if kind == "stage":
        low, high = row["predicted_ms"]
        floor = f"{row['over_floor']} times its floor of {row['floor_ms']:.3f} ms"
        return f"{row['stage']:18} {row['median_ms']:.3f} ms, {floor}, predicted {low:.1f} to {high:.1f}"
    if kind == "decode":
        return f"decode {row['op']:11} at {row['position']}: {row['us_per_token']:.1f} us per token"
    return f"{row['task']}: {row['why']}" if kind == "skipped" else ""


def folder_of(card: str) -> Path:
    """docs/results/gpu/nvidia-h200 for "NVIDIA H200"."""
    return Path("docs/results/gpu") / re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


@dataclass
class Options:
    seconds: int = setting(540, "time limit in seconds", above=0)
    out: str | None = setting(None, "output folder; null: $OUT if it is set, else docs/results/gpu/<card>")


def options_of(argv: list[str]) -> Options:
    """The options, read without Hydra, which a bare machine lacks.

    Raises:
        ConfigError: an option that does not exist, or a value that is not legal.
    """
    options = Options()
    for word in argv:
        name, equals, value = word.partition("=")
        if name == "out" and equals:
            options.out = value or None
        elif name == "seconds" and re.fullmatch("[1-9][0-9]*", value):
            options.seconds = int(value)
        else:
            raise ConfigError(f"'{word}' is not an option; legal: seconds=540 (a whole number), out=FOLDER")
    return options


def main(argv: list[str] | None = None) -> int:
    """The command line described in the module's docstring."""
    from ovq.cli import HELP, guarded

    words = sys.argv[1:] if argv is None else argv
    if any(word in HELP for word in words):
        print("\n".join([(__doc__ or "").strip(), "", "Options (key=value):", *describe(Options)]))
        return 0
    return guarded(lambda: measure(options_of(words)))


def measure(options: Options, where: str = "eval.bench.gpu.tasks:GPU", child: Child | None = None) -> int:
    """Run the whole benchmark and draw its plots; returns the exit status.

    Raises:
        ConfigError: there is no GPU.
    """
    out = options.out or os.environ.get("OUT")
    runner = Runner(options.seconds, Path(out) if out else None, where=where, child=child)
    status = runner.run()
    record = runner.record
    assert record.out is not None
    with reporting("the plots", "elsewhere, from results.json"):
        from eval.bench.gpu.plots import draw

        for path in draw(record.results, record.out):
            print(f"drawn: {path}")
    for line in bars.lines(record.results["bars"]):
        print(line)
    print(f"written: {record.out / 'results.json'} ({record.results['status']})")
    return status
