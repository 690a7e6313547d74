"""All measurements of OVQ-attention that need a GPU, in one command of at most nine minutes.

    python -m eval.bench.gpu                            checks, then times, then plots, under docs/results/gpu/<card>/
    python -m eval.bench.gpu seconds=300 out=/tmp/gpu

The kernels are first checked for correctness (against float64, on poisoned memory, for reproducibility), then timed,
the most important measurements first: the shape of the bars at 64k tokens, stages against the cost model's floor, other
lengths, small batches, decoding, other rivals, other widths and capacities. Tasks for which no time is left are listed
as skipped. results.json is rewritten after every task, so that an interrupted run keeps what it has measured; a task
that hangs is named and ends the run.

Exit status: 0 if all measured bars hold, 1 if one does not, 2 if there is no GPU, 3 if a task hung.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from eval.bench import cost
from eval.bench.gpu import bars
from eval.bench.gpu.checks import CHECKS, Sizes, Wrong
from eval.bench.gpu.stages import shape_of, stage_calls
from eval.bench.rivals import RIVALS, SDPA, Case, decode_attention, decode_ovq, forward_backward, make_inputs, missing
from eval.bench.stopwatch import Stopwatch, copy_rate, matmul_rate
from ovq.cli import command, guarded
from ovq.errors import ConfigError
from ovq.files import write_whole
from ovq.machine import describe_machine
from ovq.schema import setting

K = 1024
RESERVED = 15  # seconds set aside for plots and the summary
HANG = 150  # seconds beyond its estimate after which a task counts as hung


@dataclass(frozen=True)
class Setting:
    """What the benchmark runs on: the GPU, or a stand-in that runs the same code on a CPU at small sizes."""

    device: str = "cuda"
    backend: str = "triton"
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
    sizes: tuple[Sizes, ...] = (Sizes(), Sizes(K=128, V=128), Sizes(K=64, V=128, tokens=3001, heads=3, kv_heads=1))
    scale: int = 1  # divides all lengths and positions
    case: Case = Case(batch=4, tokens=64 * K, heads=8, width=64, num_centroids=2048)
    rivals: tuple[str, ...] = ("ovq", *RIVALS)
    matmul_size: int = 8192
    copy_bytes: int = 4 << 30


@dataclass(frozen=True)
class Task:
    """`seconds`: expected duration, compilation included; the task is skipped if less time is left."""

    name: str
    seconds: float
    run: Callable[[], None]


class Bench:
    """Runs tasks in order while time is left, and keeps results.json up to date."""

    def __init__(self, out: Path, setting: Setting, seconds: float) -> None:
        self.out, self.setting = out, setting
        self.began, self.end = time.monotonic(), time.monotonic() + seconds - RESERVED
        self.device = torch.device(setting.device)
        self.stopwatch = Stopwatch(self.device)
        self.best_sdpa: str | None = None
        self.results: dict[str, Any] = {
            "status": "running",
            "machine": describe_machine() | {"cuda": torch.version.cuda, "triton": triton_version()},
            "rates": {},
            "checks": [],
            "measurements": [],
            "stages": [],
            "decode": [],
            "skipped": [],
            "bars": [],
        }

    # --- tasks and their order ---

    def tasks(self) -> list[Task]:
        """All tasks, the most important first."""
        case, long = self.setting.case, 64 * K // self.setting.scale
        bar = replace(case, tokens=long)
        wide = replace(bar, width=2 * case.width)
        tasks = [Task("rates of this card", 8, self.rates), *self.check_tasks()]
        tasks.append(self.passes(bar, ["ovq", *SDPA], 40))
        tasks += [Task(f"stages at {long}", 15, lambda: self.stages(bar))]
        tasks += [self.passes(replace(bar, tokens=long // n), ["ovq", *SDPA], 8) for n in (8, 4, 2, 16, 32)]
        tasks.append(self.passes(replace(bar, tokens=2 * long), ["ovq", "best_sdpa"], 20))
        tasks.append(self.passes(replace(bar, batch=1), ["ovq", *SDPA], 12))
        tasks.append(Task("decoding", 35, self.decoding))
        peers = ["flash_attention_3", "gated_deltanet", "mamba2", "flex", "ovq_torch"]
        tasks.append(self.passes(bar, peers, 40))
        tasks.append(self.passes(wide, ["ovq", "best_sdpa"], 25))
        tasks += [self.passes(replace(bar, num_centroids=n), ["ovq"], 6) for n in (1024, 8192)]
        tasks += [Task(f"stages at {long}, B = 1", 10, lambda: self.stages(replace(bar, batch=1)))]
        tasks += [self.passes(replace(bar, tokens=long // n), peers, 25) for n in (8, 32)]
        tasks.append(self.passes(replace(bar, tokens=4 * long), ["ovq", "best_sdpa"], 30))
        for n in (8, 32, 2):
            tasks.append(self.passes(replace(wide, tokens=long // n), ["ovq", "best_sdpa"], 8))
            tasks.append(self.passes(replace(bar, batch=1, tokens=long // n), ["ovq", "best_sdpa"], 6))
        for n in (1024, 8192):
            tasks += [self.passes(replace(bar, num_centroids=n, tokens=long // m), ["ovq"], 5) for m in (8, 32)]
            tasks.append(self.passes(replace(wide, num_centroids=n), ["ovq"], 8))
        tasks += [self.passes(replace(wide, tokens=n * long), ["ovq", "best_sdpa"], 40) for n in (2, 4)]
        return tasks

    def run(self) -> int:
        """Run the tasks; returns 1 if a bar fails, else 0."""
        for task in self.tasks():
            if time.monotonic() + task.seconds > self.end:
                self.results["skipped"].append({"task": task.name, "why": "no time left"})
                continue
            with self.watchdog(task):
                try:
                    task.run()
                except Exception as error:
                    why = f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
                    self.results["skipped"].append({"task": task.name, "why": why})
                    self.say(f"{task.name}: {why}")
            self.write()
            if self.stopwatch.cuda:
                torch.cuda.empty_cache()
        self.results["status"] = "complete" if not self.results["skipped"] else "complete except for skipped tasks"
        self.write()
        return int(any(bar["verdict"] == "FAIL" for bar in self.results["bars"]))

    def watchdog(self, task: Task) -> Watchdog:
        return Watchdog(task.seconds + HANG, lambda: self.hung(task))

    def hung(self, task: Task) -> None:
        """End the process, because a kernel that never returns cannot be interrupted."""
        self.results["status"] = f"hung in: {task.name}"
        self.write()
        self.say(f"hung in: {task.name}")
        os._exit(3)

    def write(self) -> None:
        """Rewrite results.json atomically."""
        self.results["seconds"] = round(time.monotonic() - self.began, 1)
        self.results["bars"] = bars.evaluate(self.results)
        write_whole(self.out / "results.json", json.dumps(self.results, indent=1) + "\n")

    def say(self, line: str) -> None:
        print(f"{time.monotonic() - self.began:6.1f}s  {line}", flush=True)

    # --- checks ---

    def check_tasks(self) -> list[Task]:
        tasks = []
        for name in CHECKS:
            for dtype in self.setting.dtypes:
                sizes = self.setting.sizes if name == "against float64" else self.setting.sizes[:1]
                tasks += [self.check_task(name, size, dtype) for size in sizes]
        return tasks

    def check_task(self, name: str, sizes: Sizes, dtype: torch.dtype) -> Task:
        label = f"{name}, {str(dtype).removeprefix('torch.')}, K = {sizes.K}, V = {sizes.V}"

        def run() -> None:
            found: dict[str, Any] = {"check": label, "sizes": asdict(sizes), "passed": False}
            try:
                found["found"] = CHECKS[name](self.setting.backend, sizes, self.device, dtype)
                found["passed"] = True
            except Exception as error:  # a kernel that does not run is wrong as well
                found["found"] = str(error) if isinstance(error, Wrong) else f"{type(error).__name__}: {error}"[:500]
            self.results["checks"].append(found)
            self.say(f"{'ok   ' if found['passed'] else 'WRONG'} {label}: {found['found']}")

        return Task(f"check: {label}", 6, run)

    # --- times ---

    def rates(self) -> None:
        self.results["rates"] = {
            "matmul_flops": matmul_rate(self.stopwatch, self.setting.matmul_size),
            "copy_bytes": copy_rate(self.stopwatch, self.setting.copy_bytes),
        }
        flops, moved = self.results["rates"].values()
        self.say(f"bf16 matmul {flops / 1e12:.3g} TFLOP/s, copy {moved / 1e12:.3g} TB/s")

    def passes(self, case: Case, ops: list[str], seconds: float) -> Task:
        """A task that times forward and forward + backward of several rivals in turns."""
        shape = f"B x H = {case.batch} x {case.heads}, D = {case.width}, N = {case.num_centroids}"
        return Task(f"{shape}, T = {case.tokens}: {', '.join(ops)}", seconds, lambda: self.measure(case, ops, seconds))

    def measure(self, case: Case, ops: list[str], seconds: float) -> None:
        chosen = [op for name in ops if (op := self.best_sdpa if name == "best_sdpa" else name) in self.setting.rivals]
        for op in list(chosen):
            if op and (why := missing(op, self.device)):
                chosen.remove(op)
                note = {"task": op, "why": why}
                self.results["skipped"] += [note] if note not in self.results["skipped"] else []
        x = make_inputs(case, self.device, self.setting.dtypes[0])
        calls = {op: forward_backward(self.rival(op), x, case) for op in chosen if op}
        for op, timing in self.stopwatch.turns(calls, seconds=seconds / 3).items():
            known = bool(timing.whole_ms) and timing.error is None
            row = {
                "op": op,
                **asdict(case),
                "forward_ms": timing.first_ms,
                "total_ms": timing.whole_ms,
                "forward_median_ms": timing.first if known else None,
                "total_median_ms": timing.whole if known else None,
                "peak_bytes": timing.peak_bytes,
                "error": timing.error,
            }
            self.results["measurements"].append(row)
            what = f"forward {timing.first:.3f} ms, with backward {timing.whole:.3f} ms" if known else timing.error
            self.say(
                f"{op:18} BH {case.batch * case.heads} D {case.width} N {case.num_centroids} T {case.tokens}: {what}"
            )
        if self.best_sdpa is None:
            done = [row for row in self.results["measurements"] if row["op"] in SDPA and row["total_median_ms"]]
            self.best_sdpa = min(done, key=lambda row: row["total_median_ms"])["op"] if done else None

    def rival(self, op: str) -> Any:
        """A rival by name; "ovq" is OVQ-attention on this setting's backend."""
        return RIVALS[f"ovq_{self.setting.backend}" if op == "ovq" else op]

    def stages(self, case: Case) -> None:
        """Time every stage separately, against its floor at this card's measured rates."""
        if self.setting.backend != "triton":
            return
        x = make_inputs(case, self.device, self.setting.dtypes[0])
        chip = self.chip()
        work = cost.stages(shape_of(case), chip)
        for name, timing in self.stopwatch.turns(stage_calls(x, case), seconds=3).items():
            if timing.error is not None:
                self.results["skipped"].append({"task": f"stage {name}", "why": timing.error})
                continue
            low, high = work[name].predicted_ms(chip)
            row = {"stage": name, **asdict(case), "ms": timing.whole_ms, "median_ms": timing.whole}
            row |= {"floor_ms": work[name].floor_ms(chip), "predicted_ms": [low, high]}
            row["over_floor"] = round(timing.whole / row["floor_ms"], 2)
            self.results["stages"].append(row)
            self.say(
                f"{name:18} {timing.whole:.3f} ms, {row['over_floor']} times its floor of {row['floor_ms']:.3f} ms, "
                f"predicted {low:.1f} to {high:.1f}"
            )

    def chip(self) -> cost.Chip:
        """The cost model's chip nearest to this card, with the rates measured here."""
        name = self.results["machine"].get("accelerator", "")
        chip = cost.CHIPS["h200" if "H200" in name else "a100" if "A100" in name else "h100"]
        rates = self.results["rates"]
        return replace(chip, name=name, matmul=rates["matmul_flops"], copy=rates["copy_bytes"]) if rates else chip

    def decoding(self) -> None:
        """Time per decoded token, averaged over a chunk, at several positions, for OVQ and for a key/value cache."""
        setting, case = self.setting, self.setting.case
        positions = [n * K // setting.scale for n in (4, 16, 64, 256, 1024)]
        steps = {}
        for position in positions:
            steps["ovq", position] = decode_ovq(case, position, self.device, setting.dtypes[0], setting.backend)
            steps["attention", position] = decode_attention(case, position, self.device, setting.dtypes[0])

        def tokens(step: Callable[[], None]) -> Callable[[Callable[[], None]], None]:
            def call(mark: Callable[[], None]) -> None:
                for _ in range(case.chunk_size):
                    step()

            return call

        calls = {f"{op} {position}": tokens(step) for (op, position), step in steps.items()}
        timings = self.stopwatch.turns(calls, seconds=8, most=9)
        for op, position in steps:
            timing = timings[f"{op} {position}"]
            if timing.error is not None:
                self.results["skipped"].append({"task": f"decoding: {op} at {position}", "why": timing.error})
                continue
            us = 1e3 * timing.whole / case.chunk_size
            row = {"op": op, "position": position, **asdict(case), "us_per_token": us, "ms": timing.whole_ms}
            self.results["decode"].append(row)
            self.say(f"decode {op:11} at {position}: {us:.1f} us per token")


class Watchdog:
    """Context manager that calls `bark` from another thread if its block takes longer than `seconds`."""

    def __init__(self, seconds: float, bark: Callable[[], None]) -> None:
        self.timer = threading.Timer(seconds, bark)
        self.timer.daemon = True

    def __enter__(self) -> None:
        self.timer.start()

    def __exit__(self, *exception: object) -> None:
        self.timer.cancel()


def triton_version() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def folder_of(card: str) -> Path:
    """docs/results/gpu/nvidia-h200 for "NVIDIA H200"."""
    return Path("docs/results/gpu") / re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


@dataclass
class Options:
    seconds: int = setting(540, "time limit in seconds", above=0)
    out: str | None = setting(None, "output folder; null: docs/results/gpu/<card>")


def main(argv: list[str] | None = None) -> int:
    """The command line described in the module's docstring."""
    argv = sys.argv[1:] if argv is None else argv
    return command_line(argv) if argv else guarded(lambda: measure(Options()))  # works without Hydra


@command(Options)
def command_line(options: Options) -> int:
    return measure(options)


def measure(options: Options) -> int:
    """Run the whole benchmark and draw its plots; returns the exit status.

    Raises:
        ConfigError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise ConfigError("there is no GPU here, so nothing was measured; on a CPU, use python -m eval.bench.ops")
    out = Path(options.out) if options.out else folder_of(torch.cuda.get_device_name(0))
    bench = Bench(out, Setting(), options.seconds)
    status = bench.run()
    from eval.bench.gpu.plots import draw

    for path in draw(bench.results, out):
        bench.say(f"drawn: {path}")
    for line in bars.lines(bench.results["bars"]):
        print(line)
    print(f"written: {out / 'results.json'} ({bench.results['status']})")
    return status
