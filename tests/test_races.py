"""Claims about the kernels under random schedules of their programs: the cases in `races_cases.py`.

They run in separate processes, because Triton's interpreter must be selected before Triton is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

CASES = Path(__file__).with_name("races_cases.py")


def run(names: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", str(CASES), "-k", names]
    done = subprocess.run(command, env=environment, cwd=CASES.parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and " skipped" not in done.stdout


def test_the_detector_finds_races_and_nothing_else() -> None:
    run("detector or schedules")


@pytest.mark.slow
def test_kernels_have_no_race_and_no_schedule_changes_a_bit() -> None:
    run("bit")


@pytest.mark.slow
def test_mutants_of_the_kernels_are_found() -> None:
    run("mutants")
