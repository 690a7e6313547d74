"""Memories of N key/value pairs kept by plainer rules than OVQ's: what its capacity alone is worth.

Same layer (unit-norm keys and queries, learned beta, no positions), same attention within a chunk, same softmax with a
log weight for each entry, same capacity; only the rule by which a finished chunk enters the memory differs.

The chunks are walked one after the other, and autograd keeps the memory of every chunk: T / L x N x (K + V) numbers a
head in training. These are baselines for comparing quality, not for speed.

Shapes: B batch, T tokens, L chunk, M entries held, N capacity, G key/value heads, H query heads, K head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ovq.mixers.attention_layer import AttentionLayer
from ovq.mixers.base import MixerShape
from ovq.ops.fla import each_document
from ovq.ops.memory_attention import memory_attention


@dataclass
class MemoryState:
    """Entries [B, M, G, K] and the position of each [M], the unfinished chunk's keys and values, and tokens so far."""

    key: Tensor
    value: Tensor
    entry_position: Tensor
    pending_key: Tensor
    pending_value: Tensor
    position: int


pytree.register_pytree_node(
    MemoryState,
    lambda s: ([s.key, s.value, s.entry_position, s.pending_key, s.pending_value], s.position),
    lambda leaves, position: MemoryState(*leaves, position),
    serialized_type_name="ovq.MemoryState",
)


class MemoryLayer(AttentionLayer):
    """Attends to a memory of at most `num_centroids` entries made of earlier chunks, and exactly to its chunk.

    A subclass says what a chunk adds (`entries`), which entries stay (`kept`) and what each stands for (`log_weight`).

    Args:
        num_centroids: capacity N, named as OVQ's so that one override sets all.
        chunk_size: tokens a chunk.
        beta_init: inverse temperature at the start.
        backend: auto | reference | torch.

    Raises:
        ValueError: a capacity or chunk below 1, or an unknown backend.
    """

    def __init__(
        self, shape: MixerShape, *, num_centroids: int, chunk_size: int, beta_init: float, backend: str
    ) -> None:
        super().__init__(shape, qk_norm=True)
        name = type(self).__name__
        if num_centroids < 1 or chunk_size < 1:
            raise ValueError(f"num_centroids={num_centroids} and chunk_size={chunk_size} of {name} must be at least 1")
        if backend not in ("auto", "reference", "torch"):
            raise ValueError(f"backend={backend} of {name} is not a legal value; legal: auto, reference, torch")
        self.num_centroids, self.chunk_size = num_centroids, chunk_size
        self.beta_init, self.backend = beta_init, backend

    def entries(self, key_BLGK: Tensor, value_BLGK: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and positions of what the chunk from token `start` on adds; as they are unless overridden."""
        position_L = torch.arange(start, start + key_BLGK.shape[1], device=key_BLGK.device)
        return key_BLGK, value_BLGK, position_L

    def kept(self, position_M: Tensor) -> Tensor:
        """Indices, in ascending order, of the entries that stay when there are more than the capacity."""
        raise NotImplementedError

    def log_weight(self, held: int, position: int) -> float:
        """Logarithm of the number of tokens that each of `held` entries stands for after `position` tokens."""
        return 0.0

    def entries_after(self, chunks: int) -> int:
        """Entries that `chunks` chunks have added, before any is dropped."""
        return chunks * self.chunk_size

    def init_weights(self, std: float) -> None:
        super().init_weights(std)
        nn.init.constant_(self.beta, self.beta_init)  # type: ignore[arg-type]

    def forward(
        self,
        x_BTD: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        state: MemoryState | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, MemoryState | None]:
        q, k, v = self.project(x_BTD)
        if cu_seqlens is not None:
            return self.project_out(each_document(lambda *x: self.mix(*x)[0], cu_seqlens, (q, k, v), state)), None
        o, new_state = self.mix(q, k, v, state)
        return self.project_out(o), new_state if return_state else None

    def mix(self, q: Tensor, k: Tensor, v: Tensor, state: MemoryState | None = None) -> tuple[Tensor, MemoryState]:
        """Outputs [B, T, H, K] and the state after the last token."""
        if state is None:
            empty, none = k[:, :0], torch.empty(0, dtype=torch.int64, device=k.device)
            state = MemoryState(empty, empty, none, empty, empty, 0)
        key, value, entry_position = state.key, state.value, state.entry_position
        own_k, own_v = torch.cat([state.pending_key, k], dim=1), torch.cat([state.pending_value, v], dim=1)
        beta = self.beta.float() * self.shape.head_dim**0.5  # type: ignore[union-attr]
        L, position, end = self.chunk_size, state.position, state.position + q.shape[1]
        first = position - state.pending_key.shape[1]  # position of own_k[:, 0]
        rows = []
        for start in range(first, end, L):
            own = slice(start - first, min(start + L, end) - first)
            asked = slice(max(start, position) - position, min(start + L, end) - position)
            weight = key.new_full((len(key), key.shape[2], key.shape[1]), self.log_weight(key.shape[1], start))
            rows.append(
                memory_attention(
                    q[:, asked], key, value, weight, own_k[:, own], own_v[:, own], beta, backend=self.backend
                )
            )
            if start + L <= end:
                more_k, more_v, more_position = self.entries(own_k[:, own], own_v[:, own], start)
                key, value = torch.cat([key, more_k], dim=1), torch.cat([value, more_v], dim=1)
                entry_position = torch.cat([entry_position, more_position])
                if len(entry_position) > self.num_centroids:
                    keep = self.kept(entry_position)
                    key, value = key.index_select(1, keep), value.index_select(1, keep)
                    entry_position = entry_position[keep]
        pending = slice(own_k.shape[1] - end % L, None)
        held = MemoryState(key, value, entry_position, own_k[:, pending].clone(), own_v[:, pending].clone(), end)
        return torch.cat(rows, dim=1), held

    def state_size(self, context: int) -> int:
        """Keys, values and positions of the entries held, and the keys and values of an unfinished chunk."""
        L, shape = self.chunk_size, self.shape
        held = min(self.num_centroids, self.entries_after(context // L))
        return shape.num_kv_heads * 2 * shape.head_dim * (held + context % L) + held

    def mixing_flops(self, context: int) -> float:
        """Two products of each query with the memory and with its chunk."""
        L, chunks = self.chunk_size, -(-context // self.chunk_size)
        held = sum(min(self.num_centroids, self.entries_after(c)) for c in range(chunks)) / chunks
        return 4 * self.shape.num_heads * self.shape.head_dim * (held + (min(L, context) + 1) / 2)


class FIFO(MemoryLayer):
    """The last N pairs before the chunk: a sliding window without positions."""

    def __init__(
        self,
        shape: MixerShape,
        *,
        num_centroids: int = 2048,
        chunk_size: int = 128,
        beta_init: float = 1.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            shape, num_centroids=num_centroids, chunk_size=chunk_size, beta_init=beta_init, backend=backend
        )

    def kept(self, position_M: Tensor) -> Tensor:
        return torch.arange(len(position_M) - self.num_centroids, len(position_M), device=position_M.device)


class Reservoir(MemoryLayer):
    """A uniform sample of N of all pairs before the chunk, each standing for t / N tokens.

    The sample is that of the N lowest hashes of (seed, position): at every moment uniform without replacement, and a
    pure function of the position, so the same for all heads, batches, devices and streamed pieces.
    """

    def __init__(
        self,
        shape: MixerShape,
        *,
        num_centroids: int = 2048,
        chunk_size: int = 128,
        seed: int = 0,
        beta_init: float = 1.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            shape, num_centroids=num_centroids, chunk_size=chunk_size, beta_init=beta_init, backend=backend
        )
        self.seed = seed

    def kept(self, position_M: Tensor) -> Tensor:
        order = position_hash(self.seed, position_M).argsort(stable=True)
        return order[: self.num_centroids].sort().values

    def log_weight(self, held: int, position: int) -> float:
        return math.log(position / held) if held else 0.0


class LearnedCompression(MemoryLayer):
    """The last N slots, each a learned average of `tokens_per_slot` neighbouring pairs.

    The Compressive Transformer's memory (arXiv 1911.05507) with attentive pooling: within a group of neighbours,
    weights = softmax(w_h . k + b_h,i), i the place in the group; w and b start at 0, that is, as a mean.

    Args:
        tokens_per_slot: the compression rate; it must divide chunk_size.

    Raises:
        ValueError: a chunk that is no multiple of tokens_per_slot.
    """

    def __init__(
        self,
        shape: MixerShape,
        *,
        num_centroids: int = 2048,
        chunk_size: int = 128,
        tokens_per_slot: int = 4,
        beta_init: float = 1.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            shape, num_centroids=num_centroids, chunk_size=chunk_size, beta_init=beta_init, backend=backend
        )
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
        score = (key * self.pool_key.to(key.dtype)).sum(-1) + self.pool_place.to(key.dtype)
        weight = score.softmax(dim=2)[..., None]
        position = torch.arange(start, start + key_BLGK.shape[1], c, device=key.device)
        return (weight * key).sum(2), (weight * value).sum(2), position

    def kept(self, position_M: Tensor) -> Tensor:
        return torch.arange(len(position_M) - self.num_centroids, len(position_M), device=position_M.device)

    def log_weight(self, held: int, position: int) -> float:
        return math.log(self.tokens_per_slot)

    def entries_after(self, chunks: int) -> int:
        return chunks * self.chunk_size // self.tokens_per_slot


def position_hash(seed: int, position: Tensor) -> Tensor:
    """A 32-bit hash (lowbias32, Wellons 2018) of seed and position, as int64 in 0 .. 2^32 - 1."""
    mask = 0xFFFFFFFF
    x = (position + (seed * 0x9E3779B9 & mask)) & mask
    x = ((x ^ x >> 16) * 0x7FEB352D) & mask
    x = ((x ^ x >> 15) * 0x846CA68B) & mask
    return x ^ x >> 16
