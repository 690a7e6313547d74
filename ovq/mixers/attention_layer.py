"""Shared by the softmax-attention layers: projections, optional unit-norm keys and queries, and the key/value cache.

Shapes: B batch, T tokens, S cached + new tokens, D model width, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ovq.mixers.base import MixerShape, SequenceMixer
from ovq.ops.common import work_dtype

ROOM_FROM = 1024  # length in tokens from which a cache is extended in place: copying a shorter one costs little
ROOM = 8  # spare room is an eighth of the length


class Room:
    """A buffer that starts with a cache's keys and values and has room for more; its first `used` tokens are taken.

    A cache that ends at token `used` can be extended in place: no other cache sees what is written there.
    """

    def __init__(self, key: Tensor, value: Tensor, used: int) -> None:
        self.key, self.value, self.used = key, value, used


@dataclass
class KVCache:
    """Keys and values [B, S, G, K] of the last S tokens (RoPE applied), and the number of tokens seen so far.

    `room`: the buffer in which full attention extends them without a copy (see `AttentionLayer.append`).
    """

    key: Tensor
    value: Tensor
    position: int
    room: Room | None = field(default=None, repr=False, compare=False)


pytree.register_pytree_node(
    KVCache,
    lambda cache: ([cache.key, cache.value], (cache.position, cache.room)),
    lambda leaves, context: KVCache(*[*leaves, *context]),
    serialized_type_name="ovq.KVCache",
)


class AttentionLayer(SequenceMixer):
    """Query, key, value and output projections around a softmax attention.

    With `qk_norm`, queries and keys have unit norm and the logits are beta_h sqrt(K) cos(q, k), with beta_h learned and
    initialised to `beta_init`. This is OVQ's parameterisation, so that models differ only in what they remember.
    """

    differentiable_state = True

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

    def head_counts(self) -> dict[str, int] | None:
        return {"model.num_heads": self.shape.num_heads, "model.num_kv_heads": self.shape.num_kv_heads}

    def project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, T, H, K], k and v [B, T, G, K]; q and k have unit norm with `qk_norm`.

        If sequences are divided, these are the heads of this process for the tokens of all (see `gather_tokens`).
        """
        B, T, _ = x_BTD.shape
        K = self.shape.head_dim
        q = self.q_proj(x_BTD).view(B, T, self.shape.num_heads, K)
        k = self.k_proj(x_BTD).view(B, T, self.shape.num_kv_heads, K)
        v = self.v_proj(x_BTD).view(B, T, self.shape.num_kv_heads, K)
        if self.beta is not None:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        q, k, v = self.gather_tokens(q, k, v)
        return q, k, v

    def scale_queries(self, q_BTHK: Tensor) -> Tensor:
        """Queries scaled so that q.k / sqrt(K) gives the logits, beta sqrt(K) cos(q, k) with `qk_norm`."""
        if self.beta is None:
            return q_BTHK
        return q_BTHK * (self.own_heads(self.beta) * self.shape.head_dim).to(q_BTHK.dtype)[:, None]

    def inverse_temperature(self) -> Tensor:
        """beta_h sqrt(K) of this process's heads, [H] in float32 or float64; requires `qk_norm`."""
        assert self.beta is not None
        return self.own_heads(self.beta).to(work_dtype(self.beta)) * self.shape.head_dim**0.5

    def mean_beta(self) -> Tensor:
        """Mean beta of the heads, for health reports."""
        assert self.beta is not None
        return self.beta.detach().float().mean()

    def project_out(self, o_BTHK: Tensor) -> Tensor:
        """y [B, T, D], shaped like the input of `project`, from mixed values [B, T, H, K], shaped like its q."""
        return self.out_proj(self.gather_heads(o_BTHK).flatten(2))

    def extend(self, cache: KVCache | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the cache followed by the new ones."""
        if cache is None:
            return k, v
        return torch.cat([cache.key, k], dim=1), torch.cat([cache.value, v], dim=1)

    def append(self, cache: KVCache | None, k: Tensor, v: Tensor) -> KVCache:
        """The cache with the new keys and values appended, for a layer that keeps all of them.

        In decoding, they are written behind those of the cache, which itself does not change, and all are copied only
        when its room is full, so that a token does not cost a copy of all tokens before it.
        """
        if cache is None:
            return KVCache(k, v, k.shape[1])
        used, end, position = cache.key.shape[1], cache.key.shape[1] + k.shape[1], cache.position + k.shape[1]
        trained = torch.is_grad_enabled() and any(x.requires_grad for x in (k, v, cache.key, cache.value))
        if trained or k.shape[1] > 1 or end < ROOM_FROM:
            return KVCache(*self.extend(cache, k, v), position)
        room = cache.room
        if room is None or not _continues(cache, room, end):
            key, value = (x.new_empty(len(x), end + end // ROOM, *x.shape[2:]) for x in (k, v))
            room = Room(key, value, used)
            room.key[:, :used], room.value[:, :used] = cache.key, cache.value
        room.key[:, used:end], room.value[:, used:end], room.used = k, v, end
        return KVCache(room.key[:, :end], room.value[:, :end], position, room)


def _continues(cache: KVCache, room: Room, end: int) -> bool:
    """Whether a cache can be extended in its room up to token `end`: it must be a view of it, not a changed copy."""
    pairs = ((cache.key, room.key), (cache.value, room.value))
    same = all(x.data_ptr() == y.data_ptr() and x.stride() == y.stride() and x.dtype == y.dtype for x, y in pairs)
    fits = room.used == cache.key.shape[1] and end <= room.key.shape[1] and len(cache.key) == len(room.key)
    # Tensors created in inference mode cannot be written to outside it.
    return same and fits and (torch.is_inference_mode_enabled() or not room.key.is_inference())
