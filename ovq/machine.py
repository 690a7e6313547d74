"""What a measurement was taken on, and how much memory it took: written beside every figure of a benchmark."""

from __future__ import annotations

import datetime
import functools
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

# Dense bf16 tensor-core peak in TFLOP/s, from NVIDIA's and AMD's data sheets.
PEAK_TFLOPS = {"H100 NVL": 835, "H100 PCIe": 756, "H100": 989, "H200": 989, "B200": 2250, "A100": 312, "MI300X": 1307}


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
    """The command that runs, as one would type it: `python -m eval.bench.ops key=value`."""
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
