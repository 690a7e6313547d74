"""Which tokens make up which row of which step: a pure function of (documents, seed, global batch, context).

A *lane* is one row of the global batch, followed through all steps. Lane g reads the documents with ordinals g, g + G,
g + 2G, ... of an endless sequence (G rows in the global batch): ordinal o is document `o % n` of epoch `o // n`, in
that epoch's own seeded permutation of all n documents. A lane's state is (ordinal, offset in that document, rows read).
Ranks, workers and accumulation steps only divide the lanes differently, and resuming needs nothing else. Every ordinal
belongs to one lane, which reads its document from the first token to the last, so nothing is read twice or lost (except
what packing "document" truncates). Only with fewer documents than rows do several lanes begin with the same document;
they begin at different places in it, evenly spaced, because their rows would otherwise be equal.

A document d_1..d_n yields the n + 1 pairs (separator, d_1), (d_1, d_2), ..., (d_n, separator) of input and label.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from data.corpus import Tokens
from data.order import permute
from data.sources import DataError

IGNORE = -100  # target of a position that has no label, as in ovq.model
LaneState = dict[str, int]  # ordinal, offset (pairs of that document already read), rows (read by this lane so far)


@dataclass
class Row:
    """One row of one step: `inputs` and `targets`, int32 [T] (-100: no label), and `starts`, where documents start.

    `counts`: tokens (labels) and bytes (of the labels' text); for documents that begin in the row: documents, words,
    short_documents (fewer pairs than the context), empty_documents (skipped), bad_utf8 (sequences replaced),
    unreadable_documents, untitled_documents; with packing "document" also padding and truncated (pairs not read).
    """

    lane: int
    inputs: np.ndarray
    targets: np.ndarray
    starts: list[int]
    documents: list[str]
    state: LaneState
    counts: dict[str, int] = field(default_factory=dict)
    source: str = ""  # the data set of a mixture that the row comes from


def first_state(lane: int) -> LaneState:
    """The state of a lane before its first row."""
    return {"ordinal": lane, "offset": 0, "rows": 0}


class _Held(NamedTuple):
    """A lane's current document."""

    ordinal: int
    stream: np.ndarray
    title: str
    begun: dict[str, int]


class LaneReader:
    """Makes the rows of lanes, which may be asked for in any order. Keeps one tokenised document per lane in memory."""

    def __init__(
        self,
        tokens: Tokens,
        separator_id: int,
        num_bytes: Callable[[np.ndarray], int],
        *,
        context: int,
        global_batch: int,
        seed: int,
        shuffle: bool = True,
        packing: str = "packed",
    ) -> None:
        self.tokens, self.separator_id, self.num_bytes = tokens, separator_id, num_bytes
        self.context, self.global_batch, self.seed = context, global_batch, seed
        self.shuffle, self.packing = shuffle, packing
        self._held: dict[int, _Held] = {}  # by lane

    def document_of(self, ordinal: int) -> int:
        """Index in the corpus of the document with this ordinal."""
        epoch, position = divmod(ordinal, len(self.tokens))
        # Every epoch has its own permutation, as has every seed below 2**31; seeds s and s + 2**31 share theirs.
        return permute(position, len(self.tokens), self.seed << 32 | epoch) if self.shuffle else position

    def describe(self, lane: int, state: LaneState) -> str:
        """Where the lane's next row starts reading."""
        return self.tokens.locate(self.document_of(state["ordinal"]))

    def row(self, lane: int, state: LaneState) -> Row:
        """The lane's next row, with the lane's state after it.

        Raises:
            DataError: every document is empty, or one cannot be read.
        """
        context, packed = self.context, self.packing == "packed"
        inputs = np.full(context, self.separator_id, np.int32)
        targets = np.full(context, IGNORE, np.int32)
        row = Row(lane, inputs, targets, [], [], {})
        ordinal, offset, filled = state["ordinal"], state["offset"], 0
        empty, empties = set[int](), 0
        while filled < context:
            stream, title, begun = self._document(lane, ordinal)
            pairs = len(stream) - 1
            if packed and ordinal == lane and state["rows"] == 0:
                offset = self._first_offset(lane, pairs)
            if offset == 0:
                _count(row.counts, **begun)
            if pairs < 2:
                empty.add(self.document_of(ordinal))
                empties += 1
                # Of a shuffled corpus, each epoch shows the lane other documents, which may be the same ones by chance.
                if len(empty) == len(self.tokens) or (not self.shuffle and empties > len(self.tokens)):
                    raise DataError(
                        f"every document of the training data that lane {lane} of {self.global_batch} reads is empty "
                        "or unreadable; see data.text_field (with data.shuffle=false, a lane may not read all of them)"
                    )
                ordinal, offset = ordinal + self.global_batch, 0
                continue
            take = min(context - filled, pairs - offset)
            inputs[filled : filled + take] = stream[offset : offset + take]
            targets[filled : filled + take] = stream[offset + 1 : offset + take + 1]
            row.starts.append(filled)
            row.documents.append(title)
            filled, offset = filled + take, offset + take
            if not packed:
                _count(row.counts, padding=context - filled, truncated=pairs - offset)
                row.starts += [filled] if filled < context else []
            if offset == pairs or not packed:
                ordinal, offset = ordinal + self.global_batch, 0
            if not packed:
                break
        labels = targets[:filled]
        _count(row.counts, tokens=filled, bytes=self.num_bytes(labels))
        row.state = {"ordinal": ordinal, "offset": offset, "rows": state["rows"] + 1}
        return row

    def _first_offset(self, lane: int, pairs: int) -> int:
        """Where in its first document, of this many pairs, a lane begins: lane // n lanes before it begin with the same
        document, and at most ceil(G / n) in all."""
        documents = len(self.tokens)
        return pairs * (lane // documents) // -(-self.global_batch // documents)

    def _document(self, lane: int, ordinal: int) -> tuple[np.ndarray, str, dict[str, int]]:
        """A document of the lane: its ids between two separators, its title, and the counts to add where it begins."""
        held = self._held.get(lane)
        if held is None or held.ordinal != ordinal:
            document = self.tokens.read(self.document_of(ordinal))
            separator = np.array([self.separator_id], document.ids.dtype)
            length = len(document.ids)
            begun = {
                "documents": int(length > 0),
                "words": document.num_words,
                "short_documents": int(0 < length < self.context - 1),
                "empty_documents": int(length == 0 and "unreadable_documents" not in document.flags),
                **document.flags,
            }
            stream = np.concatenate([separator, document.ids, separator])
            held = self._held[lane] = _Held(ordinal, stream, document.title, begun)
        return held.stream, held.title, held.begun


def _count(counts: dict[str, int], **amounts: int) -> None:
    for name, amount in amounts.items():
        if amount:
            counts[name] = counts.get(name, 0) + amount
