"""Settings as dataclass fields, each with its type, default, legal range and a sentence of help in one place.

    @dataclass
    class Options:
        out: str = setting("runs.png", "file to write")
        repeats: int = setting(3, "timed repetitions", at_least=1)

The run config (`ovq.config`) and the options of every tool (`ovq.cli`) are such dataclasses.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator
from dataclasses import MISSING, field
from typing import Any

REQUIRED = "???"  # OmegaConf's missing value: a setting without a default


def setting(
    default: Any,
    help: str,
    *,
    choices: tuple[Any, ...] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    length: int | None = None,
    endings: tuple[str, ...] | None = None,
    writes: str | None = None,
    paths: bool = False,
    empty: bool = False,
    text: bool = False,
) -> Any:
    """A dataclass field with help and legal values; a list or dictionary default is copied for each instance.

    Args:
        default: the default, or REQUIRED if there is none.
        help: one sentence, with the unit, without a full stop.
        choices: the legal values.
        at_least, above, at_most, below: bounds on a number, or on each number in a list; NaN and infinity are never
            legal. None is always legal for a setting whose type allows it.
        length: the number of entries of a list.
        endings: the legal endings of a file's name, as in (".png", ".pdf").
        empty: whether a list may be empty; one that is empty by default always may.
        writes: "file" or "folder", if one is written at the path: an existing path of the other kind is refused.
        paths: the value is a path, or a list of paths, which on a command line may contain commas; `~` is expanded.
        text: a list of free texts: on a command line, one that is not in brackets is kept with its spaces.
    """
    limits: dict[str, Any] = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    limits |= {"choices": choices, "length": length, "endings": endings, "writes": writes}
    metadata = {"help": help, **{name: limit for name, limit in limits.items() if limit is not None}}
    metadata |= {name: True for name, given in (("empty", empty), ("text", text)) if given}
    if paths or writes:
        metadata["paths"] = True
    if isinstance(default, (list, dict)):
        kept = default
        return field(default_factory=lambda: type(kept)(kept), metadata=metadata)
    return field(default=default, metadata=metadata)


def one_of(*choices: str, help: str) -> Any:
    """A string setting with a closed list of legal values; the first is the default."""
    return setting(choices[0], help, choices=choices)


def problems(schema: Any, values: Any, prefix: str = "") -> Iterator[str]:
    """What is illegal among the attributes of `values`, one line per setting: 'trainer.steps=0 must be at least 1'."""
    for item in dataclasses.fields(schema):
        value = _value(values, item.name)
        if dataclasses.is_dataclass(item.default_factory):
            yield from problems(item.default_factory, value, f"{prefix}{item.name}.")
            continue
        if fault := fault_of(item, value):
            yield f"{prefix}{item.name}={_shown(value)} {fault}"


def fault_of(item: Any, value: Any) -> str | None:
    """What is illegal about the value of one setting, as in 'must be at least 1'; None if it is legal."""
    if value is None or value == REQUIRED:
        return None
    if not _is_list(value):
        return _fault(value, item.metadata)
    if not len(value) and _default(item) != [] and not item.metadata.get("empty"):
        return "must not be empty"
    if len(value) != item.metadata.get("length", len(value)):
        return f"must have {item.metadata['length']} entries"
    return next((fault for each in value if (fault := _fault(each, item.metadata))), None)


def describe(schema: Any, prefix: str = "") -> list[str]:
    """Lines of two columns for `--help`: 'name=default   help (legal values)'."""
    return columns(list(_rows(schema, prefix)))


def columns(rows: list[tuple[str, str]]) -> list[str]:
    """Rows of (setting, help) as lines for `--help`."""
    width = min(44, max((len(name) for name, _ in rows), default=0))
    return [f"  {name:<{width}}  {text}".rstrip() for name, text in rows]


def _rows(schema: Any, prefix: str) -> Iterator[tuple[str, str]]:
    for item in dataclasses.fields(schema):
        if dataclasses.is_dataclass(item.default_factory):
            yield from _rows(item.default_factory, f"{prefix}{item.name}.")
            continue
        default = _default(item)
        shown = "(required)" if default == REQUIRED else _shown(default)
        yield f"{prefix}{item.name}={shown}", item.metadata.get("help", "") + _legal(item.metadata)


def _default(item: Any) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


def _legal(limits: Any) -> str:
    parts = [f"{word} {_plain(limits[name])}" for name, word in _BOUNDS if name in limits]
    if "length" in limits:
        parts.append(f"{limits['length']} entries")
    if "choices" in limits:
        parts.append("one of: " + ", ".join(map(str, limits["choices"])))
    if "endings" in limits:
        parts.append(", ".join(limits["endings"]))
    return f" ({'; '.join(parts)})" if parts else ""


_BOUNDS = (("at_least", "at least"), ("above", "above"), ("at_most", "at most"), ("below", "below"))


def _plain(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def _fault(value: Any, limits: Any) -> str | None:
    choices = limits.get("choices")
    if choices and value not in choices:
        return f"is not a legal value; legal: {', '.join(map(str, choices))}"
    if limits.get("writes") == "file" and os.path.isdir(value):
        return "is a folder; name a file"
    if limits.get("writes") == "folder" and os.path.isfile(value):
        return "is a file; name a folder"
    endings = limits.get("endings")
    if endings and not str(value).lower().endswith(endings):
        return f"is not a file name that can be written; legal endings: {', '.join(endings)}"
    bounds = [(name, word, limits[name]) for name, word in _BOUNDS if name in limits]
    for name, _, bound in bounds:
        # Tested this way round so that NaN, which compares false with everything, violates every bound.
        holds = {
            "at_least": value >= bound, "above": value > bound, "at_most": value <= bound, "below": value < bound
        }[name]  # fmt: skip
        if not holds:
            return f"must be {' and '.join(f'{w} {_plain(b)}' for _, w, b in bounds)}"
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    return None


def _value(values: Any, name: str) -> Any:
    """A setting's value, or REQUIRED if an OmegaConf node has none yet."""
    from omegaconf import OmegaConf

    return REQUIRED if OmegaConf.is_config(values) and OmegaConf.is_missing(values, name) else getattr(values, name)


def _is_list(value: Any) -> bool:
    return not isinstance(value, (str, bytes, dict)) and hasattr(value, "__iter__") and not hasattr(value, "items")


def _shown(value: Any) -> str:
    if _is_list(value):
        return "[" + ",".join(_shown(each) for each in value) + "]"
    return value if isinstance(value, str) else json.dumps(value, default=str)
