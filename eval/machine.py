"""What a measurement was made on, for the JSON beside it."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import Any


def describe() -> dict[str, Any]:
    """Processor, cores this process may use, threads, memory, GPU and versions; and the time, in UTC."""
    import psutil
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": gpu,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }


def _processor() -> str:
    """The processor's name as Linux tells it, else what Python knows."""
    facts = Path("/proc/cpuinfo")
    if facts.exists():
        for row in facts.read_text().splitlines():
            if row.startswith("model name"):
                return " ".join(row.partition(":")[2].split())
    return platform.processor() or "unknown"
