"""Claims about settings: type and meaning are checked before anything is loaded, and errors are one line long."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import train
from data.tasks import Task
from eval.bench import cost, models
from eval.figures.declare import RecallOptions
from eval.figures.fig6 import Figure6Options
from eval.plot import main as plot
from ovq.compose import compose
from ovq.config import Config
from ovq.errors import ConfigError
from ovq.instantiate import instantiate
from ovq.mixers import MixerShape, SequenceMixer
from ovq.model import check_mixers
from ovq.overrides import file_of, literal, options
from ovq.schema import REQUIRED, fault_of
from ovq.train.loop import due
from ovq.values import kind_of, read

WRONG = {
    "model.size=480m": "model.size=480m chooses nothing: write model/size=480m; legal: 150m, 480m, 70m, tiny",
    "data.task=recall": "write data/task=recall",
    "model.mixer=ovq": "write +model/mixer@model.mixers.ovq=ovq",
    "model.name=sw": "model.name=sw would only be a label: write model=sw; legal: gdn",
    "data.name=mine": "data.name=mine would only be a label: write data=NAME; legal: builtin",
    "model/size=480m,70m": "model/size=480m,70m gives several values, and this is one run",
    "seed=0,1": "for a run with each: python -m launch.sweep seed=0,1 ...",
    "seed=-1": "seed=-1 must be at least 0 and at most 4294967295",
    "trainer/steps=3": "there is no group 'trainer/steps'; did you mean the setting trainer.steps=3?",
    "model=null": "model=null does not exist; legal: gdn",
    "model/mixer=ovq": "a mixer is added under a name: +model/mixer@model.mixers.ovq=ovq",
    "data/task=recall": "data/task=recall needs data=task",
    "optim.betas=[0.9]": "optim.betas=[0.9] must have 2 entries",
    "optim.betas=[0.9,1]": "optim.betas=[0.9,1] must be at least 0 and below 1",
    "optim.lr=nan": "optim.lr=nan must be at least 0",
    "optim.lr=inf": "optim.lr=inf must be a finite number",
    "optim.warmup_steps=-5": "optim.warmup_steps=-5 must be at least 0",
    "model.pattern=[]": "model.pattern=[] must not be empty",
    "model.dim=0": "model.dim=0 must be at least 1",
    "model.num_layers=0": "model.num_layers=0 must be at least 1",
    "model.num_kv_heads=0": "model.num_kv_heads=0 must be at least 1",
    "trainer.steps=1.5": "trainer.steps=1.5 must be a whole number",
    "trainer.steps=null": "trainer.steps=null must be a whole number",
    "trainer.compile=2": "trainer.compile=2 must be true or false",
    "name=null": "name=null must be text",
    "data.train=null": "data.train=null: a list is expected, as in data.train=[a,b]",
    "data.words={train:abc}": "data.words={train:abc}: Value 'abc' of type 'str' could not be converted to Integer",
    "logger.project=${oc.env:OVQ_UNSET}": "logger.project: the environment variable OVQ_UNSET is not set; set it, or",
    "tokenizer.model_path=a.model": "is ignored with tokenizer=byte; choose tokenizer=sentencepiece or tokenizer=hf",
    "data.train=[a.txt]": "data.train is ignored with data.kind=builtin; leave it out (or null",
    "+data.task={_target_:data.tasks.recall.RecallTask}": "data.task is ignored with data.kind=builtin; leave it out",
    "data=recall data.packing=document": "data.packing is ignored with data.kind=task; leave it out",
    "data=recall data.validation=[a.txt]": "data.validation is ignored with data.kind=task; leave it out",
    "data=memmap data.train=[a] data.title_field=title": "data.title_field is ignored with data.kind=memmap; leave it",
    "data=jsonl data.train=[a] data.path=b": "a kind that uses it: datasets",
    "data=mixture data.mixture={books:{data:text,train:[a],text_field:body}}": "data.mixture.books.text_field is ign",
    "+trainer.steps=3": "+trainer.steps=3: the setting exists already; leave the + out",
}


@pytest.mark.parametrize("override", WRONG)
def test_a_wrong_setting_is_one_line_with_what_to_write(override: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(override.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and WRONG[override] in said and said.count("\n") == 1


RIGHT: list[tuple[str, str, Any]] = [
    ("experiment=null", "name", "010"),
    ("trainer.steps=1e3", "trainer.steps", 1000),
    ("trainer.context=4096.0", "trainer.context", 4096),
    ("trainer.checkpoint_every=0", "trainer.checkpoint_every", 0),
    ("trainer.log_every=0", "trainer.log_every", 0),
    ("trainer.compile=yes", "trainer.compile", True),
    ("optim.lr=1", "optim.lr", 1.0),
    ("data.revision=12e4567", "data.revision", "12e4567"),
    ("name=010", "name", "010"),
    ("data.words={train: 5}", "data.words.train", 5),
    ("data.words.test=7", "data.words.test", 7),
]


def test_a_value_is_read_by_the_type_of_its_setting() -> None:
    cfg = compose(["data=jsonl", *(override for override, _, _ in RIGHT)])
    for override, key, expected in RIGHT:
        found: Any = cfg
        for part in key.split("."):
            found = found[part]
        assert (found, type(found)) == (expected, type(expected)), override


def test_zero_means_never() -> None:
    assert [step for step in range(1, 9) if due(step, 0)] == []
    assert [step for step in range(1, 9) if due(step, 3)] == [3, 6]


# --- every setting ---------------------------------------------------------------------------------------------------


def leaves(schema: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    for item in dataclasses.fields(schema):
        if dataclasses.is_dataclass(item.default_factory):
            yield from leaves(item.default_factory, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", item


TOOLS = (
    *("data.prepare", "data.train_tokenizer", "eval.plot", "eval.per_position", "eval.perplexity", "eval.accuracy"),
    *("eval.needle", "eval.harness", "eval.stored_state", "eval.bench.cpu", "eval.bench.compare", "eval.bench.models"),
    *("eval.bench.ops", "eval.bench.pipeline", "eval.bench.cost", "eval.bench.aot", "eval.bench.gpu.bench"),
    *("eval.bench.decode", "ovq.inference.export"),
    *("eval.report", "launch.plan", "ovq.inference.generate", "ovq.ops.ovq_attention.selftest"),
)
SCHEMAS = {"": Config} | {name: importlib.import_module(name).Options for name in TOOLS}
SCHEMAS |= {"eval.figures.fig4": RecallOptions, "eval.figures.fig6": Figure6Options}
NONSENSE = ("abc", "-1e30", "nan", "inf", "[]", "null", "", "{a: 1}", "true", "[null]", "1e400", "[[1]]")


@pytest.mark.parametrize("tool", SCHEMAS)
def test_every_setting_has_a_sentence_and_every_number_a_range(tool: str) -> None:
    for name, item in leaves(SCHEMAS[tool]):
        assert len(item.metadata.get("help", "")) > 8 or name == "seed", name
        if kind_of(item) in ("int", "float", "list[int]", "list[float]"):
            assert {"at_least", "above"} & set(item.metadata), f"{name} has no lower bound"


@pytest.mark.parametrize("tool", SCHEMAS)
def test_nonsense_is_refused_in_one_line_or_is_legal(tool: str) -> None:
    """Wrong types, NaN, infinity, negative numbers, empty lists and null, in every setting."""
    for name, item in leaves(SCHEMAS[tool]):
        for text in NONSENSE:
            kind = kind_of(item)
            if kind.startswith("dict"):
                continue
            try:
                if not tool:
                    literal(f"{name}={text}")
                value = read(item, name, text)
                if fault := fault_of(item, value):
                    raise ConfigError(f"{name}={text} {fault}")
            except ConfigError as error:
                said = str(error)
                assert name.rpartition(".")[2] in said and "\n" not in said and len(said) < 400, said
            else:
                numeric = kind in ("int", "float", "bool", "list[int]", "list[float]")
                empty = text == "" and item.metadata.get("empty")  # a list of none
                legal = text in ("null", "[]") or empty or (text == "true" and kind == "bool")
                assert not numeric or legal, f"{name}={text} is accepted as {value!r}"


@pytest.mark.parametrize("group", ["model/mixer", "data/task"])
def test_nonsense_in_a_class_of_the_config_is_refused_when_it_is_built(group: str) -> None:
    from omegaconf import OmegaConf

    shape = [MixerShape(dim=32, num_heads=2, num_kv_heads=2, head_dim=16)] if group == "model/mixer" else []
    kind: Any = SequenceMixer if group == "model/mixer" else Task
    for option in options(group):
        settings: Any = OmegaConf.to_container(OmegaConf.load(file_of(group, option)))
        for name, default in settings.items():
            wrong = [float("nan"), [], -3, 10**30] if isinstance(default, (int, float)) else [[1], True]
            for value in wrong if name != "_target_" else ["pathlib.Path", "nothing", None]:
                if (name, value) == ("seed", -3) or (isinstance(default, float) and value == 10**30):
                    continue
                with pytest.raises(ConfigError) as error, torch.device("meta"):
                    instantiate({**settings, name: value}, kind, f"it.{option}", *shape)
                said = str(error.value)
                assert "\n" not in said and option in said.replace("data.task", option), (name, value)


def test_the_width_of_a_head_that_is_rotated_is_even() -> None:
    with pytest.raises(ConfigError, match=r"model.head_dim=63 must be even for rotary positions"):
        check_mixers(compose(["model.head_dim=63"]).model)
    task: Any = instantiate({"_target_": "data.tasks.recall.RecallTask", "key_vocab": 1e3}, Task, "data.task")
    assert task.key_vocab == 1000


# --- tools -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tool", "argument", "expected"),
    [
        (plot, "out=x.bmp", "out=x.bmp is not a file name that can be written; legal endings: .png, .pdf, .svg"),
        (plot, "out=picture", "out=picture is not a file name that can be written"),
        (plot, "out=.", "out=. is a folder; name a file"),
        (cost.main, "tokens=1.5e0", "tokens=1.5e0 must be a whole number"),
        (models.command_line, "contexts=abc", "contexts=abc must be a list of whole numbers, like [1,2]"),
        (models.command_line, "contexts=[2048,0]", "contexts=[2048,0] must be at least 1"),
    ],
)
def test_a_tools_settings_are_checked_at_the_start(
    tool: Any, argument: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool(["runs=[nowhere]", argument] if tool is plot else [argument]) == 2
    assert expected in capsys.readouterr().err


def test_tools_read_numbers_as_training_does() -> None:
    fields = {item.name: item for item in dataclasses.fields(SCHEMAS["data.train_tokenizer"])}
    assert read(fields["vocab_size"], "vocab_size", "1e3") == 1000
    assert read(fields["sample_mb"], "sample_mb", "0.02") == 0.02
    assert fields["out"].default == REQUIRED
