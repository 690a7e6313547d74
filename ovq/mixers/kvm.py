"""Key/value pairs merged by cosine similarity, in the style of Key-Value Means (arXiv 2605.09877).

Shapes: B batch, L chunk, M entries held, G key/value heads, K head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ovq.mixers.memory_layer import Memory, MemoryLayer
from ovq.ops.common import first_max, work_dtype


class KVM(MemoryLayer):
    """Keeps every pair until the memory is full; then a chunk's pairs merge into the entries most similar to them.

    In the style of Key-Value Means (arXiv 2605.09877), a peer of OVQ: a pair joins the entry with the highest cosine
    similarity, and keys are renormalised whenever they are read, so that an entry's key is a direction and never
    shrinks by averaging; values are means. That paper's RoPE dimensions, decay and growing state are left out, so that
    the only differences from OVQ are that the memory fills up immediately and that keys are normalised.
    """

    def empty(self, k_BTGK: Tensor) -> Memory:
        """Key and value sums in float32 (float64 for float64 inputs), and counts."""
        none = torch.empty_like(k_BTGK[:, :0], dtype=work_dtype(k_BTGK))  # a view would keep the piece's keys alive
        return Memory(none, none, none[..., 0].transpose(1, 2))

    def read(self, memory: Memory, position: int) -> tuple[Tensor, Tensor, Tensor]:
        mean = memory.value / memory.note.transpose(1, 2)[..., None]
        return F.normalize(memory.key, dim=-1), mean, memory.note.log()

    def commit(self, memory: Memory, key_BLGK: Tensor, value_BLGK: Tensor, start: int) -> Memory:
        key, value = key_BLGK.to(memory.key.dtype), value_BLGK.to(memory.key.dtype)
        B, M, G, K = memory.key.shape
        if M == 0:  # no entries to compare with yet: the first pair becomes one
            memory = Memory(key[:, :1], value[:, :1], key.new_ones(B, G, 1))
            key, value, M = key[:, 1:], value[:, 1:], 1
        with torch.no_grad():
            similarity_BGLM = key.transpose(1, 2) @ F.normalize(memory.key, dim=-1).permute(0, 2, 3, 1)
            best_BGL, entry_BGL = first_max(similarity_BGLM)
            room = min(self.capacity - M, key.shape[1])
            # The pairs least similar to any entry take the free places, in text order.
            novel_BGR = best_BGL.argsort(dim=-1, stable=True)[..., :room].sort(-1).values
            places = torch.arange(M, M + room, device=key.device).expand_as(novel_BGR)
            entry_BGL = entry_BGL.scatter(2, novel_BGR, places)
            count = F.pad(memory.note, (0, room)).scatter_add(2, entry_BGL, torch.ones_like(best_BGL))
        index = entry_BGL.transpose(1, 2)[..., None].expand(-1, -1, -1, K)
        longer_key, longer_value = (F.pad(x, (0, 0, 0, 0, 0, room)) for x in (memory.key, memory.value))
        return Memory(longer_key.scatter_add(1, index, key), longer_value.scatter_add(1, index, value), count)

    def state_size(self, context: int) -> int:
        """As for the other rules, but with a count per head and entry instead of a position per entry."""
        held = min(self.capacity, self.entries_after(context // self.chunk_size))
        return super().state_size(context) + (self.shape.num_kv_heads - 1) * held

    def float32_state(self, context: int) -> int:
        held = min(self.capacity, self.entries_after(context // self.chunk_size))
        return self.shape.num_kv_heads * held * (2 * self.shape.head_dim + 1)

    def mixing_flops(self, context: int) -> float:
        """Attention, and the product of every key with the memory to find the entry that it merges into."""
        return super().mixing_flops(context) + self.assignment_flops(context)

    def assignment_flops(self, context: int) -> float:
        held = (min(self.capacity, self.entries_after(c)) for c in range(context // self.chunk_size))
        return 2 * self.shape.num_kv_heads * self.shape.head_dim * self.chunk_size * sum(held) / context
