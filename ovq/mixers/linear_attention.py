"""Linear attention with the feature map elu + 1 and its normaliser (Katharopoulos et al. 2020, arXiv 2006.16236)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ovq.mixers.attention_layer import AttentionLayer
from ovq.mixers.base import MixerShape
from ovq.ops.common import check_backend
from ovq.ops.linear_attention import linear_attention

State = tuple[Tensor, Tensor]


class LinearAttention(AttentionLayer):
    """Softmax attention's exp(q.k) replaced by phi(q).phi(k), phi = elu + 1 (eq. 7): a K x V state per head.

    The projections are those of attention; grouped key/value heads are repeated. There are no positions, and no output
    norm, which flash-linear-attention's layer has by default.

    Args:
        chunk_size: tokens per chunk of the torch form; affects speed only.
        backend: auto (fla's kernels on a GPU in half precision, if fla-core is installed) | reference | torch | fla.

    Raises:
        ValueError: chunk_size below 1.
    """

    def __init__(self, shape: MixerShape, *, chunk_size: int = 64, backend: str = "auto") -> None:
        super().__init__(shape)
        if chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size} of linear_attention must be at least 1")
        check_backend("linear_attention", backend, "fla")
        self.chunk_size, self.backend = chunk_size, backend

    def forward(
        self,
        x_BTD: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        state: State | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, State | None]:
        q, k, v = self.project(x_BTD)
        if (shared := self.shape.num_heads // self.shape.num_kv_heads) > 1:  # even once would be a copy
            k, v = (x.repeat_interleave(shared, dim=2) for x in (k, v))
        o, state = linear_attention(
            F.elu(q) + 1,
            F.elu(k) + 1,
            v,
            chunk_size=self.chunk_size,
            cu_seqlens=cu_seqlens,
            state=state,
            backend=self.backend,
        )
        return self.project_out(o), state if return_state else None

    def state_size(self, context: int) -> int:
        """Per head, the K x V sum of key-value products and the sum of keys."""
        return self.shape.num_heads * self.shape.head_dim * (self.shape.head_dim + 1)

    def float32_state(self, context: int) -> int:
        return self.state_size(context)

    def mixing_flops(self, context: int) -> float:
        """The recurrence: write and read a K x V state (the chunked form does about as much, in larger matmuls)."""
        return 4 * self.shape.num_heads * self.shape.head_dim * (self.shape.head_dim + 1)
