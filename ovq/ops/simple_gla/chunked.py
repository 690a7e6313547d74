"""Simple GLA in chunks: quadratic within a chunk, a recurrent state between chunks (arXiv 2405.21060, sec. 6).

Within a chunk, o_i = sum_{j<=i} exp(a_i - a_j) (q_i.k_j) v_j + exp(a_i) S^T q_i with a the running sum of g: two masked
matrix products per chunk, batched over all chunks; only the T / L state updates are sequential.

Shapes: B batch, T tokens, H heads, G groups of heads, K key width, V value width, C chunks, L tokens per chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ovq.ops.common import work_dtype


@dataclass
class Memory:
    """What a sequence of (k, v, g) has written, ready to be read by queries."""

    key_BGCLK: Tensor
    value_BHCLV: Tensor
    decay_BHCLL: Tensor  # exp(a_i - a_j) for j <= i, else 0; [1, 1, 1, L, L] without decay
    from_start_BHCL1: Tensor | None  # exp(a_i); None without decay
    states_BHCKV: Tensor  # before each chunk
    final_BHKV: Tensor


def forward(
    q_BTGK: Tensor, k_BTGK: Tensor, v_BTHV: Tensor, g_BTH: Tensor | None, *, chunk_size: int, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `reference.forward`; g = None means no decay."""
    B, T, H, V = v_BTHV.shape
    L = min(chunk_size, T)
    q, k, v = (to_chunks(x.to(work_dtype(x)), L) for x in (q_BTGK, k_BTGK, v_BTHV))
    g = None if g_BTH is None else to_chunks(g_BTH.to(q.dtype)[..., None], L)[..., 0]
    memory = write(spread(k, H), v, g, state)
    return from_chunks(read(spread(q, H), memory), T).to(v_BTHV.dtype), memory.final_BHKV


def to_chunks(x_BTHK: Tensor, L: int) -> Tensor:
    """[B, T, H, K] -> [B, H, C, L, K], padded with zeros to whole chunks."""
    x = F.pad(x_BTHK, (0, 0, 0, 0, 0, -x_BTHK.shape[1] % L))
    return x.unflatten(1, (-1, L)).permute(0, 3, 1, 2, 4)


def from_chunks(x_BHCLV: Tensor, T: int) -> Tensor:
    """The inverse of `to_chunks`, without the padding: [B, T, H, V]."""
    return x_BHCLV.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :T]


def spread(x_BGCLK: Tensor, H: int) -> Tensor:
    """Expand groups to heads. A single group is left to broadcasting, so that its products are computed only once."""
    G = x_BGCLK.shape[1]
    return x_BGCLK if G in (1, H) else x_BGCLK.repeat_interleave(H // G, dim=1)


def write(k_BGCLK: Tensor, v_BHCLV: Tensor, g_BHCL: Tensor | None, state_BHKV: Tensor | None) -> Memory:
    """Compute the state before every chunk. Padding writes nothing: its k, v and g are 0."""
    B, H, C, L, V = v_BHCLV.shape
    mask_LL = torch.ones(L, L, dtype=torch.bool, device=v_BHCLV.device).tril()
    if g_BHCL is None:
        decay, from_start, to_end, whole = mask_LL.to(v_BHCLV.dtype)[None, None, None], None, k_BGCLK, None
    else:
        a_BHCL = g_BHCL.cumsum(-1)
        # Masked before exp: above the diagonal a_i - a_j > 0 may overflow.
        decay = (a_BHCL[..., :, None] - a_BHCL[..., None, :]).masked_fill(~mask_LL, -torch.inf).exp()
        from_start = a_BHCL.exp()[..., None]
        to_end = k_BGCLK * (a_BHCL[..., -1:] - a_BHCL).exp()[..., None]
        whole = a_BHCL[..., -1, None, None].exp()
    written_BHCKV = to_end.transpose(-1, -2) @ v_BHCLV
    S = v_BHCLV.new_zeros(B, H, k_BGCLK.shape[-1], V) if state_BHKV is None else state_BHKV.to(v_BHCLV.dtype)
    # Unbound once: the gradient of each x[:, :, c] would have the size of x: quadratic in the number of chunks.
    written, decays = written_BHCKV.unbind(2), [None] * C if whole is None else whole.unbind(2)
    before = []
    for written_BHKV, decay_BH11 in zip(written, decays):
        before.append(S)
        S = (S if decay_BH11 is None else decay_BH11 * S) + written_BHKV
    return Memory(k_BGCLK, v_BHCLV, decay, from_start, torch.stack(before, dim=2), S)


def read(q_BGCLK: Tensor, memory: Memory) -> Tensor:
    """o [B, H, C, L, V] for queries in chunks."""
    weight = q_BGCLK @ memory.key_BGCLK.transpose(-1, -2)
    carried = q_BGCLK @ memory.states_BHCKV
    if torch.is_grad_enabled() or weight.shape != memory.decay_BHCLL.shape:
        own = (weight * memory.decay_BHCLL) @ memory.value_BHCLV
        return own + (carried if memory.from_start_BHCL1 is None else carried * memory.from_start_BHCL1)
    own = weight.mul_(memory.decay_BHCLL) @ memory.value_BHCLV  # in place, because Mesa reads in every iteration
    return own.add_(carried) if memory.from_start_BHCL1 is None else own.addcmul_(carried, memory.from_start_BHCL1)
