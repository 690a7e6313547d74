"""Checks before a run's first step for anything that would make it fail or waste time: at a start, and in a dry run.

A start raises an error for what is certain to fail, and gets a line for what is merely worth knowing. A dry run prints
both.
"""

from __future__ import annotations

from pathlib import Path

import torch

from data.build import (
    build_tokenizer,
    build_tokens,
    check_names_held_out,
    has_split,
    is_task,
    named,
    shares_of,
    sources_of,
)
from data.corpus import TokenisedCorpus, Tokens
from data.dataset_corpus import is_remote as is_on_hub
from data.describe import epochs, is_remote
from data.prepared import PreparedTokens
from data.sources import DataError, find_files
from data.tokenizer import Tokenizer
from eval.overlap import trained_on
from ovq.config import Config
from ovq.config_data import FROM_FILES
from ovq.errors import ConfigError
from ovq.inference.run import check_capacity
from ovq.model import Transformer, build_model
from ovq.plan import lacking_room
from ovq.train.checkpoint_files import CheckpointError
from ovq.train.claim import check_resume, elsewhere, same_run, unwritable
from ovq.train.warm_start import check_weights

WITHOUT = "or set eval.at_end=false trainer.eval_every=0"
LOOKED_AT = 100  # documents that are read where the lengths are not known without reading all
OPENED = 1 << 30  # most bytes of JSON lines or text that are opened only for a check

# --- checks at a start; each on rank 0 only --------------------------------------------------------------------------


def check_held_out(cfg: Config, tokenizer: Tokenizer) -> list[str]:
    """Check the split that the run is to be evaluated on; returns lines that are worth knowing.

    Raises:
        ConfigError, DataError: there would be nothing to evaluate on, after days of training.
    """
    if is_task(cfg) or not (cfg.eval.at_end or cfg.trainer.eval_every):
        return []
    check_names_held_out(cfg)
    split = cfg.eval.split
    try:
        tokens = open_split(cfg, tokenizer, split)
    except ConfigError as error:
        raise ConfigError(f"{error}; for a run without an evaluation, {WITHOUT.removeprefix('or ')}") from None
    lines = list(filter(None, [trained_on(cfg, split)]))
    if tokens is None:
        return lines
    most, among = longest(cfg, tokens)
    if most >= cfg.eval.context:
        return lines
    if among < len(tokens):
        return [
            *lines,
            f"none of the first {among} {split} documents has eval.context={cfg.eval.context} tokens (the longest: "
            f"{most}); if no other has, there will be no loss by position: set eval.context to less",
        ]
    return [
        *lines,
        f"no {split} document has eval.context={cfg.eval.context} tokens, so there will be no loss by position; the "
        f"longest has {most} at most: set eval.context to less",
    ]


def check_training_data(cfg: Config, tokens: dict[str, Tokens], tokenizer: Tokenizer) -> list[str]:
    """Read the first training document of every data set; returns a line for each that the schedule is longer than.

    Args:
        tokens: the documents of the loader.

    Raises:
        DataError: a document cannot be read.
    """
    sources, lines = sources_of(cfg), []
    shares = shares_of(cfg)
    for name, documents in tokens.items():
        if is_remote(sources[name], "train"):
            continue
        read_first(sources[name], documents)
        found = epochs(sources[name], documents, tokenizer, shares.get(name, 1.0))
        if found and found[0] > 1:
            lines.append(f"trainer.steps={cfg.trainer.steps} is longer than the data: {in_words(found, name)}")
    return lines


def in_words(found: tuple[float, str] | None, name: str = "") -> str:
    """What `epochs` found about a data set, as text; empty if nothing."""
    where = f"data.mixture.{name}.train" if name else "data.train"
    return f"about {found[0]:.3g} epochs of {where} ({found[1]})" if found else ""


def check_room(cfg: Config, model: Transformer, run_dir: Path) -> None:
    """Raise ConfigError if the run's checkpoints would fill the disk. Call it before the model is sharded."""
    if problem := lacking_room(cfg, model, run_dir):
        raise ConfigError(problem)


# --- what a dry run prints -------------------------------------------------------------------------------------------


def look_ahead(cfg: Config, run_dir: Path, vocab_size: int, broken: list[str]) -> tuple[str, list[str]]:
    """For a dry run: the epochs in words, if they are known, and a line for everything a start would refuse or report.

    Args:
        broken: splits whose error the report already shows, in any data set of a mixture; it is not repeated.
    """
    with torch.device("meta"):
        model = build_model(cfg.model, vocab_size)
    lines = [unwritable(run_dir), elsewhere(run_dir, cfg), lacking_room(cfg, model, run_dir)]
    words = ""
    try:
        check_capacity(model, cfg)
        check_weights(cfg, model, same_run(run_dir, cfg))
        check_resume(run_dir, cfg)
    except (ConfigError, CheckpointError) as error:  # the first, at which a start would end
        lines.append(str(error))
    try:
        tokenizer = build_tokenizer(cfg)
        if cfg.eval.split not in broken:
            lines += check_held_out(cfg, tokenizer)
    except (ConfigError, DataError, OSError) as error:
        lines.append(str(error))
    try:
        known = is_task(cfg) or cfg.data.kind == "mixture"  # the report has a mixture's epochs
        if not known and "train" not in broken and not is_remote(cfg, "train"):
            tokens = open_split(cfg, tokenizer := build_tokenizer(cfg), "train")
            words = in_words(epochs(cfg, tokens, tokenizer)) if tokens is not None else ""
            lines += check_training_data(cfg, {"": tokens} if tokens is not None else {}, tokenizer)
    except (ConfigError, DataError, OSError) as error:
        lines.append(str(error))
    return words, [f"before it starts: {line}" for line in dict.fromkeys(lines) if line]


# --- the documents ---------------------------------------------------------------------------------------------------


def open_split(cfg: Config, tokenizer: Tokenizer, split: str) -> Tokens | None:
    """A split's documents, after reading the first one (`read_first`). Files that are remote, or so large that opening
    them takes minutes of hashing, are only looked for, and None is returned, as it is for data=datasets on the Hub,
    which is left alone, and for a mixture, whose data sets are checked one by one.

    Raises:
        ConfigError: a path is mistyped, a field is missing, the split is empty or was prepared with another tokenizer.
        DataError: the first document cannot be read.
    """
    if cfg.data.kind == "mixture":
        for name, source in sources_of(cfg).items():
            with named(name):
                if has_split(source, split):
                    open_split(source, tokenizer, split)
        return None
    if cfg.data.kind == "datasets" and is_on_hub(str(cfg.data.path)):
        return None
    if cfg.data.kind in FROM_FILES:
        size = sum(file.size for file in find_files(cfg.data, split)[0])
        if is_remote(cfg, split) or (cfg.data.kind != "parquet" and size > OPENED):
            return None
    tokens, _ = build_tokens(cfg, tokenizer, split)
    if not len(tokens):
        raise ConfigError(f"data.{split} holds no documents: {list(getattr(cfg.data, split) or cfg.data.train)}")
    read_first(cfg, tokens)
    return tokens


def read_first(cfg: Config, tokens: Tokens) -> None:
    """Read the first document if the data are JSON lines; with other data, a missing field is noticed without this.

    Raises:
        DataError: it cannot be read.
    """
    if cfg.data.kind == "jsonl" and isinstance(tokens, TokenisedCorpus):
        tokens.corpus.read(0)


def longest(cfg: Config, tokens: Tokens) -> tuple[int, int]:
    """An upper bound on the ids of the longest document, and among how many documents. If it is known only by reading
    them, the first are read, until one is long enough for eval.context."""
    if isinstance(tokens, PreparedTokens):
        return int(tokens.lengths().max(initial=0)), len(tokens)
    if isinstance(tokens, TokenisedCorpus) and cfg.data.kind in ("jsonl", "text"):
        # Bytes of a line or a file; an id stands for one or more.
        return int(tokens.corpus.sizes().max(initial=0)), len(tokens)
    most, among = 0, min(LOOKED_AT, len(tokens))
    for index in range(among):
        most = max(most, len(tokens.read(index).ids))
        if most >= cfg.eval.context:
            break
    return most, among
