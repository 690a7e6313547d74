"""Stage D, one token: its query against the dictionary and the unfinished chunk, in time independent of the position.

    o = softmax([ beta q.S^k_n / c_n + log c_n ] ++ [ beta q.k_s ]) @ [ S^v_n / c_n ; v_s ]

The carried sums are read directly, without version rows: means are computed on the fly and, as everywhere, rounded to
the operands' dtype. The query heads of a group are the rows of one tile. A head's centroids are distributed over SPLITS
programs and its pending keys go to one more; each writes its partial softmax, and `combine_kernel` merges the parts.
"""

# mypy: allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ovq.ops.ovq_attention.kernels.blocks import load_rows, load_tokens, token_at
from ovq.ops.ovq_attention.kernels.configs import arch_of, constants, padded
from ovq.ops.ovq_attention.kernels.predict import LOG2E, absorb

SCALARS = ["S", "H", "G", "N", "size"]
SPLITS = 16


def decode(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, key_sum: Tensor, value_sum: Tensor, count: Tensor, size: int
) -> Tensor:
    """o [B, 1, H, V] for one query per head; the last token of k and v is the query's own."""
    (B, _, H, K), (S, G, V), N = q.shape, v.shape[1:], count.shape[2]
    settings = constants("decode", arch_of(q.device), q.dtype, K, V, rows=H // G, SPLITS=SPLITS)
    parts = q.new_empty(B, H, SPLITS + 1, V + 2, dtype=torch.float32)
    o = q.new_empty(B, 1, H, V)
    decode_kernel[(SPLITS + 1, B * G)](q, k, v, beta, key_sum, value_sum, count, parts, S, H, G, N, size, **settings)
    combine_kernel[(B * H,)](
        parts,
        o,
        V=V,
        BLOCK_V=settings["BLOCK_V"],
        SPLITS=SPLITS,
        PADDED=padded(SPLITS + 1),
        num_warps=settings["num_warps"],
    )
    return o


@triton.jit(do_not_specialize=SCALARS)
def decode_kernel(
    q_ptr,  # [B, 1, H, K]
    k_ptr,  # [B, S, G, K]
    v_ptr,  # [B, S, G, V]
    beta_ptr,  # [H] float32
    key_sum_ptr,  # [B, G, N, K] float32
    value_sum_ptr,  # [B, G, N, V] float32
    count_ptr,  # [B, G, N] float32
    part_ptr,  # [B, H, SPLITS + 1, V + 2] float32 out: sum of p value, then the largest logit and the sum of p
    S,
    H,
    G,
    N,
    size,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    split = tl.program_id(0)
    head = tl.cast(tl.program_id(1), tl.int64)
    batch = head // G
    g = tl.program_id(1) % G
    group = H // G
    r = tl.arange(0, BLOCK_R)
    live = r < group
    first = batch * H + g * group
    q = load_rows(q_ptr + first * K, r, live, K, BLOCK_K)
    scale = tl.load(beta_ptr + g * group + r, mask=live, other=0.0) * LOG2E
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
    if split < SPLITS:
        key_sum_ptr += head * N * K
        value_sum_ptr += head * N * V
        count_ptr += head * N
        for n in tl.range(split * BLOCK_N, size, SPLITS * BLOCK_N, num_stages=STAGES):
            centroid = n + tl.arange(0, BLOCK_N)
            held = centroid < size
            count = tl.load(count_ptr + centroid, mask=held, other=1.0)
            inverse = tl.div_rn(1.0, count)[:, None]
            key = (load_rows(key_sum_ptr, centroid, held, K, BLOCK_K) * inverse).to(q.dtype)
            value = (load_rows(value_sum_ptr, centroid, held, V, BLOCK_V) * inverse).to(q.dtype)
            bias = tl.where(held, tl.log2(count), float("-inf"))
            logit = tl.dot(q, tl.trans(key), input_precision=PRECISION) * scale[:, None] + bias[None, :]
            top, total, acc = absorb(top, total, acc, logit, value, PRECISION)
    else:
        k_ptr = token_at(k_ptr, batch * S, G, g, K)
        v_ptr = token_at(v_ptr, batch * S, G, g, V)
        for s in tl.range(0, S, BLOCK_N, num_stages=STAGES):
            own = s + tl.arange(0, BLOCK_N)
            key = load_tokens(k_ptr, own, G, own < S, K, BLOCK_K)
            value = load_tokens(v_ptr, own, G, own < S, V, BLOCK_V)
            logit = tl.dot(q, tl.trans(key), input_precision=PRECISION) * scale[:, None]
            logit = tl.where((own < S)[None, :], logit, float("-inf"))
            top, total, acc = absorb(top, total, acc, logit, value, PRECISION)
    part_ptr += (first * (SPLITS + 1) + split) * (V + 2)
    stride = (SPLITS + 1) * (V + 2)
    d = tl.arange(0, BLOCK_V)
    tl.store(part_ptr + r[:, None] * stride + d[None, :], acc, mask=live[:, None] & (d < V)[None, :])
    tl.store(part_ptr + r * stride + V, top, mask=live)
    tl.store(part_ptr + r * stride + V + 1, total, mask=live)


@triton.jit
def combine_kernel(
    part_ptr,  # [B, H, SPLITS + 1, V + 2] float32
    o_ptr,  # [B, 1, H, V] out
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SPLITS: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Merge the parts of one query head; the pending keys' is finite, since they include the token's own key."""
    head = tl.cast(tl.program_id(0), tl.int64)
    part_ptr += head * (SPLITS + 1) * (V + 2)
    p = tl.arange(0, PADDED)
    d = tl.arange(0, BLOCK_V)
    held = p <= SPLITS
    top = tl.load(part_ptr + p * (V + 2) + V, mask=held, other=float("-inf"))
    total = tl.load(part_ptr + p * (V + 2) + V + 1, mask=held, other=0.0)
    acc = tl.load(part_ptr + p[:, None] * (V + 2) + d[None, :], mask=held[:, None] & (d < V)[None, :], other=0.0)
    weight = tl.exp2(top - tl.max(top, 0))
    o = tl.sum(acc * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(o_ptr + head * V + d, o.to(o_ptr.dtype.element_ty), mask=d < V)
