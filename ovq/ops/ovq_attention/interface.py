"""`ovq_attention`: checks the arguments, picks a backend, joins pending and new tokens, builds the next state.

A backend is a module beside this one with

    forward(q_BTHK, k_BSGK, v_BSGV, beta_H, spec, dictionary, assignment=None) -> (o_BTHV, dictionary, assignment_BGS)

for S >= T tokens that start at `dictionary.position`, with queries for the last T; assignment is int32, and -1 in an
unfinished last chunk. Passing `assignment` forces it, which is how backends are compared. A backend may also have

    forward_packed(q_1THK, k_1TGK, v_1TGV, beta_H, spec, cu_seqlens) -> o_1THV
    unsupported(q_BTHK, k_BSGK, v_BSGV, spec) -> str | None      None, or one line on what it cannot do, and why

Shapes: B batch, T tokens, S pending + new tokens, H query heads, G key/value heads, N centroids, K and V widths.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from ovq.ops.common import BackendError, check_backend, document_bounds, each_document, require_tokens, work_dtype
from ovq.ops.ovq_attention.spec import Dictionary, OVQSpec, OVQState, check_step_size

MODULES = {"reference": "reference", "torch": "chunked", "triton": "kernels"}  # sibling module of each backend


def ovq_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    num_centroids: int,
    chunk_size: int = 128,
    growth: str = "plateau",
    growth_tokens: int | None = None,
    seeding: str = "spread",
    seed: int = 0,
    step: str | float = "count",
    first_chunk: str = "merge",
    assign_on: str = "key",
    cu_seqlens: Tensor | None = None,
    state: OVQState | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, OVQState | None]:
    """softmax(beta q.[mu^k, k_chunk] + [log count, 0]) [mu^v, v_chunk], where mu is the dictionary before the chunk.

    Differentiable in q, k, v and beta and, except with the triton backend, in the sums and pending tokens of a carried
    state. The triton backend returns a state without gradients, as `ovq.mixers.base.detach_state` does: a piece then
    learns only from its own tokens (truncated backpropagation). Assignments and counts carry no gradient.

    Args:
        q: [B, T, H, K], used as given: normalising queries and keys is left to the layer.
        k, v: [B, T, G, K] and [B, T, G, V]; H is a multiple of G, and the query heads of a group share one dictionary.
        beta: [H], multiplies q.k; there is no other scaling.
        num_centroids ... assign_on: see `OVQSpec`; `step` is its step_size.
        cu_seqlens: int32 [documents + 1], bounds of packed documents; requires B = 1 and no state. The
            dictionary and the chunking restart at each document.
        state: returned by an earlier call with the same settings; None at the start. Not modified. One that requires a
            gradient needs the torch or reference backend; auto then means torch.
        return_state: also return the state after the last token.
        backend: reference (the definition, slow) | torch (any device) | triton (GPU) | auto (triton where it can run).

    Returns:
        o [B, T, H, V] in q's dtype, and the state (None unless return_state).

    Raises:
        ValueError: an invalid setting or shape, or a backend that does not support this call.
    """
    check_step_size("step", step)
    spec = OVQSpec(
        num_centroids=num_centroids,
        chunk_size=chunk_size,
        growth=growth,
        growth_tokens=growth_tokens,
        seeding=seeding,
        seed=seed,
        step_size=step,
        first_chunk=first_chunk,
        assign_on=assign_on,
    )
    return attend(q, k, v, beta, spec, cu_seqlens=cu_seqlens, state=state, return_state=return_state, backend=backend)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    spec: OVQSpec,
    *,
    cu_seqlens: Tensor | None = None,
    state: OVQState | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, OVQState | None]:
    """`ovq_attention` with its settings as a spec, which a layer builds and validates only once."""
    _check_shapes(q, k, v, beta)
    carried = state is not None and torch.is_grad_enabled() and any(x.requires_grad for x in state.tensors())
    chosen = _choose(backend, q, k, v, spec, carried)
    if cu_seqlens is not None:
        _check_packed(q, cu_seqlens, state, return_state)
        if hasattr(chosen, "forward_packed"):
            return chosen.forward_packed(q, k, v, beta, spec, cu_seqlens), None
        alone = functools.partial(_run, chosen, beta=beta, spec=spec)
        document_bounds(cu_seqlens, q.shape[1])  # raises unless these are valid bounds
        return each_document(lambda *qkv: alone(*qkv)[0], cu_seqlens, (q, k, v)), None
    if state is not None:
        _check_state(state, q, k, v, spec)
    o, new_state = _run(chosen, q, k, v, beta=beta, spec=spec, state=state)
    return o, new_state if return_state else None


def _run(
    backend: Any, q: Tensor, k: Tensor, v: Tensor, *, beta: Tensor, spec: OVQSpec, state: OVQState | None = None
) -> tuple[Tensor, OVQState]:
    """Outputs of one document, or a piece of one, and the state after the last token."""
    if state is None:
        dictionary = _empty(k, v, spec)
    else:
        dictionary = state.dictionary()
        k = torch.cat([state.pending_key, k], dim=1)
        v = torch.cat([state.pending_value, v], dim=1)
    o, new, _ = backend.forward(q, k, v, beta, spec, dictionary)
    end = dictionary.position + k.shape[1]
    pending = slice(k.shape[1] - end % spec.chunk_size, None)
    # Cloned, because a view would keep the whole piece's keys alive.
    kept_k, kept_v = k[:, pending].clone(), v[:, pending].clone()
    after = OVQState(new.key_sum, new.value_sum, new.count, kept_k, kept_v, new.size, end)
    return o, after if getattr(backend, "STATE_GRADIENT", False) else after.map(torch.Tensor.detach)


def _empty(k: Tensor, v: Tensor, spec: OVQSpec) -> Dictionary:
    B, _, G, K = k.shape
    N, work = spec.num_centroids, work_dtype(k)
    zeros = functools.partial(torch.zeros, dtype=work, device=k.device)
    return Dictionary(zeros(B, G, N, K), zeros(B, G, N, v.shape[3]), zeros(B, G, N), 0, 0)


def _choose(backend: str, q: Tensor, k: Tensor, v: Tensor, spec: OVQSpec, carried: bool = False) -> Any:
    """The backend module to use; with `carried`, it must pass gradients to a carried state."""
    check_backend("ovq_attention", backend, "triton")
    if backend == "auto":
        possible = q.is_cuda and "triton" in _MODULES and not carried
        fits = possible and not _unsupported(_MODULES["triton"], q, k, v, spec)
        return _MODULES["triton" if fits else "torch"]
    if backend not in _MODULES:
        raise BackendError(
            f"backend={backend} of ovq_attention needs the triton package and a GPU build of torch (or "
            "TRITON_INTERPRET=1, which runs the kernels on the CPU, slowly); use backend=torch"
        )
    chosen = _MODULES[backend]
    if reason := _unsupported(chosen, q, k, v, spec):
        raise BackendError(f"backend={backend} of ovq_attention: {reason}; use backend=torch")
    if carried and not getattr(chosen, "STATE_GRADIENT", False):
        raise BackendError(
            f"backend={backend} of ovq_attention has no gradient of a carried state; use backend=torch, or cut it off "
            "with ovq.mixers.base.detach_state"
        )
    return chosen


def backend_of(backend: str, q: Tensor, k: Tensor, v: Tensor, spec: OVQSpec) -> str:
    """The name of the backend that `attend` picks for such tensors, of any length, given its argument `backend`.

    Raises:
        BackendError: the backend asked for cannot run here, or not on these tensors.
    """
    chosen = _choose(backend, q, k, v, spec)
    return next(name for name, module in _MODULES.items() if module is chosen)


def _load_backends() -> dict[str, Any]:
    """Backends by name, imported eagerly since torch.compile cannot trace an import; Triton only where it can run."""
    runs = torch.version.cuda or torch.version.hip or os.environ.get("TRITON_INTERPRET") == "1"
    return {
        name: importlib.import_module(f"{__package__}.{module}")
        for name, module in MODULES.items()
        if name != "triton" or (runs and importlib.util.find_spec("triton"))
    }


_MODULES = _load_backends()


def _unsupported(module: Any, q: Tensor, k: Tensor, v: Tensor, spec: OVQSpec) -> str | None:
    return module.unsupported(q, k, v, spec) if hasattr(module, "unsupported") else None


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> None:
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"q, k and v must be [B, T, heads, width], got {_shape(q)}, {_shape(k)}, {_shape(v)}")
    if q.shape[:2] != k.shape[:2] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q {_shape(q)}, k {_shape(k)} and v {_shape(v)} must agree in batch and tokens, k and v in heads, "
            "q and k in width"
        )
    require_tokens(k, "ovq_attention")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads must be a multiple of the {k.shape[2]} key/value heads")
    if beta.shape != q.shape[2:3]:
        raise ValueError(f"beta must be one number per query head, [{q.shape[2]}], got {_shape(beta)}")
    if not q.is_floating_point() or not (q.dtype == k.dtype == v.dtype):
        raise ValueError(f"q, k and v must have one floating-point dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not (q.device == k.device == v.device == beta.device):
        raise ValueError(
            f"q, k, v and beta must be on one device, got {q.device}, {k.device}, {v.device}, {beta.device}"
        )


def _check_packed(q: Tensor, cu_seqlens: Tensor, state: OVQState | None, return_state: bool) -> None:
    if state is not None or return_state:
        raise ValueError("cu_seqlens excludes state and return_state: a carried state belongs to one document")
    if q.shape[0] != 1:
        raise ValueError(f"cu_seqlens needs a batch of 1 with the documents concatenated, got {q.shape[0]}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be int32 [documents + 1], got {cu_seqlens.dtype} {_shape(cu_seqlens)}")


def _check_state(state: OVQState, q: Tensor, k: Tensor, v: Tensor, spec: OVQSpec) -> None:
    """Raise ValueError unless the state fits this batch, these heads and these settings."""
    B, _, G, K = k.shape
    want, got = [B, G, spec.num_centroids, K, v.shape[3]], [*state.key_sum.shape, state.value_sum.shape[-1]]
    if want != got:
        raise ValueError(f"state is of [batch, heads, num_centroids, K, V] = {got}, but this call needs {want}")
    if state.size != spec.size_at(state.position) or state.pending_key.shape[1] != state.position % spec.chunk_size:
        raise ValueError(
            f"state holds {state.size} centroids and {state.pending_key.shape[1]} pending tokens after "
            f"{state.position}, but these settings give {spec.size_at(state.position)} and "
            f"{state.position % spec.chunk_size}: it was made with another chunk_size or growth"
        )
    if state.pending_key.dtype != q.dtype:
        raise ValueError(f"state was made with {state.pending_key.dtype}, but this call has {q.dtype}")


def _shape(x: Tensor) -> str:
    return str(list(x.shape))
