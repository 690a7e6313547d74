"""What the GPU benchmark measures: tasks, in groups that each run in a process of their own (`group`).

Making the list touches no GPU; running a task does. Every result is a row, emitted as soon as it is known: a dictionary
whose "kind" is machine, rates, kernel, check, measurement, stage, decode or skipped.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from eval.bench import cost
from eval.bench.gpu.checks import CHECKS, Sizes, Wrong, programs_per_head
from eval.bench.gpu.stages import shape_of, stage_calls
from eval.bench.rivals import RIVALS, SDPA, Case, decode_attention, decode_ovq, forward_backward, make_inputs, missing
from eval.bench.stopwatch import Stopwatch, copy_rate, matmul_rate
from ovq.machine import describe_machine

Row = dict[str, Any]
K = 1024
CHECK = "check: "  # how the names of tasks that check results begin
START = 8  # seconds that a process takes to import torch and open the GPU
PROGRAMS = (1, 2, 4, 16)  # per head, in the order in which they are tried
TIMED = ("kernel", "measurement", "stage", "decode")  # kinds of rows that note the card's clock


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
    """`seconds`: expected duration, compilation included."""

    name: str
    seconds: float
    run: Callable[[], None]


@dataclass(frozen=True)
class Group:
    """Tasks that one process runs in turn. It is killed after `limit` seconds: the task it was running counts as hung,
    and a new process goes on with the next one.

    `programs`: the number of programs per head that it tries, for the groups that find out how many may be used.
    `under`: a program that the process runs under. `optional`: whether its process may fail.
    """

    name: str
    limit: float
    tasks: list[Task]
    programs: int | None = None
    under: tuple[str, ...] = ()
    optional: bool = False

    @property
    def seconds(self) -> float:
        return START + sum(task.seconds for task in self.tasks)


MAIN = "regex:(assign|predict|query_grad|dictionary_grad|chunk_grad)_kernel"
NCU = ("ncu", "--clock-control", "none", "--set", "full", "--kernel-name", MAIN, "--launch-count", "5")
SANITIZER = ("compute-sanitizer", "--error-exitcode", "9")


class Bench:
    """The tasks, and what they share with each other: `emit` is called with every row.

    `rates` and `best_sdpa`: results of earlier processes.
    """

    def __init__(
        self, setting: Setting, emit: Callable[[Row], None], rates: Row | None = None, best_sdpa: str | None = None
    ) -> None:
        self.setting, self.device = setting, torch.device(setting.device)
        self.rates_found, self.best_sdpa = rates or {}, best_sdpa
        self._emit = emit

    @functools.cached_property
    def stopwatch(self) -> Stopwatch:
        return Stopwatch(self.device)

    def emit(self, kind: str, **row: Any) -> None:
        clock = {"sm_mhz": self.clock()} if kind in TIMED and self.setting.device == "cuda" else {}
        self._emit({"kind": kind, **row, **clock})

    def skipped(self, task: str, why: str) -> None:
        self.emit("skipped", task=task, why=why)

    def clock(self) -> int | None:
        """The current SM clock of the card in MHz; None if it cannot be read."""
        card = str(torch.cuda.get_device_properties(self.device).uuid)
        query = ["nvidia-smi", "-i", f"GPU-{card}", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
        try:
            return int(subprocess.run(query, capture_output=True, text=True, timeout=5, check=True).stdout.split()[0])
        except (OSError, subprocess.SubprocessError, ValueError, IndexError):
            return None

    # --- groups, and their order ---

    def groups(self) -> list[Group]:
        """All groups, the most important first."""
        case, long = self.setting.case, 64 * K // self.setting.scale
        bar = replace(case, tokens=long)
        wide, few = replace(bar, width=2 * case.width), replace(bar, batch=1)
        peers = ["flash_attention_3", "gated_deltanet", "mamba2", "flex", "ovq_torch"]
        best = ["ovq", "best_sdpa"]
        first, *others = self.setting.dtypes
        sizes = self.setting.sizes
        checks = [self.check_task(name, sizes[0], first) for name in CHECKS]
        shapes = [self.check_task("against float64", size, first) for size in sizes[1:]]
        groups = [Group("machine", 60, [Task("machine", 2, self.machine)])]
        for k in PROGRAMS:
            groups.append(Group(f"{k} programs per head", 25 if k > 1 else 60, [self.alone_task(k)], programs=k))
        groups += [
            Group("checks", 60, checks + shapes),
            Group("bar", 60, [Task("rates of this card", 8, self.rates), self.passes(bar, ["ovq", *SDPA], 40)]),
            Group("stages", 40, [Task(f"stages at {long}", 15, lambda: self.stages(bar))]),
            Group("profile", 60, [Task(f"profile at {long}", 40, lambda: self.once(bar))], under=NCU, optional=True),
            Group("lengths", 60, [self.passes(replace(bar, tokens=long // n), ["ovq", *SDPA], 8) for n in (8, 4, 2)]),
            Group("short", 40, [self.passes(replace(bar, tokens=long // n), ["ovq", *SDPA], 8) for n in (16, 32)]),
            Group("twice", 60, [self.passes(replace(bar, tokens=2 * long), best, 20)]),
            Group("one row", 60, [self.passes(few, ["ovq", *SDPA], 12)]),
            Group("decoding", 60, [Task("decoding", 35, self.decoding)]),
            Group("sanitizer", 60, [self.alone_task(4, "sanitizer: ")], under=SANITIZER),
        ]
        for dtype in others:
            groups.append(
                Group(f"checks in {name_of(dtype)}", 60, [self.check_task(c, sizes[0], dtype) for c in CHECKS])
            )
            groups.append(
                Group(
                    f"shapes in {name_of(dtype)}", 40, [self.check_task("against float64", x, dtype) for x in sizes[1:]]
                )
            )
        groups += [
            Group("rivals", 60, [self.passes(bar, peers, 40)]),
            Group("wide", 60, [self.passes(wide, best, 25)]),
            Group("capacities", 40, [self.passes(replace(bar, num_centroids=n), ["ovq"], 6) for n in (1024, 8192)]),
            Group("stages of one row", 40, [Task(f"stages at {long}, B = 1", 10, lambda: self.stages(few))]),
            Group("rivals, short", 60, [self.passes(replace(bar, tokens=long // n), peers, 25) for n in (8, 32)]),
            Group("four times", 60, [self.passes(replace(bar, tokens=4 * long), best, 30)]),
            Group("wide, short", 40, [self.passes(replace(wide, tokens=long // n), best, 8) for n in (8, 32, 2)]),
            Group("one row, short", 40, [self.passes(replace(few, tokens=long // n), best, 6) for n in (8, 32, 2)]),
        ]
        for n in (1024, 8192):
            tasks = [self.passes(replace(bar, num_centroids=n, tokens=long // m), ["ovq"], 5) for m in (8, 32)]
            groups.append(
                Group(f"{n} centroids", 40, [*tasks, self.passes(replace(wide, num_centroids=n), ["ovq"], 8)])
            )
        groups += [
            Group(f"wide, {n} times", 60, [self.passes(replace(wide, tokens=n * long), best, 40)]) for n in (2, 4)
        ]
        return groups

    def machine(self) -> None:
        """Emit the card and what is installed; for the stand-in, the CPU."""
        if self.setting.device == "cuda" and not torch.cuda.is_available():
            self.emit("machine", gpu=False)
            return
        try:
            machine = describe_machine()
        except ImportError:  # a bare machine lacks psutil
            machine = {"torch": torch.__version__, "processor": "unknown"}
            if torch.cuda.is_available():
                machine["accelerator"] = torch.cuda.get_device_name(0)
        self.emit(
            "machine", gpu=self.setting.device == "cuda", **machine, cuda=torch.version.cuda, triton=triton_version()
        )

    def alone_task(self, programs: int, prefix: str = "") -> Task:
        name = f"{prefix}every kernel alone, {programs} programs per head"
        return Task(name, 40 if programs == 1 or prefix else 12, lambda: self.alone(programs))

    def alone(self, programs: int) -> None:
        """Launch each kernel once, on a short text, and wait for it, so that what fails or hangs is known by name."""
        if self.setting.backend != "triton":
            return
        tokens = 300 // self.setting.scale
        case = replace(self.setting.case, batch=1, heads=2, tokens=tokens, num_centroids=200, chunk_size=64)
        x = make_inputs(case, self.device, self.setting.dtypes[0])

        def done(stage: str) -> None:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self.emit("kernel", stage=stage, programs=programs)

        with programs_per_head(lambda usual: programs):
            stage_calls(x, case, done)
            decode_ovq(case, tokens, self.device, self.setting.dtypes[0], self.setting.backend)()
            done("decode")

    def once(self, case: Case) -> None:
        """All stages once, for a profiler."""
        if self.setting.backend == "triton":
            stage_calls(make_inputs(case, self.device, self.setting.dtypes[0]), case)

    # --- checks ---

    def check_task(self, name: str, sizes: Sizes, dtype: torch.dtype) -> Task:
        label = f"{name}, {name_of(dtype)}, K = {sizes.K}, V = {sizes.V}"

        def run() -> None:
            found: dict[str, Any] = {"check": label, "sizes": asdict(sizes), "passed": False}
            try:
                found["found"] = CHECKS[name](self.setting.backend, sizes, self.device, dtype)
                found["passed"] = True
            except Exception as error:  # a kernel that does not run is wrong as well
                found["found"] = str(error) if isinstance(error, Wrong) else f"{type(error).__name__}: {error}"[:500]
            self.emit(**{"kind": "check", **found})

        return Task(f"{CHECK}{label}", 5, run)

    # --- times ---

    def rates(self) -> None:
        self.rates_found = {
            "matmul_flops": matmul_rate(self.stopwatch, self.setting.matmul_size),
            "copy_bytes": copy_rate(self.stopwatch, self.setting.copy_bytes),
        }
        self.emit("rates", **self.rates_found)

    def passes(self, case: Case, ops: list[str], seconds: float) -> Task:
        """A task that times forward and forward + backward of several rivals in turns."""
        shape = f"B x H = {case.batch} x {case.heads}, D = {case.width}, N = {case.num_centroids}"
        return Task(f"{shape}, T = {case.tokens}: {', '.join(ops)}", seconds, lambda: self.measure(case, ops, seconds))

    def measure(self, case: Case, ops: list[str], seconds: float) -> None:
        chosen = [op for name in ops if (op := self.best_sdpa if name == "best_sdpa" else name) in self.setting.rivals]
        for op in list(chosen):
            if op and (why := missing(op, self.device)):
                chosen.remove(op)
                self.skipped(op, why)
        x = make_inputs(case, self.device, self.setting.dtypes[0])
        calls = {op: forward_backward(self.rival(op), x, case) for op in chosen if op}
        measured: dict[str, float] = {}
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
            self.emit("measurement", **row)
            if known:
                measured[op] = timing.whole
        torch_own = [op for op in measured if op in SDPA]
        if self.best_sdpa is None and torch_own:
            self.best_sdpa = min(torch_own, key=measured.__getitem__)

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
                self.skipped(f"stage {name}", timing.error)
                continue
            low, high = work[name].predicted_ms(chip)
            row = {"stage": name, **asdict(case), "ms": timing.whole_ms, "median_ms": timing.whole}
            row |= {"floor_ms": work[name].floor_ms(chip), "predicted_ms": [low, high]}
            row["over_floor"] = round(timing.whole / row["floor_ms"], 2)
            self.emit(**{"kind": "stage", **row})

    def chip(self) -> cost.Chip:
        """The cost model's chip nearest to this card, with the rates measured here."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""
        chip = cost.CHIPS["h200" if "H200" in name else "a100" if "A100" in name else "h100"]
        rates = self.rates_found
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
                self.skipped(f"decoding: {op} at {position}", timing.error)
                continue
            us = 1e3 * timing.whole / case.chunk_size
            row = {"op": op, "position": position, **asdict(case), "us_per_token": us, "ms": timing.whole_ms}
            row["replay_us_per_token"] = self.replayed_us(steps[op, position]) if self.device.type == "cuda" else None
            self.emit("decode", **row)

    def replayed_us(self, step: Callable[[], None]) -> float | None:
        """Microseconds of a step's kernels alone: replayed from a CUDA graph, they do not wait for the host."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                step()
        except RuntimeError:
            return None

        def replay(mark: Callable[[], None]) -> None:
            for _ in range(20):
                graph.replay()

        timing = self.stopwatch.turns({"replay": replay}, seconds=0.2, most=9)["replay"]
        return 1e3 * timing.whole / 20 if timing.error is None else None


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def triton_version() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


GPU = Setting()


def setting_at(path: str) -> Setting:
    """The setting at "module:name"."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
