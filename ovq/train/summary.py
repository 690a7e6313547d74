"""The outcome of a run, as text and as the last file it writes."""

from __future__ import annotations

import json
import shlex
import statistics
from pathlib import Path
from typing import Any

from ovq.config import Config
from ovq.files import write_whole
from ovq.report import readable, reporting

FILE = "summary.json"
FIELDS = {"step", "stopped_by", "tokens", "last_loss", "checkpoint"}  # of any summary that `finish` writes


def finish(summary: dict[str, Any], cfg: Config, run_dir: Path) -> None:
    """Write summary.json, the last file of a finished run, then print the summary."""
    if summary["stopped_by"] is None:
        write_whole(run_dir / FILE, json.dumps(summary, indent=1) + "\n")
    with reporting("the summary on the screen"):
        print(summary_text(summary, cfg, run_dir), flush=True)


def read_finished(run_dir: Path) -> dict[str, Any] | None:
    """The summary that `finish` wrote in this run folder; None if the run did not finish there."""
    try:
        summary = json.loads((run_dir / FILE).read_bytes())
    except (OSError, ValueError):
        return None
    return summary if isinstance(summary, dict) and summary.keys() >= FIELDS and summary["stopped_by"] is None else None


def recorded(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The entries of a summary that are read from the rows of metrics.jsonl."""
    losses = [row["loss"] for row in rows if row.get("loss") is not None]
    speeds = [row["tokens_per_s"] for row in rows if row.get("tokens_per_s") is not None]
    evaluations = [row for row in rows if any(key.startswith("eval/") for key in row)]
    return {
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "evaluation": evaluations[-1] if evaluations else {},
        "tokens_per_s": statistics.median_high(speeds) if speeds else None,
        "memory_gib": max((row.get("memory_gib") or 0.0 for row in rows), default=0.0),
    }


def summary_text(summary: dict[str, Any], cfg: Config, run_dir: Path) -> str:
    """One screen: the outcome, where the files are, what to run next."""
    step = summary["step"]
    if summary["stopped_by"]:
        lines = [
            f"stopped by {summary['stopped_by']} at step {step} of {cfg.trainer.steps}; checkpoint "
            f"{summary['checkpoint']}; resume with the same command"
        ]
    else:
        lines = [f"finished: {step} steps, {summary['tokens']:,} tokens"]
    if summary["first_loss"] is not None:
        lines.append(f"  loss          {summary['first_loss']:.4f} -> {summary['last_loss']:.4f} nats per token")
    if summary["tokens_per_s"]:
        lines.append(f"  speed         {summary['tokens_per_s']:,.0f} tokens/s (median)")
    lines.append(f"  peak memory   {summary['memory_gib']:.2f} GiB per process")
    for key, value in summary["evaluation"].items():
        if key.startswith("eval/") and value is not None:
            lines.append(f"  {key[5:]:<13} {readable(value)} (evaluation at step {summary['evaluation']['step']})")
    names = ["config.yaml", "metrics.jsonl", "checkpoints/latest", "per_position_loss.parquet", "plots"]
    lines += [f"  {'in ' + str(run_dir)}: {', '.join(name for name in names if (run_dir / name).exists())}"]
    lines += [f"    {path}" for path in sorted((run_dir / "plots").glob("*.png"))]
    if not summary["stopped_by"]:
        lines.append("next:")
        run, runs = shlex.quote(f"run={run_dir}"), shlex.quote(f"runs=[{run_dir}]")
        if cfg.data.kind == "task":  # loss by position is not defined for it
            lines.append(f"  python -m eval.accuracy {run}     accuracy by length")
            lines.append(f"  python -m eval.plot {runs} kind=accuracy     then overlay several runs")
        else:
            lines.append(
                f"  python -m eval.per_position {run} context={4 * cfg.eval.context}     loss at longer positions"
            )
            lines.append(f"  python -m eval.plot {runs}     overlay several runs")
    return "\n".join(lines)
