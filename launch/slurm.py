"""Train under SLURM: write a plain sbatch file into the run folder and submit it; key=a,b makes an array of jobs.

    python -m launch slurm --nodes 4 --gpus-per-node 8 --time 12:00:00 -- experiment=pg19_480m
    python -m launch slurm --print --gpus-per-node 8 --sbatch "--partition=long" -- experiment=pg19_150m
    python -m launch slurm --gpus-per-node 1 -- experiment=pg19_70m model=sw,sw_ovq seed=0,1      # an array of four

Settings, data, tokenizer and run folder are checked first. On each node srun starts `python -m launch run`, which is
torchrun. --grace seconds before the time limit, and when the job is preempted, SLURM signals the ranks: they save and
end, and the batch script requeues the job until summary.json says that the run is finished. A run that fails is not
requeued, nor is one that saved nothing in three starts, nor a job that was cancelled. SLURM itself requeues a job that
loses a node.

The same command continues a run that was cancelled or has failed, with any --nodes whose ranks divide the batch. A run
has one job at a time: another waits for it (--dependency=singleton). Of a sweep, only unfinished runs are queued, and
none as long as the sweep still has jobs in the queue.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from launch import options as arguments
from launch import sweep
from launch.options import positive
from ovq.cli import guarded
from ovq.errors import ConfigError, Failure
from ovq.files import write_whole
from ovq.train.summary import read_finished

ROOT = Path(__file__).resolve().parent.parent
LOG = "slurm.log"
IDLE = 3  # starts in a row that save nothing, after which a job is not queued again

SCRIPT = """\
#!/bin/bash
# Written by: {command}
# To continue after a failure: the same command, or sbatch with this file.
{directives}

cd {folder} || exit
export PYTHONPATH={root}${{PYTHONPATH:+:$PYTHONPATH}}
{setup}
{which}

# The first node, and a port from the job's number, below those that the system gives away.
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((15000 + SLURM_JOB_ID % 15000))

saved() {{ ls -d "$run"/checkpoints/step_*/manifest.json 2>/dev/null; }}
before=$(saved)

# One launcher a node, which starts the ranks. SLURM's signals go to all of them, not to this script: the ranks save and
# end with status 0, or 128 + the signal's number if they had not begun to train.
srun --kill-on-bad-exit=1 {cpus}{python} -m launch run --no-check {ranks} --nodes "$SLURM_JOB_NUM_NODES" \\
  --rendezvous "$host:$port" --id "$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}}" -- "${{settings[@]}}"
status=$?

if [ "$run/summary.json" -nt {file} ]; then  # the run's last file, and not that of a shorter run
  echo "job $SLURM_JOB_ID: finished"
  rm -f "$run/slurm.idle"
  exit 0
fi
case $status in
  0 | 129 | 130 | 138 | 140 | 143) ;;  # saved, or HUP, INT, USR1, USR2, TERM before that
  *)
    echo "job $SLURM_JOB_ID: failed with status $status; the lines above say why. It is not queued again"
    exit "$status"
    ;;
esac
# An array's own number is also that of one of its tasks, and would mean all of them.
job=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID}}
job=${{job:-$SLURM_JOB_ID}}
if ! scontrol show job "$job" | grep -q "JobState=RUNNING"; then  # but, for instance, CANCELLED
  exit 0
fi
# Without this, a job whose time is over before its first step would be queued for ever.
if [ "$(saved)" != "$before" ]; then
  rm -f "$run/slurm.idle"
else
  mkdir -p "$run"
  echo "$SLURM_JOB_ID" >>"$run/slurm.idle"
  if [ "$(wc -l <"$run/slurm.idle")" -ge {idle} ]; then
    rm "$run/slurm.idle"
    echo "job $SLURM_JOB_ID: {idle} starts in a row saved nothing (status $status). It is not queued again;" \\
      "it may need more --time, or less --grace"
    exit 1
  fi
fi
echo "job $SLURM_JOB_ID: stopped before the end (status $status); queued again"
scontrol requeue "$job"
"""


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv

    def run() -> int:
        options = arguments.read(parser(), words, literal=("--sbatch", "--setup"))
        options.command = shlex.join(["python", "-m", "launch", "slurm", *words]).replace("\n", " ")
        return submit(options)

    return guarded(run)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m launch slurm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [options] -- key=value ...",
    )
    made.add_argument("--nodes", type=positive, default=1, help="nodes of each job (default: 1)")
    made.add_argument("--gpus-per-node", type=positive, help="GPUs on each node, one rank each")
    made.add_argument("--cpu-ranks", type=positive, help="use no GPU; run this many ranks on each node")
    made.add_argument("--cpus-per-node", type=positive, help="cores of each node (default: what the cluster gives)")
    made.add_argument("--time", default="24:00:00", help="time limit of a job, as sbatch has it (default: 24:00:00)")
    made.add_argument("--grace", type=positive, default=300, metavar="S", help="seconds to save in (default: 300)")
    made.add_argument("--sbatch", action="append", default=[], metavar="LINE", help="one more #SBATCH line; repeatable")
    made.add_argument("--setup", action="append", default=[], metavar="LINE", help="one more shell line before the run")
    made.add_argument(
        "--python", default=shlex.quote(sys.executable), metavar="WORDS", help="Python, or container ... python"
    )
    made.add_argument("--print", action="store_true", dest="only_print", help="print the file; submit nothing")
    made.set_defaults(command="python -m launch slurm")  # `main` adds the words
    return made


def submit(options: argparse.Namespace) -> int:
    """Check the runs, write the sbatch file, and pass it to sbatch; returns the exit status.

    Raises:
        ConfigError, DataError, CheckpointError: a run that cannot start, or a sweep that is queued already.
        Failure: there is no sbatch here, or it refused the file.
    """
    if bool(options.gpus_per_node) == bool(options.cpu_ranks):
        raise ConfigError("give one of --gpus-per-node N and --cpu-ranks N")
    jobs = sweep.expand(options.overrides)
    swept = len(jobs) > 1
    if swept or not got_longer(jobs[0]):
        sweep.mark_finished(jobs)
    waiting = [job for job in jobs if job.status == "waiting"]
    if not waiting:
        print("finished already:\n" + sweep.table(jobs))
        return 0
    check(waiting, options)
    path = (jobs[0].run_dir.parent / f"{name_of(jobs)}.sbatch" if swept else jobs[0].run_dir / "job.sbatch").absolute()
    text = script(waiting, options, name_of(jobs), path, swept)
    if options.only_print:
        print(text, end="")
        return 0
    if not shutil.which("sbatch"):
        raise Failure("there is no sbatch on this machine; --print shows the file that it would get")
    if swept and (queued := queued_as(name_of(jobs))):
        raise ConfigError(f"the sweep is queued or running as {queued}; wait for it, or cancel it with scancel")
    for job in waiting:
        job.run_dir.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)
    done = subprocess.run(["sbatch", str(path)], capture_output=True, text=True)
    if done.returncode:
        raise Failure(f"sbatch refused {path} ({' '.join(done.stderr.split())}); see --sbatch")
    print(f"{done.stdout.strip()}: {len(waiting)} run(s), {path}")
    print("\n".join(f"  {job.run_dir / LOG}" for job in waiting))
    return 0


def got_longer(job: sweep.Job) -> bool:
    """Whether a finished run is now asked to take more steps."""
    finished = read_finished(job.run_dir)
    return finished is not None and finished["step"] < job.cfg.trainer.steps


def check(jobs: list[sweep.Job], options: argparse.Namespace) -> None:
    """Check every run; if there is only one, print its report."""
    from launch.check import check as check_run

    asked = ("--exclusive", "--cpus-per-", "-c")
    if options.gpus_per_node and not options.cpus_per_node and not any(x.startswith(asked) for x in options.sbatch):
        print(
            "warning: without --cpus-per-node a job gets the cluster's default, often one core for all ranks and their "
            "data workers; give it, or --sbatch=--exclusive",
            file=sys.stderr,
        )
    for job in jobs:
        checked = check_run(job.overrides, options.nodes * (options.gpus_per_node or options.cpu_ranks))
        if len(jobs) == 1 and not options.only_print:
            print(checked.report, end="\n\n")
        for warning in checked.warnings:
            print(f"warning: {job.run_dir}: {warning}", file=sys.stderr)
        last = last_save_s(job.run_dir)
        if last and last > options.grace / 2:
            print(
                f"warning: the last save of {job.run_dir} took {last:.0f} s and --grace is {options.grace} s; what is "
                "not saved by then is lost",
                file=sys.stderr,
            )


def last_save_s(run_dir: Path) -> float | None:
    """Seconds from the end of a step to the newest complete checkpoint; None if there is none, or it does not say."""
    try:
        return float(json.loads((run_dir / "checkpoints" / "latest" / "manifest.json").read_bytes())["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def name_of(jobs: list[sweep.Job]) -> str:
    """A job's name for SLURM, the same whenever the same runs are submitted."""
    folders = "\n".join(str(job.run_dir.absolute()) for job in jobs)
    readable = jobs[0].run_dir.name if len(jobs) == 1 else "sweep"
    return f"{readable}-{hashlib.sha256(folders.encode()).hexdigest()[:8]}"


def queued_as(name: str) -> str:
    """The numbers of this user's jobs with this name; empty if there are none or squeue cannot tell."""
    if not shutil.which("squeue"):
        return ""
    asked = ["squeue", "--me", "--noheader", f"--name={name}", "--format=%A"]
    return ", ".join(sorted(set(subprocess.run(asked, capture_output=True, text=True).stdout.split())))


def script(jobs: list[sweep.Job], options: argparse.Namespace, name: str, path: Path, swept: bool) -> str:
    """The sbatch file of one run, or of an array with a task for each."""
    directives = {
        "job-name": name,
        "nodes": options.nodes,
        "ntasks-per-node": 1,
        **({"gpus-per-node": options.gpus_per_node} if options.gpus_per_node else {}),
        **({"cpus-per-task": options.cpus_per_node} if options.cpus_per_node else {}),
        "time": options.time,
        "signal": f"TERM@{options.grace}",
        "open-mode": "append",
        "output": path.with_name("slurm-%A_%a.log") if swept else path.with_name(LOG),
        **({"array": f"0-{len(jobs) - 1}"} if swept else {"dependency": "singleton"}),
    }
    lines = [f"#SBATCH --{key}={shlex.quote(str(value))}" for key, value in directives.items()] + ["#SBATCH --requeue"]
    lines += [f"#SBATCH {line}" for line in options.sbatch]
    ranks = f"--gpus {options.gpus_per_node}" if options.gpus_per_node else f"--cpu-ranks {options.cpu_ranks}"
    return SCRIPT.format(
        command=options.command,
        directives="\n".join(lines),
        folder=shlex.quote(str(Path.cwd())),
        root=shlex.quote(str(ROOT)),
        file=shlex.quote(str(path)),
        setup="".join(f"{line}\n" for line in options.setup),
        idle=IDLE,
        which=array(jobs) if swept else assignments(jobs[0]),
        cpus=f"--cpus-per-task={options.cpus_per_node} " if options.cpus_per_node else "",
        python=options.python,
        ranks=ranks,
    )


def assignments(job: sweep.Job, indent: str = "") -> str:
    """Shell lines that set $run and ${settings[@]}."""
    settings = "".join(f"{indent}  {shlex.quote(text)}\n" for text in job.overrides)
    return f"{indent}run={shlex.quote(str(job.run_dir.absolute()))}\n{indent}settings=(\n{settings}{indent})"


def array(jobs: list[sweep.Job]) -> str:
    """Shell lines that choose a run by the task's number in the array, and send the output to its folder."""
    cases = "\n".join(f"  {number})\n{assignments(job, '    ')}\n    ;;" for number, job in enumerate(jobs))
    return f'case $SLURM_ARRAY_TASK_ID in\n{cases}\nesac\nexec >> "$run/{LOG}" 2>&1'


if __name__ == "__main__":
    sys.exit(main())
