"""The settings of data and tokenizers, a part of `ovq.config`."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ovq.errors import ConfigError, omegaconf_message
from ovq.schema import REQUIRED, one_of, problems, setting

FROM_FILES = ("parquet", "jsonl", "text")  # kinds whose splits are the files that data.train etc. name
NAMED_SPLITS = (*FROM_FILES, "datasets")  # kinds that have the splits which data.train etc. name, and no others
KINDS = ("builtin", *FROM_FILES, "datasets", "memmap", "task", "mixture")

# The kinds of data that use a setting; all kinds use those that are not listed.
USED_BY = {
    **dict.fromkeys(("train", "validation", "test"), (*NAMED_SPLITS, "memmap")),
    **dict.fromkeys(("text_field", "title_field"), ("parquet", "jsonl", "datasets")),
    "revision": NAMED_SPLITS,
    **dict.fromkeys(("path", "config_name", "data_files"), ("datasets",)),
    **dict.fromkeys(("packing", "isolate_documents", "shuffle"), tuple(kind for kind in KINDS if kind != "task")),
    "task": ("task",),
}


@dataclass
class SourceConfig:
    name: str = setting(REQUIRED, "name of the data set, an option of configs/data")
    kind: str = setting(REQUIRED, "how it is read", choices=KINDS)
    train: list[str] = setting(
        [],
        "training files: paths, folders, globs, or hf://datasets/... or s3://... patterns; with kind=datasets, splits",
        paths=True,
    )
    validation: list[str] = setting([], "validation files or splits, likewise", paths=True)
    test: list[str] = setting([], "test files or splits, likewise", paths=True)
    path: str | None = setting(
        None, "with kind=datasets: a data set of the Hub, a folder, a file, or a builder such as csv"
    )
    config_name: str | None = setting(None, "with kind=datasets: the data set's configuration, if it has several")
    data_files: dict[str, Any] = setting({}, "with kind=datasets: split -> file or files, for a builder or a folder")
    text_field: str = setting("text", "column or JSON field that holds the text")
    title_field: str | None = setting(None, "column or JSON field that holds a title")
    revision: str | None = setting(None, "Hub commit or branch to read; null: the newest commit, resolved once")
    on_bad_shard: str = one_of(
        "error", "skip", help="whether a missing or corrupt shard stops the run, or is skipped and counted"
    )


@dataclass
class DataConfig(SourceConfig):
    packing: str = one_of(
        "packed", "document", help="pack documents one after another, or give each row the beginning of one document"
    )
    isolate_documents: bool = setting(False, "let no information flow from one packed document to the next")
    shuffle: bool = setting(True, "use a new permutation of the documents each epoch")
    num_workers: int = setting(0, "processes per rank that read and tokenise", at_least=0)
    prefetch: int = setting(4, "micro-batches prepared in advance", at_least=1)
    words: dict[str, int] = setting({}, "published words of each split, for word perplexity; counted if none")
    task: dict[str, Any] = setting({}, "a generated task, {_target_: class path, **its settings}")
    mixture: dict[str, Any] = setting(
        {}, "several data sets: name -> weight, or {data: option of configs/data, weight: number, **its settings}"
    )


@dataclass
class MixtureSource(SourceConfig):
    """One data set of a mixture."""

    weight: float = setting(1.0, "share of the rows, relative to the other weights", above=0)


@dataclass
class TokenizerConfig:
    name: str = setting(REQUIRED, "name of the tokenizer, an option of configs/tokenizer")
    kind: str = setting(REQUIRED, "how text is split into ids", choices=("byte", "sentencepiece", "hf"))
    model_path: str | None = setting(
        None, "file of a trained model; with kind=hf a tokenizer.json, its folder, or hf://OWNER/NAME[@REVISION]"
    )
    separator: str | None = setting(
        None, "token between documents, with kind=hf; null: the end-of-text token that tokenizer_config.json names"
    )
    vocab_size: int | None = setting(None, "pieces in the model; if set, a dry run needs no model file", at_least=1)


def check_data(data: DataConfig) -> None:
    """Raise ConfigError unless the settings of the data are compatible."""
    if data.kind == "task" and not data.task.get("_target_"):
        raise ConfigError("data.task has no _target_; choose a task with data/task=NAME")
    _check_source(data, "data")
    if data.mixture and data.kind != "mixture":
        raise ConfigError(f"data.mixture is set, but data.kind={data.kind}; a mixture is chosen with data=mixture")
    if data.kind == "mixture" and not data.mixture:
        raise ConfigError(
            "data.mixture is empty; give it data sets and weights: 'data.mixture={pg19: 0.7, python_source: 0.3}', or "
            "'data.mixture={books: {data: parquet, train: [books/*.parquet], weight: 0.7}, ...}'"
        )
    for name, source in mixture_sources(data).items():
        where = f"data.mixture.{name}"
        for problem in problems(MixtureSource, source, f"{where}."):
            raise ConfigError(problem)
        if source.kind in ("task", "mixture"):
            raise ConfigError(f"{where} is a {source.kind}; a mixture is made of data sets of text")
        _check_source(source, where)


def check_used(data: DataConfig, typed: Collection[str] | None = None) -> None:
    """Raise ConfigError if a command sets what its kind of data ignores. A stored config may hold such a setting.

    Args:
        typed: full names of the settings to check; None: all.
    """
    places: dict[str, SourceConfig] = {"data": data}
    places |= {f"data.mixture.{name}": source for name, source in mixture_sources(data).items()}
    for where, source in places.items():
        defaults = DataConfig() if where == "data" else SourceConfig()
        for key, kinds in USED_BY.items():
            name = f"{where}.{key}"
            if source.kind in kinds or not hasattr(defaults, key) or (typed is not None and name not in typed):
                continue
            if getattr(source, key) != getattr(defaults, key):
                mend = "leave it out (or null, if an option of configs/data sets it), or choose data of a kind that"
                mend += f" uses it: {', '.join(kinds)}"
                if source.kind == "mixture" and hasattr(SourceConfig(), key):
                    mend = f"set it for one of its data sets: data.mixture.NAME.{key}"
                raise ConfigError(f"{name} is ignored with {where}.kind={source.kind}; {mend}")


def _check_source(source: SourceConfig, where: str) -> None:
    if source.kind == "datasets" and not source.path:
        raise ConfigError(
            f"{where}.path is required with {where}.kind=datasets: a data set of the Hub (OWNER/NAME), a folder, a "
            "file, or a builder such as csv"
        )


def check_tokenizer(cfg: TokenizerConfig) -> None:
    """Raise ConfigError unless the settings of the tokenizer are compatible."""
    if cfg.kind == "sentencepiece" and not cfg.model_path:
        raise ConfigError(
            "tokenizer.model_path is required with tokenizer.kind=sentencepiece; "
            "train a model with: python -m data.train_tokenizer data=... out=PATH"
        )
    if cfg.kind == "hf" and not cfg.model_path:
        raise ConfigError(
            "tokenizer.model_path is required with tokenizer.kind=hf: a tokenizer.json, its folder, or hf://OWNER/NAME"
        )


def check_tokenizer_used(cfg: TokenizerConfig, typed: Collection[str]) -> None:
    """Raise ConfigError if a command sets what its tokenizer ignores. An experiment may set it for another one.

    Args:
        typed: full names of the settings that the command sets.
    """
    for key, kinds in {"model_path": ("sentencepiece", "hf"), "separator": ("hf",)}.items():
        if getattr(cfg, key) and cfg.kind not in kinds and f"tokenizer.{key}" in typed:
            mend = " or ".join(f"tokenizer={kind}" for kind in kinds)
            raise ConfigError(
                f"tokenizer.{key}={getattr(cfg, key)} is ignored with tokenizer={cfg.kind}; choose {mend}, or leave it "
                "out"
            )


def mixture_sources(data: DataConfig) -> dict[str, MixtureSource]:
    """The data sets of a mixture, by name; empty for other data.

    Raises:
        ConfigError: an unknown setting, or a value of another type.
    """
    return dict(_sources(data)) if data.kind == "mixture" else {}


def _sources(data: DataConfig) -> Iterator[tuple[str, MixtureSource]]:
    for name, values in data.mixture.items():
        try:
            yield name, cast(MixtureSource, OmegaConf.merge(OmegaConf.structured(MixtureSource), values))
        except OmegaConfBaseException as error:
            raise ConfigError(f"data.mixture.{name}.{omegaconf_message(error)}") from None
