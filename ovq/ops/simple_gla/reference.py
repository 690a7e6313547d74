"""Simple GLA, one token at a time: the definition.

Shapes: B batch, T tokens, H heads, G groups of heads, K key width, V value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ovq.ops.common import work_dtype


def forward(
    q_BTGK: Tensor, k_BTGK: Tensor, v_BTHV: Tensor, g_BTH: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T,  o_t = S_t^T q_t.

    arXiv 2405.21060, eq. 2 with A a multiple of the identity.
    """
    B, T, H, V = v_BTHV.shape
    q, k = (x.to(work_dtype(x)).repeat_interleave(H // x.shape[2], dim=2) for x in (q_BTGK, k_BTGK))
    v, g = v_BTHV.to(q.dtype), g_BTH.to(q.dtype)
    S_BHKV = q.new_zeros(B, H, q.shape[3], V) if state is None else state
    o = []
    for t in range(T):
        S_BHKV = g[:, t, :, None, None].exp() * S_BHKV + k[:, t, :, :, None] * v[:, t, :, None, :]
        o.append(torch.einsum("bhkv,bhk->bhv", S_BHKV, q[:, t]))
    return torch.stack(o, dim=1).to(v_BTHV.dtype), S_BHKV
