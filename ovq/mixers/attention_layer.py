"""Shared by the softmax-attention layers: projections, optional unit-norm keys and queries, and the key/value cache.

Shapes: B batch, T tokens, S cached + new tokens, D model width, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ovq.mixers.base import MixerShape, SequenceMixer
from ovq.ops.common import work_dtype


@dataclass
class KVCache:
    """Keys and values [B, S, G, K] of the last S tokens (RoPE applied), and the number of tokens seen so far."""

    key: Tensor
    value: Tensor
    position: int


pytree.register_pytree_node(
    KVCache,
    lambda cache: ([cache.key, cache.value], cache.position),
    lambda leaves, position: KVCache(*[*leaves, position]),
    serialized_type_name="ovq.KVCache",
)


class AttentionLayer(SequenceMixer):
    """Query, key, value and output projections around a softmax attention.

    With `qk_norm`, queries and keys have unit norm and the logits are beta_h sqrt(K) cos(q, k), with beta_h learned and
    initialised to `beta_init`. This is OVQ's parameterisation, so that models differ only in what they remember.
    """

    def __init__(self, shape: MixerShape, *, qk_norm: bool = False, beta_init: float = 1.0) -> None:
        super().__init__(shape)
        if beta_init <= 0:
            raise ValueError(f"beta_init={beta_init:g} must be above 0")
        self.beta_init = beta_init
        width = shape.num_heads * shape.head_dim
        kv_width = shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.dim, width, bias=False)
        self.k_proj = nn.Linear(shape.dim, kv_width, bias=False)
        self.v_proj = nn.Linear(shape.dim, kv_width, bias=False)
        self.out_proj = nn.Linear(width, shape.dim, bias=False)
        self.beta = nn.Parameter(torch.ones(shape.num_heads)) if qk_norm else None

    def init_weights(self, std: float) -> None:
        super().init_weights(std)
        if self.beta is not None:
            nn.init.constant_(self.beta, self.beta_init)

    def project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, T, H, K], k and v [B, T, G, K]; q and k have unit norm with `qk_norm`."""
        B, T, _ = x_BTD.shape
        K = self.shape.head_dim
        q = self.q_proj(x_BTD).view(B, T, self.shape.num_heads, K)
        k = self.k_proj(x_BTD).view(B, T, self.shape.num_kv_heads, K)
        v = self.v_proj(x_BTD).view(B, T, self.shape.num_kv_heads, K)
        if self.beta is not None:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        return q, k, v

    def scale_queries(self, q_BTHK: Tensor) -> Tensor:
        """Queries scaled so that q.k / sqrt(K) gives the logits, beta sqrt(K) cos(q, k) with `qk_norm`."""
        if self.beta is None:
            return q_BTHK
        return q_BTHK * (self.beta * self.shape.head_dim).to(q_BTHK.dtype)[:, None]

    def inverse_temperature(self) -> Tensor:
        """beta_h sqrt(K) [H] in float32 or float64, of a layer with `qk_norm`."""
        assert self.beta is not None
        return self.beta.to(work_dtype(self.beta)) * self.shape.head_dim**0.5

    def mean_beta(self) -> Tensor:
        """Mean beta of the heads, for health reports."""
        assert self.beta is not None
        return self.beta.detach().float().mean()

    def project_out(self, o_BTHK: Tensor) -> Tensor:
        return self.out_proj(o_BTHK.flatten(2))

    def extend(self, cache: KVCache | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the cache followed by the new ones."""
        if cache is None:
            return k, v
        return torch.cat([cache.key, k], dim=1), torch.cat([cache.value, v], dim=1)
