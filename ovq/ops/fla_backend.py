"""When an operator runs on flash-linear-attention's kernels (the optional extra `fla`) and when on its torch form."""

from __future__ import annotations

import functools
import importlib.util
import warnings

import torch
from torch import Tensor

from ovq.ops.common import BackendError

BACKENDS = ("auto", "reference", "torch", "fla")
# Below this many tokens (decoding) the torch form is a handful of small products: no kernel is compiled for them.
FEWEST_TOKENS = 16


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
