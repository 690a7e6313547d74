"""What a run would read, for a dry run: the size of its data, found without downloading them."""

from __future__ import annotations

from typing import Any

import numpy as np

from data.build import build_corpus, build_task, build_tokenizer, is_task, shares_of, sources_of, splits_of
from data.builtin import BuiltinCorpus
from data.corpus import Corpus
from data.dataset_corpus import describe_dataset, is_remote
from data.index import index_shards
from data.prepared import describe_prepared
from data.sources import HUB, NOT_LISTED, DataError, find_files, hub_parts
from data.tokenizer import Tokenizer
from ovq.config import Config
from ovq.errors import ConfigError

_SAMPLE_BYTES, _MOST_SAMPLED = 1 << 20, 256


def describe(cfg: Config) -> dict[str, dict[str, Any]]:
    """For each split: shards, bytes on disk, documents if cheap to count; or why it cannot be opened.

    Hub and bucket files are listed but not opened. A generated task has one split, and describes a training sequence.
    A mixture has a line for each split of each data set, with its share of the rows and, where its files are at hand,
    how often the run reads it ("epochs").
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
                facts |= {"share": shares[name], "epochs": _epochs(source, shares[name], facts)}
    return lines


def _unreachable(found: dict[str, Any]) -> bool:
    return NOT_LISTED in found.get("error", "")


def hub_of(cfg: Config, split: str) -> list[str]:
    """The hub's repositories that a split's files come from; empty for local files."""
    return sorted({hub_parts(path)[0] for path in getattr(cfg.data, split) if path.startswith(HUB)})


def _epochs(cfg: Config, share: float, found: dict[str, Any]) -> float | None:
    """How often the run reads a data set, from the tokens of its first documents; None where that takes a download, or
    a tokenizer that is not there."""
    trainer = cfg.trainer
    rows = share * trainer.steps * trainer.global_batch
    if cfg.data.packing == "document" and found["documents"]:
        return rows / found["documents"]
    tokens = found.get("tokens")
    if tokens is None:
        if any("://" in path for path in cfg.data.train) or (
            cfg.data.kind == "datasets" and is_remote(cfg.data.path or "")
        ):
            return None
        try:
            tokens = _count_tokens(build_corpus(cfg, "train"), build_tokenizer(cfg))
        except (ConfigError, DataError):
            return None
    return rows * trainer.context / max(1.0, float(tokens))


def _count_tokens(corpus: Corpus, tokenizer: Tokenizer) -> float:
    """Tokens of a corpus with their separators, extrapolated from about a megabyte at its beginning."""
    sizes = corpus.sizes()
    sampled = min(len(sizes), _MOST_SAMPLED, 1 + int(np.searchsorted(np.cumsum(sizes), _SAMPLE_BYTES)))
    lengths = [len(tokenizer.encode(corpus.read(i).text)) for i in range(sampled)]
    pairs = sum(length + 1 for length in lengths if length)
    return float(sizes.sum() * pairs / max(1, sizes[:sampled].sum()))


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
