"""The short causal convolution of recurrent mixers: one small filter per channel, then SiLU.

Shapes: B batch, T tokens, D channels, W taps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ShortConv(nn.Module):
    """y_t = silu(sum_j w_j x_{t-j} + b), j = 0 .. W - 1, with zeros before a document's start.

    Written as W shifted products, since W is only 4 and packed documents then cost nothing extra.

    Raises:
        ValueError: width below 1.
    """

    def __init__(self, channels: int, width: int, *, bias: bool = False) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"conv_size={width} must be at least 1")
        self.weight = nn.Parameter(torch.empty(channels, width))  # the last tap is the token itself
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def init_weights(self) -> None:
        """As in nn.Conv1d: uniform in +-1/sqrt(taps)."""
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(
        self,
        x_BTD: Tensor,
        cu_seqlens: Tensor | None = None,
        tail_BSD: Tensor | None = None,
        own: Callable[[Tensor], Tensor] = lambda parameter: parameter,
    ) -> tuple[Tensor, Tensor]:
        """(y [B, T, D], the last W - 1 inputs [B, W - 1, D], to pass as the next call's `tail_BSD`).

        `own` selects the part of a parameter that belongs to the D channels given, if they are not all channels.
        """
        B, T, D = x_BTD.shape
        W = self.weight.shape[1]
        if tail_BSD is None:
            tail_BSD = x_BTD.new_zeros(B, W - 1, D)
        longer = torch.cat([tail_BSD, x_BTD], dim=1)
        since_start = None if cu_seqlens is None else positions(cu_seqlens, T)
        weight = own(self.weight).to(x_BTD.dtype)
        y = x_BTD * weight[:, W - 1]
        for j in range(1, W):
            past = longer[:, W - 1 - j : W - 1 - j + T]
            if since_start is not None:
                past = past * (since_start >= j).to(past.dtype)[:, None]
            y = y + past * weight[:, W - 1 - j]
        if self.bias is not None:
            y = y + own(self.bias).to(y.dtype)
        return F.silu(y), longer[:, T:].clone()  # a view would keep the whole piece alive


def positions(cu_seqlens: Tensor, T: int) -> Tensor:
    """Position of each of T packed tokens in its own document, int64 [T]."""
    index = torch.arange(T, device=cu_seqlens.device)
    starts = cu_seqlens.long()
    return index - starts[torch.searchsorted(starts, index, right=True) - 1]
