"""Cross-entropy with all logits at once: the definition.

Shapes: N tokens, D width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ovq.ops.common import work_dtype

IGNORE = -100  # target of a token that has no label


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """cap tanh(logits / cap), in at least float32; with cap = 0, the logits unchanged."""
    return cap * torch.tanh(logits.to(work_dtype(logits)) / cap) if cap else logits


def forward(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    chunk: int,
    z_loss: float,
    reduction: str,
    softcap: float,
) -> tuple[Tensor, Tensor | None]:
    """Arguments as for the public function; `chunk` is ignored."""
    logits_NV = soft_cap(F.linear(x_ND, weight_VD).to(work_dtype(x_ND)), softcap)
    loss = F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORE, reduction=reduction)
    if not z_loss:
        return loss, None
    valid_N = targets_N != IGNORE
    return loss, z_loss * (logits_NV.logsumexp(-1).square() * valid_N).sum()
