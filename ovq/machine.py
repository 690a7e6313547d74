"""What a measurement was taken on, and how much memory it took: written beside every figure of a benchmark."""

from __future__ import annotations

import datetime
import platform
import resource
import sys
from pathlib import Path
from typing import Any

import torch


def describe_machine() -> dict[str, Any]:
    """Processor, accelerator, memory, versions, threads, date and command line, ready for JSON."""
    import psutil

    described: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command_line(),
        "processor": processor_name(),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_1min": round(psutil.getloadavg()[0], 2),  # of other work: a busy machine times badly
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        described["accelerator"] = properties.name
        described["accelerator_memory_gib"] = round(properties.total_memory / 2**30, 1)
    return described


def command_line() -> str:
    """The command that runs, as one would type it: `python -m eval.bench_ops key=value`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"-m {spec.name}" if spec else sys.argv[0]
    return " ".join(["python", program, *sys.argv[1:]])


def processor_name() -> str:
    """The processor's name, and where the system tells only a family, that."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def peak_rss() -> int:
    """The most memory this process has had resident so far, in bytes; it never falls, so measure in a fresh process.

    Linux's VmHWM: getrusage's ru_maxrss begins, in a child, with what its parent had.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def current_rss() -> int:
    """What this process has resident now, in bytes."""
    import psutil

    return psutil.Process().memory_info().rss
