"""What a run records: metrics.jsonl always, Weights & Biases or TensorBoard on request.

metrics.jsonl has one line per training step, {"step": n, "loss": ...}, and one line per evaluation, whose keys begin
with "eval/". It is the record that survives: after a resume there is still exactly one line per step. Reporting never
stops training: lines that do not fit on a full disk are kept in memory and written once there is room.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ovq.config import Config, to_dict
from ovq.errors import one_line
from ovq.files import write_whole

FINISH_S, FAILED_S = 30.0, 2.0
QUITS = (Exception, SystemExit)  # what wandb may raise: without an API key it may exit the process


class Metrics:
    """The run's log. Every rank may hold one; only the main one writes.

    Args:
        run_dir: the folder that holds metrics.jsonl.
        cfg: logger settings, and the config shown in the logger.
        main: whether this rank writes.
        start_step: the step of the checkpoint resumed from (0: a new run). Lines of later steps are dropped, as those
            steps will be repeated. Damaged lines are dropped and missing ones counted, with a warning.
    """

    def __init__(self, run_dir: Path | str, cfg: Config, *, main: bool = True, start_step: int = 0) -> None:
        self.path = Path(run_dir) / "metrics.jsonl"
        self.main = main
        self._file: io.FileIO | None = None
        self._unwritten = b""
        self._logger: Any = None  # a wandb run, or an object with the same `log` and `finish`
        self._logger_name = cfg.logger.name
        if not main:
            return
        rows, damaged = _parse(self.path)
        rows = [row for row in rows if row["step"] <= start_step]
        if flaws := _flaws(rows, damaged, start_step):
            print(f"{self.path}: {flaws}; training is not affected", file=sys.stderr, flush=True)
        kept = [json.dumps(row) for row in rows]
        write_whole(self.path, "".join(line + "\n" for line in kept))
        self._file = self.path.open("ab", buffering=0)
        if cfg.logger.name == "wandb":
            self._logger = start_wandb(Path(run_dir), cfg)
        elif cfg.logger.name == "tensorboard":
            self._logger = start_tensorboard(Path(run_dir), cfg, start_step)

    def log(self, row: dict[str, Any]) -> None:
        """Append one line; `row["step"]` is required. Once written it survives this process, however that ends."""
        if self._file is None:
            return
        self._write(json.dumps(row).encode() + b"\n")
        numbers = {key: value for key, value in row.items() if isinstance(value, (int, float))}
        self._tell_logger(lambda logger: logger.log(numbers, step=row["step"]))

    def _tell_logger(self, call: Callable[[Any], object]) -> None:
        if self._logger is None:
            return
        try:
            call(self._logger)
        except QUITS as error:
            print(f"logger={self._logger_name} failed, continuing without it: {one_line(error)}", file=sys.stderr)
            self._logger = None

    def _write(self, line: bytes) -> None:
        """Write a line after any that could not be written before; one that is cut short is completed the next time."""
        assert self._file is not None
        waited = bool(self._unwritten)
        self._unwritten += line
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) or 0 :]
        except OSError as error:
            if not waited:
                print(
                    f"{self.path} cannot be written ({error.strerror}); lines are kept in memory until it can be",
                    file=sys.stderr,
                )

    def sync(self) -> None:
        """Flush the lines so far to the disk: a checkpoint must not outlive the record of its steps."""
        if self._file is not None:
            self._write(b"")
            with contextlib.suppress(OSError):
                os.fsync(self._file.fileno())

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self.close(failed=error is not None)

    def close(self, *, failed: bool = False) -> None:
        """Close the file, then the logger, if it takes no longer than FINISH_S: it may wait for a network that is gone.
        After a failure the other ranks wait for this one's report, so it gets no more than FAILED_S."""
        if self._file is not None:
            self._write(b"")
            if self._unwritten:
                lost = self._unwritten.count(b"\n")
                print(f"{self.path} could not be completed: {lost} line(s) are lost", file=sys.stderr)
            self._file.close()
            self._file = None
        if self._logger is None:
            return
        seconds = FAILED_S if failed else FINISH_S
        finish = threading.Thread(
            target=self._tell_logger, args=(lambda logger: logger.finish(exit_code=int(failed)),), daemon=True
        )
        finish.start()
        finish.join(seconds)
        if finish.is_alive():
            print(f"logger={self._logger_name} has not finished within {seconds:.0f} s; not waiting", file=sys.stderr)
        self._logger = None


def finite(value: float | None) -> float | None:
    """The value, or None (null in JSON, which has no NaN) if it is not finite."""
    return value if value is not None and math.isfinite(value) else None


def read_rows(path: Path | str) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, each with an integer "step"; none where there is no file. Damaged lines are left
    out, as is a last line that a killed process left unfinished."""
    return _parse(Path(path))[0]


def training_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl that are training steps."""
    return [row for row in read_rows(run_dir / "metrics.jsonl") if row.get("loss") is not None]


def _parse(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows, and the number of damaged lines."""
    if not path.is_file():
        return [], 0
    *lines, unfinished = path.read_bytes().split(b"\n")
    rows = [_row(line) for line in lines if line.strip()]
    good = [row for row in [*rows, _row(unfinished)] if row is not None]
    return good, rows.count(None)


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line.decode())
    except ValueError:  # not JSON, or not UTF-8
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def _flaws(rows: list[dict[str, Any]], damaged: int, last_step: int) -> str:
    """What is wrong with the record of the steps up to `last_step`, for a message; empty if nothing is."""
    parts = [f"{damaged} damaged line(s) dropped"] if damaged else []
    steps = {row["step"] for row in rows if "loss" in row}
    missing = [step for step in range(min(steps, default=last_step), last_step + 1) if step not in steps]
    if steps and missing:
        shown = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        parts.append(f"{len(missing)} step(s) up to step {last_step} have no line ({shown})")
    return "; ".join(parts)


def start_wandb(run_dir: Path, cfg: Config) -> Any:
    """A Weights & Biases run, which a resumed job continues; None, with a warning, if it fails: training goes on."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        import wandb

        return wandb.init(
            project=cfg.logger.project,
            entity=cfg.logger.entity,
            mode=cfg.logger.mode,  # type: ignore[arg-type]  # one of two literals, by the schema
            tags=list(cfg.logger.tags),
            dir=str(run_dir),
            name=run_dir.name,
            id=hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16],
            resume="allow",
            config=to_dict(cfg),
        )
    except QUITS as error:  # no network, no key, a broken installation
        print(f"logger=wandb could not start, continuing without it: {one_line(error)}", file=sys.stderr)
        return None


class TensorBoard:
    """Logs to run_dir/tensorboard with metrics.jsonl's names. A resumed job hides the steps that it will repeat."""

    def __init__(self, run_dir: Path, cfg: Config, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)
        self._writer.add_text("config", f"```\n{json.dumps(to_dict(cfg), indent=1)}\n```", start_step + 1)

    def log(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def finish(self, exit_code: int = 0) -> None:
        self._writer.close()


def start_tensorboard(run_dir: Path, cfg: Config, start_step: int) -> TensorBoard | None:
    """A log for TensorBoard (an optional extra); None, with a warning, if it fails: logging never stops training."""
    try:
        return TensorBoard(run_dir, cfg, start_step)
    except ImportError:
        reason = "it is not installed; pip install -c launch/constraints-cpu.txt -e '.[tensorboard]'"
    except Exception as error:  # a folder that cannot be written to
        reason = one_line(error)
    print(f"logger=tensorboard could not start, continuing without it: {reason}", file=sys.stderr)
    return None


def show_in_wandb(name: str, picture: Path, rows: list[dict[str, Any]], step: int | None = None) -> None:
    """Log a picture and the table behind it to this process's open Weights & Biases run, if there is one.

    Args:
        step: the run's step; None for a run that was reopened after its end, which accepts no earlier step.
    """
    wandb = sys.modules.get("wandb")
    run = getattr(wandb, "run", None)
    if wandb is None or run is None:
        return
    try:
        columns = list(rows[0])
        table = wandb.Table(columns=columns, data=[[row[column] for column in columns] for row in rows])
        run.log({name: wandb.Image(str(picture)), f"{name}_table": table}, step=step)
    except QUITS as error:  # logging never stops training
        print(f"logger=wandb did not take {picture}: {one_line(error)}", file=sys.stderr)
