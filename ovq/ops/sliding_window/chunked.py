"""Sliding-window attention in bands, on any device: time and memory linear in T, no T x T matrix.

A block of C queries attends to one strip of C + W keys, where W is the window rounded up to whole blocks. Strips
overlap; they are views of one padded tensor. Several blocks at a time form one batched matmul, few enough for their
logits to stay in the cache. The backward pass recomputes the logits, so only q, k and v are saved.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, R = H / G, N = B G, I blocks, C queries per block,
K key, V value width, P = C + W keys per strip.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ovq.ops.attention import chunked as sdpa
from ovq.ops.common import exact_products, work_dtype

LOGITS_AT_ONCE = 2**18  # elements, on a CPU: 1 MiB of float32, which stays in a core's cache
LOGITS_AT_ONCE_GPU = 2**26


def forward(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, window: int) -> Tensor:
    """As `attention.reference.forward`."""
    T, S = q_BTHK.shape[1], k_BSGK.shape[1]
    reach = slice(max(0, S - T - window + 1), None)
    k, v = k_BSGK[:, reach], v_BSGV[:, reach]
    if k.shape[1] <= window:  # every query attends to all keys before it
        return sdpa.forward(q_BTHK, k, v)
    return banded_attention(q_BTHK, k, v, window)


class _Bands:
    """How T queries and S keys are cut into blocks and strips, with conversions to and from the padded layout."""

    def __init__(self, q_BTHK: Tensor, k_BSGK: Tensor, window: int) -> None:
        self.B, self.T, H, K = q_BTHK.shape
        self.S, self.G = k_BSGK.shape[1:3]
        self.R, self.window = H // self.G, window
        self.scale = K**-0.5
        self.C = min(self.T, max(32, min(128, 2 ** round(math.log2(window) - 2))))
        self.I = -(-self.T // self.C)
        self.W = -(-window // self.C) * self.C
        self.P = self.C + self.W
        self.missing = self.W - (self.S - self.T)  # rows of padding before the first key
        self.dtype = q_BTHK.dtype if q_BTHK.is_cuda else work_dtype(q_BTHK)
        at_once = LOGITS_AT_ONCE_GPU if q_BTHK.is_cuda else LOGITS_AT_ONCE
        self.at_once = max(1, at_once // (self.R * self.C * self.P))

    def blocks(self, x_BTHK: Tensor) -> Tensor:
        """[N, I, R C, K]: queries, or a tensor of their shape, padded to whole blocks."""
        x = F.pad(x_BTHK, (0, 0, 0, 0, 0, self.I * self.C - self.T)) if self.T % self.C else x_BTHK
        x = x.view(self.B, self.I, self.C, self.G, self.R, -1).permute(0, 3, 1, 4, 2, 5)
        return x.to(self.dtype).reshape(self.B * self.G, self.I, self.R * self.C, -1)

    def unblocks(self, x_NIRCK: Tensor) -> Tensor:
        """The inverse of `blocks`."""
        x = x_NIRCK.view(self.B, self.G, self.I, self.R, self.C, -1).permute(0, 2, 4, 1, 3, 5)
        return x.reshape(self.B, self.I * self.C, self.G * self.R, -1)[:, : self.T]

    def padded(self, x_BSGK: Tensor) -> Tensor:
        """[N, W + I C, K]: keys or values, zero-padded where a strip reaches beyond them."""
        B, S, G, K = x_BSGK.shape
        out = x_BSGK.new_zeros(B, G, self.W + self.I * self.C, K, dtype=self.dtype)
        out[:, :, self.missing : self.missing + S] = x_BSGK.transpose(1, 2)
        return out.flatten(0, 1)

    def unpadded(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (self.B, self.G))[:, :, self.missing : self.missing + self.S].transpose(1, 2)

    def strips(self, x: Tensor) -> Tensor:
        """[N, I, K, P]: the overlapping strips, as a view."""
        return x.unfold(1, self.P, self.C)

    def groups(self) -> Iterator[tuple[slice, slice]]:
        """Slices of heads and blocks that are computed together."""
        N = self.B * self.G
        heads = max(1, self.at_once // self.I)
        step = min(self.I, self.at_once)
        for head in range(0, N, heads):
            for block in range(0, self.I, step):
                yield slice(head, min(head + heads, N)), slice(block, min(block + step, self.I))

    def band(self, like: Tensor) -> Tensor:
        """[R C, P]: 0 where query j of a block attends to strip position p, -inf elsewhere."""
        query = torch.arange(self.C, device=like.device)[:, None]
        ahead = torch.arange(self.P, device=like.device) - self.W - query  # 0 at the query's own key
        seen = (ahead <= 0) & (ahead > -self.window)
        band = torch.zeros(self.C, self.P, dtype=like.dtype, device=like.device).masked_fill_(~seen, -torch.inf)
        return band.repeat(self.R, 1)

    def probabilities(self, q: Tensor, keys: Tensor, band: Tensor, blocks: slice) -> Tensor:
        """Softmax [M, R C, P] of M = heads x blocks products of queries (already scaled) with strips of keys."""
        logits = torch.baddbmm(band, q, keys)
        by_block = logits.unflatten(0, (-1, blocks.stop - blocks.start))
        for i in range(blocks.start, min(blocks.stop, -(-self.missing // self.C))):
            by_block[:, i - blocks.start, :, : self.missing - i * self.C] = -torch.inf
        return logits.softmax(-1, dtype=work_dtype(q)).to(q.dtype)


# Custom operators, so that each is a single node in the graph of a compiled model, not one node per block.


@torch.library.custom_op("ovq::banded_attention", mutates_args=())
def banded_attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, window: int) -> Tensor:
    """Attention [B, T, H, V] to the last `window` of S keys, at most `window` - 1 of which are carried over."""
    bands = _Bands(q_BTHK, k_BSGK, window)
    q = bands.blocks(q_BTHK) * bands.scale
    keys, values = (bands.strips(bands.padded(x)) for x in (k_BSGK, v_BSGV))
    band = bands.band(q)
    o = q.new_empty(*q.shape[:3], v_BSGV.shape[3])
    with exact_products():
        for at in bands.groups():
            p = bands.probabilities(q[at].flatten(0, 1), keys[at].flatten(0, 1), band, at[1])
            o[at] = torch.bmm(p, values[at].flatten(0, 1).mT).view_as(o[at])
    return bands.unblocks(o).to(q_BTHK.dtype).contiguous()


@banded_attention.register_fake
def _(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, window: int) -> Tensor:
    return q_BTHK.new_empty(*q_BTHK.shape[:3], v_BSGV.shape[3])


@torch.library.custom_op("ovq::banded_attention_backward", mutates_args=())
def banded_attention_backward(
    do_BTHV: Tensor, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    bands = _Bands(q_BTHK, k_BSGK, window)
    q, do = bands.blocks(q_BTHK) * bands.scale, bands.blocks(do_BTHV)
    k_padded, v_padded = bands.padded(k_BSGK), bands.padded(v_BSGV)
    keys, values = bands.strips(k_padded), bands.strips(v_padded)
    band, dq = bands.band(q), torch.empty_like(q)
    dk, dv = (torch.zeros_like(x, dtype=work_dtype(q)) for x in (k_padded, v_padded))
    with exact_products():
        for at in bands.groups():
            q_at, do_at, k_at, v_at = (x[at].flatten(0, 1) for x in (q, do, keys, values))
            p = bands.probabilities(q_at, k_at, band, at[1])
            _overlap_add(dv, torch.bmm(p.mT, do_at), at, bands.C)
            dp = torch.bmm(do_at, v_at)
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, dp.dtype)
            dq[at] = torch.bmm(ds, k_at.mT).view_as(dq[at])
            _overlap_add(dk, torch.bmm(ds.mT, q_at), at, bands.C)
    gradients = bands.unblocks(dq.mul_(bands.scale)), bands.unpadded(dk), bands.unpadded(dv)
    dq, dk, dv = (d.to(x.dtype).contiguous() for d, x in zip(gradients, (q_BTHK, k_BSGK, v_BSGV)))
    return dq, dk, dv


@banded_attention_backward.register_fake
def _(do_BTHV: Tensor, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q_BTHK, k_BSGK, v_BSGV))
    return dq, dk, dv


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.window = inputs[3]


def _backward(ctx: Any, do_BTHV: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *banded_attention_backward(do_BTHV, *ctx.saved_tensors, ctx.window), None


banded_attention.register_autograd(_backward, setup_context=_save)


def _overlap_add(rows: Tensor, strips_MPK: Tensor, at: tuple[slice, slice], C: int) -> None:
    """Add each strip to the rows it came from, the j-th blocks of all strips at once, since these are disjoint."""
    heads, blocks = at
    num_blocks = blocks.stop - blocks.start
    strips = strips_MPK.unflatten(0, (-1, num_blocks)).unflatten(2, (-1, C))
    by_block = rows.unflatten(1, (-1, C))
    for j in range(strips.shape[2]):
        by_block[heads, blocks.start + j : blocks.stop + j] += strips[:, :, j]
