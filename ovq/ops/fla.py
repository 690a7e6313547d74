"""When an operator runs on flash-linear-attention's kernels (the optional extra `fla`) and when on its torch form."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

BACKENDS = ("auto", "reference", "torch", "fla")
# Below this many tokens (decoding) the torch form is a handful of small products: no kernel is compiled for them.
FEWEST_TOKENS = 16


class BackendError(ValueError):
    """A backend was asked for that cannot run here; the message is one line that says what would."""


def uses_fla(backend: str, x_BTHK: Tensor, op: str) -> bool:
    """Whether `op` runs on the kernels for this input.

    "auto" takes them for bfloat16 and float16 on CUDA where fla-core is installed, and says once where it is not.

    Raises:
        BackendError: an unknown backend, or "fla" asked for where it cannot run.
    """
    if backend not in BACKENDS:
        raise BackendError(f"backend={backend} of {op} is not a legal value; legal: {', '.join(BACKENDS)}")
    if backend == "fla":
        if not x_BTHK.is_cuda:
            raise BackendError(f"backend=fla of {op} needs a CUDA tensor, got {x_BTHK.device.type}; use backend=torch")
        if x_BTHK.dtype not in (torch.bfloat16, torch.float16):
            raise BackendError(f"backend=fla of {op} needs bf16, got {x_BTHK.dtype}; set trainer.precision=bf16")
        if not installed():
            raise BackendError(f"backend=fla of {op} needs fla-core; install it with: pip install '.[fla]'")
        return True
    if backend != "auto" or not x_BTHK.is_cuda or x_BTHK.dtype not in (torch.bfloat16, torch.float16):
        return False
    if not installed():
        _note_missing()
        return False
    return x_BTHK.shape[1] >= FEWEST_TOKENS


@functools.cache
def installed() -> bool:
    return importlib.util.find_spec("fla") is not None


@functools.cache
def _note_missing() -> None:
    warnings.warn(
        "fla-core is not installed: linear-attention mixers run in their slower torch form; pip install '.[fla]'",
        stacklevel=3,
    )


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
