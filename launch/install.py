"""Make .venv and install the locked dependencies; run by `make setup` with nothing but the standard library.

Which torch: with an NVIDIA GPU the CUDA build, which brings its own triton; without one the CPU build, from PyTorch's
CPU index if that answers within seconds, else from the default index (where it may be the CUDA build), plus triton for
the interpreter tests if torch does not bring it.

Which versions: torch is installed first, without its dependencies, because PyTorch's index does not carry every version
of them. Its metadata then says which build it is, and so which lock constrains everything else.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
MARKER = VENV / ".installed"  # names the lock that the environment was made with, and this folder
PYPROJECT = ROOT / "pyproject.toml"
CPU_LOCK = ROOT / "launch" / "constraints-cpu.txt"
CUDA_LOCK = ROOT / "launch" / "constraints-cuda.txt"
TORCH = "torch==2.13.0"
TRITON_FOR_CPU = "triton==3.6.0"
LAST_LINES = 40  # of pip's output, shown when it fails
PIN = re.compile(r"([A-Za-z0-9._-]+)(?:\[.*\])?==([^\s;]+)(?:\s*;.*)?")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


class SetupError(Exception):
    """Setup cannot continue. The message is one line: what failed, and what to do."""


class Pin(NamedTuple):
    """One line of a lock; the name is in canonical form (lower case, single hyphens)."""

    name: str
    version: str
    line: int


def main() -> int:
    """Install everything; returns an exit status."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print((__doc__ or "").strip())
        return 0
    try:
        install()
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def install() -> None:
    """Make or update .venv.

    Raises:
        SetupError: wrong Python, no venv module, a lock that disagrees with pyproject.toml, or pip failed.
    """
    check_python()
    for lock in (CPU_LOCK, CUDA_LOCK):
        if problem := disagreement(lock):
            raise SetupError(problem)
    MARKER.unlink(missing_ok=True)
    say(f"making {VENV}")
    if subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=False).returncode:
        raise SetupError("python -m venv failed; on Debian and Ubuntu install python3-venv")
    pip(["--no-deps", *torch_arguments()])
    lock = lock_for(torch_requirements(), sys.platform)
    pip([TORCH, "setuptools", *triton_arguments(lock)], lock)
    # Source distributions are built with the setuptools just installed: an isolated build ignores `-c`.
    pip(["--no-build-isolation", "-e", ".[dev]"], lock)
    MARKER.write_text(f"{shown(lock)}\n{ROOT}\n")
    say(f"installed as {shown(lock)} has it")


def check_python() -> None:
    """Raise SetupError for a Python that the locks are not made for."""
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        found = sys.version.split()[0]
        raise SetupError(f"Python 3.11 to 3.13 is needed, this is {found}; use make PYTHON=python3.12")


# --- which build of torch --------------------------------------------------------------------------------------------


def torch_arguments() -> list[str]:
    """What to pass to `pip install` for the torch that fits this machine."""
    return [TORCH, "--index-url", CPU_INDEX] if not has_gpu() and cpu_index_answers() else [TORCH]


def triton_arguments(lock: Path) -> list[str]:
    """What to pass to `pip install` for triton; nothing where torch brings it, or where there is none."""
    return [TRITON_FOR_CPU] if sys.platform == "linux" and lock == CPU_LOCK else []


def torch_requirements() -> list[str]:
    """The `Requires-Dist` lines of the torch in .venv."""
    code = "import importlib.metadata as m; print(*m.requires('torch') or [], sep='\\n')"
    return subprocess.run([python(), "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()


def lock_for(requirements: list[str], platform: str) -> Path:
    """The lock of a build of torch, by its requirements: the CUDA build for Linux requires NVIDIA's packages."""
    cuda = any(canonical(requirement).startswith(("nvidia-", "cuda-")) for requirement in requirements)
    return CUDA_LOCK if platform == "linux" and cuda else CPU_LOCK


def has_gpu() -> bool:
    """Whether this machine has a working NVIDIA driver."""
    return bool(shutil.which("nvidia-smi")) and not subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode


def cpu_index_answers(seconds: float = 4.0) -> bool:
    """Whether PyTorch's CPU index can be reached."""
    try:
        with urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=seconds) as answer:
            return answer.status == 200
    except (OSError, ValueError):
        return False


# --- locks -----------------------------------------------------------------------------------------------------------


def read_pins(text: str, source: str) -> list[Pin]:
    """The pins of a constraints file's text, or of a list of requirements.

    Raises:
        SetupError: a line that is neither empty, a comment nor `name==version`; named by `source`.
    """
    pins = []
    for number, line in enumerate(text.splitlines(), 1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        found = PIN.fullmatch(content)
        if not found:
            raise SetupError(f"{source}:{number}: '{content}' is not name==version; run: make lock")
        pins.append(Pin(canonical(found[1]), found[2], number))
    return pins


def read_lock(lock: Path) -> list[Pin]:
    """The pins of a constraints file; raises as `read_pins` does."""
    return read_pins(lock.read_text(), shown(lock))


def direct_pins(*more: str) -> dict[str, str]:
    """Canonical name -> version of what pyproject.toml pins, extras included, of torch, and of `more` requirements."""
    import tomllib

    project = tomllib.loads(PYPROJECT.read_text())["project"]
    extras = project["optional-dependencies"].values()
    pinned = [item for items in (project["dependencies"], *extras) for item in items if "==" in item]
    return {pin.name: pin.version for pin in read_pins("\n".join([*pinned, TORCH, *more]), shown(PYPROJECT))}


def disagreement(lock: Path) -> str | None:
    """How a lock contradicts the direct dependencies, in one line; None if it does not."""
    if not lock.is_file():
        return f"{shown(lock)} is missing; run: make lock"
    pins = read_lock(lock)
    triton = [TRITON_FOR_CPU] if lock == CPU_LOCK else []
    for name, version in direct_pins(*triton).items():
        found = [pin for pin in pins if pin.name == name]
        for pin in found:
            if pin.version != version:
                return f"{shown(lock)}:{pin.line} has {pin.version} of {name}, {version} is wanted; run: make lock"
        if not found:
            return f"{shown(lock)} has no line for {name}=={version}; run: make lock"
    return None


def culprit(output: str, lock: Path) -> Pin | None:
    """The pin of the lock that pip's output blames: a constraint in a conflict, else a package that an error names."""
    pins = {(pin.name, pin.version): pin for pin in read_lock(lock)}
    for blame in (r"\(constraint\) (\S+)==(\S+)", r"^ERROR: .*?(\S+)==(\S+)"):
        for name, version in re.findall(blame, output, re.MULTILINE):
            if pin := pins.get((canonical(name), version)):
                return pin
    return None


def canonical(name: str) -> str:
    """A distribution's name (or a text that begins with one) as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


# --- pip -------------------------------------------------------------------------------------------------------------


def pip(arguments: list[str], lock: Path | None = None) -> None:
    """Run `pip install` in .venv, under the constraints of a lock.

    Raises:
        SetupError: pip failed.
    """
    arguments = [*arguments, *(["-c", shown(lock)] if lock else [])]
    say("pip install " + " ".join(arguments))
    command = [python(), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar=off", *arguments]
    environment = os.environ | {"PIP_NO_INPUT": "1", "PYTHONUNBUFFERED": "1"}
    # Not --quiet, which hides the details of a conflict.
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            if not line.startswith("Requirement already satisfied"):
                lines.append(line)
            if line.startswith("WARNING"):
                print(line, end="", file=sys.stderr)
    if process.returncode:
        print("".join(lines[-LAST_LINES:]), file=sys.stderr)
        raise SetupError(explain("".join(lines), arguments, lock))


def explain(output: str, arguments: list[str], lock: Path | None) -> str:
    """One line for a failed `pip install`: what it could not install, where that is pinned, what to do."""
    if lock and (pin := culprit(output, lock)):
        return (
            f"pip could not install {pin.name}=={pin.version} ({shown(lock)}:{pin.line}); its lines above say why. "
            "If the package index did not answer, run make setup again; if no such release fits, run make lock"
        )
    return (
        f"pip install {' '.join(arguments)} failed; its lines above say why. "
        "If the package index did not answer, run make setup again"
    )


def python() -> str:
    return str(VENV / "bin" / "python")


def shown(path: Path) -> str:
    """A path as the user can type it from the project's folder."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def say(line: str) -> None:
    print(f"[setup] {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
