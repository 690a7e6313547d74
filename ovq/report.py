"""Output that cannot stop the work: a closed pipe, a full disk under a log or a missing glyph costs text, not a run.

`lasting_streams` is installed once, by `ovq.cli.guarded`, and covers whatever writes to sys.stdout and sys.stderr:
print, warnings, logging, progress bars, libraries. `reporting` is for everything else that only presents results: a
picture, a table, a summary on the screen, metrics sent to a service.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from ovq.errors import one_line

LOST = (OSError, ValueError)  # a broken pipe, a full disk, a terminal that was closed; a file object that was closed


class LastingStream:
    """A text stream whose `write` and `flush` never raise; everything else is delegated to the stream.

    Text that the stream cannot encode is written with backslash escapes; text that it cannot take is dropped.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding or "ascii"
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except LOST:
            pass
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with contextlib.suppress(*LOST):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def lasting_streams() -> Iterator[None]:
    """Make sys.stdout and sys.stderr lasting within the `with` block.

    A stream that turns out broken is redirected to /dev/null at the end: Python flushes both once more at exit, and
    would turn status 0 into 120 if that failed.
    """
    if isinstance(sys.stdout, LastingStream) and isinstance(sys.stderr, LastingStream):
        yield
        return
    _open_missing()
    with open(os.devnull, "w") as nowhere:
        before = sys.stdout, sys.stderr
        streams = [stream or nowhere for stream in before]  # None if the process was started without one
        sys.stdout, sys.stderr = (LastingStream(stream) for stream in streams)  # type: ignore[assignment]
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before
            for stream in streams:
                _flush_or_discard(stream)


@contextlib.contextmanager
def reporting(what: str, again: str = "") -> Iterator[None]:
    """Let no error within the `with` block end the work: it costs only `what`, and one line on stderr says so, once.

    A library's SystemExit counts as an error (some exit if they lack an API key); a KeyboardInterrupt does not.

    Args:
        what: what the block produces, for the message, as in "the plot of the evaluation".
        again: a command that produces it later.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        later = f"; make it later: {again}" if again else ""
        tell_once(f"{what}: not made ({one_line(error)[:MOST_QUOTED]}); continuing{later}")


def tell_once(line: str) -> None:
    """Print a line to stderr, unless this process has printed it before."""
    if line not in _told:
        _told.add(line)
        print(line, file=sys.stderr, flush=True)


def figures(values: Mapping[str, float | None]) -> str:
    """Results as one line for people to read: 'loss 2.9957  perplexity 20'. The files have all digits."""
    return "  ".join(f"{name} {readable(value)}" for name, value in values.items() if value is not None)


def readable(value: Any) -> str:
    """A result formatted for people: five digits, no powers of ten. Of a perplexity over a million, such as the word
    perplexity of a byte-level model, the exact value says nothing more."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return str(value)
    if value != value or abs(value) >= MOST_READ:
        return f"{value:,}" if isinstance(value, int) else "over a million" if value > 0 else f"{value}"
    return f"{value:,}" if isinstance(value, int) or value == round(value) and abs(value) >= 1000 else f"{value:.5g}"


MOST_READ = 1e6


def typed(key: str, value: object) -> str:
    """key=value as it is typed in a shell for train.py, for messages: quoted where the shell or Hydra needs that."""
    text = str(value)
    if text and all(c.isascii() and (c.isalnum() or c in "/._-+") for c in text):
        return f"{key}={text}"
    return shlex.quote(f"{key}='{text}'") if any(c in text for c in "'\"$`\\!") else f"{key}=\"'{text}'\""


MOST_QUOTED = 200  # characters of an error that `reporting` quotes
_told: set[str] = set()  # lines that this process has printed


def write_error(text: str) -> None:
    """Write to file descriptor 2 unbuffered, for signal handlers: they may have interrupted a `print`."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


def _open_missing() -> None:
    """Open descriptors 0 to 2 where they are closed, or the next file opened would receive what is meant for stderr."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one


def _flush_or_discard(stream: TextIO) -> None:
    try:
        stream.flush()
    except LOST:
        with contextlib.suppress(*LOST):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
            stream.flush()
