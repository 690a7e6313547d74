"""What a run would read, for a dry run: the size of its data, determined without downloading them."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np

from data.build import build_task, build_tokenizer, build_tokens, is_task, shares_of, sources_of, splits_of
from data.builtin import BuiltinCorpus
from data.corpus import TokenisedCorpus, Tokens
from data.dataset_corpus import describe_dataset
from data.dataset_corpus import is_remote as is_on_hub
from data.index import index_shards
from data.prepared import PreparedTokens, describe_prepared
from data.sources import HUB, NOT_LISTED, DataError, find_files, hub_parts
from data.tokenizer import Tokenizer
from ovq.config import Config
from ovq.config_data import FROM_FILES
from ovq.errors import ConfigError

_SAMPLE_BYTES, _MOST_SAMPLED = 1 << 20, 256


def describe(cfg: Config) -> dict[str, dict[str, Any]]:
    """For each split: shards, bytes on disk, documents if cheap to count; or why it cannot be opened.

    Hub and bucket files are listed but not opened. A generated task has one split, describing one training sequence.
    A mixture has an entry for each split of each data set; for training data, it includes their share of the rows and,
    if the files are local, how often the run reads them ("epochs").
    """
    if cfg.data.kind != "mixture":
        found: dict[str, dict[str, Any]] = {}
        for split in splits_of(cfg):
            same = [other for other in found if _unreachable(found[other]) and hub_of(cfg, other) == hub_of(cfg, split)]
            found[split] = {"error": f"not looked for, see data {same[0]}"} if same else _describe(cfg, split)
        return found
    shares = shares_of(cfg)
    lines: dict[str, dict[str, Any]] = {}
    for name, source in sources_of(cfg).items():
        for split in splits_of(source) or ["train"]:
            lines[f"{split} {name}"] = facts = _describe(source, split)
            if split == "train" and "error" not in facts:
                facts |= {"share": shares[name], "epochs": _epochs(source, shares[name])}
    return lines


def _unreachable(found: dict[str, Any]) -> bool:
    return NOT_LISTED in found.get("error", "")


def hub_of(cfg: Config, split: str) -> list[str]:
    """The hub repositories that a split's files come from; empty for local files."""
    return sorted({hub_parts(path)[0] for path in getattr(cfg.data, split) if path.startswith(HUB)})


def _epochs(cfg: Config, share: float) -> float | None:
    """How often the run reads a data set of a mixture; None if finding out takes a download or a tokenizer that does
    not exist yet."""
    if is_remote(cfg, "train") or (cfg.data.kind == "datasets" and is_on_hub(cfg.data.path or "")):
        return None
    try:
        tokenizer = build_tokenizer(cfg)
        found = epochs(cfg, build_tokens(cfg, tokenizer, "train")[0], tokenizer, share)
    except (ConfigError, DataError):
        return None
    return found and found[0]


def is_remote(cfg: Config, split: str) -> bool:
    """Whether files of a split are on the hub or in a bucket, where opening one may mean a long download."""
    return cfg.data.kind in FROM_FILES and any("://" in path for path in getattr(cfg.data, split))


def epochs(cfg: Config, tokens: Tokens, tokenizer: Tokenizer, share: float = 1.0) -> tuple[float, str] | None:
    """How often a run reads these documents, and their amount as a phrase ("8 documents"); None if it is unknown.

    With packing "document", an epoch reads the beginning of each document once.

    Args:
        share: fraction of the rows that come from these documents.
    """
    rows = share * cfg.trainer.steps * cfg.trainer.global_batch
    if cfg.data.packing == "document":
        return rows / max(1, len(tokens)), f"{len(tokens):,} documents"
    ids = count_tokens(tokens, tokenizer)
    return (rows * cfg.trainer.context / ids, f"{ids:,.0f} tokens") if ids else None


def count_tokens(tokens: Tokens, tokenizer: Tokenizer) -> float | None:
    """Ids in all documents, with their separators: exact for prepared data, else extrapolated from about a megabyte of
    the first documents that can be read and are no longer than that."""
    if isinstance(tokens, PreparedTokens):
        return float(describe_prepared([str(folder) for folder in tokens.folders], "train")["tokens"] + len(tokens))
    if not isinstance(tokens, TokenisedCorpus):
        return None
    sizes = tokens.corpus.sizes()
    fitting = np.flatnonzero(sizes <= _SAMPLE_BYTES)[:_MOST_SAMPLED]
    sampled = fitting[: 1 + int(np.searchsorted(np.cumsum(sizes[fitting]), _SAMPLE_BYTES))]
    bytes_read, ids = 0, 0
    for i in sampled:
        with contextlib.suppress(DataError):  # training reports a damaged one when it gets there
            length = len(tokenizer.encode(tokens.corpus.read(int(i)).text))
            bytes_read, ids = bytes_read + int(sizes[i]), ids + (length and length + 1)
    if not bytes_read:
        return float(sizes.sum()) + len(tokens)  # one id per byte
    return float(sizes.sum()) * ids / bytes_read


def _describe(cfg: Config, split: str) -> dict[str, Any]:
    data = cfg.data
    try:
        if is_task(cfg):
            return dict(build_task(cfg).describe(cfg.trainer.context))
        if data.kind == "memmap":
            return describe_prepared(list(getattr(data, split) or data.train), split)
        if data.kind == "builtin":
            corpus = BuiltinCorpus(split)
            size = sum(len(corpus.read(i).text.encode()) for i in range(len(corpus)))
            return {"shards": 0, "documents": len(corpus), "bytes": size}
        if data.kind == "datasets":
            return describe_dataset(data, split)
        files, missing = find_files(data, split)
        found: dict[str, Any] = {
            "shards": len(files),
            "missing": len(missing),
            "bytes": sum(file.size for file in files),
            "documents": None,
        }
        if data.kind == "text":
            found["documents"] = len(files)
        if files[0].path.startswith(HUB):
            found["commit"] = files[0].commit
        elif data.kind == "parquet" and "://" not in files[0].path:
            found["documents"] = sum(shard.documents for shard in index_shards(data, split)[0])
        return found
    except (ConfigError, OSError) as error:
        return {"error": str(error)}
