"""Read held-out documents for a model on any number of processes: the basis of every evaluation on text.

- A document is truncated to the context. `ovq.inference.losses` then runs it through the model in pieces.
- Only rank 0 reads and tokenises. Each round of documents is broadcast to all ranks, and each rank takes its share. A
  rank with no document in a round still runs another rank's and discards the result, because under FSDP all ranks must
  make the same forward passes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data.build import heldout_documents, is_task
from data.sources import DataError
from data.tokenizer import Tokenizer
from ovq import processes
from ovq.config import Config
from ovq.errors import ConfigError, one_line


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
    source: str = ""  # the data set of the mixture that it comes from


class HeldOut:
    """The first `limit` documents of `cfg.eval.split` with at least `context` ids, truncated to `context`.

    `limit=None` takes every document; `context=None` takes documents of any length, whole.

    Totals over all rounds so far, the same on every rank: `given` documents returned of `seen` examined, the
    `num_bytes` and `num_words` of those returned, and `longest`, the number of ids in the longest document examined.

    Raises ConfigError if the config is of a generated task.
    """

    def __init__(self, cfg: Config, tokenizer: Tokenizer, context: int | None, limit: int | None) -> None:
        if is_task(cfg):
            raise ConfigError("the run was trained on a generated task, which has no text; see python -m eval.accuracy")
        self.cfg, self.tokenizer, self.context, self.limit = cfg, tokenizer, context, limit
        self.given = self.seen = self.longest = self.num_bytes = self.num_words = 0
        self._excerpts = self._read()  # runs on rank 0 only

    def round(self, count: int) -> list[Excerpt]:
        """The next `count` documents (fewer at the end), the same on every rank. Collective.

        Raises:
            ConfigError, DataError: the split cannot be read; raised on every rank.
        """

        def take() -> tuple[list[Excerpt], int, int]:
            try:
                return list(itertools.islice(self._excerpts, count)), self.seen, self.longest
            except OSError as error:
                raise DataError(f"the {self.cfg.eval.split} split cannot be read: {one_line(error)}") from error

        excerpts, self.seen, self.longest = processes.on_main_slowly(take)
        self.given += len(excerpts)
        self.num_bytes += sum(excerpt.num_bytes for excerpt in excerpts)
        self.num_words += sum(excerpt.num_words for excerpt in excerpts)
        return excerpts

    def _read(self) -> Iterator[Excerpt]:
        given = 0
        for document in heldout_documents(self.cfg, self.tokenizer, self.cfg.eval.split):
            tokens = document.tokens[:-1].astype(np.int32)
            self.seen, self.longest = self.seen + 1, max(self.longest, len(tokens) - 1)
            if self.context is None:
                yield Excerpt(tokens, document.title, document.num_bytes, document.num_words, document.source)
            elif len(tokens) <= self.context:
                continue
            else:
                tokens = tokens[: self.context + 1]
                words = len(self.tokenizer.decode(tokens).split())
                num_bytes = self.tokenizer.num_bytes(tokens)
                yield Excerpt(tokens, document.title, num_bytes, words, document.source)
            given += 1
            if given == self.limit:
                return
