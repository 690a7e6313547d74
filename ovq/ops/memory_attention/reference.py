"""Attention to a weighted memory and to the current tokens, one query at a time: the definition.

Shapes: B batch, T queries, S own tokens, M memory entries, H query heads, G key/value heads, K key, V value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ovq.ops.common import work_dtype


def forward(
    q_BTHK: Tensor,
    key_BMGK: Tensor,
    value_BMGV: Tensor,
    log_weight_BGM: Tensor,
    own_key_BSGK: Tensor,
    own_value_BSGV: Tensor,
    beta_H: Tensor,
) -> Tensor:
    """arXiv 2602.03922, eq. 15, for any memory."""
    work = work_dtype(q_BTHK)
    T, H, S, G = q_BTHK.shape[1], q_BTHK.shape[2], own_key_BSGK.shape[1], own_key_BSGK.shape[2]
    rows = []
    for t in range(T):
        heads = []
        for h in range(H):
            g, seen = h * G // H, S - T + t + 1
            keys = torch.cat([key_BMGK[:, :, g], own_key_BSGK[:, :seen, g]], dim=1).to(work)
            values = torch.cat([value_BMGV[:, :, g], own_value_BSGV[:, :seen, g]], dim=1).to(work)
            logits = beta_H[h].to(work) * torch.einsum("bk,bnk->bn", q_BTHK[:, t, h].to(work), keys)
            bias = torch.cat([log_weight_BGM[:, g].to(work), logits.new_zeros(len(logits), seen)], dim=1)
            heads.append(torch.einsum("bn,bnv->bv", (logits + bias).softmax(-1), values))
        rows.append(torch.stack(heads, dim=1))
    return torch.stack(rows, dim=1).to(own_value_BSGV.dtype)
