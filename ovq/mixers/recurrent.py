"""Shared by the baselines: the decay gate, the carried state of recurrent mixers, and size checks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ovq.mixers.base import MixerShape
from ovq.ops.common import work_dtype


@dataclass
class RecurrentState:
    """memory: the operator's state; tail: the last inputs of the convolution [B, W - 1, channels]."""

    memory: Any
    tail: Tensor


pytree.register_pytree_node(
    RecurrentState,
    lambda state: ([state.memory, state.tail], None),
    lambda leaves, _: RecurrentState(*leaves),
    serialized_type_name="ovq.RecurrentState",
)


class DecayGate(nn.Module):
    """log decay = -exp(A_log) softplus(raw + dt_bias), one per head and token (Mamba, arXiv 2312.00752, sec. 3.6)."""

    # Initial step sizes are log-uniform in this range and A is in 1..16: memory spans from below 1 to 1,000 tokens.
    STEP_RANGE = (1e-3, 0.1)
    A_RANGE = (1.0, 16.0)

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(num_heads))
        self.dt_bias = nn.Parameter(torch.empty(num_heads))

    def init_weights(self) -> None:
        nn.init.uniform_(self.A_log, *self.A_RANGE)
        low, high = (math.log(bound) for bound in self.STEP_RANGE)
        nn.init.uniform_(self.dt_bias, low, high)
        with torch.no_grad():
            self.A_log.log_()
            # The inverse of softplus, so that a raw input of 0 gives the sampled step.
            step = self.dt_bias.exp()
            self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))

    def forward(
        self, raw_BTH: Tensor, own: Callable[[Tensor], Tensor] = lambda parameter: parameter
    ) -> tuple[Tensor, Tensor]:
        """(log decay, step), [B, T, H] each, in float32 or float64: bf16 would round a decay of 0.999 to 1.

        `own` selects the part of a parameter that belongs to the H heads given, if they are not all heads.
        """
        work = work_dtype(raw_BTH)
        step = F.softplus(raw_BTH.to(work) + own(self.dt_bias).to(work))
        return -own(self.A_log).to(work).exp() * step, step


def width(shape: MixerShape) -> int:
    """The inner width of attention in this model, on which the sizes of the recurrent mixers are based."""
    return shape.num_heads * shape.head_dim


def require_positive(name: str, **settings: float) -> None:
    """Raise ValueError naming the first setting that is not above 0."""
    for key, value in settings.items():
        if value <= 0:
            raise ValueError(f"{key}={value} of {name} must be above 0")
