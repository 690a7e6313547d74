"""The Mesa layer in chunks: conjugate gradients on all tokens at once.

All tokens' systems are solved together: multiplying every token's Hkk_t by that token's vector is simple GLA with keys
as values, so no T x K x K tensor is materialised. The backward pass does not differentiate the iterations: by the
implicit function theorem, the gradient of x = A^-1 q is one more solve with the same (symmetric) A.

Shapes: B batch, T tokens, H heads, K key width, V value width, C chunks, L tokens per chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ovq.ops.common import work_dtype
from ovq.ops.simple_gla.chunked import Memory, from_chunks, read, to_chunks, write

Product = Callable[[Tensor], Tensor]


def forward(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor,
    beta_BTH: Tensor,
    lamb_HK: Tensor,
    *,
    iterations: int,
    chunk_size: int,
    state: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """As `reference.forward`, with `iterations` conjugate-gradient steps instead of the direct solve."""
    T, L, work = q_BTHK.shape[1], min(chunk_size, q_BTHK.shape[1]), work_dtype(q_BTHK)
    q, k, v = (to_chunks(x.to(work), L) for x in (q_BTHK, k_BTHK, v_BTHV))
    g = to_chunks(g_BTH.to(work)[..., None], L)[..., 0]
    weighted = k * to_chunks(beta_BTH.to(work)[..., None], L)
    before_kk, before_kv = state or (None, None)
    kk, kv = write(weighted, k, g, before_kk), write(weighted, v, g, before_kv)
    ridge = lamb_HK.to(work)[None, :, None, None, :]
    x = solve(q, kk, ridge, iterations)
    return from_chunks(read(x, kv), T).to(v_BTHV.dtype), (kk.final_BHKV, kv.final_BHKV)


def solve(q_BHCLK: Tensor, kk: Memory, ridge: Tensor, iterations: int) -> Tensor:
    """x = (Hkk_t + ridge)^-1 q_t for every token, differentiable in q, Hkk and the ridge."""
    frozen = Memory(**{name: part.detach() for name, part in vars(kk).items()})
    frozen_ridge = ridge.detach()

    def product(p: Tensor) -> Tensor:
        return read(p, frozen).addcmul_(frozen_ridge, p)

    with torch.no_grad():
        x = conjugate_gradients(product, q_BHCLK.detach(), iterations)
    if not torch.is_grad_enabled():
        return x
    # d x = A^-1 (d q - d A x): the residual carries both terms, and backward applies A^-1 to the gradient.
    residual = q_BHCLK - (read(x, kk) + ridge * x)
    return x + _Inverse.apply(residual, product, iterations)


class _Inverse(torch.autograd.Function):
    """The forward pass returns 0 (the residual of a solved system), the backward pass applies A^-1."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, product: Product, iterations: int) -> Tensor:
        ctx.product, ctx.iterations = product, iterations
        return torch.zeros_like(residual)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return conjugate_gradients(ctx.product, grads[0], ctx.iterations), None, None


def conjugate_gradients(product: Product, b: Tensor, iterations: int) -> Tensor:
    """A^-1 b for a symmetric positive definite A, with a separate system for each vector along the last dimension.

    The number of steps is fixed, and a system that has converged stops changing: one early-stopping decision for all
    systems would let one token's difficulty change another token's result.
    """
    # A gradient may be so small that its square underflows, and A^-1 b would be NaN. Powers of two change no other bit.
    exponent = torch.frexp(b.abs().amax(-1, keepdim=True)).exponent.clamp(-120, 120)
    scale = torch.ldexp(torch.ones_like(b[..., :1]), exponent)
    b = b / scale
    x, r, p = torch.zeros_like(b), b.clone(), b.clone()
    rr = (r * r).sum(-1, keepdim=True)
    tolerance = rr * torch.finfo(b.dtype).eps ** 2
    zero = torch.zeros_like(rr)
    for _ in range(iterations):
        Ap = product(p)
        active = rr > tolerance
        alpha = torch.where(active, rr / (p * Ap).sum(-1, keepdim=True), zero)
        x.addcmul_(alpha, p)
        r.addcmul_(alpha, Ap, value=-1)
        rr_new = (r * r).sum(-1, keepdim=True)
        p.mul_(torch.where(active, rr_new / rr, zero)).add_(r)
        rr = torch.where(active, rr_new, rr)
    return x.mul_(scale)
