"""Causal attention with torch's scaled_dot_product_attention on any device; no T x S matrix is stored on the CPU.

torch aligns `is_causal` with the first key, so carried keys need care. The CUDA kernels can align it with the last key
instead. On the CPU that would need a materialised mask, at three times the cost, so two calls without a mask replace it
there: one over the carried keys and a causal one over the new keys, merged by their log-sum-exps. Given the merged
output and log-sum-exp, their backward kernels return exactly the gradients of the full attention.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, K key, V value width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.bias import causal_lower_right


def forward(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor) -> Tensor:
    """As `reference.forward`."""
    T, H = q_BTHK.shape[1:3]
    S, G = k_BSGK.shape[1:3]
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGV))
    if T in (1, S):
        o = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=G != H)
        return o.transpose(1, 2)
    if G != H:
        k, v = k.repeat_interleave(H // G, dim=1), v.repeat_interleave(H // G, dim=1)
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(T, S)).transpose(1, 2)
    if k.shape[-1] != v.shape[-1]:  # not supported by the CPU's flash kernel
        width = max(k.shape[-1], v.shape[-1])
        scale = k.shape[-1] ** -0.5
        q, k, v_wide = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
        return _Carried.apply(q, k, v_wide, scale)[..., : v.shape[-1]].transpose(1, 2)
    return _Carried.apply(q, k, v, k.shape[-1] ** -0.5).transpose(1, 2)


class _Carried(torch.autograd.Function):
    """Attention [B, H, T, V] of the last T of S tokens, on the CPU."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        old = k.shape[2] - q.shape[2]
        o_old, lse_old = attend(q, k[:, :, :old], v[:, :, :old], scale=scale)
        o_own, lse_own = attend(q, k[:, :, old:], v[:, :, old:], is_causal=True, scale=scale)
        lse = torch.logaddexp(lse_old, lse_own)
        # Each half's share of the softmax, [B, H, T, 1].
        o = o_old * (lse_old - lse).exp()[..., None] + o_own * (lse_own - lse).exp()[..., None]
        o = o.to(q.dtype)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.scale = scale
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, o, lse = ctx.saved_tensors
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        old = k.shape[2] - q.shape[2]
        halves = [
            attend(do, q, k[:, :, part], v[:, :, part], o, lse, 0.0, causal, scale=ctx.scale)
            for part, causal in ((slice(old), False), (slice(old, None), True))
        ]
        dq = halves[0][0] + halves[1][0]
        return dq, torch.cat([half[1] for half in halves], 2), torch.cat([half[2] for half in halves], 2), None
