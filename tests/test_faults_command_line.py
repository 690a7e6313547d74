"""Claims about the command line: it accepts any path, shows every setting, and takes user-defined options."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from typing import Any

import pytest

import train
from eval.plot import main as plot
from launch.sweep import expand as jobs_of
from ovq import cli, config
from ovq.compose import compose, help_text, own_settings, run_dir_of
from ovq.errors import ConfigError
from ovq.overrides import file_of, literal, options, parse, sweep_values
from ovq.values import expand

ROOT = Path(__file__).resolve().parent.parent

# --- values ----------------------------------------------------------------------------------------------------------

PATHS = (
    *("runs/x,model=sw", "a=b", "runs/a b", "übung/日本", "a~b", "runs/(x)", "runs/[x]", "[odd]", "runs/{x}", "it's"),
    *("a:b", "a#b&c", "100%", "back\\slash", "tail\\", 'a"b', "2024", "1e3", "true", "010", "a;b|c", "$x", "x?*"),
)


@pytest.mark.parametrize("path", PATHS)
def test_a_path_is_taken_as_it_is_typed(path: str) -> None:
    for key in ("run_dir", "runs_root", "resume", "init_from", "tokenizer.model_path", "data.text_field", "name"):
        read = parse(literal(f"{key}={path}"))
        assert read is not None and str(read.value()) == path and type(read.value()) is not float
        assert literal(literal(f"{key}={path}")) == literal(f"{key}={path}")
    read = parse(literal(f"data.train=[{path}]"))
    assert read is not None and read.value() == (path.split(",") if "," in path else [path])


def test_all_of_them_reach_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,model=sw").mkdir()
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", f"{tmp_path}/home")
    line = [
        "run_dir=~/übung, a=b [1] ~x", "init_from=runs/x,model=sw", "resume='quoted, text'", "data.title_field=null",
        "data=text", "data.train=[a,model=sw,b c.txt,'d,e.txt',~/f.txt]", "tokenizer.model_path=${oc.env:HOME}/ü.model",
        "tokenizer=sentencepiece",
    ]  # fmt: skip
    cfg = compose(line)
    assert run_dir_of(cfg, line) == tmp_path / "home" / "übung, a=b [1] ~x"
    assert (cfg.init_from.path, cfg.resume, cfg.data.title_field) == ("runs/x,model=sw", "quoted, text", None)
    assert list(cfg.data.train) == ["a,model=sw", "b c.txt", "d,e.txt", f"{tmp_path}/home/f.txt"]
    assert cfg.tokenizer.model_path == f"{tmp_path}/home/ü.model"


def test_a_dry_run_shows_the_folder_as_it_was_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = f"{tmp_path}/übung, a=b [1]"
    line = ["data=recall", "model=sw", "model.num_layers=1", f"run_dir={folder}", "dry_run=true"]
    assert train.main(line) == 0
    assert folder in capsys.readouterr().out


def test_a_sweep_reads_a_path_as_one_value_and_a_list_as_several(tmp_path: Path) -> None:
    assert sweep_values("init_from=runs/x,model=sw") == ["init_from=runs/x,model=sw"]
    assert sweep_values("seed=0,1") == ["seed=0", "seed=1"]
    for endless in ("optim.lr=interval(0,1)", "model=glob(*)"):
        with pytest.raises(ConfigError, match="lists no values; a sweep takes key=a,b, choice"):
            sweep_values(endless)
    assert sweep_values("init_from='a,b','c'") == ["init_from='a,b'", "init_from='c'"]
    assert sweep_values("data.train=[hf://x/y,z],[y z]") == ["data.train=[hf://x/y,z]", "data.train=[y z]"]
    jobs = jobs_of([f"runs_root={tmp_path}/ü,x=1", "seed=0,1"])
    assert [job.run_dir.parent for job in jobs] == [tmp_path / "ü,x=1"] * 2 and jobs[0].run_dir != jobs[1].run_dir


@pytest.mark.parametrize("paths", [["hf://a/b@c", "hf://c/d"], ["my runs/a:1", "b"], ["a\\b", "c"], ["'a,b'", "'c'"]])
def test_a_swept_path_is_the_one_given_alone(paths: list[str]) -> None:
    swept = sweep_values(f"init_from={','.join(paths)}")
    alone = [f"init_from={path}" for path in paths]
    for each, one in zip(swept, alone, strict=True):
        assert compose([each]).init_from.path == compose([one]).init_from.path
        assert run_dir_of(compose([each]), [each]) == run_dir_of(compose([one]), [one])


def test_a_pattern_in_runs_stands_for_the_run_folders_it_matches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = compose(["model=sw"])
    for name in ("b,seed=1", "a [1]"):
        config.save(cfg, tmp_path / name)
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n')
    (tmp_path / "bench").mkdir()
    assert expand([f"{tmp_path}/*"], holding="config.yaml") == [f"{tmp_path}/a [1]", f"{tmp_path}/b,seed=1"]
    assert expand([f"{tmp_path}/a [1]", f"{tmp_path}/no*"], holding="config.yaml")[1] == f"{tmp_path}/no*"
    out = tmp_path / "two.PNG"
    assert plot([f"runs=[{tmp_path}/*]", "kind=training", f"out={out}"]) == 0, capsys.readouterr().err
    assert out.stat().st_size > 1000


# --- user-defined options --------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A config directory with one option of every kind that a user can add."""
    files = {
        "model/mine.yaml": "defaults:\n  - size: small\n  - mixer@mixers.near: near\nname: mine\npattern: [near]\n",
        "model/size/small.yaml": "# @package model\nsize: small\nnum_layers: 1\ndim: 32\nnum_heads: 2\n"
        "num_kv_heads: 2\nhead_dim: 16\nffn_dim: 48\n",
        "model/mixer/near.yaml": "_target_: ovq.mixers.sliding_window.SlidingWindow\nwindow: 3  # tokens\n",
        "data/task/short.yaml": "_target_: data.tasks.recall.RecallTask\nkey_vocab: 64  # distinct keys\n",
        "experiment/quick.yaml": "# @package _global_\ndefaults:\n  - override /model: mine\nname: quick\n"
        "trainer:\n  steps: 3\n",
    }
    for name, text in files.items():
        (tmp_path / "own, [1]" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own, [1]" / name).write_text(text)
    return tmp_path / "own, [1]"


def test_a_config_directory_of_ones_own_adds_options_to_every_group(own: Path) -> None:
    line = ["--config-dir", str(own), "experiment=quick", "model.mixers.near.window=4"]
    cfg = compose(line)
    assert (cfg.name, cfg.trainer.steps, cfg.model.dim) == ("quick", 3, 32)
    assert cfg.model.mixers["near"]["window"] == 4
    assert run_dir_of(cfg, line).name.startswith("quick")
    cfg = compose([f"--config-dir={own}", "data=task", "data/task=short"])
    assert cfg.data.task["key_vocab"] == 64
    assert "model.mixers.near.window=3" in help_text([own]) and " mine " in help_text([own])
    with pytest.raises(ConfigError, match=r"model.mixers.near.windoww'; legal: _target_, window"):
        compose([f"--config-dir={own}", "experiment=quick", "model.mixers.near.windoww=4"])


def test_a_config_directory_that_is_wrong_is_one_line(own: Path) -> None:
    with pytest.raises(ConfigError, match=r"--config-dir nowhere is not a folder"):
        compose(["--config-dir", "nowhere"])
    with pytest.raises(ConfigError, match=r"--config-dir needs a folder"):
        compose(["--config-dir"])
    (own / "experiment" / "bad.yaml").write_text("trainer: [1\n")
    with pytest.raises(ConfigError) as error:
        compose([f"--config-dir={own}", "experiment=bad"])
    assert "\n" not in str(error.value) and "bad" in str(error.value)


# --- help ------------------------------------------------------------------------------------------------------------


def programs() -> list[str]:
    """The modules that can be run with `python -m`."""
    files = [ROOT / "train.py", *(f for room in ("ovq", "data", "eval", "launch") for f in (ROOT / room).rglob("*.py"))]
    named = [file for file in files if file.name == "__main__.py" or 'if __name__ == "__main__"' in file.read_text()]
    return [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in named]


NO_COMMAND = {  # set-up, child processes of other programs, and aliases
    *("launch.install", "launch.lock", "launch.__main__", "ovq.__main__", "eval.bench.gpu.__main__"),
    *("ovq.ops.ovq_attention.verify", "eval.bench.gpu.group"),
}


def test_every_program_is_a_command() -> None:
    assert set(cli.COMMANDS.values()) - {"eval.bench.gpu.bench"} == set(programs()) - NO_COMMAND


@pytest.mark.parametrize("program", sorted(set(programs()) - {"ovq.__main__"}))
def test_help_of_every_program_works(
    program: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", [program, "--help"])
    main = importlib.import_module(program).main
    try:
        status = main() if program == "launch.install" else main(["--help"])
    except SystemExit as ended:  # argparse
        status = ended.code
    said = capsys.readouterr()
    assert (status, said.err) == (0, "") and len(said.out.splitlines()) >= 2
    lines = [line for line in said.out.splitlines() if re.match(r"  [\w.]+=\S*  ", line)]
    assert all(len(line.split("=", 1)[1].strip()) > 8 for line in lines)


def test_every_setting_of_a_mixer_and_a_task_is_shown_with_a_sentence() -> None:
    text = help_text()
    for group in ("model/mixer", "data/task"):
        for option in options(group):
            path = file_of(group, option)
            rows: list[Any] = own_settings(path, "")
            assert len(rows) == sum(":" in line for line in path.read_text().splitlines()) - 1
            for name, sentence in rows:
                assert len(sentence) > 5 and sentence in text, (option, name)


def test_no_recipe_runs_a_script_whose_first_line_is_a_path() -> None:
    """Such scripts break when a clone is moved or renamed."""
    for file in ("Makefile", ".ci/run"):
        assert not re.findall(r"(?:\$\(BIN\)|\.venv/bin)/(?!python\b)\w+", (ROOT / file).read_text()), file
    ast.parse((ROOT / "ovq" / "__main__.py").read_text())
