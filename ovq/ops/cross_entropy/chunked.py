"""Cross-entropy in chunks of tokens: a chunk's logits are computed, used and freed.

For the plain sum, the gradients of x and the weight are computed in the forward pass, while the logits are in memory
(as in Liger, arXiv 2410.10989): backward only multiplies them by the incoming scalar. With a z term, or a loss per
token, the incoming gradient is more than one scalar, so backward recomputes the logits.

Shapes: N tokens, C tokens per chunk, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ovq.ops.common import work_dtype
from ovq.ops.cross_entropy.reference import IGNORE, soft_cap


def forward(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    chunk: int,
    z_loss: float,
    reduction: str,
    softcap: float,
) -> tuple[Tensor, Tensor | None]:
    """As `reference.forward`."""
    if reduction == "sum" and x_ND.device.type == "cpu" and not torch.compiler.is_compiling():
        # On the CPU, selecting the labelled tokens forces no synchronisation, and the others then cost nothing.
        labelled = (targets_N != IGNORE).nonzero()[:, 0]
        if len(labelled) < len(targets_N):
            x_ND, targets_N = x_ND[labelled], targets_N[labelled]
    trained = torch.is_grad_enabled() and (x_ND.requires_grad or weight_VD.requires_grad)
    if trained and reduction == "sum" and not z_loss:
        return _Sum.apply(x_ND, weight_VD, targets_N, chunk, softcap), None
    loss_N, z_N = _PerToken.apply(x_ND, weight_VD, targets_N, chunk, softcap)
    z = z_loss * z_N.sum() if z_loss else None
    return loss_N.sum() if reduction == "sum" else loss_N, z


class _Sum(torch.autograd.Function):
    """The summed loss; its gradients are computed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int, softcap: float) -> Tensor:
        loss = x_ND.new_zeros((), dtype=work_dtype(x_ND))
        gradients = _Gradients(x_ND, weight_VD, ctx.needs_input_grad)
        for at in _chunks(len(x_ND), chunk):
            logits_CV = soft_cap(F.linear(x_ND[at], weight_VD), softcap)
            logp_CV, label_C1, valid_C = _log_probabilities(logits_CV, targets_N[at])
            loss -= (logp_CV.gather(1, label_C1)[:, 0] * valid_C).sum()
            dlogits_CV = logp_CV.exp_()
            dlogits_CV.scatter_add_(1, label_C1, dlogits_CV.new_full((), -1.0).expand(label_C1.shape))
            gradients.add(at, _uncapped(dlogits_CV.mul_(valid_C[:, None]), logits_CV, softcap))
        ctx.save_for_backward(gradients.dx, gradients.dweight)
        ctx.dtype = x_ND.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = ctx.saved_tensors
        # In float32: rounding dloss (1 / tokens) to bf16 first would scale every gradient wrongly by up to 0.4%.
        dx, dweight = (None if d is None else (d.to(dloss.dtype) * dloss).to(ctx.dtype) for d in (dx, dweight))
        return dx, dweight, None, None, None


class _PerToken(torch.autograd.Function):
    """(loss, squared log-partition) of each token, 0 for tokens without a label."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int, softcap: float
    ) -> tuple[Tensor, Tensor]:
        loss_N, z_N = (x_ND.new_empty(len(x_ND), dtype=work_dtype(x_ND)) for _ in range(2))
        for at in _chunks(len(x_ND), chunk):
            logits_CV = soft_cap(F.linear(x_ND[at], weight_VD), softcap)
            logp_CV, label_C1, valid_C = _log_probabilities(logits_CV, targets_N[at])
            label_logp_C = logp_CV.gather(1, label_C1)[:, 0]
            loss_N[at] = -label_logp_C * valid_C
            z_N[at] = (logits_CV.gather(1, label_C1)[:, 0] - label_logp_C).square() * valid_C
        ctx.save_for_backward(x_ND, weight_VD, targets_N)
        ctx.chunk, ctx.softcap = chunk, softcap
        return loss_N, z_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss_N: Tensor, dz_N: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight_VD, targets_N = ctx.saved_tensors
        gradients = _Gradients(x_ND, weight_VD, ctx.needs_input_grad)
        for at in _chunks(len(x_ND), ctx.chunk):
            logits_CV = soft_cap(F.linear(x_ND[at], weight_VD), ctx.softcap)
            logp_CV, label_C1, valid_C = _log_probabilities(logits_CV, targets_N[at])
            lse_C1 = logits_CV.gather(1, label_C1) - logp_CV.gather(1, label_C1)
            dloss_C1 = (dloss_N[at] * valid_C)[:, None]
            dlse_C1 = dloss_C1 + (dz_N[at] * valid_C)[:, None] * 2 * lse_C1
            dlogits_CV = logp_CV.exp_().mul_(dlse_C1)
            dlogits_CV.scatter_add_(1, label_C1, -dloss_C1)
            gradients.add(at, _uncapped(dlogits_CV, logits_CV, ctx.softcap))
        return *gradients.of(), None, None, None


class _Gradients:
    """Gradients of x and the weight, accumulated over chunks of logits; the weight's in at least float32."""

    def __init__(self, x_ND: Tensor, weight_VD: Tensor, needed: tuple[bool, ...]) -> None:
        self.x, self.weight = x_ND, weight_VD
        self.dx = torch.empty_like(x_ND) if needed[0] else None
        self.dweight = torch.zeros_like(weight_VD, dtype=work_dtype(x_ND)) if needed[1] else None

    def add(self, at: slice, dlogits_CV: Tensor) -> None:
        dlogits_CV = dlogits_CV.to(self.x.dtype)
        if self.dx is not None:
            torch.mm(dlogits_CV, self.weight, out=self.dx[at])
        if self.dweight is None:
            return
        if self.dweight.dtype == self.x.dtype:
            self.dweight.addmm_(dlogits_CV.t(), self.x[at])
        else:
            self.dweight += dlogits_CV.t() @ self.x[at]

    def of(self) -> tuple[Tensor | None, Tensor | None]:
        return self.dx, None if self.dweight is None else self.dweight.to(self.weight.dtype)


def _chunks(tokens: int, chunk: int) -> Iterator[slice]:
    return (slice(start, min(start + chunk, tokens)) for start in range(0, tokens, chunk))


def _uncapped(dlogits_CV: Tensor, logits_CV: Tensor, softcap: float) -> Tensor:
    """Turn the gradient of the capped logits y = c tanh(x / c) into that of the logits x: dy/dx = 1 - (y/c)^2.

    Both tensors are overwritten.
    """
    return dlogits_CV.mul_(logits_CV.div_(softcap).square_().neg_().add_(1)) if softcap else dlogits_CV


def _log_probabilities(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log softmax [C, V] in at least float32, the label's column [C, 1], whether there is a label [C])."""
    valid_C = targets_C != IGNORE
    label_C1 = targets_C.where(valid_C, 0)[:, None]
    return torch.log_softmax(logits_CV, dim=-1, dtype=work_dtype(logits_CV)), label_C1, valid_C
