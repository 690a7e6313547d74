"""Throughput of the data pipeline alone by number of workers: a GPU must never wait for data.

    python -m eval.bench.pipeline data=builtin                        workers 0, 1 and 2, five seconds each
    python -m eval.bench.pipeline data=memmap 'data.train=[DIR]' trainer.context=8192 need=900000
    python -m eval.bench.pipeline run=runs/pg19_70m                   that run's settings and speed

One rank reads the whole global batch, from file to micro-batch, with no model behind it. The first step opens a
document in every lane and is reported separately. After it, tokens are counted for `seconds`, and until as many
documents have started as there are lanes (but for at most ten times `seconds`), because most of the work is tokenizing
new documents. `need` is what the model consumes on all ranks, in tokens/s; with run=DIR it is the median of that run's
metrics.jsonl. With W ranks, each has its own pipeline, which must supply 1/W of it. json=PATH writes the results and
the machine they were measured on.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from data.build import build_loader, build_tokenizer
from data.loader import Loader
from ovq import config
from ovq.cli import command
from ovq.compose import compose
from ovq.config import Config
from ovq.errors import ConfigError
from ovq.files import write_whole
from ovq.machine import describe_machine
from ovq.processes import World
from ovq.schema import setting
from ovq.train.metrics import read_rows


@dataclass
class Options:
    workers: list[int] = setting([0, 1, 2], "numbers of worker processes to measure", at_least=0)
    seconds: float = setting(5.0, "duration of a measurement in seconds", above=0)
    need: float | None = setting(None, "tokens/s that the model consumes on all ranks", above=0)
    run: str | None = setting(None, "run folder to take settings and speed from", paths=True)
    json: str | None = setting(None, "JSON file to write the results to", writes="file")


_SAMPLE_S = 2.0  # interval between samples of the processes' memory


def measure(cfg: Config, workers: int, seconds: float) -> dict[str, Any]:
    """Measure the pipeline of `cfg` with this many workers, for at least `seconds`; returns a row of the table."""
    cfg = copy.deepcopy(cfg)
    cfg.data.num_workers = workers
    began = time.perf_counter()
    loader = build_loader(cfg, build_tokenizer(cfg), World())
    opened = time.perf_counter()
    batches = iter(loader)
    for _ in range(loader.micro_batches_per_step):
        next(batches)
    first = time.perf_counter()
    tokens, num_bytes, documents = 0, 0, 0
    memory, elapsed, sampled = 0.0, 0.0, 0.0
    while elapsed < seconds or (documents < cfg.trainer.global_batch and elapsed < 10 * seconds):
        start = time.perf_counter()
        batch = next(batches)
        elapsed += time.perf_counter() - start  # excludes sampling the memory, which is slow
        tokens += batch.inputs.numel()
        num_bytes += batch.counts.get("bytes", 0)
        documents += batch.counts.get("documents", 0)
        if elapsed - sampled > _SAMPLE_S:
            sampled, memory = elapsed, max(memory, _memory_mib())
    memory = max(memory, _memory_mib())
    del batches  # ends the workers
    return {
        "workers": loader.num_workers,
        "open_s": round(opened - began, 3),
        "first_step_s": round(first - opened, 3),
        "tokens_per_s": round(tokens / elapsed),
        "documents": documents,
        "text_mb_per_s": round(num_bytes / elapsed / 1e6, 3),
        "memory_mib": round(memory),
        "counts": _irregular(loader),
    }


def _irregular(loader: Loader) -> dict[str, int]:
    """How many documents of each irregular kind were read."""
    usual = ("tokens", "bytes", "documents", "words", "padding", "truncated")
    return {name: count for name, count in loader.counts.items() if name not in usual}


def _memory_mib() -> float:
    """Memory of this process and its workers in MiB; shared pages count once where the system reports PSS."""
    import psutil

    total = 0
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        try:
            info = process.memory_full_info()
            total += getattr(info, "pss", info.rss)
        except psutil.Error:  # the process has just ended
            continue
    return total / 2**20


def _of_run(run: str) -> tuple[Config, float]:
    """The config of a run folder, and the median tokens/s of its steps.

    Raises:
        ConfigError: the run has not logged a step yet.
    """
    cfg = config.load(run, trust=())
    speeds = [row["tokens_per_s"] for row in read_rows(Path(run) / "metrics.jsonl") if "tokens_per_s" in row]
    if not speeds:
        raise ConfigError(f"{run}/metrics.jsonl has no step yet, so the speed of its model is unknown")
    return cfg, median(speeds)


def table(rows: list[dict[str, Any]], need: float | None) -> str:
    """The results as text."""
    lines = [f"{'workers':>7} {'open s':>8} {'first step s':>13} {'tokens/s':>12} {'text MB/s':>10} {'memory MiB':>11}"]
    lines[0] += f" {'of need':>9}" if need else ""
    for row in rows:
        lines.append(
            f"{row['workers']:>7} {row['open_s']:>8.2f} {row['first_step_s']:>13.2f} {row['tokens_per_s']:>12,} "
            f"{row['text_mb_per_s']:>10.1f} {row['memory_mib']:>11,}"
            + (f" {row['tokens_per_s'] / need:>8.1f}x" if need else "")
        )
        if row["counts"]:
            lines.append(
                " " * 8 + "counted: " + ", ".join(f"{name} {count:,}" for name, count in row["counts"].items())
            )
    if need:
        best = max(row["tokens_per_s"] for row in rows)
        verdict = "enough" if best >= need else "NOT enough: prepare the data (python -m data.prepare) or add workers"
        lines.append(f"needed: {need:,.0f} tokens/s on all ranks; best {best:,} on one rank: {verdict}")
    return "\n".join(lines)


@command(Options, overrides=True)
def main(options: Options, overrides: list[str]) -> int:
    """The command line described in the module's docstring."""
    if options.run and overrides:
        raise ConfigError(f"run={options.run} brings its own settings; remove {' '.join(overrides)}")
    cfg, need = _of_run(options.run) if options.run else (compose(overrides), options.need)
    rows = [measure(cfg, count, options.seconds) for count in options.workers]
    trainer = cfg.trainer
    print(
        f"data={cfg.data.name} tokenizer={cfg.tokenizer.name} context={trainer.context} "
        f"global_batch={trainer.global_batch} micro_batch={trainer.micro_batch}"
    )
    print(table(rows, need))
    if options.json:
        report = {"machine": describe_machine(), "config": config.to_dict(cfg), "need": need, "rows": rows}
        write_whole(options.json, json.dumps(report, indent=1).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
