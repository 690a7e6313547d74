"""Whether a run would be evaluated on documents that it trains on: the same files, or the same rows of a split.

Copies of a text in other files are noticed in prepared data only, which hold a checksum of each document.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np

from data.build import build_tokenizer, build_tokens, has_split, sources_of
from data.describe import is_remote
from data.prepared import PreparedTokens
from data.sources import DataError, find_files
from data.tokenizer import Tokenizer
from ovq.config import Config
from ovq.config_data import FROM_FILES
from ovq.errors import ConfigError

SCALE = 10**12  # rows that a split is taken to have, to compare percentages with each other


def trained_on(cfg: Config, split: str) -> str:
    """What of a split is in the training data as well, as one line; empty if nothing is, or it cannot be opened."""
    sources = [source for source in sources_of(cfg).values() if has_split(source, split)]
    try:
        trained = {path for source in sources_of(cfg).values() for path in _paths(source, "train")}
        held_out = sorted({path for source in sources for path in _paths(source, split)})
    except ConfigError:  # reported where they are opened
        return ""
    found = [path for path in held_out if path in trained]
    if found:
        what = f"{len(found)} of the {len(held_out)} {split} files, such as {found[0]},"
        return _line(f"{what} {'are' if len(found) > 1 else 'is'}", split)
    for data in (source.data for source in sources if source.data.kind == "datasets"):
        for name in getattr(data, split):
            if any(_meet(trained_name, name) for trained_name in data.train):
                return _line(f"documents of data.{split}={name} are", split)
    found, of = _same_documents(cfg, split)
    if found:
        what = f"{len(found)} of the {of} {split} documents, such as {found[0]},"
        return _line(f"{what} {'are' if len(found) > 1 else 'is'}", split)
    return ""


def _line(found: str, split: str) -> str:
    return (
        f"{found} also trained on (data.train), so the loss would not be that of unseen text: leave them out of "
        f"data.train, or of data.{split}"
    )


def _paths(source: Config, split: str) -> Iterator[str]:
    """The files of a split, if they are on this machine."""
    if source.data.kind in FROM_FILES and getattr(source.data, split) and not is_remote(source, split):
        yield from (os.path.realpath(file.path) for file in find_files(source.data, split)[0])


def _same_documents(cfg: Config, split: str) -> tuple[list[str], int]:
    """Where the prepared documents of a split are that are trained on as well, and how many the split has."""
    if all(source.data.kind != "memmap" for source in sources_of(cfg).values()):
        return [], 0
    try:
        tokenizer = build_tokenizer(cfg)
        trained = [tokens.checksums() for tokens in _prepared(cfg, tokenizer, "train")]
        held_out = _prepared(cfg, tokenizer, split) if trained else []
        found = [np.isin(sums := tokens.checksums(), np.concatenate(trained)) & (sums > 0) for tokens in held_out]
    except (ConfigError, DataError):  # reported where they are opened
        return [], 0
    places = [tokens.locate(int(i)) for tokens, same in zip(held_out, found) for i in np.flatnonzero(same)]
    return places, sum(map(len, held_out))


def _prepared(cfg: Config, tokenizer: Tokenizer, split: str) -> list[PreparedTokens]:
    """The prepared data sets that have a split."""
    sources = [source for source in sources_of(cfg).values() if source.data.kind == "memmap"]
    opened = [build_tokens(source, tokenizer, split)[0] for source in sources if has_split(source, split)]
    return [tokens for tokens in opened if isinstance(tokens, PreparedTokens)]


def _meet(one: str, other: str) -> bool:
    """Whether two names of splits, or slices of them, have rows in common; False if that depends on their size."""
    import datasets

    if "%" in one + other and not all("%" in name or "[" not in name for name in (one, other)):
        return False
    splits = {part.partition("[")[0] for name in (one, other) for part in name.split("+")}
    try:
        rows = [
            datasets.ReadInstruction.from_spec(name).to_absolute(dict.fromkeys(splits, SCALE)) for name in (one, other)
        ]
    except ValueError:  # reported where it is opened
        return False
    return any(a.splitname == b.splitname and max(a.from_, b.from_) < min(a.to, b.to) for a in rows[0] for b in rows[1])
