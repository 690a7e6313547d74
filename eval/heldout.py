"""Held-out documents through a model, piece by piece: what every evaluation on text is made of.

- A document is cut to the context and processed in pieces with the state carried, so that memory does not grow with
  the context but by what the mixers themselves keep.
- Rank 0 alone reads and tokenises; a round of documents goes to all ranks, and each takes its own. A rank that has
  none in a round runs another's all the same and drops the result: under FSDP all must make the same forward passes.

Shapes: D documents side by side, T positions.
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
    """The head of a document, or all of it.

    `tokens` int32 [n + 1]: the separator and n ids, so that tokens[:-1] predict tokens[1:]. `num_bytes` and
    `num_words` are those of the n ids; a word that is cut in two counts as one.
    """

    tokens: np.ndarray
    title: str
    num_bytes: int
    num_words: int


class HeldOut:
    """The first `limit` documents of `cfg.eval.split` with at least `context` ids, cut to that; None: all and whole.

    On every rank, of all rounds so far: `given` documents of `seen` that were looked at, their `num_bytes` and
    `num_words`, and `longest`, the ids of the longest document that was looked at.
    """

    def __init__(self, cfg: Config, tokenizer: Tokenizer, context: int | None, limit: int | None) -> None:
        self.cfg, self.tokenizer, self.context, self.limit = cfg, tokenizer, context, limit
        self.given = self.seen = self.longest = self.num_bytes = self.num_words = 0
        self._excerpts = self._read()  # runs on rank 0 only

    def round(self, count: int) -> list[Excerpt]:
        """The next `count` documents, fewer at the end, the same on every rank. Collective.

        Raises:
            ConfigError, DataError: the split cannot be read; on every rank.
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
    """Nats of each label of each row, float64 [D, positions]; 0 beyond a row's end. None if should_stop() said so.

    Args:
        rows: tokens of each document, at most positions + 1.
        piece: tokens a forward pass; before each one should_stop is asked, as often on every rank.
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
