"""The state that VQ-attention carries from piece to piece, and the assignment of keys to codes.

Shapes: B batch, T tokens, S recent tokens, G key/value heads, N codes, K key width, V value width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ovq.ops.common import first_max, work_dtype


@dataclass
class VQState:
    """value_sum [B, G, N, V] and count [B, G, N] (float32; float64 for float64 inputs) over the tokens before the
    recent blocks; the recent keys and values [B, S, G, K or V], not quantised; and the number of tokens so far."""

    value_sum: Tensor
    count: Tensor
    recent_key: Tensor
    recent_value: Tensor
    position: int


pytree.register_pytree_node(
    VQState,
    lambda s: ([s.value_sum, s.count, s.recent_key, s.recent_value], s.position),
    lambda leaves, position: VQState(*[*leaves, position]),
    serialized_type_name="ovq.VQState",
)


def recent_start(position: int, block_size: int) -> int:
    """The first token still kept unquantised when the next one is at `position`: the start of the previous block."""
    return max(0, position // block_size - 1) * block_size


@torch.no_grad()
def assign(k_BTGK: Tensor, codebook_GNK: Tensor) -> Tensor:
    """int64 [B, T, G]: the nearest code to each key (Euclidean); ties go to the lowest index."""
    work = work_dtype(k_BTGK)
    code = codebook_GNK.to(work)
    score_BGTN = k_BTGK.to(work).transpose(1, 2) @ code.transpose(-1, -2) - code.square().sum(-1)[:, None] / 2
    return first_max(score_BGTN)[1].transpose(1, 2)
