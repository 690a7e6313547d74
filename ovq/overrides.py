"""Overrides as the user types them, key=value: checked by name and by type, and rewritten so that Hydra can parse them.

Hydra's own grammar cannot parse a path with a comma, a bracket, `~` or a non-ASCII letter. Here the value of a setting
is parsed according to its type in the schema (`ovq.values`), and quoted for Hydra where necessary.

A config directory of the user's, `--config-dir=DIR`, has the layout of `configs/` and adds options to its groups.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString, Transformer
from hydra.errors import HydraException
from omegaconf import OmegaConf

from ovq.config import Config
from ovq.errors import ConfigError
from ovq.identity import within
from ovq.schema import fault_of
from ovq.values import KINDS, kind_of, read

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"
DIRECTORY = "--config-dir"
# Settings that are dictionaries whose keys the schema does not know: entries are added without Hydra's "+".
DICTIONARIES = (
    *("optim.custom", "optim.custom_schedule", "optim.groups"),
    *("trainer.lengths", "data.mixture", "data.data_files", "data.words"),
)
_SPECIAL = re.compile(r"""[][{}()'",]|^\s|\s$|^$""")  # in a text: not to be read as it stands
_PARTS = re.compile(r"(\+\+|\+|~|)([^=]*)(?:(=)(.*))?", re.DOTALL)
Dirs = Sequence[Path]


# --- groups and their options ----------------------------------------------------------------------------------------


def joined(argv: Sequence[str]) -> list[str]:
    """The arguments, with `--config-dir DIR` joined into one word, --config-dir=DIR."""
    words = list(argv)
    for place in [i for i, word in enumerate(words) if word == DIRECTORY][::-1]:
        if place + 1 == len(words):
            raise ConfigError(f"{DIRECTORY} needs a folder: {DIRECTORY} DIR")
        words[place : place + 2] = [f"{DIRECTORY}={words[place + 1]}"]
    return words


def directories(argv: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The config directories that a command line adds, and its other arguments.

    Raises:
        ConfigError: one is not a folder.
    """
    words = joined(argv)
    dirs = [Path(word.partition("=")[2]).expanduser() for word in words if word.startswith(f"{DIRECTORY}=")]
    for folder in dirs:
        if not folder.is_dir():
            raise ConfigError(f"{DIRECTORY} {folder} is not a folder; it has the layout of {CONFIG_DIR}")
    return dirs, [word for word in words if not word.startswith(f"{DIRECTORY}=")]


def groups(dirs: Dirs = ()) -> list[str]:
    """The config groups: the folders in configs/ that hold options."""
    return sorted({str(p.parent.relative_to(root)) for root in (CONFIG_DIR, *dirs) for p in root.rglob("*/*.yaml")})


def options(group: str, dirs: Dirs = ()) -> list[str]:
    """The options of one config group."""
    return sorted({p.stem for root in (CONFIG_DIR, *dirs) for p in (root / group).glob("*.yaml")})


def file_of(group: str, option: str, dirs: Dirs = ()) -> Path:
    """The file of an option."""
    return next(path for root in (CONFIG_DIR, *dirs) if (path := root / group / f"{option}.yaml").is_file())


# --- one override ----------------------------------------------------------------------------------------------------


def parse(override: str) -> Override | None:
    """An override as Hydra reads it; None if it cannot."""
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException:
        return None


def sweep_values(override: str) -> list[str]:
    """The overrides that `key=a,b` stands for in a sweep; only the override itself if it gives a single value."""
    parsed = parse(override)
    if parsed is None or not parsed.is_sweep_override():
        return [override]
    try:
        return [f"{override.partition('=')[0]}={_as_typed(value)}" for value in parsed.sweep_iterator()]
    except HydraException:
        raise ConfigError(f"{override} lists no values; a sweep takes key=a,b, choice(a,b) or range(1,4)") from None


def _as_typed(value: Any) -> str:
    """One value of a sweep as a user would type it alone. Hydra's text has escapes, which would be part of a path."""
    if isinstance(value, list):
        return "[" + ",".join(map(_as_typed, value)) + "]"
    if not isinstance(value, str):
        return str(Transformer.str(value))
    return value if "${" in value or not _SPECIAL.search(value) else _for_hydra(value)


def canonical(overrides: Iterable[str], dirs: Dirs = ()) -> list[str]:
    """Overrides that Hydra can read and that name settings, groups and options that exist.

    Raises:
        ConfigError: a name does not exist, or a value is not of the setting's type; the line lists what is legal.
    """
    checked, known = [], groups(dirs)
    for override in overrides:
        prefix, key, equals, text = parts_of(override)
        if not equals and prefix != "~":
            raise ConfigError(f"'{override}' cannot be read; an override is key=value, lists are [a,b]")
        group = key.partition("@")[0]
        if group in known:
            if prefix != "~" and text == "null" and group in _OPTIONAL:
                continue  # the same as leaving it out
            _check_group(override, prefix, key, text, dirs)
        else:
            _check_key(key, text, dirs, known)
        checked.append(literal(override))
    return [re.sub(r"^(\+*)init_from=", r"\1init_from.path=", override) for override in checked]


_OPTIONAL = ("experiment", "scale", "data/task")  # groups from which nothing need be chosen


def parts_of(override: str) -> tuple[str, str, str, str]:
    """Its prefix (+, ++, ~ or nothing), key, "=" if there is one, and value."""
    found = _PARTS.fullmatch(override)
    assert found is not None
    return found[1], found[2], found[3] or "", found[4] or ""


def literal(override: str) -> str:
    """The same override, quoted where Hydra could not parse it or would parse it as a type other than the setting's.

    Raises:
        ConfigError: the value is not of the setting's type, or several values are given, which only a sweep accepts.
    """
    prefix, key, equals, text = parts_of(override)
    item = field_of("init_from.path" if key == "init_from" else key)
    parsed = parse(override)
    kind = kind_of(item) if item is not None else ""
    if not equals or prefix == "~":
        return override
    free = kind == "str" and item is not None and "choices" not in item.metadata
    if parsed is not None and parsed.is_sweep_override() and not free:
        raise ConfigError(
            f"{override} gives several values, and this is one run; for a run with each: "
            f"python -m launch.sweep {override} ..."
        )
    if item is None or kind not in KINDS:
        if parsed is None:
            raise ConfigError(f"'{override}' cannot be read; an override is key=value, lists are [a,b]")
        # Hydra adds no key to a dictionary unless told to.
        return f"++{key}={text}" if within(key, DICTIONARIES) and not prefix else override
    if "${" in text:  # resolved by OmegaConf
        return override if parsed is not None else f"{prefix}{key}={_for_hydra(text)}"
    if kind.startswith("list") and not text.startswith("["):
        raise ConfigError(f"{override}: a list is expected, as in {key}=[a,b]")
    quoted = "str" in kind and ("'" in text or '"' in text) and parsed is not None and not parsed.is_sweep_override()
    value = parsed.value() if quoted and parsed is not None else read(item, key, text)  # Hydra knows its own escapes
    if quoted and item.metadata.get("paths"):
        value = [os.path.expanduser(v) for v in value] if isinstance(value, list) else os.path.expanduser(str(value))
    if fault := fault_of(item, value):
        raise ConfigError(f"{key}={text} {fault}")
    if parsed is not None and not parsed.is_sweep_override() and _same(parsed.value(), value):
        return override
    return f"{prefix}{key}={_for_hydra(value)}"


def _same(parsed: Any, value: Any) -> bool:
    if isinstance(value, list):
        return isinstance(parsed, list) and len(parsed) == len(value) and all(map(_same, parsed, value))
    if isinstance(value, float):
        return type(parsed) in (int, float) and parsed == value
    return type(parsed) is type(value) and bool(parsed == value)


def _for_hydra(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ",".join(map(_for_hydra, value)) + "]"
    if isinstance(value, str):
        return QuotedString(text=value, quote=Quote.single).with_quotes()
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def field_of(key: str) -> dataclasses.Field[Any] | None:
    """The schema's field of a setting; None if the key is no setting, is inside a dictionary, or holds settings."""
    schema: Any = Config
    item = None
    for part in key.split("."):
        if not dataclasses.is_dataclass(schema):
            return None
        item = {each.name: each for each in dataclasses.fields(schema)}.get(part)
        if item is None:
            return None
        schema = item.default_factory
    return None if dataclasses.is_dataclass(schema) else item


# --- checks ----------------------------------------------------------------------------------------------------------


def _check_group(override: str, prefix: str, key: str, text: str, dirs: Dirs) -> None:
    group = key.partition("@")[0]
    legal = options(group, dirs)
    if prefix == "~" and not text:
        return
    literal(override)  # one value
    if text not in legal:
        raise ConfigError(f"{key}={text} does not exist; legal: {', '.join(legal)}")
    if group == "model/mixer" and group == key and not prefix:
        raise ConfigError(f"a mixer is added under a name: +{group}@model.mixers.{text}={text}, then model.pattern")


def _check_key(key: str, text: str, dirs: Dirs, known: list[str]) -> None:
    slashed = key.replace(".", "/")
    if slashed in known and not text.startswith("{"):
        legal = options(slashed, dirs)
        chosen = text if text in legal else "NAME"
        group = f"+{slashed}@model.mixers.{chosen}" if slashed == "model/mixer" else slashed
        raise ConfigError(f"{key}={text} chooses nothing: write {group}={chosen}; legal: {', '.join(legal)}")
    group, _, last = key.rpartition(".")
    item = field_of(key)
    if last == "name" and group in known and item is not None and "choices" not in item.metadata:
        legal = options(group, dirs)
        chosen = text if text in legal else "NAME"
        raise ConfigError(
            f"{key}={text} would only be a label: write {group}={chosen}; legal: {', '.join(legal)}, "
            f"or one of your own in {DIRECTORY} DIR"
        )
    dotted = key.replace("/", ".")
    if key != dotted and field_of(dotted) is not None:
        raise ConfigError(f"there is no group '{key}'; did you mean the setting {dotted}={text}?")
    _check_path(key, dirs, known)


def _check_path(key: str, dirs: Dirs, known: list[str]) -> None:
    schema: Any = Config
    parts = key.split(".")
    for depth, part in enumerate(parts):
        fields = {item.name: item for item in dataclasses.fields(schema)}
        if part not in fields:
            legal = list(dict.fromkeys([*fields, *(known if depth == 0 else [])]))
            close = difflib.get_close_matches(part, legal, n=1)
            hint = f"did you mean {'.'.join([*parts[:depth], close[0]])}? " if close else ""
            raise ConfigError(f"there is no setting '{key}'; {hint}legal: {', '.join(legal)}")
        schema = fields[part].default_factory
        if not dataclasses.is_dataclass(schema):
            if depth + 1 < len(parts) and "dict" not in str(fields[part].type):
                raise ConfigError(f"there is no setting '{key}'; '{'.'.join(parts[: depth + 1])}' is a single value")
            if parts[:2] == ["model", "mixers"] and len(parts) > 3 and parts[2] in options("model/mixer", dirs):
                _check_mixer_key(parts[2], parts[3], dirs)
            return  # the keys of other dictionaries are checked by the code that reads them


def _check_mixer_key(mixer: str, name: str, dirs: Dirs) -> None:
    settings: Any = OmegaConf.load(file_of("model/mixer", mixer, dirs))
    if name in settings:
        return
    legal = ", ".join(map(str, settings))
    raise ConfigError(f"there is no setting 'model.mixers.{mixer}.{name}'; legal: {legal}")
