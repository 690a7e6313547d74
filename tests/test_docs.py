"""What the documentation shows is true: its examples run, and the paths and commands it names exist."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from eval import loss_table
from ovq import cli, compose
from ovq.mixers.base import SequenceMixer
from ovq.model import build_mixer
from ovq.train.batches import COUNTED
from ovq.train.metrics import read_rows
from tests import test_mixers as contract
from tests.helpers import TINY
from tests.test_per_position import run_folder

ROOT = Path(__file__).resolve().parent.parent
EXTENDING = (ROOT / "docs" / "extending.md").read_text()
README = (ROOT / "README.md").read_text()
QUICK = [
    *TINY,
    *("trainer.steps=12", "trainer.context=32", "trainer.global_batch=8", "trainer.micro_batch=8"),
    *("trainer.device=cpu", "trainer.progress=false", "optim.lr=1e-2", "optim.warmup_steps=1"),
    *("eval.context=32", "eval.documents=1"),
]


def blocks(text: str, language: str) -> dict[str, str]:
    """Fenced code blocks in a language: the rest of the opening line -> the code."""
    found = re.findall(rf"^```{language} ?([^\n]*)\n(.*?)^```$", text, flags=re.M | re.S)
    return {title or str(i): code for i, (title, code) in enumerate(found)}


CODE, COMMANDS = blocks(EXTENDING, "python"), list(blocks(EXTENDING, "sh").values())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the documented files, on the import path."""
    for name, code in CODE.items():
        (tmp_path / name).write_text(code)
    (tmp_path / "books").mkdir()
    words = np.random.default_rng(0).choice(["one", "two", "three", "four"], (3, 400))
    for name, row in zip(("train-0", "train-1", "held-out"), words):
        (tmp_path / "books" / f"{name}.jsonl").write_text(json.dumps({"text": " ".join(row), "title": name}) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield tmp_path
    for name in CODE:
        sys.modules.pop(name.removesuffix(".py"), None)


def run(line: str, folder: Path) -> list[float]:
    """Run a documented train.py command in the folder at a small size; returns the losses of its steps."""
    words = shlex.split(line)
    settings = words[words.index("train.py") + 1 :]
    env = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train.py"), *settings, *QUICK, f"run_dir={folder}/run"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (folder / "run" / "summary.json").is_file()
    return [row["loss"] for row in read_rows(folder / "run" / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize("line", COMMANDS)
def test_every_documented_extension_trains(line: str, folder: Path) -> None:
    losses = run(line, folder)
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.05


def test_the_documented_mixer_meets_the_contract_of_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    added = ["model=sw", "+model.mixers.leaky={_target_: leaky.Leaky, decay: 0.5}", "model.pattern=[leaky]", *TINY]

    def make(name: str, *, kv_heads: int = 2, seed: int = 0) -> SequenceMixer:
        mixer = build_mixer(compose.compose(added).model, 0)
        torch.manual_seed(seed)
        mixer.init_weights(0.2)
        return mixer.double().eval()

    monkeypatch.setattr(contract, "make", make)
    contract.test_output_before_t_ignores_token_t("leaky")
    contract.test_streamed_in_pieces_equals_one_pass("leaky", [1, 6, 20, 18])
    contract.test_packed_documents_do_not_see_each_other("leaky")
    contract.test_state_size_is_what_is_held("leaky")


@pytest.mark.parametrize("length", [4, 33, 100])
def test_the_documented_task_is_answered_by_its_oracle(folder: Path, length: int) -> None:
    from copying import Copying  # type: ignore[import-not-found]

    task = Copying(symbols=5)
    for row in range(5):
        inputs, targets = task.make(length, 0, 0, 0, row)
        answers = task.describe(length)["answers"]
        assert inputs.shape == targets.shape == (length,) and inputs.max() < task.vocab_size
        assert task.score(task.oracle(inputs)[None], targets[None]) == (answers, answers) and answers > 0


def test_the_documented_data_set_is_a_legal_config() -> None:
    (text,) = blocks(EXTENDING, "yaml").values()
    cfg = compose.compose([f"data={(settings := yaml.safe_load(text))['kind']}"])
    assert set(settings) <= set(cfg.data) and settings["kind"] in text


def test_the_examples_in_python_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_folder(tmp_path, "sw_ovq", []).rename(tmp_path / "cpu_demo")
    (tmp_path / "runs").mkdir()
    (tmp_path / "cpu_demo").rename(tmp_path / "runs" / "cpu_demo")
    monkeypatch.chdir(tmp_path)
    examples = blocks(README, "python")
    assert len(examples) == 2
    for code in examples.values():
        exec(compile(code, "README.md", "exec"), {})


def test_every_room_of_the_map_exists_and_every_folder_is_on_it() -> None:
    house = list(blocks(README, "text").values())[-1]
    named = [line.split()[0] for line in house.splitlines()]
    assert all((ROOT / path).exists() for path in named), named
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    rooms = {path.split("/")[0] + "/" for path in tracked if "/" in path and not path.startswith(".")}
    assert not [room for room in rooms if not any(name.startswith(room) for name in named)]


DOCUMENTS = ["README.md", *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_and_path_that_a_document_names_exists(document: str) -> None:
    text = (ROOT / document).read_text()
    for module in set(re.findall(r"python -m ([a-z_0-9.]+[a-z0-9])", text)) - {"venv", "pip"}:
        assert importlib.util.find_spec(module) is not None, f"{document} names python -m {module}"
    for words in set(re.findall(r"\bovq ([a-z]+(?: [a-z_]+)?)(?= |$)", "\n".join(blocks(text, "sh").values()), re.M)):
        assert words in cli.COMMANDS or words.split()[0] in cli.COMMANDS, f"{document} names ovq {words}"
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    for target in set(re.findall(r"\bmake ([a-z-]+)\b", "\n".join(re.findall(r"`[^`\n]+`|^make .*$", text, re.M)))):
        assert target in targets, f"{document} names make {target}"
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in link:
            assert (ROOT / document).parent.joinpath(link).exists(), f"{document} links to {link}"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) if command in ("launch run", "launch slurm", "launch sweep") else open(os.devnull):
        assert cli.main([*command.split(), "--help"]) == 0
    said = capsys.readouterr().out
    assert len(said.splitlines()) > 5, said


def test_every_promise_names_tests_that_exist() -> None:
    named = set(re.findall(r"`(test_[a-z0-9_]+)`", (ROOT / "docs" / "promises.md").read_text()))
    written = {
        name for file in (ROOT / "tests").glob("*.py") for name in re.findall(r"def (test_\w+)", file.read_text())
    }
    assert len(named) > 20 and not named - written, named - written


def documented(heading: str, text: str) -> list[str]:
    """The names in the first columns of the tables of a section, in the order of the document."""
    section = re.split(r"^## ", text.split(f"\n## {heading}\n")[1], flags=re.M)[0]
    return [
        name for row in re.findall(r"^\| (`[^|]*) \|", section, flags=re.M) for name in re.findall(r"`([^`]+)`", row)
    ]


def test_every_field_of_a_run_folder_is_documented(folder: Path) -> None:
    """metrics.jsonl of a run with everything enabled has the documented keys and no others; so do the tables."""
    text = (ROOT / "docs" / "run-folder.md").read_text()
    books = "a: {data: jsonl, train: [books/train-0.jsonl], validation: [books/held-out.jsonl], weight: 0.5}"
    run(
        f"python train.py data=mixture 'data.mixture={{{books}, b: {{data: builtin, weight: 0.5}}}}' "
        "data.num_workers=0 +model/mixer@model.mixers.vq=vq model.pattern=[ovq,vq] trainer.z_loss=1e-4 "
        "'trainer.lengths={0: 16, 6: 32}' trainer.health_every=1",
        folder,
    )
    rows = read_rows(folder / "run" / "metrics.jsonl")
    seen = {key for row in rows for key in row}
    keys = documented("metrics.jsonl", text)
    patterns = [re.escape(key).replace("NAME", "[ab]").replace("layer_01", r"layer_\d\d") for key in keys]
    assert not [key for key in seen if not any(re.fullmatch(pattern, key) for pattern in patterns)]
    unseen = {key for key, pattern in zip(keys, patterns) if not any(re.fullmatch(pattern, name) for name in seen)}
    flaws = {f"data/{name}" for name in COUNTED if name not in ("bytes", "documents", "words")}
    assert unseen <= flaws | {"skipped", "mfu"} and flaws - seen == unseen - {"skipped", "mfu"}
    assert set(documented("Tables of evaluations", text)) == set(loss_table.SCHEMA.names)
