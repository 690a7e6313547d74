"""The choice between flash-linear-attention's kernels (the optional extra `fla`) and an operator's own torch form."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import re
import warnings

import torch
from torch import Tensor

from ovq.ops.common import BackendError, check_backend

# With fewer tokens (decoding) the torch form is a handful of small matmuls, not worth compiling a kernel for.
MIN_TOKENS = 16
GATED = ("gated_delta_rule", "simple_gla")  # whose gradients are those of fla's chunk_bwd_dqkwg


def uses_fla(backend: str, x_BTHK: Tensor, op: str) -> bool:
    """Whether `op` uses the fla kernels for this input.

    "auto" uses them for bfloat16 and float16 on CUDA, and warns once if fla-core is not installed, or if it would
    refuse to compute the gradients.

    Raises:
        BackendError: an unknown backend, or "fla" where it cannot run.
    """
    check_backend(op, backend, "fla")
    if backend == "fla":
        if not x_BTHK.is_cuda:
            raise BackendError(f"backend=fla of {op} needs a CUDA tensor, got {x_BTHK.device.type}; use backend=torch")
        if x_BTHK.dtype not in (torch.bfloat16, torch.float16):
            raise BackendError(f"backend=fla of {op} needs bf16, got {x_BTHK.dtype}; set trainer.precision=bf16")
        if not installed():
            raise BackendError(f"backend=fla of {op} needs fla-core; install it with: pip install -e '.[fla]'")
        if refuses_gradients(x_BTHK, op):
            raise BackendError(f"backend=fla of {op} {REFUSED}, or set backend=torch")
        return True
    if backend != "auto" or not x_BTHK.is_cuda or x_BTHK.dtype not in (torch.bfloat16, torch.float16):
        return False
    if not installed():
        _warn_missing()
        return False
    if refuses_gradients(x_BTHK, op):
        _warn_refused(op)
        return False
    return x_BTHK.shape[1] >= MIN_TOKENS


REFUSED = "has no gradients on this GPU: Triton 3.4.0 to 3.7.0 computes them wrongly on Hopper; install triton>=3.7.1"


def refuses_gradients(x_BTHK: Tensor, op: str) -> bool:
    """Whether fla-core 0.6.0 would raise an error in the backward pass (its issue 640).

    For the gated delta rule, it uses TileLang's kernels instead if TileLang is installed.
    """
    if op not in GATED or not (torch.is_grad_enabled() and x_BTHK.requires_grad):
        return False
    if torch.cuda.get_device_capability(x_BTHK.device)[0] != 9 or not (3, 4, 0) <= _triton_version() < (3, 7, 1):
        return False
    return op != "gated_delta_rule" or importlib.util.find_spec("tilelang") is None


@functools.cache
def _triton_version() -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", importlib.metadata.version("triton"))[:3]))


@functools.cache
def _warn_refused(op: str) -> None:
    warnings.warn(f"fla's {op} {REFUSED}. Until then, its slower torch form is used", stacklevel=3)


@functools.cache
def installed() -> bool:
    return importlib.util.find_spec("fla") is not None


@functools.cache
def _warn_missing() -> None:
    warnings.warn(
        "fla-core is not installed: linear-attention mixers use their slower torch form; pip install -e '.[fla]'",
        stacklevel=3,
    )
