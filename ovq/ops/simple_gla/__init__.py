"""Linear attention with one decay per head and token: Mamba2's SSD (arXiv 2405.21060, sec. 6), fla's "simple GLA"."""

from __future__ import annotations

from torch import Tensor

from ovq.ops import fla_backend
from ovq.ops.common import as_int64, each_document, require_tokens
from ovq.ops.simple_gla import chunked, reference


def simple_gla(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor,
    *,
    chunk_size: int = 64,
    cu_seqlens: Tensor | None = None,
    state: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T,  o_t = S_t^T q_t.

    Args:
        q_BTGK, k_BTGK: [B, T, G, K]; G divides H, and the heads of a group share queries and keys.
        v_BTHV: [B, T, H, V].
        g_BTH: [B, T, H], log of the decay, at most 0.
        chunk_size: tokens per chunk of the torch form.
        cu_seqlens: int32 [documents + 1], bounds of packed documents; requires B = 1 and no state.
        state: S [B, H, K, V] in float32 (float64 for float64 inputs).
        backend: auto | reference | torch | fla.

    Returns:
        (o [B, T, H, V] in v's dtype, the state after the last token; None with cu_seqlens).

    Raises:
        ValueError: an invalid backend, no tokens, or cu_seqlens with a state or B > 1.
    """
    require_tokens(q_BTGK, "simple_gla")
    if fla_backend.uses_fla(backend, q_BTGK, "simple_gla"):
        return _kernel(q_BTGK, k_BTGK, v_BTHV, g_BTH, cu_seqlens, state)
    if cu_seqlens is not None:
        return each_document(
            lambda *x: simple_gla(*x, chunk_size=chunk_size, backend=backend)[0],
            cu_seqlens,
            (q_BTGK, k_BTGK, v_BTHV, g_BTH),
            state,
        ), None
    if backend == "reference":
        return reference.forward(q_BTGK, k_BTGK, v_BTHV, g_BTH, state)
    return chunked.forward(q_BTGK, k_BTGK, v_BTHV, g_BTH, chunk_size=chunk_size, state=state)


def _kernel(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, cu_seqlens: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    from fla.ops.simple_gla import chunk_simple_gla

    H = v.shape[2]
    if (G := q.shape[2]) != H:  # a copy, even if there is nothing to repeat
        q, k = (x.repeat_interleave(H // G, dim=2) for x in (q, k))
    return chunk_simple_gla(
        q,
        k,
        v,
        g.float(),
        scale=1.0,
        initial_state=state,
        output_final_state=cu_seqlens is None,
        cu_seqlens=None if cu_seqlens is None else as_int64(cu_seqlens),
    )
