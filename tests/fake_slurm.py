"""A fake SLURM on one machine, for tests: sbatch, srun, scontrol and squeue on PATH, which really run a job's ranks.

`Cluster.run` plays the controller: it runs the batch script of a submitted job, and again after each requeue. Of the
resources that a job requests, only the number of nodes matters: srun starts its command once per node. As with SLURM's
--signal without B:, signals go to everything below srun and not to the batch script.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

COMMANDS = ("sbatch", "srun", "scontrol", "squeue")


class Cluster:
    """Puts the commands on PATH; their state is in `folder`."""

    def __init__(self, folder: Path, monkeypatch: Any) -> None:
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        for name in COMMANDS:
            path = folder / "bin" / name
            path.write_text(f'#!/bin/sh\nexec {sys.executable} -S {Path(__file__)} {name} "$@"\n')
            path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
        monkeypatch.setenv("FAKE_SLURM", str(folder))

    def submit(self, text: str) -> None:
        """Submit a batch script."""
        (self.folder / "job1.sh").write_text(text)

    def run(self, job: int = 1, meanwhile: Callable[[subprocess.Popen[bytes]], None] | None = None) -> list[int]:
        """Run a job, the tasks of an array one after another; returns the batch script's exit status at each start.

        Args:
            meanwhile: called with the running batch script of the first start.
        """
        script = self.folder / f"job{job}.sh"
        directives = dict(re.findall(r"^#SBATCH --([\w-]+)(?:[= ](\S+))?$", script.read_text(), re.M))
        first, _, last = directives.get("array", "0-0").partition("-")
        statuses = [
            status
            for task in range(int(first), int(last) + 1)
            for status in self._starts(script, directives, job, task, meanwhile)
        ]
        assert not list(self.folder.glob("requeued*")), "a task was queued again by another"
        return statuses

    def _starts(
        self,
        script: Path,
        directives: dict[str, str],
        job: int,
        task: int,
        meanwhile: Callable[[subprocess.Popen[bytes]], None] | None,
    ) -> list[int]:
        number, statuses = str(100 * job + task), list[int]()
        environment = os.environ | {"SLURM_JOB_ID": number, "SLURM_JOB_NUM_NODES": directives["nodes"]}
        environment |= {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_JOB_NODELIST": f"localhost:{directives['nodes']}"}
        if array := directives.get("array"):  # its own number is that of its last task
            last = array.partition("-")[2]
            environment |= {"SLURM_ARRAY_JOB_ID": str(100 * job + int(last)), "SLURM_ARRAY_TASK_MAX": last}
        output = directives["output"].replace("%A_%a", f"{job}_{task}")
        requeued = self.folder / f"requeued{number}"
        while not statuses or requeued.exists():
            requeued.unlink(missing_ok=True)
            environment["SLURM_RESTART_COUNT"] = str(len(statuses))
            with open(output, "ab" if directives["open-mode"] == "append" else "wb") as out:
                batch = subprocess.Popen(["bash", str(script)], stdout=out, stderr=out, env=environment)
            if meanwhile and not statuses:
                meanwhile(batch)
            statuses.append(batch.wait(timeout=240))
            assert len(statuses) < 7, "queued again and again"
        return statuses


def warn(batch: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Send a signal to the job's steps, as SLURM does before the time limit or on preemption."""
    import psutil  # here, since the commands start often and do not need it

    for step in psutil.Process(batch.pid).children():
        for process in step.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)


def sbatch(folder: Path, words: list[str]) -> int:
    job = len(list(folder.glob("job*.sh"))) + 1
    (folder / f"job{job}.sh").write_text(Path(words[0]).read_text())
    print(f"Submitted batch job {job}")
    return 0


def srun(folder: Path, words: list[str]) -> int:
    command = words[next(at for at, word in enumerate(words) if not word.startswith("--")) :]
    nodes = int(os.environ["SLURM_JOB_NUM_NODES"])
    tasks = [
        subprocess.Popen(command, env=os.environ | {"SLURM_PROCID": str(node)}, stdin=subprocess.DEVNULL)
        for node in range(nodes)
    ]
    while any(task.poll() is None for task in tasks):
        if any(task.poll() for task in tasks) and "--kill-on-bad-exit=1" in words:
            for task in tasks:
                task.kill()
        time.sleep(0.05)
    return max(128 - task.returncode if task.returncode < 0 else task.returncode for task in tasks)


def scontrol(folder: Path, words: list[str]) -> int:
    if words[:2] == ["show", "hostnames"]:
        name, _, count = words[2].partition(":")
        with contextlib.suppress(BrokenPipeError):  # from `| head`
            print("\n".join([name] * int(count)), flush=True)
    elif words[:2] == ["show", "job"]:
        print(f"JobId={words[2]} JobName=x\n   JobState={os.environ.get('FAKE_STATE', 'RUNNING')} Reason=None")
    elif words[0] == "requeue":
        for number in numbers_of(words[1]):
            (folder / f"requeued{number}").touch()
    return 0


def numbers_of(job: str) -> list[int]:
    """The numbers of what a job's name refers to: ARRAY_TASK is one task, the number of an array all its tasks."""
    number, _, task = job.partition("_")
    if number != os.environ.get("SLURM_ARRAY_JOB_ID"):
        return [int(number)]
    last = int(os.environ["SLURM_ARRAY_TASK_MAX"])
    return [int(number) - last + each for each in ([int(task)] if task else range(last + 1))]


def squeue(folder: Path, words: list[str]) -> int:
    name = next(word for word in words if word.startswith("--name=")).removeprefix("--name=")
    print("\n".join(path.stem[3:] for path in folder.glob("job*.sh") if f"--job-name={name}\n" in path.read_text()))
    return 0


if __name__ == "__main__":
    run = {"sbatch": sbatch, "srun": srun, "scontrol": scontrol, "squeue": squeue}[sys.argv[1]]
    sys.exit(run(Path(os.environ["FAKE_SLURM"]), sys.argv[2:]))
