"""Attention to a weighted memory and to the current tokens, all queries at once; logits and softmax in float32.

Shapes: B batch, T queries, S own tokens, M memory entries, H query heads, G key/value heads, R = H / G, K, V widths.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
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
    """As `reference.forward`."""
    work = work_dtype(q_BTHK)
    T, S, G = q_BTHK.shape[1], own_key_BSGK.shape[1], own_key_BSGK.shape[2]
    q_BGRTK = (q_BTHK.to(work) * beta_H.to(work)[:, None]).unflatten(2, (G, -1)).permute(0, 2, 3, 1, 4)
    key_BG1KN = torch.cat([key_BMGK, own_key_BSGK], dim=1).to(work).permute(0, 2, 3, 1)[:, :, None]
    value_BG1NV = torch.cat([value_BMGV, own_value_BSGV], dim=1).transpose(1, 2)[:, :, None]
    future_TS = torch.ones(T, S, dtype=torch.bool, device=q_BTHK.device).triu(S - T + 1)
    causal_TS = torch.zeros(T, S, dtype=work, device=q_BTHK.device).masked_fill(future_TS, -torch.inf)
    bias = F.pad(log_weight_BGM.to(work)[:, :, None, None], (0, S)).repeat(1, 1, 1, T, 1)
    bias[..., bias.shape[-1] - S :] = causal_TS
    p_BGRTN = (q_BGRTK @ key_BG1KN + bias).softmax(-1)
    o_BGRTV = p_BGRTN.to(value_BG1NV.dtype) @ value_BG1NV
    return o_BGRTV.permute(0, 3, 1, 2, 4).flatten(2, 3)
