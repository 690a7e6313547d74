"""Normalised linear attention in chunks: simple GLA without decay, and a running sum of keys for the normaliser.

Shapes: B batch, T tokens, H heads, K key width, V value width.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ovq.ops.common import work_dtype
from ovq.ops.linear_attention.reference import EPS
from ovq.ops.simple_gla import chunked as gla


def forward(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    *,
    chunk_size: int,
    state: tuple[Tensor, Tensor] | None,
    numerator: Callable[..., tuple[Tensor, Tensor]] = gla.forward,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """As `reference.forward`; `numerator` is simple GLA, by whichever backend."""
    S_BHKV, z_BHK = state or (None, None)
    o, S = numerator(q_BTHK, k_BTHK, v_BTHV, None, chunk_size=chunk_size, state=S_BHKV)
    work = work_dtype(q_BTHK)
    z_BTHK = k_BTHK.to(work).cumsum(1)
    if z_BHK is not None:
        z_BTHK = z_BTHK + z_BHK[:, None]
    norm = (q_BTHK.to(work) * z_BTHK).sum(-1, keepdim=True) + EPS
    return (o.to(work) / norm).to(v_BTHV.dtype), (S, z_BTHK[:, -1].clone())  # a view would keep all T alive
