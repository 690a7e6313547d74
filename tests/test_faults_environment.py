"""Claims about a run's environment: a busy machine, folders with our packages' names, no launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

import train
from ovq import config, cpu, identity
from ovq.compose import compose

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    yield
    torch.set_num_threads(before)


def machine(monkeypatch: pytest.MonkeyPatch, most: int, busy: float) -> None:
    """Simulate a machine with `most` cores, of which a fraction `busy` is in use."""
    torch.set_num_threads(most)
    monkeypatch.setattr(cpu, "cores", lambda: most)
    monkeypatch.setattr(os, "cpu_count", lambda: most)
    monkeypatch.setattr(psutil, "cpu_percent", lambda seconds: 100 * busy)


@pytest.mark.parametrize(
    ("busy", "expected", "said"),
    [
        (0.0, 4, ""),
        (0.05, 4, ""),
        (0.25, 3, "1 of 4 cores are busy: 3 thread(s); trainer.threads=4 uses all\n"),
        (1.0, 1, "3 of 4 cores are busy: 1 thread(s); trainer.threads=4 uses all\n"),
    ],
)
def test_a_busy_machine_gets_as_many_threads_as_it_has_free_cores(
    busy: float, expected: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine(monkeypatch, 4, busy)
    assert cpu.choose_threads(None) == expected == torch.get_num_threads()
    assert capsys.readouterr().out == said


def test_what_the_user_chooses_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 4, 1.0)
    assert cpu.choose_threads(3) == 3 == torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert cpu.choose_threads(None) is None and torch.get_num_threads() == 3


def test_a_run_keeps_its_number_of_threads_when_it_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another number would round sums differently, so the losses would not be bit-identical."""
    first, second = compose(["seed=1"]), compose(["seed=1"])
    machine(monkeypatch, 4, 0.5)
    train.choose_threads(first, tmp_path)
    config.save(first, tmp_path)
    machine(monkeypatch, 4, 0.0)
    train.choose_threads(second, tmp_path)
    assert first.trainer.threads == second.trainer.threads == 2
    assert identity.changed(first, compose(["seed=1", "trainer.threads=4"])) == []


def test_a_quota_counts_as_cores() -> None:
    assert 1 <= cpu.cores() <= (os.cpu_count() or 1)
    assert 0 <= cpu.free_cores(0.01) <= (os.cpu_count() or 1)


def test_the_module_ovq_runs_every_tool_beside_folders_of_the_same_names(tmp_path: Path) -> None:
    for name in ("data", "eval", "launch"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('a stranger')")
    done = subprocess.run(
        [sys.executable, "-m", "ovq", "data", "prepare", "--help"],
        cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0 and "part_mb=" in done.stdout, done.stderr
