"""Command lines: every tool's typed options, one-line errors, exit statuses and `--help`; and the `ovq` command.

    @dataclass
    class Options:
        runs: list[str] = setting(REQUIRED, "run folders to plot", ...)
        out: str = setting("runs.png", "file to write")

    @command(Options)
    def main(options: Options) -> int: ...

`main` then takes a list of arguments (by default the process's own) and returns the exit status: 0 for success, 1 if
the work failed, 2 if a setting is wrong, 130 if interrupted. String options are taken literally, so a path may contain
`=`, commas and spaces; other values are parsed by their type (`ovq.values`).

    ovq train experiment=cpu_demo            python train.py, from any folder
    ovq eval per_position run=runs/x         python -m eval.per_position, from any folder
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from ovq.errors import ConfigError, Failure, Stopped, one_line
from ovq.report import lasting_streams
from ovq.schema import REQUIRED, describe, problems
from ovq.values import read

T = TypeVar("T")
HELP = ("-h", "--help")
Leave = Callable[[int | None, BaseException], None]
ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass
class NoOptions:
    """The options class of a tool that has no options."""


def command(
    options: type = NoOptions, *, overrides: bool = False, words: bool = False, leave: Leave | None = None
) -> Callable[[Callable[..., int | None]], Callable[..., int]]:
    """Decorator that turns a function of a tool's options into `main(argv=None) -> exit status`.

    Args:
        options: dataclass whose fields are `ovq.schema.setting`s; an instance is the function's first argument.
        overrides: also pass a list of the `key=value` arguments that are not options: overrides of the config.
        words: also pass, as the last argument, a list of the arguments without `=`.
        leave: as for `guarded`.
    """

    def decorate(body: Callable[..., int | None]) -> Callable[..., int]:
        @functools.wraps(body)
        def main(argv: list[str] | None = None) -> int:
            given = sys.argv[1:] if argv is None else list(argv)

            def run() -> int | None:
                if any(word in given for word in HELP):
                    print(help_text(sys.modules[body.__module__].__doc__ or "", options, overrides))
                    return 0
                return body(*_arguments(options, given, overrides, words))

            return guarded(run, leave or stay)

        return main

    return decorate


def stay(status: int | None, error: BaseException) -> None:
    """The default `leave` of `guarded`: do nothing after a failure."""


def guarded(body: Callable[[], int | None], leave: Leave = stay) -> int:
    """Run `body`; an error that the user can act on is printed to stderr as one line, any other as a traceback.

    Printing cannot fail meanwhile (see `ovq.report`).

    Args:
        body: returns the exit status; None: 0.
        leave: called as leave(status, error) after a failure has been printed, and as leave(None, error) before the
            exception of a bug is raised again; it may end the process.

    Returns:
        The exit status.
    """
    with lasting_streams():
        try:
            return body() or 0
        except (KeyboardInterrupt, Exception) as error:
            status, message = failure_of(error)
            if message:
                print(message, file=sys.stderr, flush=True)
            leave(status, error)
            if status is None:
                raise
            return status


def failure_of(error: BaseException) -> tuple[int | None, str]:
    """(exit status of an error, the line to print); (None, "") for a bug."""
    if interrupted(error):
        return 130, "interrupted"
    assert isinstance(error, Exception)
    status = status_of(error)
    if status is None:
        return None, ""
    if isinstance(error, Stopped):  # not an error
        return status, one_line(error)
    rank, alone = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1") == "1"
    named = f"error: {one_line(error)}" if alone else f"error: rank {rank}: {one_line(error)}"
    if status != ConfigError.status:
        return status, named
    # A wrong setting is the same on every rank; what a machine lacks (a GPU, a compiler), all of its own ranks lack.
    if rank == "0":
        return status, f"error: {one_line(error)}"
    return status, named if os.environ.get("LOCAL_RANK") == "0" else ""


def interrupted(error: BaseException | None) -> bool:
    """Whether an error is a KeyboardInterrupt, or what native code turned one into while it was being imported."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        if not isinstance(error, ImportError | SystemError):
            return False
        error = error.__cause__ or error.__context__
    return False


def status_of(error: Exception) -> int | None:
    """The exit status of an error that a user can act on; None for a bug."""
    if isinstance(error, Failure):
        return error.status
    # Operators know nothing of commands, and this module must not import torch: look up their error only if loaded.
    operators = sys.modules.get("ovq.ops.common")
    if operators is not None and isinstance(error, operators.BackendError):
        return ConfigError.status
    return 1 if isinstance(error, OSError) else None


def _arguments(options: type, argv: list[str], overrides: bool, words: bool) -> list[Any]:
    if overrides and any(arg.startswith("--config-dir") for arg in argv):
        from ovq.overrides import joined

        argv = joined(argv)
    names = [item.name for item in dataclasses.fields(options)]
    own: list[str] = []
    rest: list[str] = []
    loose: list[str] = []
    for arg in argv:
        key, equals, _ = arg.partition("=")
        if not equals:
            if not words:
                raise ConfigError(f"'{arg}' cannot be read; options are key=value, lists are [a,b]")
            loose.append(arg)
        elif key in names:
            own.append(arg)
        elif overrides and not _misspelt(key, names):
            rest.append(arg)
        else:
            raise _unknown(key, names)
    return [parse(options, own), *([rest] if overrides else []), *([loose] if words else [])]


def _misspelt(key: str, names: list[str]) -> bool:
    """Whether a key resembles an option's name and is not a setting or group of the config."""
    if not key.isidentifier() or not difflib.get_close_matches(key, names, n=1, cutoff=0.8):
        return False
    from ovq.config import Config
    from ovq.overrides import groups

    return key not in {*groups(), *(item.name for item in dataclasses.fields(Config))}


def _unknown(key: str, names: list[str]) -> ConfigError:
    close = difflib.get_close_matches(key, names, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return ConfigError(f"there is no option '{key}'; {hint}legal: {', '.join(names) or 'none'}")


def parse(options: type[T], argv: list[str]) -> T:
    """Parse `key=value` arguments into options, checking types and ranges.

    Raises:
        ConfigError: an unknown option, a value that cannot be parsed or is not legal, or a missing required option.
    """
    fields = {item.name: item for item in dataclasses.fields(cast(Any, options))}
    values = {}
    for arg in argv:
        key, _, text = arg.partition("=")
        if key not in fields:
            raise _unknown(key, list(fields))
        values[key] = read(fields[key], key, text)
    made = options(**values)
    for name in fields:
        if getattr(made, name) == REQUIRED:
            raise ConfigError(f"{name}= is required: {fields[name].metadata['help']}")
    for problem in problems(options, made):
        raise ConfigError(problem)
    return made


def help_text(doc: str, options: type, overrides: bool) -> str:
    """A module's docstring and its options."""
    lines = [doc.strip()]
    if rows := describe(options):
        lines += ["", "Options (key=value):", *rows]
    if overrides:
        lines += [
            "",
            "Any setting of the config can be overridden by its full name, as in trainer.context=4096; "
            "python train.py --help lists them.",
        ]
    return "\n".join(lines)


# --- the `ovq` command -----------------------------------------------------------------------------------------------

# The module whose `main(argv)` each `ovq` command runs.
COMMANDS = {
    "train": "train",
    "data prepare": "data.prepare",
    "data python_source": "data.python_source",
    "data train_tokenizer": "data.train_tokenizer",
    "eval accuracy": "eval.accuracy",
    "eval per_position": "eval.per_position",
    "eval harness": "eval.harness",
    "eval needle": "eval.needle",
    "eval perplexity": "eval.perplexity",
    "eval stored_state": "eval.stored_state",
    "eval plot": "eval.plot",
    "eval report": "eval.report",
    "figures fig4": "eval.figures.fig4",
    "figures fig5": "eval.figures.fig5",
    "figures fig6": "eval.figures.fig6",
    "figures fig6_code": "eval.figures.fig6_code",
    "figures fig7": "eval.figures.fig7",
    "figures fig8": "eval.figures.fig8",
    "figures memory": "eval.figures.memory",
    "figures memory_pg19": "eval.figures.memory_pg19",
    "figures sensitivity": "eval.figures.sensitivity",
    "bench cpu": "eval.bench.cpu",
    "bench compare": "eval.bench.compare",
    "bench models": "eval.bench.models",
    "bench decode": "eval.bench.decode",
    "bench ops": "eval.bench.ops",
    "bench pipeline": "eval.bench.pipeline",
    "bench cost": "eval.bench.cost",
    "bench aot": "eval.bench.aot",
    "bench gpu": "eval.bench.gpu.bench",
    "generate": "ovq.inference.generate",
    "export": "ovq.inference.export",
    "selftest": "ovq.ops.ovq_attention.selftest",
    "launch run": "launch.run",
    "launch slurm": "launch.slurm",
    "launch sweep": "launch.sweep",
    "launch plan": "launch.plan",
    "checkpoint": "ovq.train.checkpoint",
}


def main(argv: list[str] | None = None) -> int:
    """The `ovq` command: the first words select the tool, the rest are its arguments. Returns the exit status."""
    given = sys.argv[1:] if argv is None else argv
    return guarded(lambda: _dispatch(given))


def _dispatch(argv: list[str]) -> int:
    # Import this project's `data` and `eval`, even if the current folder contains folders with those names.
    sys.path.insert(0, str(ROOT))
    for count in (1, 2):
        if module := COMMANDS.get(" ".join(argv[:count])):
            return importlib.import_module(module).main(argv[count:])
    typed = " ".join(argv[:2])
    if argv and argv[0] not in HELP:
        close = difflib.get_close_matches(typed, COMMANDS, n=1)
        hint = f"did you mean 'ovq {close[0]}'? " if close else ""
        print(f"error: there is no command 'ovq {typed}'; {hint}see: ovq --help", file=sys.stderr)
        return 2
    width = max(map(len, COMMANDS))
    print("ovq: pretrain language models at long context\n")
    print("\n".join(f"  ovq {name:<{width}}  {_summary(module)}" for name, module in COMMANDS.items()))
    print("\n`ovq COMMAND --help` lists a command's options.")
    return 0


def _summary(module: str) -> str:
    """The first sentence of a module's docstring, without importing it."""
    path = ROOT / module.replace(".", "/")
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    doc = ast.get_docstring(ast.parse(source.read_text())) or ""
    return doc.split("\n\n")[0].replace("\n", " ").split(". ")[0].rstrip(".")
