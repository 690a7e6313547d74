"""Sliding-window softmax attention with rotary positions: exact attention to the last `window` tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ovq.mixers.attention_layer import AttentionLayer, KVCache
from ovq.mixers.base import MixerShape
from ovq.mixers.rope import RopeScaling, check_rope, rotate
from ovq.ops.sliding_window import sliding_window_attention


class SlidingWindow(AttentionLayer):
    """A token attends to itself and the window - 1 tokens before it. State: the last window - 1 keys and values.

    Args:
        window: number of tokens attended to, at least 1.
        rope_base: base of the rotary frequencies.
        rope_scaling: {rope_type: linear | ntk | yarn, factor: ..., ...} for a longer context than in training, see
            `ovq.mixers.rope.RopeScaling`; None: none.
        qk_norm: unit-norm queries and keys with a learned inverse temperature per head.

    Raises:
        ValueError: window below 1, an odd head width, a rope_base of at most 1, or an illegal `rope_scaling`.
    """

    def __init__(
        self,
        shape: MixerShape,
        *,
        window: int = 256,
        rope_base: float = 10000.0,
        rope_scaling: Mapping[str, Any] | None = None,
        qk_norm: bool = False,
    ) -> None:
        super().__init__(shape, qk_norm=qk_norm)
        if window < 1:
            raise ValueError(f"window={window} of sliding_window must be at least 1")
        check_rope(shape.head_dim, rope_base)
        self.window = window
        self.rope_base, self.rope_scaling = rope_base, RopeScaling.of(rope_scaling)

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
        q, k = (rotate(x, start, self.rope_base, self.rope_scaling) for x in (q, k))
        k, v = self.extend(state, k, v)
        o = sliding_window_attention(self.scale_queries(q), k, v, window=self.window, cu_seqlens=cu_seqlens)
        return self.project_out(o), self._cache(k, v, start + q.shape[1]) if return_state else None

    def _cache(self, k: Tensor, v: Tensor, position: int) -> KVCache:
        kept = slice(max(0, k.shape[1] - self.window + 1), None)
        # Cloned, because a view would keep the whole piece's keys alive.
        return KVCache(k[:, kept].clone(), v[:, kept].clone(), position)

    def state_size(self, context: int) -> int:
        return 2 * self.shape.num_kv_heads * self.shape.head_dim * min(context, self.window - 1)

    def mixing_flops(self, context: int) -> float:
        full = min(context, self.window)
        # Mean number of keys attended to: a triangle until the window is full, then the window.
        keys = (full * (full + 1) / 2 + (context - full) * full) / context
        return 4 * self.shape.num_heads * self.shape.head_dim * keys
