"""Claims about the command line: legal settings work, and illegal ones fail in one line that lists the legal ones."""

from __future__ import annotations

import subprocess
import sys

import pytest

from data.build import build_task
from ovq import config, identity
from ovq.compose import compose, groups, help_text, options, run_dir_of
from ovq.errors import ConfigError
from ovq.model import build_mixer

WRONG = {
    "data.task.colour=3": ["data.task.colour", "configs/data/task/"],
    "trainer.stepz=3": ["trainer.stepz", "did you mean trainer.steps", "global_batch"],
    "trainer.steps=abc": ["trainer.steps=abc", "whole number"],
    "model=nope": ["model=nope", "sw_ovq"],
    "modell=sw": ["modell", "did you mean model"],
    "data.train=books/*.parquet": ["data.train", "a list is expected", "data.train=[a,b]"],
    "trainer.precision=fp8": ["trainer.precision=fp8", "bf16"],
    "model.mixers.ovq.num_centroid=3": ["num_centroid", "num_centroids"],
    "experiment=nope": ["experiment=nope", "cpu_demo"],
    "nonsense": ["nonsense", "key=value"],
    "model.pattern=[ovq,foo]": ["model.pattern", "foo"],
    "trainer.steps=0": ["trainer.steps=0", "at least 1"],
    "trainer.context.x=0": ["trainer.context"],
}


@pytest.mark.parametrize("override", WRONG)
def test_wrong_override_fails_in_one_line_that_names_the_legal_ones(override: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose([override])
    message = str(error.value)
    assert "\n" not in message
    for part in WRONG[override]:
        assert part in message


def test_every_named_model_composes_with_every_size() -> None:
    for model in options("model"):
        for size in options("model/size"):
            cfg = compose([f"model={model}", f"model/size={size}"])
            assert cfg.model.name == model and cfg.model.size == size
            assert set(cfg.model.mixers) == set(cfg.model.pattern)


def test_every_experiment_composes() -> None:
    for experiment in options("experiment"):
        cfg = compose([f"experiment={experiment}"])
        assert cfg.name == experiment


def test_run_folder_is_a_pure_function_of_the_command_line() -> None:
    first = ["experiment=cpu_demo", "seed=2", "model=sw_nope"]
    second = ["seed=2", "model=sw_nope", "experiment=cpu_demo", "trainer.device=cpu", "logger=wandb", "resume=never"]
    names = [run_dir_of(compose(o), o) for o in (first, second)]
    assert names[0] == names[1] and names[0].name == "cpu_demo,model=sw_nope,seed=2"
    assert run_dir_of(compose(["run_dir=a/b"]), ["run_dir=a/b"]).as_posix() == "a/b"


def test_run_folders_are_named_by_model_size_and_seed_first_and_hide_no_setting() -> None:
    line = ["optim.lr=0.01", "seed=2", "data=text", "model/size=tiny", "model=sw_nope"]
    assert run_dir_of(compose(line), line).name == "default,model=sw_nope,size=tiny,seed=2,data=text,lr=0.01"
    paths = [f"data.train=[{'corpora/' * 12}{name}.txt]" for name in ("a", "b")]
    first, second = (run_dir_of(compose(made), made).name for made in ([*line, *paths[:1]], [*line, *paths[1:]]))
    assert first.startswith("default,model=sw_nope,size=tiny,seed=2,data=text,lr=0.01,train=orpora_corpora_a.txt-")
    assert len(second) == len(first) < 120 and "_b.txt-" in second
    both = ["model=sw_reservoir", "seed=1", "model.mixers.reservoir.seed=0"]
    names = {run_dir_of(compose(line), line).name for line in (both, [both[0], "seed=0", both[2].replace("0", "1")])}
    assert names == {f"default,model=sw_reservoir,seed={a},reservoir.seed={1 - a}" for a in (0, 1)}
    alike = [["model=sw_nope", f"model.mixers.{mixer}.qk_norm=true"] for mixer in ("sliding_window", "full_attention")]
    first, second = (run_dir_of(compose(line), line).name for line in alike)
    assert first == "default,model=sw_nope,sliding_window.qk_norm=True"
    assert second == "default,model=sw_nope,full_attention.qk_norm=True"
    for one in ("model=sw_reservoir seed=1", "model=sw_reservoir model.mixers.reservoir.seed=1"):
        assert run_dir_of(compose(one.split()), one.split()).name.endswith("seed=1")
    own = ["model=sw_ovq", "model.mixers.ovq.num_centroids=8"]
    assert run_dir_of(compose(own), own).name == "default,model=sw_ovq,num_centroids=8"
    deep = [f"+model.mixers.ovq.x{number}='长值'" for number in range(40)]
    assert len(run_dir_of(compose(line), [*line, *deep]).name.encode()) < 255  # the limit for a file name


def test_different_settings_never_share_a_run_folder() -> None:
    lines = [["seed=1"], ["seed=2"], ["trainer.steps=7"], ["optim.lr=1e-2"], ["model.pattern=[ovq]"], []]
    assert len({run_dir_of(compose(o), o) for o in lines}) == len(lines)


def test_saved_config_loads_unchanged(tmp_path) -> None:
    cfg = compose(["experiment=cpu_demo", "seed=3", "model.mixers.ovq.step_size=0.5"])
    config.save(cfg, tmp_path)
    assert config.to_dict(config.load(tmp_path)) == config.to_dict(cfg)


def test_resume_may_change_how_a_run_is_computed_but_not_what() -> None:
    old = compose(["seed=1"])
    assert identity.changed(old, compose(["seed=1", "trainer.micro_batch=2", "logger=wandb"])) == []
    changed = identity.changed(old, compose(["seed=2", "trainer.context=1024"]))
    assert changed == ["seed: 1 -> 2", "trainer.context: 2048 -> 1024"]


def test_config_errors_come_before_torch_is_imported() -> None:
    code = (
        "import sys, ovq.compose as c\ntry: c.compose(['seeds=1'])\nexcept c.ConfigError: print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_help_names_every_group_and_setting() -> None:
    text = help_text()
    for part in (*groups(), "trainer.context=2048", "one of: auto, fp32, bf16"):
        assert part in text


def test_a_class_of_the_wrong_kind_is_refused_before_it_is_used() -> None:
    with pytest.raises(ConfigError, match="data.task._target_=pathlib.Path is not a subclass of data.tasks.base.Task"):
        build_task(compose(["data=task", "+data.task={_target_: pathlib.Path}"]))
    with pytest.raises(ConfigError, match=r"_target_=os.system is not a subclass of ovq.mixers.base.SequenceMixer"):
        build_mixer(compose(["model=sw", "model.mixers.sliding_window._target_=os.system"]).model, 0)
