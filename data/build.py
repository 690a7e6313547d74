"""Builds what a config specifies: corpora, tokens, tokenizers, tasks and loaders."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
from omegaconf import OmegaConf

from data import hf_tokenizer
from data.builtin import BuiltinCorpus
from data.corpus import Corpus, Document, Identified, ShardCorpus, TokenisedCorpus, Tokens
from data.dataset_corpus import DatasetCorpus
from data.index import index_shards
from data.lanes import LaneReader
from data.loader import Loader, RowSource
from data.mixture import MixtureReader
from data.prepared import PreparedTokens, load_index
from data.sources import SPLITS, pin
from data.tasks.base import Task, digest
from data.tasks.rows import TaskLoader, TaskRows, TaskTokenizer
from data.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer
from ovq.config import Config, TokenizerConfig
from ovq.config_data import FROM_FILES, NAMED_SPLITS, DataConfig, mixture_sources
from ovq.errors import ConfigError, one_line
from ovq.instantiate import instantiate, settings_of
from ovq.processes import World, on_main_slowly


def is_task(cfg: Config) -> bool:
    """Whether the data come from a generated task, which has no text and therefore no loss by position."""
    return cfg.data.kind == "task"


def sources_of(cfg: Config) -> dict[str, Config]:
    """The data sets of a mixture by name, each as a config of its own; any other config under the empty name."""
    made = {}
    for name, source in mixture_sources(cfg.data).items():
        shared, own = (OmegaConf.to_container(node, resolve=True) for node in (cfg.data, source))
        data = {**shared, **own, "mixture": {}, "words": {}}  # type: ignore[dict-item]
        del data["weight"]
        if cfg.data.on_bad_shard == "skip":  # for the whole mixture
            data["on_bad_shard"] = "skip"
        made[name] = cast(Config, OmegaConf.merge(cfg))
        made[name].data = cast(DataConfig, OmegaConf.merge(OmegaConf.structured(DataConfig), data))
    return made or {"": cfg}


def splits_of(cfg: Config) -> list[str]:
    """The splits that a config's data provide; for a mixture, those that any of its data sets provides."""
    data = cfg.data
    if data.kind == "task":
        return ["train"]
    if data.kind == "mixture":
        found = [splits_of(source) for source in sources_of(cfg).values()]
        return [split for split in SPLITS if any(split in splits for splits in found)]
    try:
        return _splits(data)
    except ConfigError:
        return ["train"]  # describing it reports the error


def has_split(source: Config, split: str) -> bool:
    """Whether one data set has a split; true of a prepared folder that cannot be read, as opening it reports why."""
    try:
        return split in _splits(source.data)
    except ConfigError:
        return True


def _splits(data: DataConfig) -> list[str]:
    if data.kind == "memmap" and data.train:
        inside = load_index(data.train[0])["splits"]
        return [split for split in SPLITS if split in inside or (split != "train" and getattr(data, split))]
    return [split for split in SPLITS if data.kind == "builtin" or getattr(data, split)]


def check_names_held_out(cfg: Config) -> None:
    """Refuse a run that, after days of training, would have nothing to be evaluated on.

    Raises:
        ConfigError: the config asks for an evaluation but names no data for it.
    """
    split = cfg.eval.split
    if is_task(cfg) or not (cfg.eval.at_end or cfg.trainer.eval_every):
        return
    sources = sources_of(cfg)
    if any(has_split(source, split) for source in sources.values()):
        return
    where = "data" if "" in sources else f"data.mixture.{next(iter(sources))}"
    kinds = {"datasets": "splits", "memmap": f"a folder that has a {split} split"}
    what = kinds.get(next(iter(sources.values())).data.kind, "files")
    raise ConfigError(
        f"{where}.{split} is empty, so loss by position cannot be evaluated; give it {what}, "
        "or set eval.at_end=false trainer.eval_every=0"
    )


# --- text ------------------------------------------------------------------------------------------------------------


def build_corpus(cfg: Config, split: str) -> Corpus:
    """The text of a split. Not for data=memmap, which stores none, nor for a mixture, which has several.

    Raises:
        ConfigError: no file or split is found, a shard is bad (unless skipped), or a named column does not exist.
    """
    data = cfg.data
    if data.kind == "builtin":
        return BuiltinCorpus(split)
    if data.kind == "datasets":
        return DatasetCorpus(data, split)
    if data.kind not in FROM_FILES:
        legal = ", ".join(("builtin", *NAMED_SPLITS))
        raise ConfigError(f"data.kind={data.kind} holds no text; legal here: {legal}")
    shards, bad = index_shards(data, split)
    return ShardCorpus(data, shards, bad)


def build_tokens(cfg: Config, tokenizer: Tokenizer, split: str) -> tuple[Tokens, Identified]:
    """The split's tokenised documents, and the corpus that identifies them."""
    if cfg.data.kind == "memmap":
        folders, skip_bad = list(getattr(cfg.data, split) or cfg.data.train), cfg.data.on_bad_shard == "skip"
        prepared = PreparedTokens(folders, split, tokenizer, skip_bad=skip_bad)
        return prepared, prepared
    corpus = build_corpus(cfg, split)
    return TokenisedCorpus(corpus, tokenizer), corpus


def _tokens_of(name: str, source: Config, tokenizer: Tokenizer, split: str) -> tuple[Tokens, Identified]:
    """`build_tokens` for one data set of a mixture, whose name its errors mention."""
    with named(name):
        return build_tokens(source, tokenizer, split)


@contextlib.contextmanager
def named(name: str) -> Iterator[None]:
    """Errors mention the data set of a mixture; the empty name stands for any other data."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"data.mixture.{name}: {error}" if name else str(error)) from None


def heldout_documents(cfg: Config, tokenizer: Tokenizer, split: str) -> Iterator[Document]:
    """Documents of a held-out split that are not empty, in file order, one in memory at a time.

    A mixture's data sets that have the split take turns.

    Not collective: each process that calls it reads the files itself.

    Raises:
        ConfigError: the split does not exist.
    """
    sources = {name: source for name, source in sources_of(cfg).items() if not name or has_split(source, split)}
    found = {name: _tokens_of(name, source, tokenizer, split)[0] for name, source in sources.items()}
    separator = np.array([tokenizer.separator_id], np.int64)
    # In turns, so that the first documents of a mixture include some from each of its data sets.
    turns = ((name, tokens, i) for i in itertools.count() for name, tokens in found.items() if i < len(tokens))
    for name, tokens, index in itertools.islice(turns, sum(map(len, found.values()))):
        document = tokens.read(index)
        if len(document.ids):
            ids = np.concatenate([separator, document.ids.astype(np.int64), separator])
            yield Document(ids, document.title, document.num_bytes, document.num_words, name)


# --- tokenizers and tasks --------------------------------------------------------------------------------------------


def build_tokenizer(cfg: Config, run_dir: Path | str | None = None, *, own: bool = False) -> Tokenizer:
    """The tokenizer of a run: for its text (see `build_text_tokenizer`), or for the symbols of its task.

    Raises:
        ConfigError: its size is not tokenizer.vocab_size, if that is set.
    """
    if not is_task(cfg):
        return build_text_tokenizer(cfg.tokenizer, run_dir, own=own)
    tokenizer = TaskTokenizer(build_task(cfg))
    _check_size(cfg.tokenizer, tokenizer, "the task")
    return tokenizer


def _check_size(cfg: TokenizerConfig, tokenizer: Tokenizer, name: str) -> None:
    if cfg.vocab_size not in (None, tokenizer.vocab_size):
        raise ConfigError(
            f"tokenizer.vocab_size={cfg.vocab_size}, but {name} has {tokenizer.vocab_size} pieces; set it to that, or "
            "to null"
        )


def build_text_tokenizer(cfg: TokenizerConfig, run_dir: Path | str | None = None, *, own: bool = False) -> Tokenizer:
    """A tokenizer for text. If the model file is gone, the copy stored in the run folder is used.

    Args:
        own: also use the copy if the model file has become another since the run was trained.

    Raises:
        ConfigError: there is no model file, the run was made with another tokenizer, or the size is not the config's.
    """
    folder = Path(run_dir) / "tokenizer" if run_dir else None
    expected = _fingerprint_in(folder) if folder else None
    stored = folder / "tokenizer.model" if folder else None
    tokenizer: Tokenizer
    if cfg.kind == "byte":
        tokenizer = ByteTokenizer()
    elif cfg.kind == "hf":
        tokenizer = _hf_tokenizer(cfg, stored)
    elif cfg.model_path and Path(cfg.model_path).expanduser().is_file():
        tokenizer = SentencePieceTokenizer(Path(cfg.model_path).expanduser().read_bytes(), cfg.model_path)
    elif stored and stored.is_file():
        tokenizer = SentencePieceTokenizer(stored.read_bytes(), str(stored))
    else:
        folder_given = cfg.model_path and Path(cfg.model_path).expanduser().is_dir()
        problem = "is a folder; name the model's file in it" if folder_given else "does not exist"
        raise ConfigError(f"tokenizer.model_path={cfg.model_path} {problem}; make one: python -m data.train_tokenizer")
    _check_size(cfg, tokenizer, cfg.model_path if cfg.kind != "byte" and cfg.model_path else f"tokenizer={cfg.kind}")
    if expected not in (None, tokenizer.fingerprint):
        if own and folder and stored and stored.is_file():
            kept = copy.deepcopy(cfg)
            kept.model_path = str(stored)
            return build_text_tokenizer(kept, run_dir)
        raise ConfigError(
            f"tokenizer differs from the one this run was made with ({folder}): "
            f"{tokenizer.fingerprint[:30]} is not {expected[:30]}"
        )
    return tokenizer


def _fingerprint_in(folder: Path) -> str | None:
    """The fingerprint of the tokenizer that a run stored; None if it has stored none yet."""
    path = folder / "tokenizer.json"
    try:
        return str(json.loads(path.read_bytes())["fingerprint"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{path} cannot be read ({one_line(error)}); if the run's tokenizer is unchanged, remove {folder}"
        ) from None


def _hf_tokenizer(cfg: TokenizerConfig, stored: Path | None) -> Tokenizer:
    path = str(cfg.model_path)
    remote = path.startswith(hf_tokenizer.HUB)
    if stored and stored.is_file() and (remote or not Path(path).expanduser().exists()):
        return hf_tokenizer.load(str(stored), cfg.separator)
    # Only one process asks the Hub, however many train.
    load = functools.partial(hf_tokenizer.load, path, cfg.separator)
    return on_main_slowly(load) if remote else load()


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
        state: from `data.loader.merge_states`; the loader resumes from it.

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
        return _task_loader(cfg, common)
    if state:
        pin_commits(cfg, state["fingerprint"])
    sources = sources_of(cfg)
    tokens, corpora = {}, {}
    for name, found in on_main_slowly(lambda: _open_all(sources, tokenizer)).items():
        tokens[name], corpora[name] = found
    fingerprint = {
        **_identity(cfg, corpora),
        "tokenizer": tokenizer.fingerprint,
        "context": trainer.context,
        "global_batch": trainer.global_batch,
        "seed": cfg.seed,
        "shuffle": data.shuffle,
        "packing": data.packing,
        "isolate_documents": data.isolate_documents,
    }
    readers = {
        name: LaneReader(
            documents,
            tokenizer.separator_id,
            tokenizer.num_bytes,
            context=trainer.context,
            global_batch=trainer.global_batch,
            seed=cfg.seed,
            shuffle=data.shuffle,
            packing=data.packing,
        )
        for name, documents in tokens.items()
    }
    rows: RowSource = next(iter(readers.values()))
    if data.kind == "mixture":
        rows = MixtureReader(readers, shares_of(cfg), global_batch=trainer.global_batch, seed=cfg.seed)
    loader = Loader(rows, fingerprint, isolate_documents=data.isolate_documents, **common)
    bad_shards = sum(corpus.bad_shards for corpus in corpora.values())
    if state is None and world.is_main and bad_shards:
        loader.counts["bad_shards"] = bad_shards
    return loader


def shares_of(cfg: Config) -> dict[str, float]:
    """The share of the rows that comes from each data set of a mixture."""
    weights = {name: source.weight for name, source in mixture_sources(cfg.data).items()}
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def pin_commits(cfg: Config, fingerprint: dict[str, Any]) -> None:
    """Read all data on the Hub at the commits of a run that has begun, unless a revision is named.

    Args:
        fingerprint: of the run's data, from a checkpoint.
    """
    for name, source in sources_of(cfg).items():
        pin(source.data, fingerprint.get(f"{name}.commit" if name else "commit"))


def _open_all(sources: dict[str, Config], tokenizer: Tokenizer) -> dict[str, tuple[Tokens, Identified]]:
    """The training documents of every data set."""
    opened = {}
    for name, source in sources.items():
        opened[name] = _tokens_of(name, source, tokenizer, "train")
        if not len(opened[name][0]):
            where = f"data.mixture.{name}" if name else "data"
            raise ConfigError(f"{where}.train holds no documents: {list(source.data.train)}")
    return opened


def _identity(cfg: Config, corpora: dict[str, Identified]) -> dict[str, Any]:
    """The fingerprint of the documents: that of the data set, or those of a mixture's data sets and their shares."""
    if "" in corpora:
        return corpora[""].fingerprint()
    shares = {f"{name}.share": share for name, share in shares_of(cfg).items()}
    parts = {f"{name}.{key}": value for name, corpus in corpora.items() for key, value in corpus.fingerprint().items()}
    return {"kind": "mixture", "order": list(corpora), **shares, **parts}  # in which they divide the rows


def _task_loader(cfg: Config, common: dict[str, Any]) -> TaskLoader:
    task, trainer = build_task(cfg), cfg.trainer
    task.check_context(trainer.context)
    given = {key: value for key, value in cfg.data.task.items() if key != "_target_"}
    fingerprint = {
        "kind": task.name,
        "task": digest(task, settings_of(type(task), given, "data.task")),
        "context": trainer.context,
        "global_batch": trainer.global_batch,
        "seed": cfg.seed,
        **({"content": content} if (content := task.content()) else {}),
    }
    return TaskLoader(task, TaskRows(task, trainer.context, cfg.seed), fingerprint, **common)
