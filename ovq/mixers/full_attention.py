"""Full causal softmax attention (arXiv 1706.03762, eq. 1), with rotary positions or none (NoPE)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ovq.mixers.attention_layer import AttentionLayer, KVCache
from ovq.mixers.base import MixerShape
from ovq.mixers.rope import RopeScaling, check_rope, rotate
from ovq.ops.attention import full_attention


class FullAttention(AttentionLayer):
    """Every token attends to itself and to all earlier tokens. State: all keys and values so far.

    Args:
        position: "rope" or "none" (the paper's sw-nope alternates sliding windows with attention without positions).
        rope_base: base of the rotary frequencies.
        rope_scaling: {rope_type: linear | ntk | yarn, factor: ..., ...} for a longer context than in training, see
            `ovq.mixers.rope.RopeScaling`; None: none.
        qk_norm: unit-norm queries and keys with a learned inverse temperature per head.

    Raises:
        ValueError: any other position, an illegal `rope_scaling`, or for rope an odd head width or a base of at most 1.
    """

    def __init__(
        self,
        shape: MixerShape,
        *,
        position: str = "rope",
        rope_base: float = 10000.0,
        rope_scaling: Mapping[str, Any] | None = None,
        qk_norm: bool = False,
    ) -> None:
        super().__init__(shape, qk_norm=qk_norm)
        if position not in ("rope", "none"):
            raise ValueError(f"position={position} of full_attention is not a legal value; legal: rope, none")
        if position == "none" and rope_scaling is not None:
            raise ValueError("rope_scaling of full_attention needs position=rope")
        if position == "rope":
            check_rope(shape.head_dim, rope_base)
        self.rope_base = rope_base if position == "rope" else None
        self.rope_scaling = RopeScaling.of(rope_scaling)

    def forward(
        self,
        x_BTD: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        state: KVCache | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, KVCache | None]:
        q, k, v = self.project(x_BTD)
        start = state.position if state else 0
        if self.rope_base is not None:
            q, k = (rotate(x, start, self.rope_base, self.rope_scaling) for x in (q, k))
        cache = self.append(state, k, v)
        o = full_attention(self.scale_queries(q), cache.key, cache.value, cu_seqlens=cu_seqlens)
        return self.project_out(o), cache if return_state else None

    def state_size(self, context: int) -> int:
        return 2 * self.shape.num_kv_heads * self.shape.head_dim * context

    def mixing_flops(self, context: int) -> float:
        # Two products of each query, with (context + 1) / 2 keys and values on average.
        return 4 * self.shape.num_heads * self.shape.head_dim * (context + 1) / 2
