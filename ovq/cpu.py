"""How a process uses a CPU: number of threads, waiting without spinning, keeping freed memory, bfloat16 products.

`quiet_threads` must run before torch is imported, so this module imports torch only inside its functions.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from glibc's malloc.h
FASTER = 1.5  # AMX makes bfloat16 products 6 or more times as fast; without leave to use it, they are slower or equal


def quiet_threads() -> None:
    """Make idle OpenMP threads sleep at once, not after spinning for milliseconds, unless the user has set otherwise.

    On a machine that is busy with other work, a spinning thread may keep its core from the very thread it waits for.
    Has an effect only before torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def choose_threads(wanted: int | None) -> int | None:
    """Set the number of threads that torch computes with, and return it; None: left as it is.

    Threads synchronise after every operation. One that shares its core with another program holds up all others, so
    more threads than free cores make a run slower, not faster. A number that the user (or torchrun) has set with
    OMP_NUM_THREADS is left alone.

    Args:
        wanted: the number; None: the number of free cores.
    """
    import torch

    if wanted is None:
        if "OMP_NUM_THREADS" in os.environ:
            return None
        most = min(torch.get_num_threads(), cores())
        wanted = max(1, min(most, free_cores()))
        if wanted < most:
            print(f"{most - wanted} of {most} cores are busy: {wanted} thread(s); trainer.threads={most} uses all")
    torch.set_num_threads(wanted)
    return wanted


def cores() -> int:
    """Cores that this process may use: by its affinity, and by the quota of its control group."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # "max 100000": no quota
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, max(1, round(int(quota) / int(period))))
    return count


def free_cores(seconds: float = 0.4) -> int:
    """Number of cores of this machine that are idle, measured over the next `seconds`."""
    import psutil

    return round((os.cpu_count() or 1) * (1 - psutil.cpu_percent(seconds) / 100))


def keep_freed_memory() -> None:
    """Let glibc's malloc keep freed memory instead of returning it to the system; no effect with another malloc.

    Every training step allocates the same large tensors, and the system zeroes memory and hands it out page by page.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def choose_precision(wanted: str) -> str:
    """Set how this process computes on a CPU, and return it: "fp32" or "bf16".

    "auto" is bf16 on a processor with matrix units for it (AMX), unless a measurement of a few milliseconds shows that
    they are not used, as with ONEDNN_MAX_CPU_ISA=AVX2. Without AMX nothing is measured: on a busy machine the outcome
    could differ from process to process. bf16 also affects the operators that work in float32: oneDNN rounds the inputs
    of their products to bfloat16 and accumulates in float32.
    """
    import torch

    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    setting.fp32_precision = "none"
    if wanted == "auto":
        faster = has_amx() and _seconds(torch.float32) > FASTER * _seconds(torch.bfloat16)
        wanted = "bf16" if faster else "fp32"
    if wanted == "bf16":
        setting.fp32_precision = "bf16"
    return wanted


def has_amx() -> bool:
    """Whether the processor has AMX, of which torch has no public test."""
    import torch

    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


def _seconds(dtype: object, size: int = 512) -> float:
    """The shortest time of a few products of square matrices."""
    import torch

    a, b = torch.randn(2, size, size, generator=torch.Generator().manual_seed(0)).to(dtype).unbind()  # type: ignore[call-overload]
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return best
