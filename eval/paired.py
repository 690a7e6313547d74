"""Differences between models on the same documents, so that the variation between documents cancels."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TypeVar

K = TypeVar("K", bound=Hashable)
Losses = dict[tuple[int, int], float]  # (document, training seed) -> mean loss of some positions, in nats per token


@dataclass(frozen=True)
class Mean:
    """A mean over `documents` and its standard error, in nats per token."""

    value: float
    error: float
    documents: int

    def __str__(self) -> str:
        """In thousandths of a nat: '-2.5 ± 0.7'."""
        return f"{1000 * self.value:+.1f} ± {1000 * self.error:.1f}"

    @property
    def clear(self) -> bool:
        """Whether it is more than two standard errors from zero."""
        return abs(self.value) > 2 * self.error


def means_in(span: tuple[int, int], buckets: Iterable[tuple[K, int, float, int]]) -> dict[K, float]:
    """The mean loss of the positions in a span, by key.

    Args:
        span: tokens [start, end); a bucket belongs to the span in which it begins.
        buckets: (key, position where it begins, mean loss, number of positions).
    """
    sums: dict[K, tuple[float, int]] = {}
    for key, start, loss, count in buckets:
        if span[0] <= start < span[1]:
            nats, before = sums.get(key, (0.0, 0))
            sums[key] = (nats + loss * count, before + count)
    return {key: nats / count for key, (nats, count) in sums.items()}


def mean_over_documents(values: dict[int, list[float]]) -> Mean:
    """The mean over documents of their means over seeds; the error comes from the spread over documents."""
    of_document = [fmean(seeds) for seeds in values.values()]
    spread = stdev(of_document) / math.sqrt(len(of_document)) if len(of_document) > 1 else math.nan
    return Mean(fmean(of_document), spread, len(of_document))


def paired(own: Losses, other: Losses) -> Mean | None:
    """The mean of own minus other over the documents and seeds that both have; None if there are none."""
    found: dict[int, list[float]] = {}
    for (document, seed), loss in own.items():
        if (document, seed) in other:
            found.setdefault(document, []).append(loss - other[document, seed])
    return mean_over_documents(found) if found else None
