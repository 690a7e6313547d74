"""A plain GPT made of torch's own parts, as one would write it in an afternoon: the peer of our training steps.

Pre-norm blocks of RMSNorm, causal SDPA and SwiGLU, cross-entropy on the full logits, fused AdamW, clipped gradients. It
imports nothing of ours and does none of our loop's work (hashes of tokens, checks, logs). It has no position encoding,
which would only make it slower. With `std_att`'s widths it has `std_att`'s number of parameters.

Shapes: B batch, T tokens, D model width, H heads, K head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, head_dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.shape = (3, heads, head_dim)
        self.norm1, self.norm2 = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.qkv, self.out = (
            nn.Linear(*size, bias=False) for size in ((dim, 3 * heads * head_dim), (heads * head_dim, dim))
        )
        self.gate_up, self.down = (nn.Linear(*size, bias=False) for size in ((dim, 2 * ffn_dim), (ffn_dim, dim)))

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x_BTD)).unflatten(-1, self.shape).permute(2, 0, 3, 1, 4)  # [B, H, T, K] each
        o_BHTK = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.out(o_BHTK.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.norm2(x_BTD)).chunk(2, dim=-1)
        return x_BTD + self.down(F.silu(gate) * up)


class PlainGPT(nn.Module):
    def __init__(self, vocab_size: int, layers: int, dim: int, heads: int, head_dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(vocab_size, dim), nn.Linear(dim, vocab_size, bias=False)
        self.blocks = nn.Sequential(*(Block(dim, heads, head_dim, ffn_dim) for _ in range(layers)))
        self.norm = nn.RMSNorm(dim)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean loss in nats."""
        logits_BTV = self.head(self.norm(self.blocks(self.embed(tokens_BT))))
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


def train_step(model: PlainGPT, optimizer: torch.optim.Optimizer, tokens_BT: Tensor, max_norm: float) -> float:
    """One step on rows of tokens, each predicting the next; returns the loss in nats."""
    optimizer.zero_grad()
    loss = model(tokens_BT, tokens_BT.roll(-1, 1))
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    return loss.item()
