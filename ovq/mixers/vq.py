"""VQ-attention (Transformer-VQ, Lingle 2023, arXiv 2309.16354): a codebook of keys learned in training, then fixed.

Shapes: B batch, T tokens, G key/value heads, N codes, K head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovq.mixers.attention_layer import AttentionLayer
from ovq.mixers.base import MixerShape, keys_in_chunk
from ovq.ops.common import check_backend, work_dtype
from ovq.ops.vq_attention import VQState, assign, vq_attention

REVIVED = 0.1  # count given to a code that replaces a dead one, as a multiple of the mean count


class VQ(AttentionLayer):
    """Exact attention to the current and the previous block, and to the codes of all earlier keys.

    As in OVQ, keys and queries have unit norm, logits are beta_h sqrt(K) cos(q, k), and there are no positions. The
    difference is that the dictionary of keys is learned in training and not from the sequence, which determines only
    the codes' mean values and log-counts.

    The codebook is not trained by gradient descent: each code is a Laplace-smoothed moving average of the keys assigned
    to it, over the tokens of all ranks. A dead code, to which too few keys are assigned, is replaced by a key from
    the batch. A commitment loss pulls keys towards their codes, and keys get the gradients of their codes (straight
    through). The averages are buffers, so they are saved and resumed with the weights. They are updated once per
    training forward pass, and take effect in the codebook at the start of the next one; a forward pass that activation
    checkpointing repeats during the backward pass therefore sees the same codebook, and updates nothing.

    Args:
        num_codes: codes per head.
        block_size: tokens per block.
        quantize_recent: also quantise the keys of the two recent blocks, as Transformer-VQ does.
        ema_decay: decay of the moving averages per forward pass.
        laplace: smoothing of the moving counts.
        dead_below: a code is dead if its moving count is at most this share of the mean count.
        commitment: weight of the commitment loss.
        beta_init: initial inverse temperature.
        backend: auto | reference | torch.

    Raises:
        ValueError: a setting outside its legal values.
    """

    differentiable_state = False  # the codes' gradients go straight through to keys that the next rank has not seen
    codebook: Tensor
    ema_count: Tensor
    ema_sum: Tensor

    def __init__(
        self,
        shape: MixerShape,
        *,
        num_codes: int = 512,
        block_size: int = 512,
        quantize_recent: bool = False,
        ema_decay: float = 0.99,
        laplace: float = 1e-5,
        dead_below: float = 0.01,
        commitment: float = 1e-4,
        beta_init: float = 1.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(shape, qk_norm=True, beta_init=beta_init)
        if num_codes < 1 or block_size < 1:
            raise ValueError(f"num_codes={num_codes} and block_size={block_size} of vq must be at least 1")
        if not 0 <= ema_decay < 1 or laplace < 0 or dead_below < 0 or commitment < 0:
            raise ValueError(
                f"ema_decay={ema_decay} of vq must be in [0, 1), laplace={laplace}, dead_below={dead_below} and "
                f"commitment={commitment} at least 0"
            )
        check_backend("vq", backend)
        self.num_codes, self.block_size, self.quantize_recent = num_codes, block_size, quantize_recent
        self.ema_decay, self.laplace, self.dead_below = ema_decay, laplace, dead_below
        self.commitment, self.backend = commitment, backend
        G, K = shape.num_kv_heads, shape.head_dim
        # The codebook in use, and the averages that the next one is computed from.
        self.register_buffer("codebook", torch.zeros(G, num_codes, K))
        self.register_buffer("ema_count", torch.zeros(G, num_codes))
        self.register_buffer("ema_sum", torch.zeros(G, num_codes, K))
        self._commitment_loss: Tensor | None = None

    def init_weights(self, std: float) -> None:
        super().init_weights(std)
        with torch.no_grad():
            # Random directions for the first pass, whose keys then replace them.
            nn.init.normal_(self.codebook)
            self.codebook.copy_(F.normalize(self.codebook, dim=-1))
            self.ema_count.zero_()
            self.ema_sum.zero_()

    def forward(
        self,
        x_BTD: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        state: VQState | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, VQState | None]:
        q, k, v = self.project(x_BTD)
        learns, codebook = self.training and state is None, self.own_heads(self.codebook)
        if learns:
            self._update_codebook()
            # Computed in a recomputed pass too, because its graph must match the first one's.
            self._keep_commitment(self._distance(k))
        o, new_state = vq_attention(
            q,
            k,
            v,
            # The averages are updated after this pass, and the backward pass may still need the old codes.
            codebook.clone() if learns else codebook,
            self.inverse_temperature(),
            block_size=self.block_size,
            quantize_recent=self.quantize_recent,
            cu_seqlens=cu_seqlens,
            state=state,
            backend=self.backend,
        )
        if learns:
            self._update_averages(k)
        if self.collect_health:
            self._report()
        return self.project_out(o), new_state if return_state else None

    def auxiliary_loss(self) -> Tensor | None:
        """commitment x mean over tokens and heads of |k - code|^2, for the last training forward pass."""
        loss, self._commitment_loss = self._commitment_loss, None
        return loss

    def _distance(self, k_BTGK: Tensor) -> Tensor:
        codebook = self.own_heads(self.codebook)
        code_BTG = assign(k_BTGK, codebook)
        nearest = codebook[torch.arange(len(codebook), device=k_BTGK.device), code_BTG]
        work = work_dtype(k_BTGK)
        return self.commitment * (k_BTGK.to(work) - nearest.to(work)).square().sum(-1).mean()

    def _keep_commitment(self, loss: Tensor) -> None:
        if not in_backward():
            self._commitment_loss = loss

    @torch.no_grad()
    def _update_codebook(self) -> None:
        """Set the codebook to the moving averages; codes without any are left unchanged."""
        if in_backward():
            return
        total = self.ema_count.sum(-1, keepdim=True)
        smoothed = (self.ema_count + self.laplace) / (total + self.num_codes * self.laplace) * total
        learned = self.ema_sum / smoothed.clamp_min(torch.finfo(smoothed.dtype).tiny)[..., None]
        self.codebook.copy_(torch.where(self.ema_count[..., None] > 0, learned, self.codebook))

    @torch.no_grad()
    def _update_averages(self, k_BTGK: Tensor) -> None:
        """Update the averages with the keys of all ranks, and replace dead codes."""
        if in_backward():
            return
        codebook = self.own_heads(self.codebook)
        G, N, K = codebook.shape
        keys_GSK = k_BTGK.to(self.ema_sum.dtype).flatten(0, 1).transpose(0, 1)
        index_GS = assign(k_BTGK, codebook).flatten(0, 1).transpose(0, 1)
        count = self.ema_count.new_zeros(G, N, 1).scatter_add(
            1, index_GS[..., None], torch.ones_like(keys_GSK[..., :1])
        )
        total = self.ema_sum.new_zeros(G, N, K).scatter_add(1, index_GS[..., None].expand_as(keys_GSK), keys_GSK)
        # A replacement key for each code in case it is dead, evenly spaced over the batch of all ranks.
        axis, S = self.data_axis, keys_GSK.shape[1]
        spaced = torch.arange(N, device=keys_GSK.device) * (S * axis.size) // N
        own = (spaced // S == axis.rank)[:, None]
        spare = torch.where(own, keys_GSK[:, spaced % S], 0)
        learned = self.all_heads(axis.sum(torch.cat([count, total, spare], dim=-1)))
        count, total, spare = learned.split([1, K, K], dim=-1)
        self.ema_count.lerp_(count[..., 0], 1 - self.ema_decay)
        self.ema_sum.lerp_(total, 1 - self.ema_decay)
        mean_count = self.ema_count.mean(-1, keepdim=True)
        dead = self.ema_count <= self.dead_below * mean_count
        self.ema_count.copy_(torch.where(dead, REVIVED * mean_count, self.ema_count))
        revived = spare * (REVIVED * mean_count)[..., None]
        self.ema_sum.copy_(torch.where(dead[..., None], revived, self.ema_sum))

    @torch.no_grad()
    def _report(self) -> None:
        share = self.ema_count / self.ema_count.sum(-1, keepdim=True).clamp_min(1e-20)
        entropy = -(share * share.clamp_min(1e-20).log()).sum(-1)
        self.health = {
            "code_perplexity": entropy.exp().mean(),
            "beta": self.mean_beta(),
        }

    def state_size(self, context: int) -> int:
        """N value sums and counts (the codebook is a weight), and the keys and values of at most two blocks."""
        shape, L = self.shape, self.block_size
        recent = context if context < L else L + context % L
        return shape.num_kv_heads * (self.num_codes * (shape.head_dim + 1) + 2 * shape.head_dim * recent)

    def float32_state(self, context: int) -> int:
        return self.shape.num_kv_heads * self.num_codes * (self.shape.head_dim + 1)

    def mixing_flops(self, context: int) -> float:
        """The nearest code of each key, and two products of each query with the codes and with about 1.5 blocks."""
        shape, L = self.shape, self.block_size
        # Keys in the query's own block and, from the second block on, in the previous one.
        near = keys_in_chunk(context, L) + L * max(0, context - L) / context
        return self.assignment_flops(context) + 4 * shape.num_heads * shape.head_dim * (self.num_codes + near)

    def assignment_flops(self, context: int) -> float:
        return 2 * self.shape.num_kv_heads * self.shape.head_dim * self.num_codes


def in_backward() -> bool:
    """Whether this forward pass is a recomputation by activation checkpointing, inside a backward pass."""
    return torch._C._current_graph_task_id() != -1
