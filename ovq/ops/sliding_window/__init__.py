"""Causal softmax attention to the last `window` tokens (Longformer, arXiv 2004.05150, sec. 3.1)."""

from __future__ import annotations

import functools

from torch import Tensor

from ovq.ops.attention import check, flex
from ovq.ops.common import each_document
from ovq.ops.sliding_window import chunked, reference

__all__ = ["sliding_window_attention"]


def sliding_window_attention(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    *,
    window: int,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(q.k / sqrt(K)) applied to the values; query t is at key position S - T + t and attends to itself and the
    window - 1 keys before it.

    Args:
        q_BTHK: [B, T, H, K].
        k_BSGK, v_BSGV: [B, S, G, K or V], S >= T, G divides H; keys before the last T are carried over, and
            window - 1 of them are enough.
        window: number of keys attended to, at least 1.
        cu_seqlens: int32 [documents + 1], bounds of packed documents; requires B = 1 and no carried keys.
        backend: auto | reference | torch | flex. auto is FlexAttention on CUDA where it can run, else torch.

    Returns:
        o [B, T, H, V] in q's dtype.

    Raises:
        ValueError: an invalid backend, window or shape, or cu_seqlens with carried keys or B > 1.
    """
    check(q_BTHK, k_BSGK, v_BSGV, cu_seqlens, backend, "sliding_window_attention")
    if window < 1:
        raise ValueError(f"window={window} of sliding_window_attention must be at least 1")
    bounded = k_BSGK.shape[1] > window or cu_seqlens is not None  # else it is plain causal attention
    forward = functools.partial(reference.forward if backend == "reference" else chunked.forward, window=window)
    if flex.takes(backend, q_BTHK, v_BSGV, wanted=bounded):
        fallback = None if backend == "flex" else forward
        return flex.forward(q_BTHK, k_BSGK, v_BSGV, window, cu_seqlens, fallback=fallback)
    if cu_seqlens is None:
        return forward(q_BTHK, k_BSGK, v_BSGV)
    return each_document(forward, cu_seqlens, (q_BTHK, k_BSGK, v_BSGV))
