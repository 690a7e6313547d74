"""Claims about a run's identity: what may change on resume, what is refused, and that each message's advice works."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import train
from ovq import config, identity
from ovq.compose import compose, run_dir_of
from ovq.config import Config
from ovq.report import typed
from ovq.train.metrics import read_rows
from tests.helpers import TINY, started

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
ROOT = Path(__file__).resolve().parent.parent
BASE = [
    *("model=sw", *TINY, "trainer.health_every=0"),
    *("data=jsonl", "trainer.context=16", "trainer.global_batch=2", "trainer.micro_batch=2", "trainer.device=cpu"),
    *(
        "trainer.steps=2",
        "trainer.progress=false",
        "trainer.peak_tflops=1000",
        "trainer.precision=fp32",
        "trainer.health_every=0",
    ),
    *("trainer.checkpoint_every=1", "optim.schedule=constant", "optim.warmup_steps=1", "eval.at_end=false"),
]
DATA = "data.train=[books.jsonl]"


def start(*words: str) -> int:
    """Exit status of train.py with these settings."""
    return started(_base(), "data.train=[books.jsonl]", "run_dir=run", *words, start=train.train)


@functools.cache
def _base() -> Config:
    return compose(BASE)


def write(path: Path, *lines: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines))


def book(number: int) -> str:
    return json.dumps({"text": f"book {number} has a text of its own, long enough for a row or two"})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with books and the run folder `run`, which has trained for two steps."""
    folder = tmp_path_factory.mktemp("made")
    for name in ("books", "copy/books"):
        write(folder / f"{name}.jsonl", *map(book, range(6)))
    write(folder / "others.jsonl", *map(book, range(9, 15)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert start() == 0
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of `made`, as the current folder."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True, symlinks=True)
    monkeypatch.chdir(tmp_path)
    yield tmp_path


RESUMED, DIFFERS, REFUSED = "run/checkpoints/step_00000002 at step 2", "the data differ", "other settings"
# Name -> (settings added to the run's command, exit status, what stderr contains).
STARTS: dict[str, tuple[list[str], int, str]] = {
    "another path to the same data": (["data.train=[copy/../books.jsonl]"], 0, RESUMED),
    "an absolute path": (["data.train=[HERE/books.jsonl]"], 0, RESUMED),
    "the same data elsewhere": (["data.train=[copy/books.jsonl]"], 0, RESUMED),
    "other data": (["data.train=[others.jsonl]"], 2, DIFFERS),
    "what is done about a bad document": (["data.on_bad_shard=skip"], 0, RESUMED),
    "other files to evaluate on": (["data.validation=[others.jsonl]", "eval.split=validation"], 0, RESUMED),
    "how it is computed and shown": (["trainer.micro_batch=1", "logger.tags=[a]"], 0, RESUMED),
    "more steps": (["trainer.steps=3"], 0, RESUMED),
    "another seed": (["seed=1"], 2, f"{REFUSED} (seed: 0 -> 1)"),
    "another context": (["trainer.context=8"], 2, f"{REFUSED} (trainer.context: 16 -> 8)"),
    "another rate": (["optim.lr=0.1"], 2, f"{REFUSED} (optim.lr: 0.001 -> 0.1)"),
    "another rate in a branch": (["optim.lr=0.1", "resume=run", "run_dir=new"], 0, RESUMED),
    "another optimizer in a branch": (
        ["optim.name=muon", "resume=run", "run_dir=new"],
        2,
        "resume=run holds the state of another optimizer (optim.name: adamw -> muon)",
    ),
    "weights to begin with in a branch": (
        ["init_from.path=run", "resume=run", "run_dir=new"],
        2,
        "init_from=run would have no effect, because resume=run continues from",
    ),
    "another model in a branch": (
        ["model.logit_softcap=30", "resume=run", "run_dir=new"],
        2,
        "resume=run was made with other settings (model.logit_softcap: ",
    ),
    "other data in a branch": (["data.train=[others.jsonl]", "resume=run", "run_dir=new"], 2, DIFFERS),
}


@pytest.mark.parametrize("name", STARTS)
def test_a_start_in_the_folder_of_a_run(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, status, says = STARTS[name]
    before = {path: path.read_bytes() for path in (Path("run/config.yaml"), Path("run/summary.json"))}
    assert start(*(word.replace("HERE", str(folder)) for word in words)) == status
    shown = capsys.readouterr().err
    assert says in shown and "Traceback" not in shown
    if status:
        assert len(shown.splitlines()) == 1
        assert {path: path.read_bytes() for path in before} == before, "a start that is refused changes nothing"


@pytest.mark.parametrize("resume", ["auto", "run/checkpoints/step_00000001"])
def test_a_start_that_is_refused_late_leaves_the_checkpoints_alone(
    resume: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in Path("run/checkpoints").iterdir())
    assert {"step_00000001", "step_00000002"} < {*before}
    assert start("data.train=[others.jsonl]", f"resume={resume}", "trainer.keep_last=1") == 2
    assert DIFFERS in capsys.readouterr().err
    assert sorted(path.name for path in Path("run/checkpoints").iterdir()) == before
    assert start() == 0 and RESUMED in capsys.readouterr().err


def test_what_a_refusal_of_other_data_advises_works(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    others = ["data.train=[others.jsonl]", "run_dir=NEW"]
    assert start(*others, "resume=run") == 2
    assert "run_dir=NEW, from the weights of this one with init_from=DIR" in capsys.readouterr().err
    assert start(*others, "init_from.path=run") == 0
    assert "began with" in capsys.readouterr().err


def test_the_advice_about_a_bad_line_continues_the_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without run_dir, since the setting must not change the folder's name either."""
    write(folder / "bad.jsonl", *map(book, range(3)), '{"text": "cut', *map(book, range(4, 8)))
    line = [*BASE, "data.train=[bad.jsonl]", "data.shuffle=false", "trainer.steps=9"]
    assert train.main(line) == 1
    shown = capsys.readouterr().err
    advised = re.search(r"data\.on_bad_shard=skip", shown)
    assert advised, shown
    assert train.main([*line, advised[0]]) == 0
    assert "resumed from" in capsys.readouterr().err and len(list((folder / "runs").iterdir())) == 1


FAILED_STARTS = (
    ["data.train=[book.jsonl]"],
    ["data.kind=memmap", "data.train=[nowhere]"],
    ["seed=1", "data.text_field=txt"],
    ["tokenizer.kind=sentencepiece", "tokenizer.model_path=nowhere.model"],
)


def test_a_run_whose_first_starts_failed_has_claimed_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in FAILED_STARTS:
        assert start("run_dir=fresh", *wrong) in (1, 2)
    assert start("run_dir=fresh") == 0
    assert "Traceback" not in capsys.readouterr().err and Path("fresh/summary.json").is_file()


def test_the_same_command_with_more_steps_names_the_run_that_it_could_continue(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree("run", "runs/run", symlinks=True)
    longer = [*BASE, DATA, "trainer.steps=3"]
    assert train.main(longer) == 0
    told = capsys.readouterr().err
    assert "is a new run folder, and" in told and "holds the same run at step 2" in told
    advised = shlex.split(told.partition("to continue that one: ")[2])[0]
    assert train.main([*longer, advised]) == 0
    assert "resumed from" in capsys.readouterr().err
    assert not identity.twins(compose([*longer, "seed=5"]), Path("runs/other"))


def test_a_setting_that_a_mixer_got_later_is_its_default_in_older_runs() -> None:
    new = config.flatten(compose(["model=sw_ovq", "data=task", "data/task=recall"]))
    for key in ("model.mixers.ovq.chunk_size", "data.task.key_vocab", "optim.decay_share"):
        older = {name: value for name, value in new.items() if name != key}
        assert identity.differences(older, new) == [] == identity.differences(new, older)
        other = new | {key: 3}
        assert identity.differences(older, other) == [f"{key}: {new[key]} -> 3"]
    assert identity.differences(new, new | {"model.mixers.ovq.colour": None}) == []


def leaves(schema: Any, prefix: str = "") -> Iterator[str]:
    for item in dataclasses.fields(schema):
        inner = item.default_factory
        if dataclasses.is_dataclass(inner):
            yield from leaves(inner, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name


def test_every_setting_has_one_place_in_the_table_and_the_table_is_in_the_documents() -> None:
    settings = list(leaves(Config))
    for key in settings:
        rules = [rule for rule in identity.RULES if identity.within(key, rule.settings)]
        assert len(rules) == 1, f"{key} is in {len(rules)} rules of ovq.identity.RULES"
    for rule in identity.RULES:
        for name in rule.settings:
            assert any(identity.within(key, (name,)) for key in settings), f"there is no setting {name}"
    assert identity.table() in (ROOT / "docs" / "promises.md").read_text(), "python -c 'print(ovq.identity.table())'"


def test_settings_that_are_no_part_of_a_run_are_no_part_of_its_folder_name() -> None:
    line = ["data=jsonl", "data.train=[a.jsonl]"]
    more = [*line, "data.on_bad_shard=skip", "data.validation=[b.jsonl]", "eval.context=9", "trainer.eval_every=1"]
    assert run_dir_of(compose(line), line) == run_dir_of(compose(more), more)


@pytest.mark.parametrize("path", ["runs/x,model=sw", "a b", "größe", "a'b"])
def test_an_advised_path_can_be_typed(path: str) -> None:
    words = shlex.split(typed("run_dir", path))
    if "'" not in path:  # Hydra quotes these differently
        assert compose(words).run_dir == path
    assert len(words) == 1


def test_a_config_that_cannot_be_read_does_not_stop_the_search_for_the_same_run(folder: Path) -> None:
    cfg = compose([*BASE, DATA])
    write(folder / "run" / "config.yaml", "a: [")
    assert identity.twins(cfg, folder / "new") == []
    config.save(cfg, folder / "run")
    assert identity.twins(cfg, folder / "new") == [(folder / "run", 2)]
    assert yaml.safe_load((folder / "run" / "config.yaml").read_text())["seed"] == 0
    assert [row["step"] for row in read_rows("run/metrics.jsonl")] == [1, 2]
