"""A layer whose memory of N key/value pairs follows a simpler rule than OVQ's, to show what capacity alone is worth.

The layer (unit-norm keys and queries, learned beta, no positions), the attention within a chunk, the softmax with a log
weight per entry and the capacity are the same; only the rule by which a finished chunk enters the memory differs.

The chunks are processed sequentially, and autograd keeps the memory of every chunk: T / L x N x (K + V) elements per
head in training. These baselines are for comparing quality, not speed.

Shapes: B batch, T tokens, L chunk, M entries held, N capacity, G key/value heads, H query heads, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ovq.mixers.attention_layer import AttentionLayer
from ovq.mixers.base import MixerShape, keys_in_chunk
from ovq.ops.common import check_backend, each_document, require_tokens, work_dtype
from ovq.ops.memory_attention import memory_attention


@dataclass
class Memory:
    """Entries' keys and values [B, M, G, K], and the rule's notes on them: positions [M] or token counts [B, G, M]."""

    key: Tensor
    value: Tensor
    note: Tensor


@dataclass
class MemoryState:
    """The memory, the unfinished chunk's keys and values [B, r, G, K], and the number of tokens so far."""

    memory: Memory
    pending_key: Tensor
    pending_value: Tensor
    position: int


pytree.register_pytree_node(
    Memory,
    lambda m: ([m.key, m.value, m.note], None),
    lambda leaves, _: Memory(*leaves),
    serialized_type_name="ovq.Memory",
)
pytree.register_pytree_node(
    MemoryState,
    lambda s: ([s.memory, s.pending_key, s.pending_value], s.position),
    lambda leaves, position: MemoryState(*[*leaves, position]),
    serialized_type_name="ovq.MemoryState",
)


class MemoryLayer(AttentionLayer):
    """Attends to a memory of at most `capacity` entries built from earlier chunks, and exactly to the current chunk.

    The base class selects entries by position. A subclass defines what a chunk adds (`entries`), which entries stay
    (`kept`) and how many tokens each stands for (`log_weight`); one that merges entries overrides `commit` and `read`.

    Args:
        capacity: maximum number of entries, N.
        chunk_size: tokens per chunk.
        beta_init: initial inverse temperature.
        backend: auto | reference | torch.

    Raises:
        ValueError: a capacity or chunk_size below 1, or an unknown backend.
    """

    def __init__(
        self,
        shape: MixerShape,
        *,
        capacity: int = 2048,
        chunk_size: int = 128,
        beta_init: float = 1.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(shape, qk_norm=True, beta_init=beta_init)
        name = type(self).__name__
        if chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size} of {name} must be at least 1")
        check_backend(name, backend)
        self.set_capacity(capacity)
        self.chunk_size, self.backend = chunk_size, backend

    @property
    def capacity(self) -> int:
        return self._capacity

    def set_capacity(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity={capacity} of {type(self).__name__} must be at least 1")
        self._capacity = capacity

    def empty(self, k_BTGK: Tensor) -> Memory:
        """The memory before the first chunk."""
        none = torch.empty_like(k_BTGK[:, :0])  # a view would keep the piece's keys alive
        return Memory(none, none, torch.empty(0, dtype=torch.int64, device=k_BTGK.device))

    def read(self, memory: Memory, position: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values as attention uses them after `position` tokens, and log weights [B, G, M]."""
        B, M, G, _ = memory.key.shape
        weight = self.log_weight(M, position)
        return (
            memory.key,
            memory.value,
            torch.full((B, G, M), weight, dtype=work_dtype(memory.key), device=memory.key.device),
        )

    def commit(self, memory: Memory, key_BLGK: Tensor, value_BLGK: Tensor, start: int) -> Memory:
        """The memory after the chunk that starts at token `start`."""
        more_key, more_value, more_position = self.entries(key_BLGK, value_BLGK, start)
        key, value = torch.cat([memory.key, more_key], dim=1), torch.cat([memory.value, more_value], dim=1)
        position = torch.cat([memory.note, more_position])
        if len(position) <= self.capacity:
            return Memory(key, value, position)
        keep = self.kept(position)
        return Memory(key.index_select(1, keep), value.index_select(1, keep), position[keep])

    def entries(self, key_BLGK: Tensor, value_BLGK: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and positions of the entries that a chunk adds; its tokens, unless overridden."""
        return key_BLGK, value_BLGK, torch.arange(start, start + key_BLGK.shape[1], device=key_BLGK.device)

    def kept(self, position_M: Tensor) -> Tensor:
        """Ascending indices of the entries to keep when there are too many: the latest, unless overridden."""
        return torch.arange(len(position_M) - self.capacity, len(position_M), device=position_M.device)

    def log_weight(self, held: int, position: int) -> float:
        """Logarithm of the number of tokens that each of `held` entries stands for after `position` tokens."""
        return 0.0

    def entries_after(self, chunks: int) -> int:
        """Number of entries that `chunks` chunks add, before any are dropped."""
        return chunks * self.chunk_size

    def forward(
        self,
        x_BTD: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        state: MemoryState | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, MemoryState | None]:
        require_tokens(x_BTD, type(self).__name__)
        q, k, v = self.project(x_BTD)
        if cu_seqlens is not None:
            return self.project_out(each_document(lambda *x: self.mix(*x)[0], cu_seqlens, (q, k, v), state)), None
        o, new_state = self.mix(q, k, v, state)
        return self.project_out(o), new_state if return_state else None

    def mix(self, q: Tensor, k: Tensor, v: Tensor, state: MemoryState | None = None) -> tuple[Tensor, MemoryState]:
        """Outputs [B, T, H, K] and the state after the last token."""
        if state is None:
            state = MemoryState(self.empty(k), k[:, :0], v[:, :0], 0)
        memory, L, position = state.memory, self.chunk_size, state.position
        own_k, own_v = torch.cat([state.pending_key, k], dim=1), torch.cat([state.pending_value, v], dim=1)
        beta = self.inverse_temperature()
        end, first = position + q.shape[1], position - state.pending_key.shape[1]  # own_k[:, 0] is token `first`
        rows = []
        for start in range(first, end, L):
            stop = min(start + L, end)
            chunk_q = q[:, max(start, position) - position : stop - position]
            chunk_k, chunk_v = own_k[:, start - first : stop - first], own_v[:, start - first : stop - first]
            rows.append(
                memory_attention(chunk_q, *self.read(memory, start), chunk_k, chunk_v, beta, backend=self.backend)
            )
            if stop - start == L:
                memory = self.commit(memory, chunk_k, chunk_v, start)
        pending = slice(own_k.shape[1] - end % L, None)
        held = MemoryState(memory, own_k[:, pending].clone(), own_v[:, pending].clone(), end)
        return torch.cat(rows, dim=1).to(v.dtype), held

    def state_size(self, context: int) -> int:
        """Keys, values and positions of the entries, and the keys and values of an unfinished chunk."""
        L, shape = self.chunk_size, self.shape
        held = min(self.capacity, self.entries_after(context // L))
        return shape.num_kv_heads * 2 * shape.head_dim * (held + context % L) + held

    def mixing_flops(self, context: int) -> float:
        """Two products of each query with the memory and with its chunk."""
        L = self.chunk_size
        held = (min(self.capacity, self.entries_after(c)) for c in range(-(-context // L)))
        seen = sum(min(L, context - L * c) * entries for c, entries in enumerate(held)) / context
        return 4 * self.shape.num_heads * self.shape.head_dim * (seen + keys_in_chunk(context, L))
