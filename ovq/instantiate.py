"""Builds objects of classes that a config names by `_target_`, with their settings as keyword arguments."""

from __future__ import annotations

import importlib
import inspect
import math
import types
import typing
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, TypeVar

from ovq.errors import ConfigError, one_line
from ovq.values import KINDS

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent
LARGEST = 2**40  # no count or size of ours comes near
OURS = ("ovq", "data")  # packages whose classes any config may name


def is_ours(path: str, run_dir: Path) -> bool:
    """Whether a class path refers to a source file of this project, judged by name alone: nothing is imported.

    Run folders may lie inside the packages; what they hold is not ours.
    """
    parts = path.split(".")
    if len(parts) < 2 or parts[0] not in OURS or not all(part.isidentifier() for part in parts):
        return False
    packages = [ROOT.joinpath(*parts[:depth]) for depth in range(1, len(parts) - 1)]
    found = ROOT.joinpath(*parts[:-1])
    file = found / "__init__.py" if found.is_dir() else found.with_suffix(".py")
    regular = all((package / "__init__.py").is_file() for package in packages)
    return regular and file.is_file() and not file.resolve().is_relative_to(run_dir.resolve())


def refuse_untrusted(
    named: Iterable[tuple[str, str]], trust: Collection[str], folder: Path | str, file: Path | str
) -> None:
    """Raise ConfigError if a stored config, `file` in `folder`, names a class that is neither ours nor trusted.

    Args:
        named: (setting, class path), for each class.
        trust: class paths outside this project that may be imported.
    """
    for where, target in named:
        if target not in trust and not is_ours(target, Path(folder)):
            raise ConfigError(
                f"{file} names {where}={target}, which is not part of this project, and importing it would run "
                f"code; if you trust it, add trust=[{target}]"
            )


def get_class(path: str, kind: type[T], where: str) -> type[T]:
    """The class at a dotted path. Imports its module, but uses nothing from it before checking the class's kind.

    A path from a stored config must have passed `ovq.config.load(..., trust=...)`.

    Raises:
        ConfigError: it cannot be imported, or is not a subclass of `kind`.
    """
    module, _, name = path.rpartition(".")
    if not module:
        raise ConfigError(f"{where}._target_={path} is not the path of a class, like package.module.Class")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # importing runs the module, which may raise anything
        raise ConfigError(f"{where}._target_={path} cannot be imported: {one_line(error)}") from None
    if not (inspect.isclass(found) and issubclass(found, kind)):
        raise ConfigError(f"{where}._target_={path} is not a subclass of {kind.__module__}.{kind.__name__}")
    return found


def settings_of(cls: type, given: dict[str, Any], where: str, after: int = 0) -> dict[str, Any]:
    """All settings of a class in the order of its signature: its defaults, replaced by those given.

    Args:
        after: the number of leading parameters that are not settings.

    Raises:
        ConfigError: a setting that the class does not have, one without a default that is missing, or a value that is
            not of the type that the signature gives.
    """
    parameters = list(inspect.signature(cls).parameters.values())[after:]
    keywords = [p for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    for key in given:
        if key not in [p.name for p in keywords]:
            legal = ", ".join(p.name for p in keywords)
            raise ConfigError(f"there is no setting '{where}.{key}'; legal: {legal}")
    for p in keywords:
        if p.default is p.empty and p.name not in given:
            raise ConfigError(f"{where}.{p.name} has no value")
    try:
        hints = typing.get_type_hints(cls.__init__)  # type: ignore[misc]
    except (NameError, TypeError):  # annotations that only a type checker can read
        hints = {}
    return {
        p.name: _of_type(given[p.name], hints.get(p.name, Any), f"{where}.{p.name}") if p.name in given else p.default
        for p in keywords
    }


def _of_type(value: Any, hint: Any, name: str) -> Any:
    """A value converted to its parameter's type; only int, float, bool, str and unions of these are checked.

    Raises:
        ConfigError: it is of another type.
    """
    wanted = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if not set(wanted) <= {int, float, bool, str, types.NoneType}:
        return value
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name}={value} must be a finite number")
    if isinstance(value, (int, float)) and abs(value) >= LARGEST and int in wanted:
        raise ConfigError(f"{name}={value:g} is too large")
    if type(value) in wanted:
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if int in wanted and int(value) == value:
            return int(value)
        if float in wanted:
            return float(value)
    kinds = " or ".join(KINDS[kind.__name__] if kind is not types.NoneType else "null" for kind in wanted)
    raise ConfigError(f"{name}={'null' if value is None else value} must be {kinds}")


def instantiate(config: dict[str, Any], kind: type[T], where: str, *args: Any) -> T:
    """An instance of the subclass of `kind` that config["_target_"] names, made with `args` and the other entries as
    keyword arguments.

    Raises:
        ConfigError: the class cannot be used, or a setting is unknown or has an illegal value.
    """
    given = {key: value for key, value in config.items() if key != "_target_"}
    cls = get_class(str(config["_target_"]), kind, where)
    settings = settings_of(cls, given, where, len(args))
    try:
        return cls(*args, **settings)
    except ConfigError:  # names the setting already
        raise
    except (ValueError, TypeError, OverflowError, MemoryError) as error:
        raise ConfigError(f"{where}: {one_line(error)}") from None
