"""The interface that the training loop expects of its data, so that it does not depend on a particular loader."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, Protocol

import torch
from torch import Tensor

# The counts of a batch that are summed over ranks and logged: amounts of text, and irregularities in it.
COUNTED = (
    "bytes",
    "documents",
    "words",
    "short_documents",
    "empty_documents",
    "bad_utf8",
    "unreadable_documents",
    "untitled_documents",
    "padding",
    "truncated",
)


class MicroBatch(Protocol):
    """What the loop uses of `data.loader.Batch`."""

    inputs: Tensor
    targets: Tensor
    cu_seqlens: Tensor | None
    documents: list[str]
    counts: dict[str, int]
    sources: list[str]  # data set of each row, if the data are a mixture

    def token_hash(self) -> int: ...

    def cut(self, length: int) -> MicroBatch: ...

    def shard(self, rank: int, ranks: int) -> MicroBatch: ...

    def to(self, device: torch.device) -> MicroBatch: ...


class Loader(Protocol):
    """What the loop uses of `data.loader.Loader`."""

    micro_batches_per_step: int
    should_stop: Callable[[], bool]

    def __iter__(self) -> Generator[MicroBatch]: ...

    def rewind(self) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...


def loss_by_source(loss: Tensor, sources: list[str], names: list[str]) -> list[Tensor]:
    """The loss of the rows of each data set of a mixture.

    Args:
        loss: per token [B, T]; its values are ignored if there are no names.
        sources: the data set of each row, or of each of several equal parts of the concatenated rows.
        names: the data sets of the mixture.

    Returns:
        A scalar for each name, float32, detached. The host does not wait for the device.
    """
    rows = [row.sum().float() for row in loss.detach().view(len(sources), -1)] if names else []
    zero = torch.zeros((), device=loss.device)
    return [sum((row for row, source in zip(rows, sources) if source == name), zero) for name in names]
