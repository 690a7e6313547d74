"""The splits of a config: opened for training, read for evaluation, described for a dry run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.builtin import BuiltinCorpus
from data.corpus import Corpus, ShardCorpus, TokenisedCorpus, Tokens
from data.sources import HUB, SPLITS, find_files, index_shards
from data.tokenizer import Tokenizer
from ovq.config import Config, ConfigError, parse_tool_args


@dataclass
class Document:
    """A held-out document. `tokens` int64 [n + 2]: separator, ids, separator; so tokens[:-1] predict tokens[1:].

    `num_bytes` (UTF-8) and `num_words` (split at whitespace) are the whole document's; for a part of it use
    `tokenizer.num_bytes(ids)` and `len(tokenizer.decode(ids).split())`.
    """

    tokens: np.ndarray
    title: str
    num_bytes: int
    num_words: int


def build_corpus(cfg: Config, split: str, commit: str | None = None) -> Corpus:
    """The texts of a split; not for data=memmap, which has none.

    Raises:
        ConfigError: nothing is found, a shard is bad (unless skipped), or a named column does not exist.
    """
    data = cfg.data
    if data.kind == "builtin":
        return BuiltinCorpus(split)
    if data.kind in ("memmap", "recall"):
        raise ConfigError(f"data.kind={data.kind} holds no text; legal here: builtin, parquet, jsonl, text")
    shards, bad = index_shards(data, split, commit)
    return ShardCorpus(data, shards, bad)


def build_tokens(cfg: Config, tokenizer: Tokenizer, split: str, commit: str | None = None) -> tuple[Tokens, Corpus]:
    """The split's tokenised documents, and the corpus that identifies them."""
    if cfg.data.kind == "memmap":
        from data.memmap import MemmapTokens

        prepared = MemmapTokens(list(cfg.data[split] or cfg.data.train), split, tokenizer)  # type: ignore[index]
        return prepared, prepared  # type: ignore[return-value]
    corpus = build_corpus(cfg, split, commit)
    return TokenisedCorpus(corpus, tokenizer), corpus


def heldout_documents(
    cfg: Config, tokenizer: Tokenizer, *, split: str, min_tokens: int, limit: int | None = None
) -> Iterator[Document]:
    """Documents of a held-out split with at least `min_tokens` ids, in file order, one in memory at a time.

    Not collective: each process that calls it reads for itself.

    Raises:
        ConfigError: the split does not exist.
    """
    tokens, _ = build_tokens(cfg, tokenizer, split)
    given = 0
    for index in range(len(tokens)):
        if limit is not None and given >= limit:
            return
        document = tokens.read(index)
        if len(document.ids) >= min_tokens:
            given += 1
            separator = np.array([tokenizer.separator_id], np.int64)
            ids = np.concatenate([separator, document.ids.astype(np.int64), separator])
            yield Document(ids, document.title, document.num_bytes, document.num_words)


def describe(cfg: Config) -> dict[str, dict[str, Any]]:
    """For each split: shards, bytes on disk, documents where that is cheap to know, or the error that opening gives.

    Hub and bucket files are listed but not opened. A generated task has one split: what a training sequence holds.
    """
    if cfg.data.kind == "recall":
        from data import recall

        return {"train": recall.describe(cfg)}
    return {split: _describe(cfg, split) for split in _splits_of(cfg)}


def _splits_of(cfg: Config) -> list[str]:
    data = cfg.data
    if data.kind == "memmap" and data.train:
        from data.memmap import load_index

        try:
            return list(load_index(data.train[0])["splits"])
        except ConfigError:
            return ["train"]  # its description is the error
    return [split for split in SPLITS if data.kind == "builtin" or data[split]]  # type: ignore[index]


def _describe(cfg: Config, split: str) -> dict[str, Any]:
    data = cfg.data
    try:
        if data.kind == "memmap":
            from data.memmap import describe_prepared

            return describe_prepared(list(data[split] or data.train), split)  # type: ignore[index]
        if data.kind == "builtin":
            corpus = BuiltinCorpus(split)
            size = sum(len(corpus.read(i).text.encode()) for i in range(len(corpus)))
            return {"shards": 0, "documents": len(corpus), "bytes": size}
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


def split_arguments(argv: list[str], own: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A tool's own `key=value` options (those of `own`, with its defaults), and the rest, which the config composes."""
    mine = [arg for arg in argv if arg.partition("=")[0] in own]
    return parse_tool_args(mine, own), [arg for arg in argv if arg not in mine]
