"""Speed on this machine's CPU compared with peers, in one run: operator, training step, inference.

    python -m eval.bench.cpu                                                    about 20 minutes on two cores
    python -m eval.bench.cpu sections=[step] models=[std_att,sw_ovq] contexts=[2048] repeats=9
    python -m eval.bench.cpu sections=[matmul,operator] lengths=[2048,8192]     the peak first, then shares of it

Sections:
    matmul      a large product in float32 and bfloat16: the peak that the others are measured against
    operator    OVQ-attention (torch backend) and SDPA, 4 heads of 64, N = 1024: forward, forward + backward, memory
    step        a training step of each named model compared with a plain GPT written with torch alone
    precision   the step of sw_ovq in bfloat16 compared with float32
    profile     where the time of a step of sw_ovq and of the plain GPT goes, on one core
    inference   reading a long text with carried state, then decoding; the peer is full attention with its cache

After one warm-up, the calls to compare take turns in one process, so that other load on the machine affects all alike.
Times are medians, and ratios are medians of the ratios within each turn; a prefill is the sum of its pieces, read once.
Models have the settings of `experiment=cpu_demo`; a key with a dot is a setting of the run. If a measurement fails, the
table shows its error, the others go on, and the exit status is 1. The JSON has all times and is rewritten after every
row. Repeats that are cut for lack of time are noted in the table.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from eval.bench import against_sdpa, ops, profile, reading, steps
from eval.bench.compare import named_models
from eval.bench.stopwatch import Stopwatch, matmul_rate
from ovq import cpu
from ovq.cli import command
from ovq.compose import options as choices_of
from ovq.files import write_whole
from ovq.machine import describe_machine
from ovq.schema import setting

Row = dict[str, Any]
SECTION_NAMES = ("matmul", "operator", "inference", "step", "precision", "profile")  # in this order: see `main`


@dataclass
class Options:
    sections: list[str] = setting(list(SECTION_NAMES), "what to measure", choices=SECTION_NAMES)
    models: list[str] = setting([], "models of step and inference, from configs/model; empty: all")
    size: str = setting("tiny", "model size, from configs/model/size", choices=tuple(choices_of("model/size")))
    matmul_size: int = setting(2048, "rows and columns of matmul's matrices", at_least=1)
    lengths: list[int] = setting([2048, 8192, 16384, 32768, 65536], "lengths of operator in tokens", at_least=1)
    peer_limit: int = setting(32768, "longest sequence to measure SDPA at, in tokens", at_least=1)
    memory: bool = setting(True, "measure the peak memory of operator, in processes of their own")
    contexts: list[int] = setting([2048, 8192, 32768], "contexts of step in tokens", at_least=1)
    precision_contexts: list[int] = setting([2048, 8192], "contexts of precision in tokens", at_least=1)
    profile_contexts: list[int] = setting([2048, 8192], "contexts of profile in tokens", at_least=1)
    step_tokens: int = setting(8192, "tokens a step, unless the context is longer", at_least=1)
    repeats: int = setting(5, "timed repetitions of operator, step and precision", at_least=1)
    seconds: float = setting(
        120, f"after this many at a context of step or precision, {steps.LEAST} repeats are enough", at_least=0
    )
    prefix: int = setting(65536, "tokens that inference reads before it writes", at_least=1)
    piece: int = setting(8192, "tokens of one pass over them", at_least=1)
    decode: int = setting(24, "tokens that inference writes", at_least=1)
    threads: int | None = setting(None, "CPU threads; null: torch's default", at_least=1)
    out: str = setting("runs/bench_cpu.json", "JSON file to write", writes="file")


class Section(NamedTuple):
    """A table: `rows` yields its rows, and notes on what was cut or left out, as they are measured."""

    title: str
    head: str
    rows: Callable[[], Iterator[Row | str]]
    line: Callable[[Row], str]


def matmul_rows(size: int) -> Iterator[Row | str]:
    """A row per dtype."""
    for dtype in (torch.float32, torch.bfloat16):
        rate = matmul_rate(Stopwatch(torch.device("cpu")), size, dtype)
        yield {"dtype": str(dtype).removeprefix("torch."), "size": size, "gflops": rate / 1e9}


def sections_of(given: Options, overrides: list[str], record: dict[str, list[Row]]) -> dict[str, Section]:
    """All sections; those that report shares of the peak look for it in `record` when they start."""
    names = named_models(given.models)
    plan = steps.Plan(given.size, given.step_tokens, given.repeats, given.seconds, tuple(overrides))
    operator = ops.Options(
        lengths=given.lengths,
        repeats=given.repeats,
        peer_limit=given.peer_limit,
        memory=given.memory,
        threads=given.threads,
        device="cpu",
    )

    def peak() -> float | None:
        return next((row["gflops"] * 1e9 for row in record["matmul"] if row["dtype"] == "float32"), None)

    return {
        "matmul": Section(
            "Products of square matrices",
            f"{'dtype':<10} {'size':>6} {'GFLOP/s':>9}",
            lambda: matmul_rows(given.matmul_size),
            lambda row: f"{row['dtype']:<10} {row['size']:>6} {row['gflops']:>9,.1f}",
        ),
        "operator": Section(
            f"Operators: B = {operator.batch}, H = {operator.heads}, D = {operator.head_dim}, "
            f"N = {operator.num_centroids}, L = {operator.chunk_size}, {operator.dtype}",
            against_sdpa.HEAD,
            lambda: against_sdpa.rows(operator, peak()),
            against_sdpa.line,
        ),
        "step": Section(
            f"Training steps: size {given.size}, float32",
            steps.head("model", steps.PEER),
            lambda: steps.rows(names, given.contexts, plan, peak()),
            lambda row: steps.line(row, "model"),
        ),
        "precision": Section(
            f"Training steps of {steps.PRECISE} by precision: size {given.size}",
            steps.head("precision", steps.PRECISIONS[0]),
            lambda: steps.precision_rows(given.precision_contexts, plan),
            lambda row: steps.line(row, "precision"),
        ),
        "profile": Section(
            f"Training steps on one core: size {given.size}, float32; milliseconds by kind of operation",
            profile.HEAD,
            lambda: profile.rows(given.profile_contexts, plan),
            profile.line,
        ),
        "inference": Section(
            f"Inference: one sequence, size {given.size}, float32",
            reading.HEAD,
            lambda: reading.rows(names, given.prefix, given.piece, given.decode, plan),
            reading.line,
        ),
    }


@command(Options, overrides=True)
def main(given: Options, overrides: list[str]) -> int:
    """The command line described in the module's docstring."""
    torch.set_num_threads(given.threads or torch.get_num_threads())
    cpu.keep_freed_memory()  # as training does; after the steps of all models, memory is too scattered to time decoding
    torch.manual_seed(0)
    tables: dict[str, list[Row]] = {name: [] for name in SECTION_NAMES}
    sections = sections_of(given, overrides, tables)
    for name in named_models(given.models) if {"step", "inference"} & set(given.sections) else [steps.PRECISE]:
        steps.config_of(name, 1, steps.Plan(given.size, 1, 1, 0, tuple(overrides)))  # errors now, not after minutes
    machine, out = describe_machine(), Path(given.out)
    record: dict[str, Any] = {"machine": machine, "settings": asdict(given) | {"overrides": overrides}}
    record |= {"finished": False, "seconds": {}, "notes": [], **tables}
    print(
        f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, load {machine['load_1min']}"
    )
    for name in [name for name in SECTION_NAMES if name in given.sections]:
        began = time.monotonic()
        print(f"\n{sections[name].title}\n{sections[name].head}", flush=True)
        for row in sections[name].rows():
            if isinstance(row, str):
                record["notes"].append(row)
                print(f"  note: {row}", flush=True)
            else:
                tables[name].append(row)
                print(sections[name].line(row), flush=True)
            _write(out, record)
        record["seconds"][name] = round(time.monotonic() - began, 1)
        print(f"  {name}: {record['seconds'][name]:,.0f} s", flush=True)
    record["finished"] = True
    _write(out, record)
    print(f"\nwritten: {out}")
    rows = [row for table in tables.values() for row in table]
    if failed := sum("error" in row for row in rows):
        print(f"error: {failed} of {len(rows)} measurements failed, see above", file=sys.stderr)
    return 1 if failed else 0


def _write(out: Path, record: dict[str, Any]) -> None:
    write_whole(out, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
