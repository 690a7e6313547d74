"""Attention to vector-quantised keys in linear time (Transformer-VQ, Lingle 2023, arXiv 2309.16354)."""

from __future__ import annotations

import functools

from torch import Tensor

from ovq.ops.common import check_backend, each_document, require_tokens
from ovq.ops.vq_attention import chunked, reference
from ovq.ops.vq_attention.state import VQState, assign

__all__ = ["VQState", "assign", "vq_attention"]


def vq_attention(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    codebook_GNK: Tensor,
    beta_H: Tensor,
    *,
    block_size: int = 512,
    quantize_recent: bool = False,
    cu_seqlens: Tensor | None = None,
    state: VQState | None = None,
    backend: str = "auto",
) -> tuple[Tensor, VQState | None]:
    """Token t attends exactly to its own and the previous block, and to the codes of all earlier tokens.

        logits = [ beta q.c_n + log count_n ] ++ [ beta q.k_s for s of the two blocks, s <= t ]
        o      = softmax(logits) @ [ mean value of the tokens with code n ; v_s ]

    which is attention to all tokens with the keys of older blocks replaced by their nearest codes. The codebook gets no
    gradient (its owner updates it by moving averages); by the straight-through estimator, each older key gets the
    gradient of its code, divided by the code's count.

    Args:
        q_BTHK: [B, T, H, K].
        k_BTGK, v_BTGV: [B, T, G, K or V], G divides H.
        codebook_GNK: [G, N, K].
        beta_H: [H], inverse temperature.
        block_size: tokens per block.
        quantize_recent: also replace the keys of the two recent blocks by their codes, as in Transformer-VQ.
        cu_seqlens: int32 [documents + 1], bounds of packed documents; requires B = 1 and no state.
        state: returned by an earlier call with the same codebook.
        backend: auto | reference | torch.

    Returns:
        (o [B, T, H, V] in v's dtype, the state after the last token; None with cu_seqlens).

    Raises:
        ValueError: an invalid backend, no tokens, or cu_seqlens with a state or B > 1.
    """
    check_backend("vq_attention", backend)
    require_tokens(q_BTHK, "vq_attention")
    forward = reference.forward if backend == "reference" else chunked.forward
    attend = functools.partial(
        forward, codebook_GNK=codebook_GNK, beta_H=beta_H, block_size=block_size, quantize_recent=quantize_recent
    )
    tensors = (q_BTHK, k_BTGK, v_BTGV)
    if cu_seqlens is not None:
        return each_document(lambda *x: attend(*x)[0], cu_seqlens, tensors, state), None
    return attend(*tensors, state=state)
