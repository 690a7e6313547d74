"""Argument parsing shared by the launch commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection


def read(parser: argparse.ArgumentParser, argv: list[str] | None, literal: Collection[str] = ()) -> argparse.Namespace:
    """Parse options and settings in any order; everything after `--` is a setting. Adds `overrides`, all settings.

    Args:
        literal: options whose value may begin with a hyphen.
    """
    given = sys.argv[1:] if argv is None else argv
    end = given.index("--") if "--" in given else len(given)
    own: list[str] = []
    for word in given[:end]:
        if own and own[-1] in literal:
            own[-1] += f"={word}"
        else:
            own.append(word)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, as train.py takes them")
    options = parser.parse_intermixed_args(own)
    options.overrides = [*options.overrides, *given[end + 1 :]]
    return options


def positive(text: str) -> int:
    """An option's value: a whole number of 1 or more."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number
