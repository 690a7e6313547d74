"""What a run's folder tells about it, whatever state the run is in, for reports over many runs."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from data.build import build_tokenizer
from eval import accuracy_table, loss_table
from eval.paired import Losses, means_in
from eval.run_table import Row
from ovq import config
from ovq.config import Config
from ovq.errors import Failure, one_line
from ovq.inference.run import at_capacity, no_imports_from
from ovq.instantiate import refuse_untrusted
from ovq.model import build_model, count_parameters, state_bytes
from ovq.train.metrics import training_rows
from ovq.train.summary import read_finished

LAST_SHARE = 0.02  # share of the steps over which the final training loss is averaged
LOGS = ("*.log", "*.out", "*.err")  # what a sweep or a scheduler leaves in a run folder


@dataclass
class Facts:
    """The contents of a run folder.

    Args:
        cfg: its settings; None if the run has not begun or they cannot be read.
        status: "finished", "unfinished", "not begun" or "unreadable".
        why: what could not be read, and what the log or the folder says about a run that is not finished.
        steps: the rows of metrics.jsonl that are training steps.
        evaluation: log buckets of the best evaluation by position (`best_evaluation`).
        by_document: rows of loss_by_document.parquet.
        answers: rows of the accuracy over all answers of a task, by length and capacity.
    """

    run_dir: Path
    cfg: Config | None
    status: str
    why: str = ""
    steps: list[Row] = field(default_factory=list)
    evaluation: list[Row] = field(default_factory=list)
    by_document: list[Row] = field(default_factory=list)
    answers: list[Row] = field(default_factory=list)
    parameters: int | None = None
    state_bytes: int | None = None
    fingerprint: str | None = None

    @property
    def step(self) -> int:
        return self.steps[-1]["step"] if self.steps else 0

    def last_loss(self) -> float | None:
        """Mean training loss of the last steps, in nats per token."""
        last = [row["loss"] for row in self.steps if row["step"] > (1 - LAST_SHARE) * self.step]
        return fmean(last) if last else None

    def tokens_per_s(self) -> float | None:
        return median(row["tokens_per_s"] for row in self.steps) if self.steps else None

    def peak_gib(self) -> float | None:
        """Peak memory of a process."""
        return max((row.get("memory_gib") or 0.0 for row in self.steps), default=None)

    def loss_at(self, position: int) -> tuple[float, float | None] | None:
        """Mean loss and standard error of the bucket that contains the `position`-th position, counted from 1."""
        for row in self.evaluation:
            if row["position_start"] < position <= row["position_end"]:
                return row["loss"], row["stderr"]
        return None

    def evaluated(self) -> str:
        """'12 test documents of 65,536 tokens, at step 6,000'; empty if nothing was."""
        if not self.evaluation:
            return ""
        row = self.evaluation[0]
        number = loss_table.documents_of(row)
        return f"{number} {row['split']} documents of {row['context']:,} tokens, at step {row['step']:,}"

    def document_losses(self, span: tuple[int, int], seed: int) -> Losses:
        """Mean loss of each document in `by_document` over a span of positions; a bucket counts if it begins there."""
        buckets = (
            ((row["document"], seed), row["position_start"], row["loss"], row["position_end"] - row["position_start"])
            for row in self.by_document
        )
        return means_in(span, buckets)


def facts_of(run_dir: Path, trust: Collection[str] = ()) -> Facts:
    """Read a run folder. What cannot be read is reported in `why`, not raised.

    Args:
        trust: classes from outside this project that the run's config may name; a run with another one is reported
            without parameters and state.
    """
    problems: list[str] = []

    def attempt(read: Any, otherwise: Any) -> Any:
        try:
            return read()
        except (Failure, OSError, ValueError) as error:
            problems.append(one_line(error))
            return otherwise

    if not (run_dir / "config.yaml").exists():
        return Facts(run_dir, None, "not begun", log_line(run_dir) or "no config.yaml in its folder")
    cfg = attempt(lambda: config.load(run_dir), None)
    if cfg is None:
        return Facts(run_dir, None, "unreadable", problems[0])
    steps = training_rows(run_dir)
    finished = read_finished(run_dir) is not None
    rows = attempt(lambda: loss_table.read(run_dir), [])
    documents = attempt(lambda: loss_table.BY_DOCUMENT.read(run_dir), [])
    own = cfg.eval.num_centroids
    evaluation = best_evaluation(rows, own)
    chosen = [loss_table.key_of(row) for row in evaluation[:1]]
    made = Facts(
        run_dir,
        cfg,
        "finished" if finished else "unfinished",
        steps=steps,
        evaluation=evaluation,
        by_document=[row for row in documents if is_plain(row, own) and loss_table.key_of(row) in chosen],
        answers=[row for row in attempt(lambda: accuracy_table.TABLE.read(run_dir), []) if row["index"] is None],
    )
    attempt(lambda: measure(made, trust), None)
    if not finished:
        problems.append(log_line(run_dir) or "no log in its folder; it may be running, or was killed")
    made.why = "; ".join(problems)
    return made


def measure(facts: Facts, trust: Collection[str]) -> None:
    """Fill in what follows from the settings: parameters, and the state of a sequence of 65,536 tokens."""
    assert facts.cfg is not None
    no_imports_from(facts.run_dir)
    refuse_untrusted(config.targets(facts.cfg), trust, facts.run_dir, facts.run_dir / "config.yaml")
    tokenizer = build_tokenizer(facts.cfg, facts.run_dir, own=True)
    facts.fingerprint = tokenizer.fingerprint
    with torch.device("meta"):
        model = build_model(facts.cfg.model, tokenizer.vocab_size)
    facts.parameters = count_parameters(model)[0]
    with at_capacity(model, facts.cfg):
        facts.state_bytes = state_bytes(model, 65536)


def best_evaluation(rows: list[Row], capacity: int | None) -> list[Row]:
    """The log buckets of the evaluation to show: with the run's own settings, of the newest step, then the longest
    context, then the most documents. `capacity`: the run's `eval.num_centroids`."""
    plain = [row for row in rows if row["buckets"] == "log" and row["num_centroids"] == capacity and not row["changes"]]
    if not plain:
        return []
    rank = {loss_table.key_of(row): (row["step"], row["context"], row["tokens"]) for row in plain}
    best = max(rank, key=lambda key: rank[key])
    return [row for row in plain if loss_table.key_of(row) == best]


def is_plain(row: Row, capacity: int | None) -> bool:
    """Whether a row of loss_by_document was measured with the run's own settings and all of the context."""
    return row["restart"] is None and not row["changes"] and row["num_centroids"] == capacity


def log_line(run_dir: Path) -> str:
    """The last line of the newest log in a run folder: the error, if one ended the run."""
    logs = [path for pattern in LOGS for path in run_dir.glob(pattern) if path.is_file()]
    for path in sorted(logs, key=lambda path: path.stat().st_mtime, reverse=True):
        lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
        if lines:
            return f"{path.name} ends with: {lines[-1][:300]}"
    return ""
