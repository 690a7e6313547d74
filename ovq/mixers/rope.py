"""Rotary position embedding (RoFormer, arXiv 2104.09864, eq. 34), half-split layout as in Llama and GPT-NeoX.

Shapes: B batch, T tokens, H heads, K head width (even).
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_rope(head_dim: int, base: float) -> None:
    """Raise ValueError unless heads of this width can be rotated with this base."""
    if head_dim % 2:
        raise ValueError(f"model.head_dim={head_dim} must be even for rotary positions")
    if base <= 1:
        raise ValueError(f"rope_base={base:g} must be above 1")


def rotate(x_BTHK: Tensor, start: int, base: float = 10000.0) -> Tensor:
    """Rotate each head of x [B, T, H, K] by the angles of positions start .. start + T - 1; same shape and dtype.

    Angles are computed in float64: in float32 they are off by 0.03 radians at position 500,000.
    """
    T, K = x_BTHK.shape[1], x_BTHK.shape[3]
    position_T = torch.arange(start, start + T, device=x_BTHK.device, dtype=torch.float64)
    frequency_F = base ** (-torch.arange(0, K, 2, device=x_BTHK.device, dtype=torch.float64) / K)
    angle_TF = position_T[:, None] * frequency_F
    cos = angle_TF.cos().to(x_BTHK.dtype)[:, None, :]
    sin = angle_TF.sin().to(x_BTHK.dtype)[:, None, :]
    left, right = x_BTHK.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)
