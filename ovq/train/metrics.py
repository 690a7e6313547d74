"""What a run records: metrics.jsonl always, Weights & Biases on request.

metrics.jsonl has one line a training step, {"step": n, "loss": ...}, and one line an evaluation, whose keys begin with
"eval/". It is the record that survives: after a resume there is still exactly one line a step. Reporting never stops
training: lines that a full disk refuses are kept and written once there is room.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ovq.config import Config, to_dict
from ovq.files import write_whole


class Metrics:
    """The run's log. Every rank may hold one; only the main one writes.

    Args:
        run_dir: where metrics.jsonl lies.
        cfg: logger settings and, for Weights & Biases, the config shown there.
        main: whether this rank writes.
        start_step: the step of the checkpoint resumed from (0: a new run). Lines of later steps are dropped: those
            steps will be made again.
    """

    def __init__(self, run_dir: Path | str, cfg: Config, *, main: bool = True, start_step: int = 0) -> None:
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


def start_wandb(run_dir: Path, cfg: Config) -> Any:
    """A Weights & Biases run that a resumed job continues, or None with a warning: logging never stops training."""
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
