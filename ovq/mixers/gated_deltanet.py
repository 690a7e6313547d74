"""Gated DeltaNet (arXiv 2412.06464): a fast-weight memory corrected by the delta rule and decayed by a gate.

Shapes: B batch, T tokens, D model width, H heads, K key width, V value width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovq.mixers.base import MixerShape, SequenceMixer
from ovq.mixers.recurrent import DecayGate, RecurrentState, require_positive, width
from ovq.mixers.short_conv import ShortConv
from ovq.ops.common import check_backend
from ovq.ops.gated_delta_rule import gated_delta_rule


class GatedDeltaNet(SequenceMixer):
    """Figure 1 of the paper: short convolutions on q, k and v, unit-norm q and k, gates alpha and beta computed from
    the token, and a head-wise RMSNorm gated by SiLU before the output projection.

    Values are twice as wide as keys, as in the paper. With half of attention's heads (the default), and keys as wide as
    attention's heads, the projections have (1 + 2 + 1) dim x width weights, as many as attention without grouped heads,
    so that models are comparable; the paper's own layer is half as large again. A starts in 1 .. 16, as in Mamba-2; in
    the published code (flash-linear-attention) it starts in 0 .. 16.

    Args:
        num_heads: heads of the memory; null for half of model.num_heads, but at least 1.
        expand_k: total key width as a multiple of attention's inner width.
        expand_v: the same for values.
        conv_size: number of taps of the short convolutions.
        chunk_size: tokens per chunk of the torch form; affects speed only.
        backend: auto (fla's kernels on a GPU in half precision, if fla-core is installed) | reference | torch | fla.

    Raises:
        ValueError: a size that is not positive, or widths not divisible by the number of heads.
    """

    differentiable_state = True

    def __init__(
        self,
        shape: MixerShape,
        *,
        num_heads: int | None = None,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        conv_size: int = 4,
        chunk_size: int = 64,
        backend: str = "auto",
    ) -> None:
        super().__init__(shape)
        require_positive(
            "gated_deltanet", expand_k=expand_k, expand_v=expand_v, conv_size=conv_size, chunk_size=chunk_size
        )
        self.num_heads = H = max(1, shape.num_heads // 2) if num_heads is None else num_heads
        require_positive("gated_deltanet", num_heads=H)
        self.key_width, self.value_width = (round(expand * width(shape)) for expand in (expand_k, expand_v))
        if self.key_width % H or self.value_width % H:
            raise ValueError(
                f"num_heads={H} of gated_deltanet must divide its key width {self.key_width} and value width "
                f"{self.value_width} (model.num_heads x model.head_dim times expand_k and expand_v)"
            )
        check_backend("gated_deltanet", backend, "fla")
        self.chunk_size, self.backend = chunk_size, backend
        self.q_proj = nn.Linear(shape.dim, self.key_width, bias=False)
        self.k_proj = nn.Linear(shape.dim, self.key_width, bias=False)
        self.v_proj = nn.Linear(shape.dim, self.value_width, bias=False)
        self.g_proj = nn.Linear(shape.dim, self.value_width, bias=False)
        self.alpha_proj = nn.Linear(shape.dim, H, bias=False)
        self.beta_proj = nn.Linear(shape.dim, H, bias=False)
        self.decay = DecayGate(H)
        self.conv = ShortConv(2 * self.key_width + self.value_width, conv_size)
        self.norm = nn.RMSNorm(self.value_width // H, eps=shape.norm_eps)
        self.out_proj = nn.Linear(self.value_width, shape.dim, bias=False)

    def init_weights(self, std: float) -> None:
        super().init_weights(std)
        self.decay.init_weights()
        self.conv.init_weights()
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
            *(projection(x_BTD).unflatten(-1, (self.num_heads, -1)) for projection in projections)
        )
        H, K, V = q.shape[2], q.shape[3], v.shape[3]
        qkv = torch.cat([q.flatten(2), k.flatten(2), v.flatten(2)], dim=-1)
        qkv, tail = self.conv(qkv, cu_seqlens, state.tail if state else None, self._own_channels)
        q, k, v = (part.unflatten(-1, (H, -1)) for part in qkv.split([H * K, H * K, H * V], dim=-1))
        o, memory = gated_delta_rule(
            F.normalize(q, dim=-1),
            F.normalize(k, dim=-1),
            v,
            self.decay(alpha.squeeze(-1), self.own_heads)[0],
            beta.squeeze(-1).sigmoid(),
            chunk_size=self.chunk_size,
            cu_seqlens=cu_seqlens,
            state=state.memory if state else None,
            backend=self.backend,
        )
        y = self.out_proj(self.norm(self.gather_heads(o)).flatten(2) * F.silu(self.g_proj(x_BTD)))
        return y, RecurrentState(memory, tail) if return_state else None

    def _own_channels(self, filters: Tensor) -> Tensor:
        """The filters of this process's heads, out of those of all channels of q, k and v."""
        if self.head_ranks == 1:
            return filters
        parts = filters.split([self.key_width, self.key_width, self.value_width])
        return torch.cat([self.own_heads(part) for part in parts])

    def head_counts(self) -> dict[str, int] | None:
        return {"num_heads of gated_deltanet": self.num_heads}

    def state_size(self, context: int) -> int:
        """A K x V memory per head, and the convolution's last inputs."""
        taps = self.conv.weight.shape[1] - 1
        return self.key_width * self.value_width // self.num_heads + taps * (2 * self.key_width + self.value_width)

    def float32_state(self, context: int) -> int:
        return self.key_width * self.value_width // self.num_heads

    def mixing_flops(self, context: int) -> float:
        """The recurrence (recall, write and read a K x V memory per head) and the convolutions."""
        memory = 6 * self.key_width * self.value_width / self.num_heads
        return memory + 2 * self.conv.weight.numel()
