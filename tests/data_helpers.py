"""Helpers for the tests of data/: small corpora in every format, and loaders over them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from data.build import build_loader, build_tokenizer
from data.loader import merge_states
from data.tasks.base import IGNORE, TRAIN, Task
from ovq.compose import compose
from ovq.config import Config
from ovq.processes import Axis, World

# Lengths at every edge case of a context of 16: empty, one byte, an exact fit, one more, many contexts.
LENGTHS = (0, 1, 14, 15, 16, 17, 40, 100, 33, 5, 64, 31, 90)


def text_of(length: int, seed: int) -> str:
    """Random ASCII text."""
    rng = np.random.default_rng([length, seed])
    return bytes(rng.choice(np.frombuffer(b"abcdefgh ijkl\nmnop", np.uint8), length)).decode().replace(" \n", "x\n")


def texts(lengths: tuple[int, ...] = LENGTHS) -> list[str]:
    return [text_of(length, seed) for seed, length in enumerate(lengths)]


def write_jsonl(path: Path, documents: list[Any]) -> Path:
    """One line per document; a document that is not a dictionary becomes the `text` field of one, with a title."""
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [d if isinstance(d, dict) else {"text": d, "title": f"book {i}"} for i, d in enumerate(documents)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_parquet(path: Path, documents: list[Any], **options: Any) -> Path:
    """PG19's columns; documents may be bytes, which need not be UTF-8, or None."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    raw = [d.encode() if isinstance(d, str) else d for d in documents]
    # A view, not a conversion: bytes that are not valid UTF-8 go into the string column unchanged.
    column = pa.Array.from_buffers(pa.string(), len(raw), pa.array(raw, pa.binary()).buffers())
    table = pa.table(
        {
            "short_book_title": [f"{path.stem} book {i}" for i in range(len(raw))],
            "publication_date": pa.array([1900] * len(raw), pa.int32()),
            "url": [f"http://example.org/{i}" for i in range(len(raw))],
            "text": column,
        }
    )
    pq.write_table(table, path, **options)
    return path


def config(*overrides: str) -> Config:
    """A config for small batches. For speed, dotted overrides other than dictionaries are merged into a cached composed
    config."""
    dotted = [
        override
        for override in overrides
        if ("." in override.partition("=")[0] or override.startswith("seed=")) and "{" not in override
    ]
    base = _base(tuple(override for override in overrides if override not in dotted))
    return OmegaConf.merge(base, OmegaConf.from_dotlist(dotted))  # type: ignore[return-value]


@lru_cache
def _base(overrides: tuple[str, ...]) -> Config:
    # Required paths get placeholders, which callers override afterwards.
    small = [
        "trainer.context=16",
        "trainer.global_batch=4",
        "trainer.micro_batch=1",
        *(["tokenizer.model_path=unset"] if {"tokenizer=sentencepiece", "tokenizer=hf"} & {*overrides} else []),
        *(["data.path=unset"] if "data=datasets" in overrides else []),
    ]
    return compose([*small, *overrides])


def rank_of(rank: int, size: int) -> World:
    """One of `size` processes that share the batch."""
    return World(rank, size, data=Axis("data", rank, size))


def loader(cfg: Config, rank: int = 0, world: int = 1, state: dict[str, Any] | None = None) -> Any:
    return build_loader(cfg, build_tokenizer(cfg), rank_of(rank, world), state)


def steps(
    cfg: Config, world: int = 1, state: dict[str, Any] | None = None
) -> Iterator[tuple[Any, Any, dict[str, Any]]]:
    """Yield for each step: inputs and targets of the whole global batch, and the merged state after the step."""
    loaders = [loader(cfg, rank, world, state) for rank in range(world)]
    streams = [iter(one) for one in loaders]
    while True:
        batches = [
            batch for one, stream in zip(loaders, streams) for batch in islice(stream, one.micro_batches_per_step)
        ]
        assert [lane for batch in batches for lane in batch.lanes] == list(range(cfg.trainer.global_batch))
        yield (
            torch.cat([batch.inputs for batch in batches]),
            torch.cat([batch.targets for batch in batches]),
            merge_states([one.state_dict() for one in loaders]),
        )


def tokens_of(cfg: Config, count: int, world: int = 1, state: dict[str, Any] | None = None) -> torch.Tensor:
    """Inputs and targets of the first `count` steps, int64 [count, 2, G, T]."""
    made = [torch.stack([inputs, targets]) for inputs, targets, _ in islice(steps(cfg, world, state), count)]
    return torch.stack(made)


def learned_guess(
    task: Task, length: int, feature: Callable[[np.ndarray, int], Hashable], *, learn: int = 1000, test: int = 500
) -> float:
    """Accuracy at a task's labels of the best guess from one feature, learned on `learn` sequences, tested on `test`.

    Args:
        feature: called with (the inputs, the position of the label).
    """
    seen: dict[Hashable, Counter[int]] = {}
    right = total = 0
    for row in range(learn + test):
        inputs, targets = task.make(length, 5, TRAIN, 0, row)
        for at in np.flatnonzero(targets != IGNORE).tolist():
            counts = seen.setdefault(feature(inputs, at), Counter())
            if row < learn:
                counts[int(targets[at])] += 1
            elif counts:
                right += counts.most_common(1)[0][0] == targets[at]
            total += row >= learn
    return right / total


def tree(folder: Path) -> dict[str, bytes]:
    """Relative path -> contents of every file under a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
