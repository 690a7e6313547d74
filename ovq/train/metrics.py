"""What a run reports: metrics.jsonl always, a progress line, Weights & Biases if asked, and the machine's peak.

metrics.jsonl has one line a training step, {"step": n, "loss": ...}, and one line an evaluation, whose keys begin with
"eval/". It is the record that survives: after a resume there is still exactly one line a step. Reporting never stops
training: lines that a full disk refuses are kept and written once there is room.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from ovq.files import write_whole
from ovq.machine import peak_rss

PROGRESS_LINE_S = 10.0  # between progress lines where stderr is no terminal
# Dense bf16 tensor-core peak in TFLOP/s, from NVIDIA's and AMD's data sheets.
PEAK_TFLOPS = {"H100 NVL": 835, "H100 PCIe": 756, "H100": 989, "H200": 989, "B200": 2250, "A100": 312, "MI300X": 1307}


class Metrics:
    """The run's log. Every rank may hold one; only the main one writes.

    Args:
        run_dir: where metrics.jsonl lies.
        cfg: logger settings and, for Weights & Biases, the config shown there.
        main: whether this rank writes.
        start_step: the step of the checkpoint resumed from (0: a new run). Lines of later steps are dropped: those
            steps will be made again.
    """

    def __init__(self, run_dir: Path | str, cfg: Any, *, main: bool = True, start_step: int = 0) -> None:
        self.path = Path(run_dir) / "metrics.jsonl"
        self.main = main
        self._file: io.FileIO | None = None
        self._unwritten = b""
        self._wandb: Any = None
        if not main:
            return
        kept = [json.dumps(row) for row in read_rows(self.path) if row["step"] <= start_step]
        write_whole(self.path, "".join(line + "\n" for line in kept))
        self._file = self.path.open("ab", buffering=0)
        if cfg.logger.name == "wandb":
            self._wandb = start_wandb(Path(run_dir), cfg)

    def log(self, row: dict[str, Any]) -> None:
        """Append one line; `row["step"]` is required. The line outlives this process, however it ends."""
        if self._file is None:
            return
        self._write(json.dumps(row).encode() + b"\n")
        numbers = {key: value for key, value in row.items() if isinstance(value, (int, float))}
        self._tell_wandb(lambda run: run.log(numbers, step=row["step"]))

    def _tell_wandb(self, call: Callable[[Any], object]) -> None:
        if self._wandb is None:
            return
        try:
            call(self._wandb)
        except Exception as error:
            print(f"logger=wandb fails, going on without: {' '.join(str(error).split())}", file=sys.stderr)
            self._wandb = None

    def _write(self, line: bytes) -> None:
        """Write what could not be written before, and this; a line that is cut off is completed the next time."""
        assert self._file is not None
        waited = bool(self._unwritten)
        self._unwritten += line
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) or 0 :]
        except OSError as error:
            if not waited:
                print(
                    f"{self.path} cannot be written ({error.strerror}); its lines are kept meanwhile", file=sys.stderr
                )

    def sync(self) -> None:
        """Ask for the lines so far to be on the disk: a checkpoint must not outlive the record of its steps."""
        if self._file is not None:
            self._write(b"")
            with contextlib.suppress(OSError):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._write(b"")
            if self._unwritten:
                lost = self._unwritten.count(b"\n")
                print(f"{self.path} could not be written to the end: {lost} line(s) are lost", file=sys.stderr)
            self._file.close()
            self._file = None
        self._tell_wandb(lambda run: run.finish())
        self._wandb = None


def read_rows(path: Path | str) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl. A last line that a killed process left unfinished is left out."""
    path = Path(path)
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows


def start_wandb(run_dir: Path, cfg: Any) -> Any:
    """A Weights & Biases run that a resumed job continues, or None with a warning: logging never stops training."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        import wandb

        from ovq.config import to_dict

        return wandb.init(
            project=cfg.logger.project,
            entity=cfg.logger.entity,
            mode=cfg.logger.mode,
            tags=list(cfg.logger.tags),
            dir=str(run_dir),
            name=run_dir.name,
            id=hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16],
            resume="allow",
            config=to_dict(cfg),
        )
    except Exception as error:  # no network, no key, a broken installation
        print(f"logger=wandb does not work here, going on without: {' '.join(str(error).split())}", file=sys.stderr)
        return None


def show_in_wandb(name: str, picture: Path, rows: list[dict[str, Any]], step: int | None = None) -> None:
    """A picture and the table behind it, in the Weights & Biases run that this process has open, if there is one.

    Args:
        step: the run's step; None where the run was reopened after its end, which takes no earlier step.
    """
    wandb = sys.modules.get("wandb")
    run = getattr(wandb, "run", None)
    if wandb is None or run is None:
        return
    try:
        columns = list(rows[0])
        table = wandb.Table(columns=columns, data=[[row[column] for column in columns] for row in rows])
        run.log({name: wandb.Image(str(picture)), f"{name}_table": table}, step=step)
    except Exception as error:  # logging never stops training
        print(f"logger=wandb did not take {picture}: {' '.join(str(error).split())}", file=sys.stderr)


class Progress:
    """A bar on a terminal; elsewhere a line at the first and last step and every ten seconds between."""

    def __init__(self, steps: int, start: int, enabled: bool, stream: TextIO | None = None) -> None:
        self.steps, self.start = steps, start
        self.stream = stream or sys.stderr
        self.enabled = enabled
        self._bar: Any = None
        self._began = time.monotonic()
        self._last_line = 0.0
        if enabled and self.stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=steps, initial=start, file=self.stream, dynamic_ncols=True, desc="train", unit="step"
            )

    def update(self, step: int, facts: dict[str, str]) -> None:
        """Show that `step` steps are done, with already formatted facts (loss, tokens/s, ...)."""
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix(facts)
            return
        now = time.monotonic()
        if step in (self.start + 1, self.steps) or now - self._last_line >= PROGRESS_LINE_S:
            self._last_line = now
            eta = (now - self._began) / max(1, step - self.start) * (self.steps - step)
            shown = "  ".join(f"{key} {value}" for key, value in facts.items())
            print(f"step {step}/{self.steps}  {shown}  ETA {duration(eta)}", file=self.stream, flush=True)

    def say(self, text: str) -> None:
        """One line that does not tear the bar."""
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """95 -> '1:35', 3700 -> '1:01:40'."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


# --- facts -----------------------------------------------------------------------------------------------------------


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far: a GPU's allocations, or this process's resident set on a CPU. GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return peak_rss() / 2**30


def peak_flops(device: torch.device, precision: str, override_tflops: float | None = None) -> tuple[float, str]:
    """(FLOP/s of one device, where the number is from): the setting, a data sheet, or a measured matrix product."""
    if override_tflops:
        return override_tflops * 1e12, "trainer.peak_tflops"
    if device.type == "cuda" and precision == "bf16":
        name = torch.cuda.get_device_name(device)
        for known, tflops in PEAK_TFLOPS.items():
            if all(part in name for part in known.split()):
                return tflops * 1e12, f"{known} data sheet"
    return measured_flops(device, precision), "measured matrix product"


@functools.cache
def measured_flops(device: torch.device, precision: str) -> float:
    """FLOP/s of the best of some square matrix products: a fifth of a second, once a process."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    size = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(size, size, generator=generator).to(device, dtype)
    best, end = float("inf"), time.perf_counter() + 0.2
    while time.perf_counter() < end:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def set_health(model: torch.nn.Module, on: bool) -> None:
    """Ask every mixer to report on the next forward pass, or to stop."""
    for mixer in model.mixers():  # type: ignore[operator]
        mixer.collect_health = on


def read_health(model: torch.nn.Module) -> dict[str, float]:
    """{"health/layer_03/fill": ...} of the last forward pass, for the layers that report."""
    return {
        f"health/layer_{index:02d}/{name}": float(value)
        for index, mixer in enumerate(model.mixers())  # type: ignore[operator]
        for name, value in mixer.health.items()
    }


# --- which tokens a step saw -----------------------------------------------------------------------------------------


def token_hash(lanes: list[int], inputs: np.ndarray, targets: np.ndarray) -> int:
    """64-bit hash of rows of tokens [m, T] and their lanes: a sum over rows, so however the rows of a step are dealt
    to ranks and micro-batches, the sum modulo 2^64 of their hashes is the same. It names the step's data."""
    with np.errstate(over="ignore"):
        position = np.arange(inputs.shape[1], dtype=np.uint64)
        pairs = inputs.astype(np.uint64) * np.uint64(2**32) + (targets.astype(np.int64) & 0xFFFFFFFF).astype(np.uint64)
        rows = _mix(pairs + _mix(position)).sum(axis=1, dtype=np.uint64)
        return int(_mix(rows + _mix(np.array(lanes, dtype=np.uint64) + np.uint64(1))).sum(dtype=np.uint64))


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser."""
    x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
