"""Stage B, prediction: attention of every chunk to the dictionary before it and to itself, all chunks at once.

For query t of chunk i, with n_i centroids whose current version rows are table[i, n]:

    logits = [ beta q.mu^k[table[i, n]] + log count[table[i, n]] ] ++ [ beta q.k_s  for s of the chunk, s <= t ]
    o      = softmax(logits) @ [ mu^v[table[i, n]] ; v_s ]

One program holds a tile of queries and streams both parts through one online softmax (exponents in base 2, so the
log-sum-exp is stored in base 2 too). This is paged attention with pages of one row: rows are gathered through the
table. Programs of one head are adjacent, so that its dictionary stays in L2; the last chunks, which have the largest
dictionary, start first. A launch covers the chunks of one table.
"""

# mypy: allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ovq.ops.ovq_attention.kernels.blocks import Rows, load_numbers, load_rows, load_tokens, store_tokens, token_at
from ovq.ops.ovq_attention.kernels.configs import arch_of, constants
from ovq.ops.ovq_attention.kernels.plan import Plan
from ovq.ops.ovq_attention.kernels.tabulate import Table

LOG2E = tl.constexpr(1.4426950408889634)

SCALARS = ["T", "S", "L", "H", "G", "rows", "table_size", "first_chunk"]


def predict(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, plan: Plan, rows: Rows, table: Table, o: Tensor, lse: Tensor
) -> None:
    """o [B, T, H, V] and the log-sum-exp [B, H, T] in base 2 of the queries in the table's chunks."""
    (B, T, H, K), (S, G, V) = q.shape, v.shape[1:]
    host, L, (first, last) = plan.tensors(q.device), plan.spec.chunk_size, table.chunks
    settings = constants("predict", arch_of(q.device), q.dtype, K, V, L)
    predict_kernel[(last - first) * triton.cdiv(L, settings["BLOCK_M"]), B * H](
        q, k, v, beta, *rows[:3], table.rows, host["starts"], host["ends"], host["sizes"], table.offsets, o, lse,
        T, S, L, H, G, rows[2].shape[2], table.size, first, **settings,
    )  # fmt: skip


@triton.jit(do_not_specialize=SCALARS)
def predict_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, S, G, K]
    v_ptr,  # [B, S, G, V]
    beta_ptr,  # [H] float32
    row_key_ptr,  # [B, G, rows, K]
    row_value_ptr,  # [B, G, rows, V]
    row_log_ptr,  # [B, G, rows] float32: log2 of the counts
    table_ptr,  # [B, G, table_size] int32
    starts_ptr,  # [chunks] int32: the first token of chunk i
    ends_ptr,  # [chunks] int32: the first token after it
    sizes_ptr,  # [chunks] int32: centroids before it
    offsets_ptr,  # [chunks of the table] int32: where its row of the table starts
    o_ptr,  # [B, T, H, V] out
    lse_ptr,  # [B, H, T] float32 out
    T,
    S,
    L,
    H,
    G,
    rows,
    table_size,
    first_chunk,  # of the table
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    tiles = tl.cdiv(L, BLOCK_M)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    b = tl.program_id(1) // H
    h = tl.program_id(1) % H
    g = h // (H // G)
    chunk = first_chunk + tile // tiles
    start = tl.load(starts_ptr + chunk)
    end = tl.load(ends_ptr + chunk)
    first = start + (tile % tiles) * BLOCK_M
    position = first + tl.arange(0, BLOCK_M)
    live = (position < end) & (position >= S - T)  # only the last T tokens have queries
    query = tl.cast(b, tl.int64) * T + first - (S - T)
    m = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)

    k_ptr = token_at(k_ptr, tl.cast(b, tl.int64) * S + start, G, g, K)
    v_ptr = token_at(v_ptr, tl.cast(b, tl.int64) * S + start, G, g, V)
    row_base = tl.cast(b * G + g, tl.int64) * rows
    row_key_ptr += row_base * K
    row_value_ptr += row_base * V
    row_log_ptr += row_base
    table_ptr += tl.cast(b * G + g, tl.int64) * table_size + tl.load(offsets_ptr + tile // tiles)
    has_queries = (first < end) & (first + BLOCK_M > S - T)  # a tile without queries skips the dictionary
    size = tl.load(sizes_ptr + chunk, mask=has_queries, other=0)

    q = load_tokens(token_at(q_ptr, query, H, h, K), m, H, live, K, BLOCK_K)
    scale = tl.load(beta_ptr + h) * LOG2E
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)

    # A tile's row indices are read one iteration before its rows, in registers, so that gathers need not wait for them.
    row = tl.load(table_ptr + column, mask=column < size, other=0)
    for n in tl.range(0, size, BLOCK_N, num_stages=STAGES):
        held = n + column < size
        key = load_rows(row_key_ptr, row, held, K, BLOCK_K)
        value = load_rows(row_value_ptr, row, held, V, BLOCK_V)
        bias = load_numbers(row_log_ptr, row, held, float("-inf"))
        row = tl.load(table_ptr + n + BLOCK_N + column, mask=n + BLOCK_N + column < size, other=0)
        logit = tl.dot(q, tl.trans(key), input_precision=PRECISION) * scale + bias[None, :]
        top, total, acc = absorb(top, total, acc, logit, value, PRECISION)

    for s in tl.range(0, tl.minimum(first + BLOCK_M, end) - start, BLOCK_N, num_stages=STAGES):
        own = s + tl.arange(0, BLOCK_N)
        held = own < end - start
        key = load_tokens(k_ptr, own, G, held, K, BLOCK_K)
        value = load_tokens(v_ptr, own, G, held, V, BLOCK_V)
        logit = tl.dot(q, tl.trans(key), input_precision=PRECISION) * scale
        logit = tl.where(held[None, :] & (own[None, :] <= (first - start + m)[:, None]), logit, float("-inf"))
        top, total, acc = absorb(top, total, acc, logit, value, PRECISION)

    store_tokens(token_at(o_ptr, query, H, h, V), m, H, live, acc / total[:, None], V, BLOCK_V)
    lse_ptr += tl.cast(tl.program_id(1), tl.int64) * T + first - (S - T)
    tl.store(lse_ptr + m, top + tl.log2(total), mask=live)


@triton.jit
def absorb(top, total, acc, logit, value, PRECISION: tl.constexpr):
    """One step of the online softmax; every row must have a finite logit, in `logit` or in an earlier step."""
    new_top = tl.maximum(top, tl.max(logit, 1))
    p = tl.exp2(logit - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION)
    return new_top, total, acc
