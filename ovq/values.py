"""Parse the text that a user types for a setting, by the setting's type: the same on every command line.

    read(field, "trainer.steps", "1e3")            1000
    read(field, "run_dir", "runs/x,model=sw")      "runs/x,model=sw": text is taken as it is typed

Text may contain anything that a path can: `=`, commas, spaces, `~`, brackets, letters of any script. It may be quoted.
"""

from __future__ import annotations

import dataclasses
import glob
import itertools
import os
import re
from pathlib import Path
from typing import Any

from ovq.errors import ConfigError

KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list[int]": "a list of whole numbers, like [1,2]",
    "list[float]": "a list of numbers, like [0.1,0.2]",
    "list[str]": "a list of names, like [a,b]",
}
BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
QUOTES = ("'", '"')


def kind_of(item: dataclasses.Field[Any]) -> str:
    """The type of a setting without None, as written: "int", "list[str]", "dict[str, Any]"."""
    return str(item.type).removesuffix(" | None")


def read(item: dataclasses.Field[Any], name: str, text: str) -> Any:
    """The value that `text` gives to a setting. An integral number such as 1e3 is accepted as an int.

    Raises:
        ConfigError: it is not of the setting's type.
    """
    kind = kind_of(item)
    value: Any = None
    if text == "null" and kind != str(item.type):
        return None
    if kind.startswith("list["):
        value = _list(item, name, text)
    elif text != "null":
        value = scalar(kind, text)
        if item.metadata.get("paths") and isinstance(value, str):
            value = os.path.expanduser(value)
    if value is None:
        raise ConfigError(f"{name}={text} must be {KINDS[kind]}")
    return value


def scalar(kind: str, text: str) -> Any:
    """Text as a "str", "int", "float" or "bool"; None if it is not one."""
    if kind == "str":
        return unquoted(text.strip())
    if kind == "bool":
        return BOOLS.get(text.lower())
    try:
        if kind == "int":
            return whole(text)
        return float(text)
    except (ValueError, OverflowError):
        return None


def whole(text: str) -> int:
    """An integer, possibly written as 1e6 or 4.0. Raises ValueError or OverflowError if it is not one."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if int(number) != number:
            raise
        return int(number)


def unquoted(text: str) -> str:
    """Text without the quotes around it, if there are any: in '"a" or "b"', the first and the last are no pair."""
    return text[1:-1] if len(text) > 1 and text[0] in QUOTES and text.find(text[0], 1) == len(text) - 1 else text


def bracketed(text: str) -> bool:
    """Whether the bracket that text begins with is closed at its end, as in '[a,b]', unlike that of '[1] and [2]'."""
    bare = re.sub(r"'[^']*'|\"[^\"]*\"", "", text.strip())  # without the quoted entries
    depths = list(itertools.accumulate((char == "[") - (char == "]") for char in bare))
    return min(depths[:-1], default=0) > 0 and depths[-1] == 0


def _list(item: dataclasses.Field[Any], name: str, text: str) -> list[Any] | None:
    if item.metadata.get("text") and not bracketed(text):
        return [unquoted(text)]
    if text.strip().startswith("[") and not text.strip().endswith("]") and not item.metadata.get("paths"):
        raise ConfigError(f"'{name}={text}' cannot be read; an option is key=value, lists are [a,b]")
    if item.metadata.get("paths"):
        return split_paths(text)
    if kind_of(item) == "list[str]" and not text.strip().startswith("["):
        return [unquoted(text.strip())]  # one string, whose commas are part of it
    entries = [scalar(kind_of(item)[5:-1], entry) for entry in split(text)]
    return None if None in entries else entries


def split(text: str) -> list[str]:
    """The entries of '[a,b]' or 'a', as they are typed; commas within quotes or brackets do not separate."""
    text = text.strip()
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
    entries, depth, quote = [""], 0, ""
    for place, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in QUOTES and not entries[-1].strip() and char in text[place + 1 :]:
            quote = char  # an apostrophe within a name opens no quotation
        depth += (char in "[{(") - (char in ")}]")
        if char == "," and not quote and depth <= 0:
            entries.append("")
        else:
            entries[-1] += char
    return [entry.strip() for entry in entries if entry.strip()]


def split_paths(text: str) -> list[str]:
    """The paths in 'a' or '[a,b]'.

    Run folder names contain commas themselves (runs/pg19_150m,model=sw), so each path is the longest that exists.
    """
    pieces = split(text)
    found = []
    while pieces:
        length = next((n for n in range(len(pieces), 1, -1) if Path(",".join(pieces[:n])).expanduser().exists()), 1)
        found.append(os.path.expanduser(unquoted(",".join(pieces[:length]))))
        pieces = pieces[length:]
    return found


def expand(paths: list[str], *, holding: str) -> list[str]:
    """Paths of folders with wildcards expanded, sorted within each pattern.

    A path that exists exactly as typed is not treated as a pattern, and a pattern that matches nothing is kept.

    Args:
        holding: a file that a folder must hold for a pattern to match it.
    """
    found: list[str] = []
    for path in paths:
        matches = [] if os.path.exists(path) else sorted(glob.glob(os.path.join(path, holding), recursive=True))
        found += [os.path.dirname(match) for match in matches] or [path]
    return list(dict.fromkeys(found))
