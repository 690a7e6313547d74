"""The Mesa layer: ridge regression on all key/value pairs so far, re-solved at every token (arXiv 2506.05233)."""

from __future__ import annotations

import functools

from torch import Tensor

from ovq.ops import fla_backend
from ovq.ops.common import as_int64, each_document, require_tokens
from ovq.ops.mesa import chunked, reference

State = tuple[Tensor, Tensor]


def mesa(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor,
    beta_BTH: Tensor,
    lamb_HK: Tensor,
    *,
    iterations: int = 30,
    chunk_size: int = 64,
    cu_seqlens: Tensor | None = None,
    state: State | None = None,
    backend: str = "auto",
) -> tuple[Tensor, State | None]:
    """o_t = Hkv_t^T (Hkk_t + diag lambda)^-1 q_t, with Hkk and Hkv the decayed sums of beta k k^T and beta k v^T.

    Args:
        q_BTHK, k_BTHK: [B, T, H, K], k with unit norm.
        v_BTHV: [B, T, H, V] (the fla kernels require V = K).
        g_BTH: [B, T, H], log of the decay, at most 0.
        beta_BTH: [B, T, H], weight of each pair, in [0, 1].
        lamb_HK: [H, K], positive ridge; at least 0.25 for the solve to converge well.
        iterations: conjugate-gradient steps; K or more are exact up to rounding. The reference solves directly.
        chunk_size: tokens per chunk of the torch form.
        cu_seqlens: int32 [documents + 1], bounds of packed documents; requires B = 1 and no state.
        state: (Hkk [B, H, K, K], Hkv [B, H, K, V]) in float32 (float64 for float64 inputs).
        backend: auto | reference | torch | fla.

    Returns:
        (o [B, T, H, V] in v's dtype, the state after the last token; None with cu_seqlens).

    Raises:
        ValueError: an invalid backend, no tokens, or cu_seqlens with a state or B > 1.
    """
    require_tokens(q_BTHK, "mesa")
    tensors = (q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH)
    if fla_backend.uses_fla(backend, q_BTHK, "mesa"):
        return _kernel(*tensors, lamb_HK, iterations, cu_seqlens, state)
    if cu_seqlens is not None:
        alone = functools.partial(mesa, lamb_HK=lamb_HK, iterations=iterations, chunk_size=chunk_size, backend=backend)
        return each_document(lambda *x: alone(*x)[0], cu_seqlens, tensors, state), None
    if backend == "reference":
        return reference.forward(*tensors, lamb_HK, state)
    return chunked.forward(*tensors, lamb_HK, iterations=iterations, chunk_size=chunk_size, state=state)


def _kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    lamb: Tensor,
    iterations: int,
    cu_seqlens: Tensor | None,
    state: State | None,
) -> tuple[Tensor, State | None]:
    from fla.ops.mesa_net import chunk_mesa_net

    kk, kv = state or (None, None)
    o, kk, kv = chunk_mesa_net(
        q,
        k,
        v,
        g.float(),
        beta.float(),
        lamb.float(),
        h_kk_init=kk,
        h_kv_init=kv,
        output_final_state=cu_seqlens is None,
        max_CG_iteration=iterations,
        cu_seqlens=None if cu_seqlens is None else as_int64(cu_seqlens),
    )
    return o, (kk, kv) if cu_seqlens is None else None
