"""VQ-attention, one query at a time: the definition.

Shapes: B batch, T tokens, S recent + new tokens, H query heads, G key/value heads, N codes, K key, V value width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ovq.ops.common import work_dtype
from ovq.ops.vq_attention.state import VQState, assign, recent_start


def forward(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    codebook_GNK: Tensor,
    beta_H: Tensor,
    *,
    block_size: int,
    quantize_recent: bool,
    state: VQState | None = None,
) -> tuple[Tensor, VQState]:
    """arXiv 2309.16354, sec. 3, with the straight-through gradient of older keys shared within a code."""
    work = work_dtype(q_BTHK)
    B, T, H, K = q_BTHK.shape
    G, N, V = codebook_GNK.shape[0], codebook_GNK.shape[1], v_BTGV.shape[3]
    code, zeros = codebook_GNK.detach().to(work), q_BTHK.new_zeros
    position = state.position if state else 0
    first = recent_start(position, block_size)
    old_count = state.count if state else zeros(B, G, N, dtype=work)
    old_value = state.value_sum if state else zeros(B, G, N, V, dtype=work)
    k = torch.cat([state.recent_key, k_BTGK], dim=1) if state else k_BTGK
    v = (torch.cat([state.recent_value, v_BTGV], dim=1) if state else v_BTGV).to(work)
    onehot_BSGN = F.one_hot(assign(k, codebook_GNK), N).to(work)
    exact = k.to(work)
    if quantize_recent:
        quantised = torch.einsum("bsgn,gnk->bsgk", onehot_BSGN, code)
        exact = exact + (quantised - exact).detach()  # straight through

    def summary(end: int) -> tuple[Tensor, Tensor, Tensor]:
        """Codes with their straight-through gradient, value sums and counts of all tokens before position `end`."""
        hot = onehot_BSGN[:, : end - first]
        count = old_count + hot.sum(1)
        value = old_value + torch.einsum("bsgn,bsgv->bgnv", hot, v[:, : end - first])
        mean = torch.einsum("bsgn,bsgk->bgnk", hot, k[:, : end - first].to(work)) / count.clamp_min(1)[..., None]
        return code + mean - mean.detach(), value, count

    rows = []
    for t in range(position, position + T):
        start = recent_start(t, block_size)
        codes, value, count = summary(start)
        heads = []
        for h in range(H):
            g = h * G // H
            q = beta_H[h].to(work) * q_BTHK[:, t - position, h].to(work)
            old = torch.einsum("bk,bnk->bn", q, codes[:, g]) + count[:, g].log()
            own = torch.einsum("bk,bsk->bs", q, exact[:, start - first : t + 1 - first, g])
            mean_value = value[:, g] / count[:, g].clamp_min(1)[..., None]
            p = torch.cat([old, own], dim=1).softmax(-1)
            values = torch.cat([mean_value, v[:, start - first : t + 1 - first, g]], dim=1)
            heads.append(torch.einsum("bn,bnv->bv", p, values))
        rows.append(torch.stack(heads, dim=1))
    held = recent_start(position + T, block_size)
    _, value, count = summary(held)
    kept = v[:, held - first :].to(v_BTGV.dtype)
    return torch.stack(rows, dim=1).to(v_BTGV.dtype), VQState(value, count, k[:, held - first :], kept, position + T)
