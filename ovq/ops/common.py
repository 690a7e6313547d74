"""Helpers shared by the operators: packed documents, the dtype of sums, the error for a backend that cannot run."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
GRAIN = 32  # elements that CPU code processes at a time: a few vector registers of float32


class BackendError(ValueError):
    """The requested backend cannot run here; the message is one line that names one that can."""


def check_backend(op: str, backend: str, *more: str) -> None:
    """Raise BackendError unless a backend is "auto", "reference", "torch" or one of `more`."""
    legal = ("auto", "reference", "torch", *more)
    if backend not in legal:
        raise BackendError(f"backend={backend} of {op} is not a legal value; legal: {', '.join(legal)}")


def require_tokens(x: Tensor, op: str) -> None:
    """Raise ValueError if there are no rows or no tokens, [B, T, ...], which kernels would divide by."""
    if not (x.shape[0] and x.shape[1]):
        raise ValueError(f"{op} needs at least one token, got shape {tuple(x.shape)}")


def once_per_tensor(make: Callable[[Tensor], T]) -> Callable[[Tensor], T]:
    """`make`, which is not called again for the tensor of the last call: layers ask the same of a tensor they share."""
    last: tuple[weakref.ref[Tensor], int, T] | None = None

    def made(x: Tensor) -> T:
        nonlocal last
        if torch.compiler.is_compiling() or x.is_inference():  # inference tensors have no version counter
            return make(x)
        known = last  # backward passes run in other threads
        if known is None or known[0]() is not x or known[1] != x._version:
            known = last = weakref.ref(x), x._version, make(x)
        return known[2]

    return made


@once_per_tensor
def _on_host(cu_seqlens: Tensor) -> tuple[int, ...]:
    return tuple(cu_seqlens.tolist())


@once_per_tensor
def as_int64(cu_seqlens: Tensor) -> Tensor:
    """The bounds of packed documents as fla expects them; one tensor, by whose identity fla caches what it derives."""
    return cu_seqlens.long()


def document_bounds(cu_seqlens: Tensor, tokens: int) -> tuple[int, ...]:
    """The bounds of packed documents as Python integers, copied to the host once for all layers, which share a tensor.

    Raises:
        ValueError: the bounds do not rise from 0 to the number of tokens.
    """
    bounds = _on_host(cu_seqlens)
    if bounds[0] != 0 or bounds[-1] != tokens or list(bounds) != sorted(bounds):
        raise ValueError(f"cu_seqlens must rise from 0 to the {tokens} tokens, got {list(bounds)}")
    return bounds


def each_document(
    run: Callable[..., Tensor], cu_seqlens: Tensor, tensors: Sequence[Tensor], state: object = None
) -> Tensor:
    """Apply `run` to the tokens (dimension 1) of each document separately and concatenate the outputs.

    Raises:
        ValueError: more than one row, a carried state together with packed documents, or bounds that do not rise from 0
            to the number of tokens.
    """
    if state is not None:
        raise ValueError("state and cu_seqlens are mutually exclusive: a carried state belongs to one document")
    if tensors[0].shape[0] != 1:
        raise ValueError(f"cu_seqlens needs a batch of 1 with the documents concatenated, got {len(tensors[0])}")
    bounds = document_bounds(cu_seqlens, tensors[0].shape[1])
    return torch.cat([run(*(x[:, a:b] for x in tensors)) for a, b in zip(bounds, bounds[1:]) if b > a], dim=1)


def work_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums and states: float32, or float64 for float64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Keep oneDNN from rounding the operands of float32 matmuls to bfloat16 in the `with` block (see `ovq.cpu`).

    Meant for many small matmuls on overlapping views: oneDNN would copy the views first, which costs more time than
    bfloat16 saves. The setting is process-wide, so no other thread may be computing in the meantime.
    """
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    setting.fp32_precision = "none"
    try:
        yield
    finally:
        setting.fp32_precision = before


def first_max(x: Tensor, grain_size: int = GRAIN) -> tuple[Tensor, Tensor]:
    """The maximum over the last dimension and the index of the first element that attains it, as `x.max(-1)` returns.

    Written in TorchScript's subset of Python (see `unlocked` in `ovq.ops.parallel`).

    `Tensor.max` is slow on a CPU because it is not vectorised. Here the maximum of each grain is, and only the first
    grain that attains the overall maximum is searched for its index.
    """
    n = x.shape[-1]
    if x.device.type != "cpu" or n < 2 * grain_size or not x.is_contiguous():
        best, index = x.max(-1)
        return best, index
    whole = n - n % grain_size
    grains = x.view(-1, n)[:, :whole].unflatten(1, (-1, grain_size))
    best, grain = grains.amax(-1).max(-1)
    inside = grains[torch.arange(len(grains)), grain].argmax(-1)
    index = grain.mul_(grain_size).add_(inside)
    if whole < n:
        rest, at = x.view(-1, n)[:, whole:].max(-1)
        later = (rest > best) | (rest.isnan() & ~best.isnan())
        best, index = torch.where(later, rest, best), torch.where(later, at + whole, index)
    return best.view(x.shape[:-1]), index.view(x.shape[:-1])
