"""How a process uses a CPU: threads that wait without spinning, memory that is kept, and products in bfloat16.

`quiet_threads` must run before torch is imported, so this module imports torch within its functions only.
"""

from __future__ import annotations

import ctypes
import os
import time

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from glibc's malloc.h
FASTER = 3.0  # how many times faster bfloat16 products must be for a whole step to gain clearly


def quiet_threads() -> None:
    """Let idle OpenMP threads sleep at once, unless the user has set otherwise, where they would spin for milliseconds.

    A thread that spins on a core takes it from the very thread it waits for if the machine is busy with other work.
    Has an effect only before torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def keep_freed_memory() -> None:
    """Let glibc's malloc keep freed memory instead of returning it to the system; no effect with another malloc.

    Every training step allocates the same large tensors, and the system hands memory out page by page, zeroed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def choose_precision(wanted: str) -> str:
    """Set how this process computes on a CPU, and return it: "fp32" or "bf16".

    "auto" is bf16 where a measurement of milliseconds shows its products to be several times faster than float32's, as
    on processors with matrix units for it (AMX). There bf16 also applies to the operators that work in float32: oneDNN
    rounds the factors of their products to bfloat16 and adds up in float32.
    """
    import torch

    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    setting.fp32_precision = "none"
    if wanted == "auto":
        wanted = "bf16" if _seconds(torch.float32) > FASTER * _seconds(torch.bfloat16) else "fp32"
    if wanted == "bf16":
        setting.fp32_precision = "bf16"
    return wanted


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
