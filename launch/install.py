"""Make .venv and install the pinned dependencies; run by `make setup` with nothing but the standard library.

Which torch: with an NVIDIA GPU the CUDA build, which brings its own triton; without one the CPU build, from PyTorch's
CPU index if that answers within seconds, else from the default index (where it may be the CUDA build), and triton for
the interpreter tests if torch has not brought it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
TORCH = "torch==2.13.0"
TRITON_FOR_CPU = "triton==3.6.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def main() -> int:
    """Install everything; returns an exit status."""
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        print(f"error: Python 3.11 to 3.13 is needed, this is {sys.version.split()[0]}; use make PYTHON=python3.12")
        return 2
    marker = VENV / ".installed"
    marker.unlink(missing_ok=True)
    say(f"making {VENV}")
    if subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=False).returncode:
        print("error: python -m venv failed; on Debian and Ubuntu install python3-venv")
        return 2
    for step in (torch_arguments, triton_arguments, lambda: ["-e", f"{ROOT}[dev]"]):
        if not (arguments := step()):
            continue
        say("pip install " + " ".join(arguments))
        if pip(arguments):
            print(f"error: pip install {' '.join(arguments)} failed; the lines above say why")
            return 2
    marker.touch()
    say("installed")
    return 0


def torch_arguments() -> list[str]:
    """What to pass to `pip install` for the torch that fits this machine."""
    return [TORCH, "--index-url", CPU_INDEX] if not has_gpu() and cpu_index_answers() else [TORCH]


def triton_arguments() -> list[str]:
    """What to pass to `pip install` for triton; nothing where torch has brought it, or where there is none."""
    there = "import importlib.util as i, sys; sys.exit(i.find_spec('triton') is None)"
    missing = subprocess.run([str(VENV / "bin" / "python"), "-c", there], check=False).returncode
    return [TRITON_FOR_CPU] if sys.platform == "linux" and missing else []


def has_gpu() -> bool:
    """Whether an NVIDIA driver is at work here."""
    return bool(shutil.which("nvidia-smi")) and not subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode


def cpu_index_answers(seconds: float = 4.0) -> bool:
    """Whether PyTorch's CPU index can be reached."""
    try:
        with urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=seconds) as answer:
            return answer.status == 200
    except (OSError, ValueError):
        return False


def pip(arguments: list[str]) -> int:
    command = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    return subprocess.run(command + arguments, env=os.environ | {"PIP_NO_INPUT": "1"}, check=False).returncode


def say(line: str) -> None:
    print(f"[setup] {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
