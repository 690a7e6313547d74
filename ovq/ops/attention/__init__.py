"""Full causal softmax attention (arXiv 1706.03762, eq. 1)."""

from __future__ import annotations

from torch import Tensor

from ovq.ops.attention import chunked, flex, reference
from ovq.ops.common import check_backend, each_document, require_tokens

__all__ = ["full_attention"]


def full_attention(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(q.k / sqrt(K)) applied to the values; query t is at key position S - T + t and attends to no later key.

    Args:
        q_BTHK: [B, T, H, K].
        k_BSGK, v_BSGV: [B, S, G, K or V], S >= T, G divides H; keys before the last T are carried over.
        cu_seqlens: int32 [documents + 1], bounds of packed documents; requires B = 1 and no carried keys.
        backend: auto | reference | torch | flex. auto is torch's scaled_dot_product_attention, or on CUDA FlexAttention
            for packed documents and for deterministic gradients.

    Returns:
        o [B, T, H, V] in q's dtype.

    Raises:
        ValueError: an invalid backend or shape, or cu_seqlens with carried keys or B > 1.
    """
    check(q_BTHK, k_BSGK, v_BSGV, cu_seqlens, backend, "full_attention")
    forward = reference.forward if backend == "reference" else chunked.forward
    if flex.takes(backend, q_BTHK, v_BSGV, wanted=cu_seqlens is not None):
        fallback = None if backend == "flex" else forward
        return flex.forward(q_BTHK, k_BSGK, v_BSGV, None, cu_seqlens, fallback=fallback)
    if cu_seqlens is None:
        return forward(q_BTHK, k_BSGK, v_BSGV)
    return each_document(forward, cu_seqlens, (q_BTHK, k_BSGK, v_BSGV))


def check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, backend: str, op: str) -> None:
    """Check the inputs of full and sliding-window attention.

    Raises:
        ValueError: an invalid backend, shapes that do not match, or cu_seqlens with carried keys or B > 1.
    """
    check_backend(op, backend, "flex")
    require_tokens(q, op)
    T, S = q.shape[1], k.shape[1]
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise ValueError(f"{op} got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: shapes do not match")
    if S < T:
        raise ValueError(f"{op} needs a key for every query, got {T} queries and {S} keys")
    if cu_seqlens is not None and S != T:
        raise ValueError("state and cu_seqlens are mutually exclusive: a carried state belongs to one document")
    if cu_seqlens is not None and q.shape[0] != 1:
        raise ValueError(f"cu_seqlens needs a batch of 1 with the documents concatenated, got {q.shape[0]}")
