"""Muon for matrices and AdamW for everything else, as one optimizer: one state to save, one `step`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, EPS, _adjust_lr, _zeropower_via_newtonschulz


class Muon(torch.optim.Optimizer):
    """Muon (Jordan, https://kellerjordan.github.io/posts/muon) for groups with "muon": True, AdamW for the others.

    The step for a matrix W with gradient G at learning rate lr, which equals that of `torch.optim.Muon` bit for bit:

        B = momentum B + (1 - momentum) G
        W = (1 - lr weight_decay) W - lr scale(W) orthogonalised((1 - momentum) G + momentum B)

    Unlike that class, this one also accepts matrices sharded by FSDP. `torch.optim.Muon` would run each product of
    the Newton-Schulz iteration on shards, with its own collectives and sums rounded to bf16 in a different order.
    Here the momentum stays sharded; every process gathers one whole matrix after another, orthogonalises it in bf16,
    and keeps its own rows: one collective per matrix, and the same update from the same momentum on any number of
    processes. (Gradients are summed in an order that depends on that number. The iteration amplifies such differences
    in directions that bf16 hardly resolves, to about 1% of a matrix after a few steps.)

    Whether a step is skipped is decided on the host (`step_unless`), which therefore waits for the device in each step.

    Args:
        groups: parameter groups with "weight_decay" and "muon"; those for Muon hold only 2-D parameters.
        lr: learning rate, which `step_unless` sets in each step.
        betas, eps, fused: of AdamW.
        momentum: decay rate of the momentum B.
        ns_steps: Newton-Schulz iterations.
        adjust_lr: scale(W): "original", sqrt(max(1, rows / columns)), or "match_rms_adamw", 0.2 sqrt(max(rows,
            columns)), for which AdamW's learning rate and weight decay are suitable (arXiv 2502.16982, section 2.2).

    Raises:
        ValueError: a parameter in a group for Muon is not a matrix.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        fused: bool = True,
        momentum: float = 0.95,
        ns_steps: int = 5,
        adjust_lr: str = "match_rms_adamw",
    ) -> None:
        matrices = [group for group in groups if group["muon"]]
        for p in (p for group in matrices for p in group["params"]):
            if p.ndim != 2:
                raise ValueError(f"Muon is for matrices, and got a parameter of shape {tuple(p.shape)}")
        rest = [group for group in groups if not group["muon"]]
        self._adamw = torch.optim.AdamW(rest or [{"params": []}], lr=lr, betas=betas, eps=eps, fused=fused)
        for group in matrices:
            group |= {"momentum": momentum, "ns_steps": ns_steps, "adjust_lr": adjust_lr}
        super().__init__([*matrices, *(self._adamw.param_groups if rest else [])], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        # Loading a checkpoint replaces both of these.
        self._adamw.param_groups = [group for group in self.param_groups if not group["muon"]]
        self._adamw.state = self.state
        self._adamw.step()
        for group in self.param_groups:
            for p in group["params"] if group["muon"] else ():
                if p.grad is not None:
                    self._step_of(p, group)

    def _step_of(self, p: Tensor, group: dict[str, Any]) -> None:
        assert p.grad is not None
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p.grad)
        momentum_buffer = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
        update = p.grad.lerp(momentum_buffer, group["momentum"])
        update = orthogonalised(update, group["ns_steps"])
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(update, alpha=-_adjust_lr(group["lr"], group["adjust_lr"], p.shape))


def orthogonalised(matrix: Tensor, ns_steps: int) -> Tensor:
    """Approximately U V^T, for a matrix with singular value decomposition U S V^T; in bf16, sharded like the matrix."""
    coefficients = (DEFAULT_A, DEFAULT_B, DEFAULT_C)
    if not isinstance(matrix, DTensor):
        return _zeropower_via_newtonschulz(matrix, coefficients, ns_steps, EPS)
    whole = _zeropower_via_newtonschulz(matrix.full_tensor(), coefficients, ns_steps, EPS)
    return distribute_tensor(whole, matrix.device_mesh, matrix.placements, src_data_rank=None)
