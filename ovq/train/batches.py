"""What the training loop asks of its data, so that it depends on no loader in particular."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, Protocol

import torch
from torch import Tensor


class MicroBatch(Protocol):
    """What the loop uses of `data.loader.Batch`."""

    inputs: Tensor
    targets: Tensor
    cu_seqlens: Tensor | None
    documents: list[str]
    counts: dict[str, int]

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
