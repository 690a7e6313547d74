"""VQ-attention block by block: running value sums and counts per code, exact attention within two blocks.

Shapes: B batch, T tokens, S recent + new tokens, H query heads, G key/value heads, N codes, K key, V value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ovq.ops.common import work_dtype
from ovq.ops.memory_attention import memory_attention
from ovq.ops.vq_attention.state import VQState, assign, recent_start


def forward(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    codebook_GNK: Tensor,
    beta_H: Tensor,
    *,
    block_size: int,
    quantize_recent: bool,
    state: VQState | None = None,
) -> tuple[Tensor, VQState]:
    """As `reference.forward`."""
    work, L = work_dtype(q_BTHK), block_size
    B, T, G, K = *k_BTGK.shape[:3], k_BTGK.shape[3]
    N, V = codebook_GNK.shape[1], v_BTGV.shape[3]
    position = state.position if state else 0
    first = recent_start(position, L)  # position of k[:, 0] below
    k = torch.cat([state.recent_key, k_BTGK], dim=1) if state else k_BTGK
    v = torch.cat([state.recent_value, v_BTGV], dim=1) if state else v_BTGV
    code_BSG = assign(k, codebook_GNK)
    recent = straight_through(k, codebook_GNK, code_BSG) if quantize_recent else k
    codes = codebook_GNK.detach().to(work)
    count = state.count if state else k.new_zeros(B, G, N, dtype=work)
    value_sum = state.value_sum if state else k.new_zeros(B, G, N, V, dtype=work)
    key_sum = k.new_zeros(B, G, N, K, dtype=work)  # carries only the straight-through gradient, not a value

    def absorb(block: slice) -> None:
        nonlocal count, value_sum, key_sum
        index = code_BSG[:, block].transpose(1, 2)
        count = count.scatter_add(2, index, torch.ones_like(index, dtype=work))
        value_sum = scatter_rows(value_sum, index, v[:, block])
        key_sum = scatter_rows(key_sum, index, k[:, block])

    end, done, rows = position + T, first, []
    for start in range(position - position % L, end, L):
        oldest = recent_start(start, L)
        if done < oldest:
            absorb(slice(done - first, oldest - first))
            done = oldest
        stop = min(start + L, end)
        scale = count.clamp_min(1)[..., None]
        mean = key_sum / scale
        own = slice(oldest - first, stop - first)
        rows.append(
            memory_attention(
                q_BTHK[:, max(start, position) - position : stop - position],
                (codes + (mean - mean.detach())).transpose(1, 2),
                (value_sum / scale).transpose(1, 2).to(v.dtype),
                count.log(),  # -inf for codes without tokens
                recent[:, own],
                v[:, own],
                beta_H,
            )
        )
    held = recent_start(end, L)
    if done < held:
        absorb(slice(done - first, held - first))
    kept = slice(held - first, None)
    # Cloned, because a view would keep the whole piece's keys alive.
    new_state = VQState(value_sum, count, k[:, kept].clone(), v[:, kept].clone(), end)
    return torch.cat(rows, dim=1), new_state


def scatter_rows(sums_BGNK: Tensor, index_BGS: Tensor, rows_BSGK: Tensor) -> Tensor:
    """The sums after each row has been added to that of its code."""
    rows = rows_BSGK.transpose(1, 2).to(sums_BGNK.dtype)
    return sums_BGNK.scatter_add(2, index_BGS[..., None].expand_as(rows), rows)


def straight_through(k_BSGK: Tensor, codebook_GNK: Tensor, code_BSG: Tensor) -> Tensor:
    """The codes in the forward pass, with gradients passed through to the keys (arXiv 2309.16354, eq. 3)."""
    G = codebook_GNK.shape[0]
    quantised = codebook_GNK.detach()[torch.arange(G, device=k_BSGK.device), code_BSG].to(k_BSGK.dtype)
    return k_BSGK + (quantised - k_BSGK).detach()
