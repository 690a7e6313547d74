"""Normalised linear attention (Katharopoulos et al. 2020, arXiv 2006.16236, eqs. 9-12), after the feature map."""

from __future__ import annotations

from torch import Tensor

from ovq.ops import fla_backend
from ovq.ops.common import each_document, require_tokens
from ovq.ops.linear_attention import chunked, reference
from ovq.ops.simple_gla import chunked as gla

State = tuple[Tensor, Tensor]


def linear_attention(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    *,
    chunk_size: int = 64,
    cu_seqlens: Tensor | None = None,
    state: State | None = None,
    backend: str = "auto",
) -> tuple[Tensor, State | None]:
    """o_t = (sum_{s<=t} v_s k_s^T) q_t / (q_t . sum_{s<=t} k_s), for positive features q and k.

    Args:
        q_BTHK, k_BTHK: [B, T, H, K], after the feature map, positive.
        v_BTHV: [B, T, H, V].
        chunk_size: tokens per chunk of the torch form.
        cu_seqlens: int32 [documents + 1], bounds of packed documents; requires B = 1 and no state.
        state: (sum of k v^T [B, H, K, V], sum of k [B, H, K]) in float32 (float64 for float64 inputs).
        backend: auto | reference | torch | fla.

    Returns:
        (o [B, T, H, V] in v's dtype, the state after the last token; None with cu_seqlens).

    Raises:
        ValueError: an invalid backend, no tokens, or cu_seqlens with a state or B > 1.
    """
    require_tokens(q_BTHK, "linear_attention")
    numerator = _kernel if fla_backend.uses_fla(backend, q_BTHK, "linear_attention") else gla.forward
    if cu_seqlens is not None:
        # For the kernels too: in some fla versions their own normaliser runs across document boundaries.
        return each_document(
            lambda *x: linear_attention(*x, chunk_size=chunk_size, backend=backend)[0],
            cu_seqlens,
            (q_BTHK, k_BTHK, v_BTHV),
            state,
        ), None
    if backend == "reference":
        return reference.forward(q_BTHK, k_BTHK, v_BTHV, state)
    return chunked.forward(q_BTHK, k_BTHK, v_BTHV, chunk_size=chunk_size, state=state, numerator=numerator)


def _kernel(
    q: Tensor, k: Tensor, v: Tensor, g: None, *, chunk_size: int, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    from fla.ops.simple_gla import chunk_simple_gla

    return chunk_simple_gla(q, k, v, scale=1.0, initial_state=state, output_final_state=True)
