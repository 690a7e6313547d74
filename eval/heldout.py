"""Run held-out documents through a model piece by piece: the basis of every evaluation on text.

- A document is truncated to the context and processed in pieces, carrying the state from one to the next, so memory
  grows with the context only by what the mixers themselves keep.
- Only rank 0 reads and tokenises. Each round of documents is broadcast to all ranks, and each rank takes its share. A
  rank with no document in a round still runs another rank's and discards the result, because under FSDP all ranks must
  make the same forward passes.

Shapes: D documents in a batch, T positions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.build import heldout_documents
from data.tokenizer import Tokenizer
from ovq import processes
from ovq.config import Config
from ovq.mixers.base import detach_state
from ovq.model import IGNORE, Transformer


@dataclass
class Excerpt:
    """The beginning of a document, or all of it.

    `tokens` int32 [n + 1]: the separator followed by n ids, so tokens[:-1] predict tokens[1:]. `num_bytes` and
    `num_words` count the text of the n ids; a word cut off at the end counts as one.
    """

    tokens: np.ndarray
    title: str
    num_bytes: int
    num_words: int


class HeldOut:
    """The first `limit` documents of `cfg.eval.split` with at least `context` ids, truncated to `context`.

    `limit=None` takes every document; `context=None` takes documents of any length, whole.

    Totals over all rounds so far, the same on every rank: `given` documents returned of `seen` examined, the
    `num_bytes` and `num_words` of those returned, and `longest`, the number of ids in the longest document examined.
    """

    def __init__(self, cfg: Config, tokenizer: Tokenizer, context: int | None, limit: int | None) -> None:
        self.cfg, self.tokenizer, self.context, self.limit = cfg, tokenizer, context, limit
        self.given = self.seen = self.longest = self.num_bytes = self.num_words = 0
        self._excerpts = self._read()  # runs on rank 0 only

    def round(self, count: int) -> list[Excerpt]:
        """The next `count` documents (fewer at the end), the same on every rank. Collective.

        Raises:
            ConfigError, DataError: the split cannot be read; raised on every rank.
        """

        def take() -> tuple[list[Excerpt], int, int]:
            return list(itertools.islice(self._excerpts, count)), self.seen, self.longest

        excerpts, self.seen, self.longest = processes.on_main(take)
        self.given += len(excerpts)
        self.num_bytes += sum(excerpt.num_bytes for excerpt in excerpts)
        self.num_words += sum(excerpt.num_words for excerpt in excerpts)
        return excerpts

    def _read(self) -> Iterator[Excerpt]:
        given = 0
        for document in heldout_documents(self.cfg, self.tokenizer, split=self.cfg.eval.split, min_tokens=1):
            tokens = document.tokens[:-1].astype(np.int32)
            self.seen, self.longest = self.seen + 1, max(self.longest, len(tokens) - 1)
            if self.context is None:
                yield Excerpt(tokens, document.title, document.num_bytes, document.num_words)
            elif len(tokens) <= self.context:
                continue
            else:
                tokens = tokens[: self.context + 1]
                words = len(self.tokenizer.decode(tokens).split())
                yield Excerpt(tokens, document.title, self.tokenizer.num_bytes(tokens), words)
            given += 1
            if given == self.limit:
                return


@torch.no_grad()
def losses_by_position(
    model: Transformer,
    rows: list[np.ndarray],
    *,
    positions: int,
    piece: int,
    device: torch.device,
    should_stop: Callable[[], bool],
) -> np.ndarray | None:
    """Loss in nats of each label of each row, float64 [D, positions]; 0 past a row's end. None if told to stop.

    Args:
        rows: the tokens of each document, at most positions + 1.
        piece: tokens per forward pass.
        should_stop: called before every forward pass, the same number of times on every rank.
    """
    tokens_DT = torch.zeros(len(rows), positions + 1, dtype=torch.int64)
    labels_DT = torch.full((len(rows), positions), IGNORE)
    for index, row in enumerate(rows):
        tokens_DT[index, : len(row)] = torch.from_numpy(row)
        labels_DT[index, : len(row) - 1] = tokens_DT[index, 1 : len(row)]
    state: list[Any] | None = None
    parts: list[Tensor] = []
    for start in range(0, positions, piece):
        if should_stop():
            return None
        span = slice(start, min(start + piece, positions))
        out = model(
            tokens_DT[:, span].to(device),
            targets_BT=labels_DT[:, span].to(device),
            state=state,
            return_state=True,
            reduction="none",
        )
        state = detach_state(out.state)
        parts.append(out.loss)
    return torch.cat(parts, dim=1).to("cpu", torch.float64).numpy()
