"""Normalised linear attention, one token at a time: the definition.

Shapes: B batch, T tokens, H heads, K key width, V value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ovq.ops.common import work_dtype

EPS = 1e-6  # added to the normaliser, as in the authors' code


def forward(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, state: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """arXiv 2006.16236, eqs. 18-20."""
    B, T, H, V = v_BTHV.shape
    q, k, v = (x.to(work_dtype(x)) for x in (q_BTHK, k_BTHK, v_BTHV))
    S_BHKV, z_BHK = state or (q.new_zeros(B, H, q.shape[3], V), q.new_zeros(B, H, q.shape[3]))
    o = []
    for t in range(T):
        S_BHKV = S_BHKV + k[:, t, :, :, None] * v[:, t, :, None, :]
        z_BHK = z_BHK + k[:, t]
        norm = (q[:, t] * z_BHK).sum(-1, keepdim=True) + EPS
        o.append(torch.einsum("bhkv,bhk->bhv", S_BHKV, q[:, t]) / norm)
    return torch.stack(o, dim=1).to(v_BTHV.dtype), (S_BHKV, z_BHK)
