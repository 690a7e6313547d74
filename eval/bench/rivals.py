"""OVQ-attention and the attention and recurrence operators it is benchmarked against.

Shapes: B batch, T tokens, H heads, K width of keys and values.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from eval.bench.stopwatch import Marked
from ovq.ops import fla_backend, ovq_attention
from ovq.ops.attention import full_attention
from ovq.ops.gated_delta_rule import gated_delta_rule
from ovq.ops.simple_gla import simple_gla
from ovq.ops.sliding_window import sliding_window_attention


@dataclass(frozen=True)
class Case:
    """A problem: the shape of q, k and v, OVQ's settings, and the sliding window's length in tokens."""

    batch: int
    tokens: int
    heads: int
    width: int
    num_centroids: int
    chunk_size: int = 128
    window: int = 256


@dataclass
class Inputs:
    """q, k (of unit norm), v and the output's gradient `do` [B, T, H, K]; beta [H], float32.

    `decay` (log, float32) and `strength` (of a write, in [0, 1)) [B, T, H] are for the recurrences.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    decay: Tensor
    strength: Tensor
    do: Tensor


def make_inputs(case: Case, device: torch.device, dtype: torch.dtype, *, heads_first: bool = False) -> Inputs:
    """Random inputs: zeros would hide mistakes and run faster than real data.

    `heads_first`: q, k, v and do are stored as [B, H, T, K], which SDPA prefers; their shape stays [B, T, H, K].
    """
    shape = (case.batch, case.tokens, case.heads, case.width)
    stored = (case.batch, case.heads, case.tokens, case.width) if heads_first else shape
    q, k, v, do = (torch.randn(stored, device=device, dtype=dtype) for _ in range(4))
    if heads_first:
        q, k, v, do = (x.transpose(1, 2) for x in (q, k, v, do))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    beta = torch.full((case.heads,), case.width**0.5, device=device)
    strength = torch.rand(shape[:3], device=device, dtype=dtype)
    decay = -torch.rand(shape[:3], device=device)
    for x in (q, k, v, beta, decay, strength):
        x.requires_grad_()
    return Inputs(q, k, v, beta, decay, strength, do)


Rival = Callable[[Inputs, Case], Tensor]


def _ovq(x: Inputs, case: Case, backend: str) -> Tensor:
    settings: dict[str, Any] = {"num_centroids": case.num_centroids, "chunk_size": case.chunk_size}
    return ovq_attention(x.q, x.k, x.v, x.beta, backend=backend, **settings)[0]


def _sliding_window(x: Inputs, case: Case) -> Tensor:
    return sliding_window_attention(x.q, x.k, x.v, window=case.window)


def _sdpa(x: Inputs, case: Case) -> Tensor:
    q, k, v = (y.transpose(1, 2) for y in (x.q, x.k, x.v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _sdpa_kernel(x: Inputs, case: Case, backend: SDPBackend) -> Tensor:
    with sdpa_kernel(backend):
        return _sdpa(x, case)


def _flash_attention_3(x: Inputs, case: Case) -> Tensor:
    from flash_attn_interface import flash_attn_func

    o = flash_attn_func(x.q, x.k, x.v, causal=True)
    return o[0] if isinstance(o, tuple) else o


def _flex(x: Inputs, case: Case) -> Tensor:
    return full_attention(x.q, x.k, x.v, backend="flex")


def _gated_deltanet(x: Inputs, case: Case) -> Tensor:
    return gated_delta_rule(x.q, x.k, x.v, x.decay, x.strength, backend="fla")[0]


def _mamba2(x: Inputs, case: Case) -> Tensor:
    return simple_gla(x.q, x.k, x.v, x.decay, backend="fla")[0]


SDPA: dict[str, Rival] = {
    "sdpa_flash": functools.partial(_sdpa_kernel, backend=SDPBackend.FLASH_ATTENTION),
    "sdpa_cudnn": functools.partial(_sdpa_kernel, backend=SDPBackend.CUDNN_ATTENTION),
    "sdpa_efficient": functools.partial(_sdpa_kernel, backend=SDPBackend.EFFICIENT_ATTENTION),
}
RIVALS: dict[str, Rival] = {
    "ovq_torch": functools.partial(_ovq, backend="torch"),
    "ovq_triton": functools.partial(_ovq, backend="triton"),
    "ovq_reference": functools.partial(_ovq, backend="reference"),
    "sliding_window": _sliding_window,
    "sdpa": _sdpa,  # torch chooses the kernel
    **SDPA,
    "flash_attention_3": _flash_attention_3,
    "flex": _flex,
    "gated_deltanet": _gated_deltanet,
    "mamba2": _mamba2,
}


def missing(name: str, device: torch.device) -> str | None:
    """Why a rival cannot run here, or None if it can."""
    if name == "ovq_triton" and device.type != "cuda":
        return "the Triton kernels need a GPU"
    if name == "flash_attention_3" and importlib.util.find_spec("flash_attn_interface") is None:
        return "flash_attn_interface is not installed"
    if name in ("gated_deltanet", "mamba2") and not fla_backend.installed():
        return "fla-core is not installed (pip install -e '.[fla]')"
    return None


def forward_backward(rival: Rival, x: Inputs, case: Case) -> Marked:
    """A call that runs the forward pass as in training, marks it, and computes the gradients of the rival's inputs."""

    def call(mark: Callable[[], None]) -> None:
        o = rival(x, case)
        mark()
        learned = (x.q, x.k, x.v, x.beta, x.decay, x.strength)
        torch.autograd.grad(o, learned, x.do, allow_unused=True)

    return call


# --- decoding --------------------------------------------------------------------------------------------------------


def decode_ovq(case: Case, position: int, device: torch.device, dtype: torch.dtype, backend: str) -> Callable[[], None]:
    """A call that decodes one token after a prefix of `position` tokens; the state advances with every call."""
    settings: dict[str, Any] = {"num_centroids": case.num_centroids, "chunk_size": case.chunk_size}
    settings |= {"return_state": True, "backend": backend}
    state, piece = None, min(position, 32768)
    with torch.no_grad():
        for start in range(0, position, piece):
            length = min(piece, position - start)
            x = make_inputs(Case(case.batch, length, case.heads, case.width, case.num_centroids), device, dtype)
            state = ovq_attention(x.q, x.k, x.v, x.beta, state=state, **settings)[1]
    token = make_inputs(Case(case.batch, 1, case.heads, case.width, case.num_centroids), device, dtype)

    def step() -> None:
        nonlocal state
        with torch.no_grad():
            state = ovq_attention(token.q, token.k, token.v, token.beta, state=state, **settings)[1]

    return step


def decode_attention(case: Case, position: int, device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
    """A call that attends from one token to a cache of `position` keys and values, which does not grow."""
    shape = (case.batch, case.heads, position, case.width)
    k, v = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
    q = torch.randn(case.batch, case.heads, 1, case.width, device=device, dtype=dtype)

    def step() -> None:
        with torch.no_grad():
            F.scaled_dot_product_attention(q, k, v)

    return step
