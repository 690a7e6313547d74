"""The Mesa layer, one token at a time, with a direct solve: the definition.

Shapes: B batch, T tokens, H heads, K key width, V value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ovq.ops.common import work_dtype


def forward(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor,
    beta_BTH: Tensor,
    lamb_HK: Tensor,
    state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """arXiv 2506.05233: the minimiser of sum_s zeta_ts |v_s - Phi k_s|^2 + |Phi|^2_lambda, applied to q_t."""
    B, T, H, V = v_BTHV.shape
    K, work = q_BTHK.shape[3], work_dtype(q_BTHK)
    q, k, v, g, beta = (x.to(work) for x in (q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH))
    ridge_HKK = torch.diag_embed(lamb_HK.to(work))
    kk, kv = state or (q.new_zeros(B, H, K, K), q.new_zeros(B, H, K, V))
    o = []
    for t in range(T):
        alpha = g[:, t, :, None, None].exp()
        key = (beta[:, t, :, None] * k[:, t])[..., None]
        kk = alpha * kk + key * k[:, t, :, None, :]
        kv = alpha * kv + key * v[:, t, :, None, :]
        x_BHK = torch.linalg.solve(kk + ridge_HKK, q[:, t])
        o.append(torch.einsum("bhkv,bhk->bhv", kv, x_BHK))
    return torch.stack(o, dim=1).to(v_BTHV.dtype), (kk, kv)
