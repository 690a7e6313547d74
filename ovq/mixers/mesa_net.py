"""Mesa-Net (arXiv 2506.05233): at every token, a ridge regression of all values so far on their keys.

Shapes: B batch, T tokens, D model width, H heads, K head width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovq.mixers.base import MixerShape, SequenceMixer
from ovq.mixers.recurrent import DecayGate, RecurrentState, require_positive, width
from ovq.mixers.short_conv import ShortConv
from ovq.ops.common import check_backend, work_dtype
from ovq.ops.mesa import mesa


class MesaNet(SequenceMixer):
    """Short convolutions on q and k, both with unit norm, decay and input gates computed from the token, the Mesa layer
    with a learned ridge, a head-wise RMSNorm, and the output projection. It has as many weights as attention without
    grouped heads, and two gates.

    The decay is Mamba's gate, exp(-A softplus(a)), whose decay is slow at initialisation. The published code
    (flash-linear-attention) has sigmoid(a), near 1/2 at the start: this gate with A = 1 and the opposite sign of a.

    Args:
        conv_size: number of taps of the short convolutions.
        iterations: conjugate-gradient steps for each token's regression; the paper trains with 30.
        lambda_init: initial ridge.
        lambda_min: lower bound of the ridge, below which the solve converges poorly.
        chunk_size: tokens per chunk of the torch form; affects speed only.
        backend: auto (fla's kernels on a GPU in half precision, if fla-core is installed) | reference (direct solve) |
            torch | fla.

    Raises:
        ValueError: a size that is not positive, or lambda_init not above lambda_min.
    """

    differentiable_state = True

    def __init__(
        self,
        shape: MixerShape,
        *,
        conv_size: int = 4,
        iterations: int = 30,
        lambda_init: float = 1.0,
        lambda_min: float = 0.25,
        chunk_size: int = 64,
        backend: str = "auto",
    ) -> None:
        super().__init__(shape)
        require_positive(
            "mesa_net", conv_size=conv_size, iterations=iterations, lambda_min=lambda_min, chunk_size=chunk_size
        )
        if lambda_init <= lambda_min:
            raise ValueError(f"lambda_init={lambda_init} of mesa_net must be above lambda_min={lambda_min}")
        check_backend("mesa_net", backend, "fla")
        self.iterations, self.chunk_size, self.backend = iterations, chunk_size, backend
        self.lambda_init, self.lambda_min = lambda_init, lambda_min
        H, E = shape.num_heads, width(shape)
        self.q_proj = nn.Linear(shape.dim, E, bias=False)
        self.k_proj = nn.Linear(shape.dim, E, bias=False)
        self.v_proj = nn.Linear(shape.dim, E, bias=False)
        self.alpha_proj = nn.Linear(shape.dim, H, bias=False)
        self.beta_proj = nn.Linear(shape.dim, H, bias=True)
        self.decay = DecayGate(H)
        self.ridge = nn.Parameter(torch.empty(E))  # softplus^-1 of (lambda - lambda_min)
        self.conv = ShortConv(2 * E, conv_size)
        self.norm = nn.RMSNorm(shape.head_dim, eps=shape.norm_eps)
        self.out_proj = nn.Linear(E, shape.dim, bias=False)

    def init_weights(self, std: float) -> None:
        super().init_weights(std)
        self.decay.init_weights()
        self.conv.init_weights()
        above = self.lambda_init - self.lambda_min
        nn.init.constant_(self.ridge, math.log(math.expm1(above)) if above < 30 else above)  # equal from there on
        nn.init.ones_(self.norm.weight)

    def forward(
        self,
        x_BTD: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        state: RecurrentState | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, RecurrentState | None]:
        projections = (self.q_proj, self.k_proj, self.v_proj, self.alpha_proj, self.beta_proj)
        q, k, v, alpha, beta = self.gather_tokens(
            *(projection(x_BTD).unflatten(-1, (self.shape.num_heads, -1)) for projection in projections)
        )
        H = q.shape[2]
        qk = torch.cat([q.flatten(2), k.flatten(2)], dim=-1)
        qk, tail = self.conv(qk, cu_seqlens, state.tail if state else None, self._own_channels)
        q, k = (F.normalize(part.unflatten(-1, (H, -1)), dim=-1) for part in qk.chunk(2, dim=-1))
        lamb_HK = F.softplus(self.own_heads(self.ridge).to(work_dtype(self.ridge))) + self.lambda_min
        o, memory = mesa(
            q,
            k,
            v,
            self.decay(alpha.squeeze(-1), self.own_heads)[0],
            beta.squeeze(-1).sigmoid(),
            lamb_HK.view(H, -1),
            iterations=self.iterations,
            chunk_size=self.chunk_size,
            cu_seqlens=cu_seqlens,
            state=state.memory if state else None,
            backend=self.backend,
        )
        y = self.out_proj(self.norm(self.gather_heads(o)).flatten(2))
        return y, RecurrentState(memory, tail) if return_state else None

    def _own_channels(self, filters: Tensor) -> Tensor:
        """The filters of this process's heads, out of those of all channels of q and k."""
        if self.head_ranks == 1:
            return filters
        return torch.cat([self.own_heads(part) for part in filters.chunk(2)])

    def head_counts(self) -> dict[str, int] | None:
        return {"model.num_heads": self.shape.num_heads}

    def state_size(self, context: int) -> int:
        """Hkk and Hkv, each K x K per head, and the convolution's last inputs."""
        E = width(self.shape)
        return 2 * E * self.shape.head_dim + (self.conv.weight.shape[1] - 1) * 2 * E

    def float32_state(self, context: int) -> int:
        return 2 * width(self.shape) * self.shape.head_dim

    def mixing_flops(self, context: int) -> float:
        """Per head, two K x K states written, one read, and a product with the other for every step of the solve."""
        E, K = width(self.shape), self.shape.head_dim
        return (4 + 2 + 2 * self.iterations) * E * K + 2 * self.conv.weight.numel()

    def backward_flops(self, context: int) -> float:
        """The solve is not differentiated step by step: its gradient is one more solve."""
        solve = 2 * self.iterations * width(self.shape) * self.shape.head_dim
        return 2 * (self.mixing_flops(context) - solve) + solve
