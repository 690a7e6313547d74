"""Mamba-2 (arXiv 2405.21060): a selective state space with one decay per head, in its dual, attention-like form.

Shapes: B batch, T tokens, D model width, H heads, P head width, N state width, E inner width = H x P.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovq.mixers.base import MixerShape, SequenceMixer
from ovq.mixers.recurrent import DecayGate, RecurrentState, require_positive, width
from ovq.mixers.short_conv import ShortConv
from ovq.ops.common import check_backend
from ovq.ops.simple_gla import simple_gla


class Mamba2(SequenceMixer):
    """Figure 6 of the paper: one parallel projection to (gate z, x, B, C, dt), a short convolution over (x, B, C), the
    SSD recurrence h_t = exp(dt A) h_{t-1} + dt B x, y = C h + D x, a gated RMSNorm, and the output projection.

    B and C are shared by all heads. Computed as simple GLA with q = C, k = B, v = dt x, g = dt A.

    The paper's block (expansion 2) replaces attention and MLP together; here it replaces only attention, and the number
    of heads is chosen so that the layer has as many weights as attention without grouped heads.

    Args:
        num_heads: heads of width model.head_dim; null for the number that gives that many weights.
        state_dim: N, the width of B and C; null for 128 as in the paper, or half the width in models narrower than 256.
        conv_size: number of taps of the short convolution.
        skip_init: initial value of D, the weight of a token's own x in the output; 1 as in the published code.
        chunk_size: tokens per chunk of the torch form; affects speed only.
        backend: auto (fla's kernels on a GPU in half precision, if fla-core is installed) | reference | torch | fla.

    Raises:
        ValueError: a size that is not positive, or a skip_init below 0 or infinite.
    """

    differentiable_state = True

    def __init__(
        self,
        shape: MixerShape,
        *,
        num_heads: int | None = None,
        state_dim: int | None = None,
        conv_size: int = 4,
        skip_init: float = 1.0,
        chunk_size: int = 64,
        backend: str = "auto",
    ) -> None:
        super().__init__(shape)
        N = min(128, max(1, width(shape) // 2)) if state_dim is None else state_dim
        if num_heads is None:
            # Attention has 4 x width columns of weights; this layer has 3 E (z, x, out) + 2 N.
            num_heads = max(1, round((4 * width(shape) - 2 * N) / (3 * shape.head_dim)))
        require_positive("mamba2", num_heads=num_heads, state_dim=N, conv_size=conv_size, chunk_size=chunk_size)
        if not 0 <= skip_init < math.inf:
            raise ValueError(f"skip_init={skip_init} of mamba2 must be a finite number of at least 0")
        self.num_heads, self.state_dim, self.inner = num_heads, N, num_heads * shape.head_dim
        check_backend("mamba2", backend, "fla")
        self.skip_init, self.chunk_size, self.backend = skip_init, chunk_size, backend
        self.in_proj = nn.Linear(shape.dim, 2 * self.inner + 2 * N + num_heads, bias=False)
        self.conv = ShortConv(self.inner + 2 * N, conv_size, bias=True)
        self.decay = DecayGate(num_heads)
        self.skip = nn.Parameter(torch.empty(num_heads))  # the paper's D
        self.norm = nn.RMSNorm(self.inner, eps=shape.norm_eps)
        self.out_proj = nn.Linear(self.inner, shape.dim, bias=False)

    def init_weights(self, std: float) -> None:
        super().init_weights(std)
        self.conv.init_weights()
        self.decay.init_weights()
        nn.init.constant_(self.skip, self.skip_init)
        nn.init.ones_(self.norm.weight)

    def forward(
        self,
        x_BTD: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        state: RecurrentState | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, RecurrentState | None]:
        E, N, H = self.inner, self.state_dim, self.num_heads
        z, x, BC, raw = self.in_proj(x_BTD).split([E, E, 2 * N, H], dim=-1)
        x, BC, raw = self.gather_tokens(
            x.unflatten(-1, (H, -1)),
            BC[:, :, None].expand(-1, -1, self.head_ranks, -1),  # every process needs them
            raw[..., None],
        )
        xBC = torch.cat([x.flatten(2), BC.flatten(2)], dim=-1)
        xBC, tail = self.conv(xBC, cu_seqlens, state.tail if state else None, self._own_channels)
        x_BTE, B_BTN, C_BTN = xBC.split([xBC.shape[-1] - 2 * N, N, N], dim=-1)
        g_BTH, step_BTH = self.decay(raw.squeeze(-1), self.own_heads)
        x_BTHP = x_BTE.unflatten(-1, (raw.shape[2], -1))
        y, memory = simple_gla(
            C_BTN[:, :, None],
            B_BTN[:, :, None],
            x_BTHP * step_BTH[..., None].to(x_BTHP.dtype),
            g_BTH,
            chunk_size=self.chunk_size,
            cu_seqlens=cu_seqlens,
            state=state.memory if state else None,
            backend=self.backend,
        )
        y = self.gather_heads(y + x_BTHP * self.own_heads(self.skip).to(y.dtype)[:, None])
        y = self.out_proj(self.norm(y.flatten(2) * F.silu(z)))
        return y, RecurrentState(memory, tail) if return_state else None

    def _own_channels(self, filters: Tensor) -> Tensor:
        """The filters of this process's heads and of B and C, out of those of all channels."""
        if self.head_ranks == 1:
            return filters
        x, BC = filters.split([self.inner, 2 * self.state_dim])
        return torch.cat([self.own_heads(x), BC])

    def head_counts(self) -> dict[str, int] | None:
        return {"num_heads of mamba2": self.num_heads}

    def state_size(self, context: int) -> int:
        """An N x P state per head, and the convolution's last inputs."""
        return self.inner * self.state_dim + (self.conv.weight.shape[1] - 1) * (self.inner + 2 * self.state_dim)

    def float32_state(self, context: int) -> int:
        return self.inner * self.state_dim

    def mixing_flops(self, context: int) -> float:
        """The recurrence (write and read an N x P state per head) and the convolution."""
        return 4 * self.inner * self.state_dim + 2 * self.conv.weight.numel()
