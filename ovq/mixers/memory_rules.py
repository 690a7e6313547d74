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
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ovq.mixers.attention_layer import AttentionLayer
from ovq.mixers.base import MixerShape
from ovq.mixers.recurrent import inverse_temperature
from ovq.ops.fla import each_document, work_dtype
from ovq.ops.memory_attention import memory_attention
from ovq.ops.position_hash import position_hash


@dataclass
class Memory:
    """Entries [B, M, G, K], and what the rule notes of each: positions [M] or token counts [B, G, M]."""

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
    """Attends to a memory of at most `num_centroids` entries made of earlier chunks, and exactly to its chunk.

    The base class keeps entries by their positions. A subclass says what a chunk adds (`entries`), which entries stay
    (`kept`) and what each stands for (`log_weight`); one that merges entries overrides `commit` and `read`.

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
        if chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size} of {name} must be at least 1")
        if backend not in ("auto", "reference", "torch"):
            raise ValueError(f"backend={backend} of {name} is not a legal value; legal: auto, reference, torch")
        self.set_capacity(num_centroids)
        self.chunk_size, self.beta_init, self.backend = chunk_size, beta_init, backend

    @property
    def capacity(self) -> int:
        return self.num_centroids

    def set_capacity(self, num_centroids: int) -> None:
        if num_centroids < 1:
            raise ValueError(f"num_centroids={num_centroids} of {type(self).__name__} must be at least 1")
        self.num_centroids = num_centroids

    def empty(self, k_BTGK: Tensor) -> Memory:
        """The memory before the first chunk."""
        none = k_BTGK[:, :0]
        return Memory(none, none, torch.empty(0, dtype=torch.int64, device=k_BTGK.device))

    def read(self, memory: Memory, position: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values as attention sees them after `position` tokens, and log weights [B, G, M]."""
        B, M, G, _ = memory.key.shape
        weight = self.log_weight(M, position)
        return (
            memory.key,
            memory.value,
            torch.full((B, G, M), weight, dtype=work_dtype(memory.key), device=memory.key.device),
        )

    def commit(self, memory: Memory, key_BLGK: Tensor, value_BLGK: Tensor, start: int) -> Memory:
        """The memory after the chunk that begins at token `start`."""
        more_key, more_value, more_position = self.entries(key_BLGK, value_BLGK, start)
        key, value = torch.cat([memory.key, more_key], dim=1), torch.cat([memory.value, more_value], dim=1)
        position = torch.cat([memory.note, more_position])
        if len(position) <= self.num_centroids:
            return Memory(key, value, position)
        keep = self.kept(position)
        return Memory(key.index_select(1, keep), value.index_select(1, keep), position[keep])

    def entries(self, key_BLGK: Tensor, value_BLGK: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and positions of what a chunk adds: its tokens, unless overridden."""
        return key_BLGK, value_BLGK, torch.arange(start, start + key_BLGK.shape[1], device=key_BLGK.device)

    def kept(self, position_M: Tensor) -> Tensor:
        """Indices, in ascending order, of the entries that stay when there are more than the capacity: the latest."""
        return torch.arange(len(position_M) - self.num_centroids, len(position_M), device=position_M.device)

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
            state = MemoryState(self.empty(k), k[:, :0], v[:, :0], 0)
        memory, L, position = state.memory, self.chunk_size, state.position
        own_k, own_v = torch.cat([state.pending_key, k], dim=1), torch.cat([state.pending_value, v], dim=1)
        beta = inverse_temperature(self)
        end, first = position + q.shape[1], position - state.pending_key.shape[1]  # own_k[:, 0] is token `first`
        rows = []
        for start in range(first, end, L):
            stop = min(start + L, end)
            asked = q[:, max(start, position) - position : stop - position]
            chunk_k, chunk_v = own_k[:, start - first : stop - first], own_v[:, start - first : stop - first]
            rows.append(
                memory_attention(asked, *self.read(memory, start), chunk_k, chunk_v, beta, backend=self.backend)
            )
            if stop - start == L:
                memory = self.commit(memory, chunk_k, chunk_v, start)
        pending = slice(own_k.shape[1] - end % L, None)
        held = MemoryState(memory, own_k[:, pending].clone(), own_v[:, pending].clone(), end)
        return torch.cat(rows, dim=1).to(v.dtype), held

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
    """The last N pairs before the chunk: a window without positions."""

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

    def log_weight(self, held: int, position: int) -> float:
        return math.log(self.tokens_per_slot)

    def entries_after(self, chunks: int) -> int:
        return chunks * self.chunk_size // self.tokens_per_slot


class KVM(MemoryLayer):
    """Every pair is kept until the memory is full; then a chunk's pairs merge into the entries most like them.

    In the style of Key-Value Means (arXiv 2605.09877), a peer of OVQ: a pair goes to the entry of highest cosine
    similarity, and keys are normalised anew whenever they are read, so that an entry's key is a direction and never
    shrinks by averaging; values are means. That paper's RoPE dimensions, decay and growing state are left out, so that
    what differs from OVQ is that the memory fills at once and that keys are normalised.
    """

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

    def empty(self, k_BTGK: Tensor) -> Memory:
        """Key and value sums in float32 (float64 for float64 inputs), and counts."""
        none = k_BTGK[:, :0].to(work_dtype(k_BTGK))
        return Memory(none, none, none[..., 0].transpose(1, 2))

    def read(self, memory: Memory, position: int) -> tuple[Tensor, Tensor, Tensor]:
        mean = memory.value / memory.note.transpose(1, 2)[..., None]
        return F.normalize(memory.key, dim=-1), mean, memory.note.log()

    def commit(self, memory: Memory, key_BLGK: Tensor, value_BLGK: Tensor, start: int) -> Memory:
        key, value = key_BLGK.to(memory.key.dtype), value_BLGK.to(memory.key.dtype)
        B, M, G, K = memory.key.shape
        if M == 0:  # the first pair has nothing to be like
            memory = Memory(key[:, :1], value[:, :1], key.new_ones(B, G, 1))
            key, value, M = key[:, 1:], value[:, 1:], 1
        with torch.no_grad():
            likeness_BGLM = torch.einsum("blgk,bmgk->bglm", key, F.normalize(memory.key, dim=-1))
            best_BGL, entry_BGL = likeness_BGLM.max(-1)
            room = min(self.num_centroids - M, key.shape[1])
            # The pairs least like any entry take the free places, in their order in the text.
            novel_BGR = best_BGL.argsort(dim=-1, stable=True)[..., :room].sort(-1).values
            places = torch.arange(M, M + room, device=key.device).expand_as(novel_BGR)
            entry_BGL = entry_BGL.scatter(2, novel_BGR, places)
            count = F.pad(memory.note, (0, room)).scatter_add(2, entry_BGL, torch.ones_like(best_BGL))
        index = entry_BGL.transpose(1, 2)[..., None].expand(-1, -1, -1, K)
        longer_key, longer_value = (F.pad(x, (0, 0, 0, 0, 0, room)) for x in (memory.key, memory.value))
        return Memory(longer_key.scatter_add(1, index, key), longer_value.scatter_add(1, index, value), count)

    def state_size(self, context: int) -> int:
        """As the other rules, with a count a head and entry instead of a position an entry."""
        held = min(self.num_centroids, self.entries_after(context // self.chunk_size))
        return super().state_size(context) + (self.shape.num_kv_heads - 1) * held

    def float32_state(self, context: int) -> int:
        held = min(self.num_centroids, self.entries_after(context // self.chunk_size))
        return self.shape.num_kv_heads * held * (2 * self.shape.head_dim + 1)

    def mixing_flops(self, context: int) -> float:
        """Attention, and the product of every key with the memory by which it is merged."""
        attention = super().mixing_flops(context)
        own = 4 * self.shape.num_heads * self.shape.head_dim * (min(self.chunk_size, context) + 1) / 2
        return attention + (attention - own) / 2 * self.shape.num_kv_heads / self.shape.num_heads
