"""The gated delta rule, one token at a time: the definition.

Shapes: B batch, T tokens, H heads, K key width, V value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ovq.ops.common import work_dtype


def forward(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, g_BTH: Tensor, beta_BTH: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """arXiv 2412.06464, eq. 10, with the state transposed to [K, V] and queries scaled by 1 / sqrt(K)."""
    B, T, H, V = v_BTHV.shape
    work = work_dtype(q_BTHK)
    q, k, v, g, beta = (x.to(work) for x in (q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH))
    S_BHKV = q.new_zeros(B, H, q.shape[3], V) if state is None else state
    o = []
    for t in range(T):
        S_BHKV = g[:, t, :, None, None].exp() * S_BHKV
        recalled_BHV = torch.einsum("bhkv,bhk->bhv", S_BHKV, k[:, t])
        correction_BHV = beta[:, t, :, None] * (v[:, t] - recalled_BHV)
        S_BHKV = S_BHKV + k[:, t, :, :, None] * correction_BHV[:, :, None, :]
        o.append(torch.einsum("bhkv,bhk->bhv", S_BHKV, q[:, t]) * q.shape[3] ** -0.5)
    return torch.stack(o, dim=1).to(v_BTHV.dtype), S_BHKV
