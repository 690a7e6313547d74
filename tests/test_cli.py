"""Claims about the tools' command line: options are typed and checked, errors are one line, folders do not matter."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from ovq import cli
from ovq.cli import command, parse
from ovq.errors import ConfigError, Failure
from ovq.schema import REQUIRED, one_of, setting

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Options:
    run: str = setting(REQUIRED, "the run folder")
    runs: list[str] = setting([], "run folders", paths=True)
    steps: int = setting(3, "steps", at_least=1)
    share: float | None = setting(None, "a share", above=0, at_most=1)
    lengths: list[int] = setting([1, 2], "lengths", at_least=1)
    kind: str = one_of("a", "b", help="which")
    fast: bool = setting(False, "whether")


@command(Options, overrides=True, words=True)
def tool(options: Options, overrides: list[str], words: list[str]) -> int:
    if words == ["fail"]:
        raise Failure("it\nfailed")
    if words == ["bug"]:
        raise ZeroDivisionError
    if words == ["interrupt"]:
        raise KeyboardInterrupt
    print(options, overrides, words)
    return 7


def test_text_is_taken_as_it_is_typed() -> None:
    for path in ("runs/a,model=sw", "a b", "~/x", "übung", "[odd]", "a=b"):
        assert parse(Options, [f"run={path}"]).run == path


def test_paths_in_a_list_may_hold_commas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a,model=sw", "a"):
        Path(name).mkdir()
    assert parse(Options, ["run=x", "runs=[a,model=sw,a]"]).runs == ["a,model=sw", "a"]


def test_values_have_their_types() -> None:
    options = parse(Options, ["run=x", "steps=4", "share=1", "lengths=[8,16]", "kind=b", "fast=true"])
    assert (options.steps, options.share, options.lengths, options.kind, options.fast) == (4, 1.0, [8, 16], "b", True)
    assert parse(Options, ["run=x", "lengths=5"]).lengths == [5]
    assert parse(Options, ["run=x"]).lengths == [1, 2] and parse(Options, ["run=x"]).lengths is not Options().lengths


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("steps=abc", "steps=abc must be a whole number"),
        ("steps=0", "steps=0 must be at least 1"),
        ("steps=1.5", "steps=1.5 must be a whole number"),
        ("share=0", "share=0.0 must be above 0 and at most 1"),
        ("share=nan", "share=NaN must be above 0 and at most 1"),
        ("lengths=[]", "lengths=[] must not be empty"),
        ("lengths=[1,0]", "lengths=[1,0] must be at least 1"),
        ("lengths=[a]", "lengths=[a] must be a list of whole numbers, like [1,2]"),
        ("kind=c", "kind=c is not a legal value; legal: a, b"),
        ("fast=maybe", "fast=maybe must be true or false"),
        ("stepz=3", "there is no option 'stepz'; did you mean steps? legal: run, runs, steps"),
        ("lengths=[1,", "'lengths=[1,' cannot be read"),
    ],
)
def test_a_wrong_option_is_one_line_that_says_what_is_legal(argument: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(Options, ["run=x", argument])
    assert message in str(error.value) and "\n" not in str(error.value)


LEGAL = ", ".join(item.name for item in fields(Options))


def test_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert tool(["run=x", "trainer.steps=3", "word"]) == 7
    assert "['trainer.steps=3'] ['word']" in capsys.readouterr().out
    for argv, status, line in (
        (["steps=3"], 2, "error: run= is required: the run folder"),
        (["run=x", "fail"], 1, "error: it failed"),
        (["run=x", "length=3"], 2, f"error: there is no option 'length'; did you mean lengths? legal: {LEGAL}"),
        (["run=x", "interrupt"], 130, "interrupted"),
    ):
        assert tool(argv) == status
        assert capsys.readouterr().err == f"{line}\n"
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        tool(["run=x", "bug"])


def test_help_has_a_sentence_and_the_legal_values_of_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert tool(["--help"]) == 0
    said = capsys.readouterr().out
    assert "run=(required)" in said and "the run folder" in said
    assert "a share (above 0; at most 1)" in said and "which (one of: a, b)" in said


def test_the_ovq_command_runs_from_a_folder_that_has_rooms_of_the_same_names(tmp_path: Path) -> None:
    for name in ("data", "eval", "launch", "ovq/train"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "__init__.py").write_text("raise ImportError('a stranger')")
    program = f"import sys; sys.path.append({str(ROOT)!r}); del sys.path[0]; from ovq.cli import main; sys.path.insert(0, ''); sys.exit(main())"  # noqa: E501
    for words in (["eval", "plot"], ["train"], ["data", "prepare"], ["bench", "compare"]):
        done = subprocess.run(
            [sys.executable, "-c", program, *words, "--help"], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0 and len(done.stdout.splitlines()) > 5, done.stderr


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "plott"]) == 2
    assert "there is no command 'ovq eval plott'; did you mean 'ovq eval plot'?" in capsys.readouterr().err
    assert cli.main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(f"ovq {name} " in listed for name in cli.COMMANDS)


def failures(kind: type[Failure] = Failure) -> list[type[Failure]]:
    return [kind, *(deeper for below in kind.__subclasses__() for deeper in failures(below))]


def test_every_failure_reaches_another_process_as_it_is() -> None:
    """Failures are sent between ranks, and from the processes of a pool."""
    for module in ("data.sources", "ovq.peers", "ovq.train.checkpoint_files"):
        importlib.import_module(module)
    assert len(failures()) >= 7
    for kind in failures():
        made = kind(15, "what failed") if kind.__name__ == "Stopped" else kind("what failed")
        again = pickle.loads(pickle.dumps(made))
        assert (type(again), str(again), again.status) == (kind, "what failed", made.status)


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({}, "error: no GPU"),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "16"}, "error: no GPU"),
        ({"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "16"}, ""),
        ({"RANK": "8", "LOCAL_RANK": "0", "WORLD_SIZE": "16"}, "error: rank 8: no GPU"),
    ],
)
def test_a_wrong_setting_is_named_once_on_every_machine(
    environment: dict[str, str], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli.failure_of(ConfigError("no GPU")) == (2, line)


def test_help_into_a_closed_pipe_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m eval.plot --help | true; exit ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_a_bug_met_while_handling_an_interrupt_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            cli.guarded(lambda: [][0] if False else (_ for _ in ()).throw(RuntimeError("a bug")))
