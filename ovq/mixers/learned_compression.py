"""Learned averages of neighbouring key/value pairs as a memory (Compressive Transformer, arXiv 1911.05507).

Shapes: B batch, L chunk, M entries held, G key/value heads, K head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ovq.mixers.base import MixerShape
from ovq.mixers.memory_layer import MemoryLayer, MemoryState


class LearnedCompression(MemoryLayer):
    """The last N slots, each a learned average of `tokens_per_slot` neighbouring pairs.

    The Compressive Transformer's memory (arXiv 1911.05507) with attentive pooling: within a group of neighbours,
    weights = softmax(w_h . k + b_h,i) where i is the place in the group; w and b start at 0, which gives a plain mean.

    Args:
        tokens_per_slot: the compression rate; must divide chunk_size.

    Raises:
        ValueError: a chunk_size that is not a multiple of tokens_per_slot.
    """

    def __init__(
        self,
        shape: MixerShape,
        *,
        capacity: int = 2048,
        chunk_size: int = 128,
        tokens_per_slot: int = 4,
        beta_init: float = 1.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(shape, capacity=capacity, chunk_size=chunk_size, beta_init=beta_init, backend=backend)
        if tokens_per_slot < 1 or chunk_size % tokens_per_slot:
            raise ValueError(
                f"chunk_size={chunk_size} of LearnedCompression must be a multiple of tokens_per_slot={tokens_per_slot}"
            )
        self.tokens_per_slot = tokens_per_slot
        self.pool_key = nn.Parameter(torch.empty(shape.num_kv_heads, shape.head_dim))
        self.pool_place = nn.Parameter(torch.empty(tokens_per_slot, shape.num_kv_heads))

    def init_weights(self, std: float) -> None:
        super().init_weights(std)
        nn.init.zeros_(self.pool_key)
        nn.init.zeros_(self.pool_place)

    def entries(self, key_BLGK: Tensor, value_BLGK: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        c = self.tokens_per_slot
        key, value = key_BLGK.unflatten(1, (-1, c)), value_BLGK.unflatten(1, (-1, c))  # [B, slots, c, G, K]
        pool_key, pool_place = self.own_heads(self.pool_key), self.own_heads(self.pool_place, dim=1)
        score = (key * pool_key.to(key.dtype)).sum(-1) + pool_place.to(key.dtype)
        weight = score.softmax(dim=2)[..., None]
        position = torch.arange(start, start + key_BLGK.shape[1], c, device=key.device)
        return (weight * key).sum(2), (weight * value).sum(2), position

    def mix(self, q: Tensor, k: Tensor, v: Tensor, state: MemoryState | None = None) -> tuple[Tensor, MemoryState]:
        o, after = super().mix(q, k, v, state)
        if torch.is_grad_enabled():  # where no slot is read, gradients of zero: all ranks must have the same gradients
            o = o + 0 * (self.pool_key.sum() + self.pool_place.sum()).to(o.dtype)
        return o, after

    def log_weight(self, held: int, position: int) -> float:
        return math.log(self.tokens_per_slot)

    def entries_after(self, chunks: int) -> int:
        return chunks * self.chunk_size // self.tokens_per_slot
