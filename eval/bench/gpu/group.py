"""One group of the GPU benchmark's tasks, in this process: rows go to stdout as JSON lines, as they come.

    python -m eval.bench.gpu.group JSON

Started by `eval.bench.gpu.bench`, which kills it if it takes too long. Needs torch, Triton and numpy only.

Exit status: 0 all tasks were run (what failed is in the rows), 4 an error has left this process unable to use the GPU.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch

from eval.bench.gpu.checks import programs_per_head
from eval.bench.gpu.tasks import Bench, Group, Row, setting_at
from ovq.bounded import end_with_parent
from ovq.errors import one_line

SPOILT = 4


def main(argv: list[str]) -> int:
    """JSON: {"group": name, "skip": names of tasks, "setting": "module:name", "programs": most per head or null,
    "seconds": limit, "rates": ..., "best_sdpa": ...}."""
    if argv[:1] in (["-h"], ["--help"]):
        print(f"{__doc__}\nStarted by: python -m eval.bench.gpu --help")
        return 0
    given = json.loads(argv[0])
    end_with_parent()
    signal.alarm(int(given["seconds"]) + 10)  # even if a hang holds the GIL
    return run(given, write)


def run(given: dict[str, Any], emit: Callable[[Row], None]) -> int:
    """Run a group's tasks in this process; returns its exit status."""
    bench = Bench(setting_at(given["setting"]), emit, given["rates"], given["best_sdpa"])
    group = next(group for group in bench.groups() if group.name == given["group"])
    most = given["programs"]
    with programs_per_head(lambda usual: usual if most is None else min(usual, most)):
        return run_tasks(bench, group, given["skip"])


def run_tasks(bench: Bench, group: Group, skip: list[str]) -> int:
    """Run the tasks of a group except those to skip; a failure is a row like any other."""
    for task in group.tasks:
        if task.name in skip:
            continue
        bench.emit("begin", task=task.name)
        try:
            task.run()
        except Exception as error:
            bench.skipped(task.name, f"{type(error).__name__}: {one_line(error)}"[:500])
        try:
            settle(bench.device)
        except Exception as error:  # an illegal access: from now on every call fails
            bench.skipped(task.name, f"{type(error).__name__}: {one_line(error)}"[:500])
            bench.emit("end", task=task.name)
            return SPOILT
        bench.emit("end", task=task.name)
    return 0


def settle(device: torch.device) -> None:
    """Wait for what is running, and give memory back; fails if an earlier call has broken this process's GPU."""
    if device.type == "cuda" and torch.cuda.is_initialized():
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def write(row: Row) -> None:
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(status)  # an orderly exit may hang once the GPU has failed
