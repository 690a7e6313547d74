"""The choice between flash-linear-attention's kernels (the optional extra `fla`) and an operator's own torch form."""

from __future__ import annotations

import functools
import importlib.util
import warnings

import torch
from torch import Tensor

from ovq.ops.common import BackendError

BACKENDS = ("auto", "reference", "torch", "fla")
# With fewer tokens (decoding) the torch form is a handful of small matmuls, not worth compiling a kernel for.
MIN_TOKENS = 16


def uses_fla(backend: str, x_BTHK: Tensor, op: str) -> bool:
    """Whether `op` uses the fla kernels for this input.

    "auto" uses them for bfloat16 and float16 on CUDA, and warns once if fla-core is not installed.

    Raises:
        BackendError: an unknown backend, or "fla" where it cannot run.
    """
    if backend not in BACKENDS:
        raise BackendError(f"backend={backend} of {op} is not a legal value; legal: {', '.join(BACKENDS)}")
    if backend == "fla":
        if not x_BTHK.is_cuda:
            raise BackendError(f"backend=fla of {op} needs a CUDA tensor, got {x_BTHK.device.type}; use backend=torch")
        if x_BTHK.dtype not in (torch.bfloat16, torch.float16):
            raise BackendError(f"backend=fla of {op} needs bf16, got {x_BTHK.dtype}; set trainer.precision=bf16")
        if not installed():
            raise BackendError(f"backend=fla of {op} needs fla-core; install it with: pip install -e '.[fla]'")
        return True
    if backend != "auto" or not x_BTHK.is_cuda or x_BTHK.dtype not in (torch.bfloat16, torch.float16):
        return False
    if not installed():
        _warn_missing()
        return False
    return x_BTHK.shape[1] >= MIN_TOKENS


@functools.cache
def installed() -> bool:
    return importlib.util.find_spec("fla") is not None


@functools.cache
def _warn_missing() -> None:
    warnings.warn(
        "fla-core is not installed: linear-attention mixers use their slower torch form; pip install -e '.[fla]'",
        stacklevel=3,
    )
