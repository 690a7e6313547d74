"""Errors that a user can act on: their message is one line, and the command line prints it without a traceback."""

from __future__ import annotations

import re


class Failure(Exception):
    """Something a user can act on. The message is one line: what failed, and what to do about it.

    `status` is the exit status of a command that ends with it: 1 where work failed, 2 where a setting is wrong.
    """

    status = 1


class ConfigError(Failure, ValueError):
    """A setting that cannot be used. The message is one line: the key, what is wrong with it, and the legal values."""

    status = 2


class Stopped(Failure):
    """A signal ended the work in an orderly way. The message is one line: what is kept, and how to continue."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number, self.status = number, 128 + number

    def __reduce__(self) -> tuple[type, tuple[int, str]]:
        return type(self), (self.number, str(self))


class TrainingError(Failure, RuntimeError):
    """Training cannot go on; the message is one line that says at which step, and what was not done."""


def omegaconf_message(error: Exception) -> str:
    """OmegaConf's message on one line, with the key in front."""
    key = getattr(error, "full_key", None)
    if unset := re.search(r"Environment variable '(\w+)' not found", str(error)):
        return (
            f"{key or 'config'}: the environment variable {unset[1]} is not set; set it, or give a default: "
            f"${{oc.env:{unset[1]},DEFAULT}}"
        )
    return f"{key or 'config'}: {' '.join(str(error).split('full_key:')[0].split())}"


LONGEST = 800  # characters of a message


def one_line(error: BaseException | str) -> str:
    """The message of any exception on one line, or its type if it has none. A long message is cut in the middle."""
    text = str(error)
    if len(text) > 4 * LONGEST:  # what a parser quotes may be megabytes
        text = f"{text[: 2 * LONGEST]} {text[-2 * LONGEST :]}"
    text = " ".join(text.split()) or type(error).__name__
    if len(text) > LONGEST:  # what is wrong comes first, and what to do about it last
        text = f"{text[: LONGEST * 2 // 3]} ... {text[-LONGEST // 3 :]}"
    return text
