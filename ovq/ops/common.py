"""What the operators share: packed documents, the dtype of sums, and the error of a backend that cannot run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class BackendError(ValueError):
    """A backend was asked for that cannot run here; the message is one line that says what would."""


def each_document(
    run: Callable[..., Tensor], cu_seqlens: Tensor, tensors: Sequence[Tensor], state: object = None
) -> Tensor:
    """`run` on the tokens (dimension 1) of every document alone, outputs joined.

    Raises:
        ValueError: more than one row, or a carried state beside packed documents.
    """
    if state is not None:
        raise ValueError("state and cu_seqlens exclude each other: a carried state belongs to one document")
    if tensors[0].shape[0] != 1:
        raise ValueError(f"cu_seqlens needs a batch of 1 with the documents one after the other, got {len(tensors[0])}")
    bounds = cu_seqlens.tolist()
    return torch.cat([run(*(x[:, a:b] for x in tensors)) for a, b in zip(bounds, bounds[1:]) if b > a], dim=1)


def work_dtype(x: Tensor) -> torch.dtype:
    """What sums and states are kept in: float32, or float64 for float64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
