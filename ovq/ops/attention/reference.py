"""Causal softmax attention, one query at a time: the definition, also of its sliding-window form.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, K key, V value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ovq.ops.common import work_dtype


def forward(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, window: int | None = None) -> Tensor:
    """arXiv 1706.03762, eq. 1, over the keys so far, or the last `window` of them."""
    work = work_dtype(q_BTHK)
    T, H, K = q_BTHK.shape[1:]
    S, G = k_BSGK.shape[1:3]
    rows = []
    for t in range(T):
        end = S - T + t + 1
        start = 0 if window is None else max(0, end - window)
        heads = []
        for h in range(H):
            g = h * G // H
            keys, values = k_BSGK[:, start:end, g].to(work), v_BSGV[:, start:end, g].to(work)
            logits = torch.einsum("bk,bsk->bs", q_BTHK[:, t, h].to(work), keys) / K**0.5
            heads.append(torch.einsum("bs,bsv->bv", logits.softmax(-1), values))
        rows.append(torch.stack(heads, dim=1))
    return torch.stack(rows, dim=1).to(q_BTHK.dtype)
