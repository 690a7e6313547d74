"""The README's tour: every command in it, run in a clean clone, one after the other.

What needs a GPU, a hub, an optional package or minutes is made small, run as a dry run, or must end with one line.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.helpers import TINY
from tests.test_docs import README, ROOT, blocks

STEPS = "trainer.steps=2 trainer.context=64 trainer.global_batch=2 trainer.micro_batch=2 trainer.device=cpu"
TRAIN = f"{STEPS} trainer.progress=false eval.context=128 eval.documents=1 optim.warmup_steps=0 trainer.eval_every=0"
SMALL = f"{TRAIN} {' '.join(TINY)}"
PREPARED = "data=memmap data.train=[prepared/pg19] tokenizer.vocab_size=null"
PLAN = "dry_run=true"


class Part(NamedTuple):
    """How the commands that begin with `words` are run: `more` is appended, `changes` are made, and `refusal` is what
    the last line says if they cannot run here. Parts are listed in the order of their dependencies."""

    words: str
    more: str = ""
    refusal: str = ""
    changes: tuple[tuple[str, str], ...] = ()
    answers: str = ""  # on stdin


def missing(package: str, refusal: str) -> str:
    """The refusal, if an optional package is not installed."""
    return "" if importlib.util.find_spec(package) else refusal


NOT_RUN = {
    r"make (train|test|figures|bench|bench-gpu)$": "CI runs the first two; the others take minutes to hours",
    r"python train\.py (tokenizer=hf|data=datasets)": "a hub: tests/test_tokenizer.py, tests/test_data_datasets.py",
    r"torchrun ": "tests/test_launch.py, tests/test_context_parallel.py",
    r".venv/bin/pip ": "installs",
    r"python -m eval\.bench\.(models|ops|aot|decode)": "minutes: tests/test_bench_*.py, tests/test_aot.py",
    r"python -m eval\.bench\.(pipeline|compare)": "ten seconds: tests/test_model_tools.py, tests/test_bench_cpu.py",
    r"python -m eval\.figures\.fig": "tests/test_figures.py",
}
BUILTIN = (("data=pg19", "data=builtin"), ("vocab_size=16384", "vocab_size=500"), ("vocab_size=2048", "vocab_size=400"))
LITTLE = "sample_mb=0.3"
PARTS = [
    Part("python train.py --help"),
    Part("python train.py experiment=pg19_150m dry_run=true"),
    Part("python -m launch plan"),
    Part("python train.py model=sw_nope model/size=tiny data=text", SMALL),
    Part("python -m data.train_tokenizer data=pg19 vocab_size", LITTLE, changes=BUILTIN),
    Part("python -m data.train_tokenizer data=pg19 model_type=bpe", f"{LITTLE} vocab_size=400", changes=BUILTIN),
    Part("python -m data.python_source", "train=[fsspec] validation=[filelock] test=[dill] document_kb=30"),
    Part("python -m data.train_tokenizer data=python_source", LITTLE, changes=BUILTIN),
    Part("python -m data.prepare", changes=BUILTIN),
    Part("python train.py experiment=pg19_70m data=memmap", f"{SMALL} tokenizer.vocab_size=null run_dir=runs/pg19_70m"),
    Part("python train.py experiment=pg19_70m_32k", f"{PREPARED} {SMALL}"),
    Part("python train.py experiment=pg19_70m optim=muon", f"{PREPARED} {SMALL}"),
    Part("python train.py experiment=pg19_70m optim.ema", f"{PREPARED} {SMALL}"),
    Part("python train.py experiment=pg19_70m optim.base_dim", f"{PREPARED} {SMALL}"),
    Part("python train.py experiment=pg19_70m model.logit_softcap=30", f"{PREPARED} {SMALL} logger=none"),
    Part(
        "python train.py experiment=pg19_70m model=std_att init_from=RUN",
        f"{PREPARED} {SMALL} init_from.strict=false",
        changes=(("init_from=RUN", "init_from.path=runs/pg19_70m"),),
    ),
    Part("python train.py experiment=pg19_70m", PLAN),
    Part("python -m launch run", refusal="this machine shows 0 GPU(s)"),
    Part("python -m launch slurm", PREPARED, changes=(("slurm", "slurm --print"),)),
    Part("python -m launch sweep", refusal="--gpus 8, but this machine shows 0"),
    Part("python -m ovq.ops.ovq_attention.selftest", refusal="there is no GPU here"),
    Part("python -m eval.report experiment=", refusal="none of the 6 folders is a run that has begun"),
    Part("python train.py data=mixture", f"{PLAN} data.mixture={{builtin:1.0}}"),
    Part("python -m eval.per_position"),
    Part("python -m eval.plot"),
    Part("python -m eval.report runs="),
    Part(
        "python -m eval.perplexity", "documents=1", changes=(("runs/pg19_70m split=test", "runs/a split=validation"),)
    ),
    Part("python -m ovq.inference.generate", "tokens=5", answers="Once\n"),
    Part("python -m ovq.inference.export", refusal=missing("transformers", "export needs transformers")),
    Part("python train.py data=task data/task=positional_recall", f"{SMALL} run_dir=runs/task"),
    Part(
        "python -m eval.accuracy",
        "answers=8",
        changes=(("run=RUN", "run=runs/task"), ("num_centroids=4096", "num_centroids=64")),
    ),
    Part("python -m eval.needle", "sequences=1 depths=[50]", changes=(("4096,65536", "512,1024"),)),
    Part("python -m eval.harness", refusal=missing("lm_eval", "lm-eval")),
]

DRIVER = """
import contextlib, importlib, io, json, sys, time, traceback
for words, answers in json.load(open(sys.argv[1])):
    module = "train" if words[0] == "train.py" else words[1]
    sys.stdin, out, began = io.StringIO(answers), io.StringIO(), time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            found = importlib.import_module(module + ".__main__" if module == "launch" else module)
            status = found.main(words[1:] if module == "train" else words[2:])
        except SystemExit as error:
            status = error.code or 0
        except BaseException:
            traceback.print_exc()
            status = -1
    print(json.dumps([status, round(time.monotonic() - began, 1), out.getvalue()]), flush=True)
"""


def commands() -> list[str]:
    """The commands in the README, each on one line and without its comment."""
    text = "\n".join(blocks(README, "sh").values()).replace("\\\n", " ")
    lines = (re.sub(r"\s+#.*$", "", line).strip() for line in text.splitlines())
    return [line for line in lines if line]


def part_of(line: str) -> Part | None:
    return next((part for part in PARTS if line.startswith(part.words)), None)


def words_of(line: str, part: Part) -> list[str]:
    """The arguments of Python, with the part's additions and changes."""
    for old, new in part.changes:
        line = line.replace(old, new)
    return [*shlex.split(line)[1:], *shlex.split(part.more)]


def test_every_command_of_the_readme_is_run_or_has_a_reason() -> None:
    undecided = [line for line in commands() if not part_of(line) and not any(re.match(p, line) for p in NOT_RUN)]
    assert not undecided
    unused = [part.words for part in PARTS if not any(part_of(line) is part for line in commands())]
    assert not unused and all(any(re.match(pattern, line) for line in commands()) for pattern in NOT_RUN)


@pytest.mark.slow
def test_the_tour_of_the_readme_runs_in_a_clean_clone(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    if subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], capture_output=True).returncode:
        pytest.skip("not a git checkout")
    for name in ("books/a.txt", "held-out/b.txt"):
        (clone / name).parent.mkdir()
        (clone / name).write_text(README)
    (clone / "many.jsonl").write_text('{"prompt": "It was"}\n{"prompt": "Once upon"}\n')
    first = [
        ["train.py", "experiment=cpu_demo", *shlex.split(SMALL), f"run_dir=runs/{name}"]
        for name in ("cpu_demo", "a", "b")
    ]
    tour: list[tuple[str, list[str], Part]] = [("", words, Part("")) for words in first]
    for part in PARTS:
        tour += [(line, words_of(line, part), part) for line in commands() if part_of(line) is part]
    (tmp_path / "tour.json").write_text(json.dumps([[words, part.answers] for _, words, part in tour]))
    command = [sys.executable, "-c", DRIVER, str(tmp_path / "tour.json")]
    done = subprocess.run(command, cwd=clone, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(tour), done.stderr
    for (line, words, part), (status, seconds, said) in zip(tour, results):
        note = f"{line}\nas {' '.join(words)}\nended with {status} after {seconds} s:\n{said[-2000:]}"
        if part.refusal:
            last = said.strip().splitlines()[-1]
            assert status in (1, 2) and last.startswith("error: ") and part.refusal in last, note
        else:
            assert status == 0, note
