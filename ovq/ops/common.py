"""Shared by the operators: packed documents, the dtype of sums, and the error for a backend that cannot run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class BackendError(ValueError):
    """The requested backend cannot run here; the message is one line that names one that can."""


def each_document(
    run: Callable[..., Tensor], cu_seqlens: Tensor, tensors: Sequence[Tensor], state: object = None
) -> Tensor:
    """Apply `run` to the tokens (dimension 1) of each document separately and concatenate the outputs.

    Raises:
        ValueError: more than one row, or a carried state together with packed documents.
    """
    if state is not None:
        raise ValueError("state and cu_seqlens are mutually exclusive: a carried state belongs to one document")
    if tensors[0].shape[0] != 1:
        raise ValueError(f"cu_seqlens needs a batch of 1 with the documents concatenated, got {len(tensors[0])}")
    bounds = cu_seqlens.tolist()
    return torch.cat([run(*(x[:, a:b] for x in tensors)) for a, b in zip(bounds, bounds[1:]) if b > a], dim=1)


def work_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums and states: float32, or float64 for float64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
