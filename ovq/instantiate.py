"""Objects of classes that a config names by `_target_`, with their settings as keyword arguments."""

from __future__ import annotations

import importlib
import inspect
from typing import Any, TypeVar

from ovq.errors import ConfigError, one_line

T = TypeVar("T")


def get_class(path: str, kind: type[T], where: str) -> type[T]:
    """The class at a dotted path.

    Raises:
        ConfigError: it cannot be imported, or is not a subclass of `kind`.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # importing runs the module, which may raise anything
        raise ConfigError(f"{where}._target_={path} cannot be imported: {one_line(error)}") from None
    if not (inspect.isclass(found) and issubclass(found, kind)):
        raise ConfigError(f"{where}._target_={path} is not a subclass of {kind.__module__}.{kind.__name__}")
    return found


def settings_of(cls: type, given: dict[str, Any], where: str) -> dict[str, Any]:
    """All settings of a class, its defaults replaced by those given, in the order of its signature.

    Raises:
        ConfigError: one that the class does not have, or one without a default that is not given.
    """
    keywords = [p for p in inspect.signature(cls).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for key in given:
        if key not in [p.name for p in keywords]:
            legal = ", ".join(p.name for p in keywords)
            raise ConfigError(f"there is no setting '{where}.{key}'; legal: {legal}")
    for p in keywords:
        if p.default is p.empty and p.name not in given:
            raise ConfigError(f"{where}.{p.name} has no value")
    return {p.name: given.get(p.name, p.default) for p in keywords}


def instantiate(config: dict[str, Any], kind: type[T], where: str, *args: Any) -> T:
    """`kind`'s subclass named by config["_target_"], called with `args` and the other entries as keywords.

    Raises:
        ConfigError: the class cannot be used, or a setting is unknown or has an illegal value.
    """
    given = {key: value for key, value in config.items() if key != "_target_"}
    cls = get_class(config["_target_"], kind, where)
    settings = settings_of(cls, given, where)
    try:
        return cls(*args, **settings)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where}: {error}") from None
