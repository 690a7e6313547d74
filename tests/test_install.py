"""Claims about the set-up: the locks hold every version, agree with pyproject.toml, and are what is installed."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from launch import install, lock
from launch.install import CPU_LOCK, CUDA_LOCK, ROOT

LOCKS = [CPU_LOCK, CUDA_LOCK]
PROJECT = tomllib.loads(install.PYPROJECT.read_text())["project"]
DIRECT = [*PROJECT["dependencies"], *(item for extra in PROJECT["optional-dependencies"].values() for item in extra)]


def versions(path: Path) -> dict[str, str]:
    return {pin.name: pin.version for pin in install.read_lock(path)}


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_direct_dependencies_are_locked_at_their_pinned_versions(path: Path) -> None:
    locked = versions(path)
    for requirement in DIRECT:
        if not requirement.startswith("torch>"):  # the set-up pins it, see below
            name, equals, version = requirement.partition("==")
            assert equals, f"{requirement} is not pinned"
            assert locked[install.canonical(name)] == version
    assert f"torch=={locked['torch']}" == install.TORCH
    assert install.disagreement(path) is None


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_each_package_is_locked_once(path: Path) -> None:
    names = [pin.name for pin in install.read_lock(path)]
    assert names == sorted(set(names))


def test_locks_differ_only_in_triton_and_cuda_packages() -> None:
    cpu, cuda = versions(CPU_LOCK), versions(CUDA_LOCK)
    assert cpu.keys() <= cuda.keys()
    assert {name for name in cpu if cpu[name] != cuda[name]} == {"triton"}
    assert all(name.startswith(("nvidia-", "cuda-")) for name in cuda.keys() - cpu.keys())
    assert f"triton=={cpu['triton']}" == install.TRITON_FOR_CPU


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_locks_are_as_the_lock_command_writes_them(path: Path) -> None:
    """A manual edit, of a line or of the header, would be lost at the next `make lock`."""
    text = path.read_text()
    body = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#"))
    assert lock.undated(lock.render(path, body, "2000-01-01")) == lock.undated(text)


def test_a_clone_that_was_moved_is_set_up_again(tmp_path: Path) -> None:
    for path in ("Makefile", "pyproject.toml", "launch/install.py", *(f"launch/{path.name}" for path in LOCKS)):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    (tmp_path / ".venv").mkdir()

    def setup_of(folder: Path) -> str:
        (tmp_path / ".venv" / ".installed").write_text(f"launch/constraints-cpu.txt\n{folder}\n")
        return subprocess.run(["make", "-n", "setup"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    assert "launch/install.py" in setup_of(tmp_path.parent)
    assert "launch/install.py" not in setup_of(tmp_path)


def test_installed_distributions_are_those_of_the_lock() -> None:
    marker = Path(sys.prefix) / ".installed"
    named = marker.read_text().partition("\n")[0] if marker.is_file() else ""
    if not named:
        pytest.skip(f"{sys.prefix} was not made by make setup from a lock")
    locked = versions(ROOT / named)
    own = {"pip", PROJECT["name"]}  # pip comes with Python
    installed = {
        install.canonical(found.name): found.version.partition("+")[0] for found in importlib.metadata.distributions()
    }
    other = {name: (version, locked.get(name)) for name, version in installed.items() if locked.get(name) != version}
    wrong = {name: pair for name, pair in other.items() if name not in own}
    assert not wrong, f"(installed, locked in {named}): {wrong}; make clean setup installs what is locked"


RESOLVED = """\
alpha==1.0 ; sys_platform == 'linux'  # via -r /tmp/x/pins.in, --override /tmp/x/overrides, ovq (pyproject.toml)
beta-two==2.0b1 ; python_full_version < '3.12'  # via alpha
beta-two==2.1 ; python_full_version >= '3.12'  # via alpha
"""


def test_lock_keeps_markers_only_where_versions_differ() -> None:
    text = lock.render(CPU_LOCK, RESOLVED, "2026-01-02")
    assert text.splitlines()[-3:] == [
        "alpha==1.0  # via launch/install.py, ovq (pyproject.toml)",
        "beta-two==2.0b1 ; python_full_version < '3.12'  # via alpha",
        "beta-two==2.1 ; python_full_version >= '3.12'  # via alpha",
    ]
    pins = install.read_pins(text, "lock")
    assert [pin[:2] for pin in pins] == [("alpha", "1.0"), ("beta-two", "2.0b1"), ("beta-two", "2.1")]


def test_lock_is_rewritten_only_when_a_version_changes(tmp_path, monkeypatch, capsys) -> None:
    path = tmp_path / "constraints.txt"
    monkeypatch.setitem(lock.WHAT, path, "a test")
    monkeypatch.setitem(lock.COVERAGE, path, "Nothing.")
    path.write_text(lock.render(path, "alpha==1.0  # via x\n", "2000-01-01"))
    lock.write(path, "alpha==1.0  # via x\n")
    assert "2000-01-01" in path.read_text()
    lock.write(path, "alpha==1.1  # via x\n")
    assert "2000-01-01" not in path.read_text()
    assert "alpha 1.0 -> 1.1" in capsys.readouterr().out


def test_lock_command_resolves_both_locks_or_writes_neither(tmp_path, monkeypatch, capfd) -> None:
    """With a resolver that fails on the second lock."""
    uv = tmp_path / "uv"
    uv.write_text('#!/bin/sh\necho "$@" | grep -q -- --excludes && exit 1\nexit 0\n')
    uv.chmod(0o755)
    monkeypatch.setattr(lock, "install_uv", lambda folder: uv)
    before = [path.read_bytes() for path in LOCKS]
    assert lock.main([]) == 1
    assert "error: uv found no versions that fit together" in capfd.readouterr().err
    assert [path.read_bytes() for path in LOCKS] == before


def test_lock_command_reads_a_lock_with_the_marks_of_a_merge(tmp_path) -> None:
    path = tmp_path / "constraints.txt"
    path.write_text("# header\n<<<<<<< ours\nalpha==1.0  # via x\n=======\nalpha==1.1\n>>>>>>> theirs\n")
    with pytest.raises(install.SetupError, match=r"constraints.txt:2: '<<<<<<< ours' is not name==version"):
        install.read_lock(path)
    assert lock.pins_of(path) == "alpha==1.0\nalpha==1.1"


@pytest.mark.parametrize(
    ("requirements", "platform", "expected"),
    [
        (["filelock", "sympy>=1.13.3"], "linux", CPU_LOCK),
        (["filelock", 'nvidia-nccl-cu13==2.29.7; platform_system == "Linux"'], "linux", CUDA_LOCK),
        (["filelock", 'nvidia-nccl-cu13==2.29.7; platform_system == "Linux"'], "darwin", CPU_LOCK),
    ],
)
def test_build_of_torch_chooses_the_lock(requirements: list[str], platform: str, expected: Path) -> None:
    assert install.lock_for(requirements, platform) == expected


def test_setup_refuses_a_lock_that_contradicts_pyproject(tmp_path, monkeypatch) -> None:
    path = tmp_path / "constraints.txt"
    text = CUDA_LOCK.read_text()
    number = next(pin.line for pin in install.read_lock(CUDA_LOCK) if pin.name == "numpy")
    path.write_text(re.sub(r"(?m)^numpy==\S+", "numpy==1.0", text))
    monkeypatch.setattr(install, "CPU_LOCK", path)
    with pytest.raises(install.SetupError, match=rf"txt:{number} has 1.0 of numpy, \S+ is wanted; run: make lock"):
        install.install()
    path.write_text(re.sub(r"(?m)^numpy==.*\n", "", text))
    with pytest.raises(install.SetupError, match=r"constraints.txt has no line for numpy==\S+; run: make lock"):
        install.install()


def test_failed_installation_names_the_line_of_the_lock(tmp_path, monkeypatch) -> None:
    """Runs pip itself without a package index: one package is locked, the other is not."""
    path = tmp_path / "constraints.txt"
    path.write_text("# header\nabsent-one==1.0\nAbsent_Two==2.0\n")
    monkeypatch.setattr(install, "python", lambda: sys.executable)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(install.SetupError, match=r"could not install absent-two==2.0 \(.*constraints.txt:3\)"):
        install.pip(["--no-index", "--dry-run", "absent-two"], path)
    with pytest.raises(install.SetupError, match=r"pip install --no-index --dry-run absent-three -c \S+ failed"):
        install.pip(["--no-index", "--dry-run", "absent-three"], path)


@pytest.mark.parametrize("module", ["launch.install", "launch.lock"])
def test_setup_needs_only_the_standard_library(module: str) -> None:
    """-S leaves out site-packages, so every import is the standard library's or this project's."""
    done = subprocess.run([sys.executable, "-S", "-c", f"import {module}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
