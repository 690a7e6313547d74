"""Builds what a config specifies: corpora, tokens, tokenizers, tasks and loaders. Describes it for a dry run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data.builtin import BuiltinCorpus
from data.corpus import Corpus, Document, Identified, ShardCorpus, TokenisedCorpus, Tokens
from data.index import index_shards
from data.lanes import LaneReader
from data.loader import Loader
from data.prepared import PreparedTokens, describe_prepared, load_index
from data.sources import HUB, SPLITS, find_files
from data.tasks.base import Task, digest
from data.tasks.rows import TaskLoader, TaskRows, TaskTokenizer
from data.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer
from ovq.config import Config, TokenizerConfig
from ovq.errors import ConfigError
from ovq.instantiate import instantiate, settings_of
from ovq.processes import World, on_main

FROM_FILES = ("parquet", "jsonl", "text")  # kinds whose splits are the files that data.train etc. name


def is_task(cfg: Config) -> bool:
    """Whether the data come from a generated task, which has no text and therefore no loss by position."""
    return cfg.data.kind == "task"


def splits_of(cfg: Config) -> list[str]:
    """The splits that a config's data provide."""
    data = cfg.data
    if data.kind == "task":
        return ["train"]
    if data.kind == "memmap" and data.train:
        try:
            return list(load_index(data.train[0])["splits"])
        except ConfigError:
            return ["train"]  # describing it reports the error
    return [split for split in SPLITS if data.kind == "builtin" or getattr(data, split)]


# --- text ------------------------------------------------------------------------------------------------------------


def build_corpus(cfg: Config, split: str, commit: str | None = None) -> Corpus:
    """The text of a split. Not for data=memmap, which stores none.

    Raises:
        ConfigError: no file is found, a shard is bad (unless skipped), or a named column does not exist.
    """
    data = cfg.data
    if data.kind == "builtin":
        return BuiltinCorpus(split)
    if data.kind not in FROM_FILES:
        raise ConfigError(f"data.kind={data.kind} holds no text; legal here: builtin, {', '.join(FROM_FILES)}")
    shards, bad = index_shards(data, split, commit)
    return ShardCorpus(data, shards, bad)


def build_tokens(cfg: Config, tokenizer: Tokenizer, split: str, commit: str | None = None) -> tuple[Tokens, Identified]:
    """The split's tokenised documents, and the corpus that identifies them."""
    if cfg.data.kind == "memmap":
        prepared = PreparedTokens(list(getattr(cfg.data, split) or cfg.data.train), split, tokenizer)
        return prepared, prepared
    corpus = build_corpus(cfg, split, commit)
    return TokenisedCorpus(corpus, tokenizer), corpus


def heldout_documents(
    cfg: Config, tokenizer: Tokenizer, *, split: str, min_tokens: int, limit: int | None = None
) -> Iterator[Document]:
    """Documents of a held-out split with at least `min_tokens` ids, in file order, one in memory at a time.

    Not collective: each process that calls it reads the files itself.

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


# --- tokenizers and tasks --------------------------------------------------------------------------------------------


def build_tokenizer(cfg: Config, run_dir: Path | str | None = None) -> Tokenizer:
    """The tokenizer of a run: for its text, or for the symbols of its task.

    Raises:
        ConfigError: there is no model file, or the run was made with another tokenizer.
    """
    return TaskTokenizer(build_task(cfg)) if is_task(cfg) else build_text_tokenizer(cfg.tokenizer, run_dir)


def build_text_tokenizer(cfg: TokenizerConfig, run_dir: Path | str | None = None) -> Tokenizer:
    """A tokenizer for text. If the model file is gone, the copy stored in the run folder is used.

    Raises:
        ConfigError: there is no model file, or the run was made with another tokenizer.
    """
    folder = Path(run_dir) / "tokenizer" if run_dir else None
    card = (
        json.loads((folder / "tokenizer.json").read_text()) if folder and (folder / "tokenizer.json").exists() else None
    )
    stored = folder / "tokenizer.model" if folder else None
    tokenizer: Tokenizer
    if cfg.kind == "byte":
        tokenizer = ByteTokenizer()
    elif cfg.model_path and Path(cfg.model_path).expanduser().is_file():
        tokenizer = SentencePieceTokenizer(Path(cfg.model_path).expanduser().read_bytes(), cfg.model_path)
    elif stored and stored.is_file():
        tokenizer = SentencePieceTokenizer(stored.read_bytes(), str(stored))
    else:
        folder_given = cfg.model_path and Path(cfg.model_path).expanduser().is_dir()
        problem = "is a folder; name the model's file in it" if folder_given else "does not exist"
        raise ConfigError(f"tokenizer.model_path={cfg.model_path} {problem}; make one: python -m data.train_tokenizer")
    if card and card["fingerprint"] != tokenizer.fingerprint:
        raise ConfigError(
            f"tokenizer differs from the one this run was made with ({folder}): "
            f"{tokenizer.fingerprint[:30]} is not {card['fingerprint'][:30]}"
        )
    return tokenizer


def build_task(cfg: Config) -> Task:
    """The generated task of a config: the class named by `data.task._target_` with the other keys as settings.

    Raises:
        ConfigError: no task is set, the class is not a Task, or a setting is unknown or has an illegal value.
    """
    if not cfg.data.task:
        raise ConfigError("data.task is empty; choose a task with data=task data/task=NAME")
    return instantiate(dict(cfg.data.task), Task, "data.task")


# --- loaders ---------------------------------------------------------------------------------------------------------


def build_loader(cfg: Config, tokenizer: Tokenizer, world: World, state: dict[str, Any] | None = None) -> Loader:
    """The loader of one rank. Collective if there are several processes: rank 0 finds and indexes the files.

    Args:
        world: this process. Ranks along the data axis read different rows.
        state: returned by `data.loader.merge_states`; the loader resumes from it.

    Raises:
        ConfigError: there is nothing to read, the batch cannot be divided among the ranks, or the data differ from
            those of `state`.
    """
    trainer, data = cfg.trainer, cfg.data
    common: dict[str, Any] = {
        "context": trainer.context,
        "global_batch": trainer.global_batch,
        "micro_batch": trainer.micro_batch,
        "rank": world.data.rank,
        "world_size": world.data.size,
        "num_workers": data.num_workers,
        "prefetch": data.prefetch,
        "timeout_s": trainer.timeout_s,
        "state": state,
    }
    if is_task(cfg):
        return _task_loader(cfg, tokenizer, common)
    commit = state["fingerprint"].get("commit") if state and not data.revision else None
    tokens, corpus = on_main(lambda: build_tokens(cfg, tokenizer, "train", commit))
    if not len(tokens):
        raise ConfigError(f"data.train holds no documents: {list(data.train)}")
    fingerprint = {
        **corpus.fingerprint(),
        "tokenizer": tokenizer.fingerprint,
        "context": trainer.context,
        "global_batch": trainer.global_batch,
        "seed": cfg.seed,
        "shuffle": data.shuffle,
        "packing": data.packing,
        "isolate_documents": data.isolate_documents,
    }
    source = LaneReader(
        tokens,
        tokenizer.separator_id,
        tokenizer.num_bytes,
        context=trainer.context,
        global_batch=trainer.global_batch,
        seed=cfg.seed,
        shuffle=data.shuffle,
        packing=data.packing,
    )
    loader = Loader(source, fingerprint, isolate_documents=data.isolate_documents, **common)
    if state is None and world.is_main and corpus.bad_shards:
        loader.counts["bad_shards"] = corpus.bad_shards
    return loader


def _task_loader(cfg: Config, tokenizer: Tokenizer, common: dict[str, Any]) -> TaskLoader:
    task, trainer = build_task(cfg), cfg.trainer
    if tokenizer.vocab_size < task.vocab_size:
        raise ConfigError(
            f"data.task needs a vocabulary of {task.vocab_size}, the tokenizer has {tokenizer.vocab_size}"
        )
    task.check_context(trainer.context)
    given = {key: value for key, value in cfg.data.task.items() if key != "_target_"}
    fingerprint = {
        "kind": task.name,
        "task": digest(task, settings_of(type(task), given, "data.task")),
        "context": trainer.context,
        "global_batch": trainer.global_batch,
        "seed": cfg.seed,
    }
    return TaskLoader(task, TaskRows(task, trainer.context, cfg.seed), fingerprint, **common)


# --- a dry run -------------------------------------------------------------------------------------------------------


def describe(cfg: Config) -> dict[str, dict[str, Any]]:
    """For each split: shards, bytes on disk, documents if cheap to count; or why it cannot be opened.

    Hub and bucket files are listed but not opened. A generated task has one split, and describes a training sequence.
    """
    return {split: _describe(cfg, split) for split in splits_of(cfg)}


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
