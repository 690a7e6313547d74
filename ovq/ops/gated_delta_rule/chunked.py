"""The gated delta rule in chunks, using the WY form of products of rank-one updates (arXiv 2412.06464, sec. 3.3).

The corrections u of a chunk's tokens depend on each other linearly: (I + A) u = beta (v - exp(a) S^T k), with
A_ij = beta_i exp(a_i - a_j) k_i.k_j for j < i and a the running sum of g. After one batched triangular solve over all
chunks, for the v term and for the factor that multiplies the state S, only matrix products remain.

Shapes: B batch, T tokens, H heads, K key width, V value width, C chunks, L tokens per chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ovq.ops.common import work_dtype
from ovq.ops.simple_gla.chunked import from_chunks, to_chunks


def forward(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor,
    beta_BTH: Tensor,
    *,
    chunk_size: int,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `reference.forward`."""
    B, T, H, V = v_BTHV.shape
    K, L, work = q_BTHK.shape[3], min(chunk_size, T), work_dtype(q_BTHK)
    q, k, v = (to_chunks(x.to(work), L) for x in (q_BTHK, k_BTHK, v_BTHV))
    a_BHCL1 = to_chunks(g_BTH.to(work)[..., None], L).cumsum(3)
    beta_BHCL1 = to_chunks(beta_BTH.to(work)[..., None], L)
    mask_LL = torch.ones(L, L, dtype=torch.bool, device=q.device).tril()
    # Masked before exp: above the diagonal a_i - a_j > 0 may overflow.
    decay_BHCLL = (a_BHCL1 - a_BHCL1.transpose(-1, -2)).masked_fill(~mask_LL, -torch.inf).exp()
    A_BHCLL = beta_BHCL1 * (k @ k.transpose(-1, -2)) * decay_BHCLL
    # With unitriangular, solve_triangular takes the diagonal as ones and reads A from the strict lower triangle.
    sides = torch.cat([beta_BHCL1 * v, beta_BHCL1 * a_BHCL1.exp() * k], dim=-1)
    u_BHCLV, w_BHCLK = torch.linalg.solve_triangular(A_BHCLL.tril(-1), sides, upper=False, unitriangular=True).split(
        [V, K], dim=-1
    )
    own_BHCLL = (q @ k.transpose(-1, -2)) * decay_BHCLL
    q_start = q * a_BHCL1.exp()
    k_end = k * (a_BHCL1[..., -1:, :] - a_BHCL1).exp()
    whole_BHC11 = a_BHCL1[..., -1:, :].exp()
    S = q.new_zeros(B, H, K, V) if state is None else state.to(work)
    by_chunk = (x.unbind(2) for x in (u_BHCLV, w_BHCLK, q_start, k_end.mT, whole_BHC11))  # not x[:, :, c], see `write`
    corrections, carried = [], []
    for u, w, q_c, k_c, whole in zip(*by_chunk):
        correction = u - w @ S
        corrections.append(correction)
        carried.append(q_c @ S)
        S = whole * S + k_c @ correction
    o_BHCLV = (torch.stack(carried, dim=2) + own_BHCLL @ torch.stack(corrections, dim=2)) * K**-0.5
    return from_chunks(o_BHCLV, T).to(v_BTHV.dtype), S
