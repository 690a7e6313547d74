"""The gated delta rule (Gated DeltaNet, arXiv 2412.06464, eq. 10)."""

from __future__ import annotations

from torch import Tensor

from ovq.ops import fla_backend
from ovq.ops.common import as_int64, each_document, require_tokens
from ovq.ops.gated_delta_rule import chunked, reference


def gated_delta_rule(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor,
    beta_BTH: Tensor,
    *,
    chunk_size: int = 64,
    cu_seqlens: Tensor | None = None,
    state: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,  o_t = S_t^T q_t / sqrt(K).

    Args:
        q_BTHK, k_BTHK: [B, T, H, K], unit norm (for |k| > sqrt(2 / beta) the state may grow without bound).
        v_BTHV: [B, T, H, V].
        g_BTH: [B, T, H], log of the decay alpha, at most 0.
        beta_BTH: [B, T, H], write strength in [0, 1].
        chunk_size: tokens per chunk of the torch form.
        cu_seqlens: int32 [documents + 1], bounds of packed documents; requires B = 1 and no state.
        state: S [B, H, K, V] in float32 (float64 for float64 inputs).
        backend: auto | reference | torch | fla.

    Returns:
        (o [B, T, H, V] in v's dtype, the state after the last token; None with cu_seqlens).

    Raises:
        ValueError: an invalid backend, no tokens, or cu_seqlens with a state or B > 1.
    """
    require_tokens(q_BTHK, "gated_delta_rule")
    tensors = (q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH)
    if fla_backend.uses_fla(backend, q_BTHK, "gated_delta_rule"):
        return _kernel(*tensors, cu_seqlens, state)
    if cu_seqlens is not None:
        return each_document(
            lambda *x: gated_delta_rule(*x, chunk_size=chunk_size, backend=backend)[0], cu_seqlens, tensors, state
        ), None
    if backend == "reference":
        return reference.forward(*tensors, state)
    return chunked.forward(*tensors, chunk_size=chunk_size, state=state)


def _kernel(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return chunk_gated_delta_rule(
        q,
        k,
        v,
        g.float(),
        beta.float(),
        scale=q.shape[-1] ** -0.5,
        initial_state=state,
        output_final_state=cu_seqlens is None,
        cu_seqlens=None if cu_seqlens is None else as_int64(cu_seqlens),
    )
