"""Describe the machine a measurement ran on and the memory it used; saved with every benchmark result."""

from __future__ import annotations

import datetime
import functools
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ovq.report import tell_once

# Dense bf16 tensor-core peak in TFLOP/s, from NVIDIA's and AMD's data sheets. The first whose words are all in a
# device's name is used, so that longer names come first.
PEAK_TFLOPS = {"H100 NVL": 835, "H100 PCIe": 756, "H100": 989, "H200 NVL": 835, "H200": 989}
PEAK_TFLOPS |= {"GB200": 2500, "B200": 2250, "A100": 312, "MI300X": 1307}

MEASURED = "measured matrix product"


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
        "load_1min": round(psutil.getloadavg()[0], 2),  # timings from a busy machine are unreliable
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
    """The running command as one would type it: `python -m eval.bench.ops key=value`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"-m {spec.name}" if spec else sys.argv[0]
    return " ".join(["python", program, *sys.argv[1:]])


@functools.cache
def code_commit() -> str:
    """The git commit of this code, "+ changes" if files outside docs/ differ from it; "unknown" outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    try:
        commit, changed = (
            subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "-uno", "--", ".", ":!docs"])
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + (" + changes" if changed else "")


def processor_name() -> str:
    """The processor's name, or its family if the system reports nothing more."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def peak_rss() -> int:
    """Peak resident memory of this process so far, in bytes; it never falls, so measure in a fresh process.

    On Linux this is VmHWM, because getrusage's ru_maxrss starts, in a child process, at its parent's value.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def current_rss() -> int:
    """Current resident memory of this process, in bytes."""
    import psutil

    return psutil.Process().memory_info().rss


def free_memory(device: torch.device) -> int:
    """Memory of a device that this process could still allocate, in bytes."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    import psutil

    return int(psutil.virtual_memory().available)


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: allocations on a GPU, or this process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return peak_rss() / 2**30


def peak_flops(device: torch.device, precision: str, override_tflops: float | None = None) -> tuple[float, str]:
    """(FLOP/s of one device, source of the figure): the setting, a data sheet, or a measured matrix product."""
    if override_tflops:
        return override_tflops * 1e12, "trainer.peak_tflops"
    if device.type == "cuda" and precision == "bf16":
        name = torch.cuda.get_device_name(device)
        for known, tflops in PEAK_TFLOPS.items():
            if all(part in name for part in known.split()):
                return tflops * 1e12, f"{known} data sheet"
    return measured_flops(device, precision), MEASURED


def share_of_peak(
    achieved: float, peak: tuple[float, str], device: torch.device, precision: str
) -> tuple[float | None, tuple[float, str]]:
    """(share of the peak that is achieved, peak to use from now on); FLOP/s of one device, a peak as in `peak_flops`.

    Exceeding a measured peak means that the cores were busy when it was measured, so it is measured again. The share is
    never above 1: it is None instead, and a line on stderr says so once.
    """
    limit, source = peak
    if achieved > limit and source == MEASURED:
        limit, source = max(limit, measured_flops.__wrapped__(device, precision)), f"{MEASURED}, the second time"
    if achieved <= limit:
        return achieved / limit, (limit, source)
    mend = "it is too low" if source == "trainer.peak_tflops" else "set trainer.peak_tflops for a share of the peak"
    tell_once(
        f"training is faster than the peak of {limit / 1e12:.3g} TFLOP/s ({source}), so its share is left out; {mend}"
    )
    return None, (limit, source)


@functools.cache
def measured_flops(device: torch.device, precision: str) -> float:
    """FLOP/s of the fastest of several square matrix products; takes a fifth of a second, once per process."""
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
