"""Write the locks: the version of every package that a set-up installs, direct or not, as pip constraints.

    make lock                    after a change in pyproject.toml: keeps other versions where possible
    make lock ARGS=--upgrade     takes the newest version of everything that pyproject.toml does not pin

The two locks, launch/constraints-cpu.txt and launch/constraints-cuda.txt, differ in triton and NVIDIA's packages. Each
is valid for every Python and system in pyproject.toml's [tool.uv] environments: uv, installed in a throw-away
environment, resolves them all at once, which pip cannot. This command needs only the standard library, because with a
lock that does not fit, .venv cannot be made.

uv reads its own settings, not pip's: UV_DEFAULT_INDEX names another package index, SSL_CERT_FILE other certificates.
"""

from __future__ import annotations

import argparse
import datetime
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from launch import install
from launch.install import CPU_LOCK, CUDA_LOCK, PIN, PYPROJECT, ROOT, TORCH, TRITON_FOR_CPU, read_pins, shown
from ovq.cli import guarded
from ovq.errors import Failure

UV = "uv==0.13.9"
LINUX = "sys_platform == 'linux'"

HEADER = """\
# Made by `make lock` (launch/lock.py, {uv}) on {date}; change pyproject.toml and run it again, edit nothing here.
# For: {what}; Python {python}; extras {extras}.
# These are pip constraints: a line installs nothing unless something requires the package.
# {coverage}
# Not covered: pip, which is the one that Python brings, and checksums.
"""
WHAT = {
    CUDA_LOCK: f"the CUDA build of {TORCH} on Linux",
    CPU_LOCK: f"the CPU build of {TORCH} on Linux, there with {TRITON_FOR_CPU}, and on macOS",
}
COVERAGE = {
    CUDA_LOCK: "Resolved from the metadata of the default index's torch, whose Linux wheels are CUDA builds.",
    CPU_LOCK: (
        "Resolved from the metadata of the default index's torch less NVIDIA's packages; torch==X also admits X+cpu."
    ),
}


class LockError(Failure):
    """The locks could not be made; the existing ones are left unchanged."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.lock", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions, not the locked ones")
    return guarded(lambda: lock(parser.parse_args(argv).upgrade))


def lock(upgrade: bool) -> None:
    """Resolve and write both locks, or neither.

    Raises:
        LockError: Python is too old or too new, uv could not be installed, or it found no set of versions.
    """
    try:
        install.check_python()
    except install.SetupError as error:
        raise LockError(str(error)) from None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        uv = install_uv(folder / "venv")
        cuda = resolve(uv, folder, keep="" if upgrade else pins_of(CUDA_LOCK), pins=[TORCH])
        triton = f"{TRITON_FOR_CPU} ; {LINUX}"
        excluded = [pin.name for pin in read_pins(cuda, "uv") if pin.name.startswith(("nvidia-", "cuda-"))]
        # The second lock starts from the versions of the first, so that they agree wherever possible.
        cpu = resolve(uv, folder, keep=cuda, pins=[TORCH, triton], overrides=[triton], excludes=excluded)
    write(CUDA_LOCK, cuda)
    write(CPU_LOCK, cpu)


def install_uv(folder: Path) -> Path:
    """Install uv in a new environment; returns the path of its program."""
    venv.create(folder, with_pip=True)
    command = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", UV]
    if subprocess.run(command, check=False).returncode:
        raise LockError(f"pip install {UV} failed; its lines above say why")
    return folder / "bin" / "uv"


def resolve(uv: Path, folder: Path, *, keep: str, pins: list[str], **rules: list[str]) -> str:
    """One resolution of pyproject.toml with all extras and `pins`.

    Args:
        keep: a lock whose versions are preferred; empty for the newest.
        rules: lines of the files given to uv's options `overrides` and `excludes`.

    Returns:
        uv's output: `name==version ; marker  # via ...` lines.
    """
    (folder / "pins.in").write_text("\n".join(pins))
    out = folder / "lock.txt"
    out.write_text(keep)
    command = [str(uv), "pip", "compile", str(PYPROJECT), str(folder / "pins.in"), "--all-extras"]
    command += ["--universal", "--fork-strategy", "fewest", "--annotation-style", "line", "--no-header"]
    command += ["--system-certs", "--no-cache", "--quiet", "--output-file", str(out)]
    for option, lines in rules.items():
        (folder / option).write_text("\n".join(lines))
        command += [f"--{option}", str(folder / option)]
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        raise LockError("uv found no versions that fit together; its lines above say why; change pyproject.toml")
    return out.read_text()


def write(path: Path, resolved: str) -> None:
    """Write a lock, unless nothing but its date would change, and print what changed."""
    text = render(path, resolved, datetime.date.today().isoformat())
    before, after = ({pin.name: pin.version for pin in read_pins(pins, "uv")} for pins in (pins_of(path), text))
    if not path.is_file() or undated(path.read_text()) != undated(text):
        path.write_text(text)
    print(f"{shown(path)}: {len(after)} packages")
    for name in sorted(before.keys() | after.keys() if before else ()):
        if before.get(name) != after.get(name):
            print(f"  {name} {before.get(name, '(new)')} -> {after.get(name, '(gone)')}")


def pins_of(path: Path) -> str:
    """The pins of an existing lock, one per line, and nothing else in it, such as the markers of a merge conflict."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return "\n".join(pin for line in lines if PIN.fullmatch(pin := line.partition("#")[0].strip()))


def render(path: Path, resolved: str, date: str) -> str:
    """The text of a lock, from uv's output."""
    import tomllib

    project = tomllib.loads(PYPROJECT.read_text())["project"]
    header = HEADER.format(
        uv=UV.replace("==", " "),
        date=date,
        what=WHAT[path],
        python=project["requires-python"],
        extras=" and ".join(sorted(project["optional-dependencies"])),
        coverage=COVERAGE[path],
    )
    names = [pin.name for pin in read_pins(resolved, "uv")]
    lines = []
    for line in resolved.splitlines():
        requirement, _, why = line.partition("#")
        pin, _, marker = (part.strip() for part in requirement.partition(";"))
        # A constraint has no effect unless its package is required, so a marker matters only between two versions.
        if marker and names.count(pin.partition("==")[0]) > 1:
            pin += f" ; {marker}"
        # The temporary files that `resolve` passes hold what launch/install.py pins.
        sources = why.strip().removeprefix("via ").split(", ")
        sources = [re.sub(r"(-r|--override) \S*/(pins\.in|overrides)", "launch/install.py", name) for name in sources]
        lines.append(f"{pin}  # via {', '.join(dict.fromkeys(sources))}")
    return header + "\n".join(lines) + "\n"


def undated(text: str) -> str:
    return re.sub(r"\) on \d{4}-\d\d-\d\d;", ");", text)


if __name__ == "__main__":
    sys.exit(main())
