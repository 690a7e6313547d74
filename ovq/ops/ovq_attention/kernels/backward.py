"""Stage C, the backward pass, in three kernels without atomics: bitwise deterministic.

With p the softmax of the forward pass (recomputed from the stored log-sum-exp) and

    delta_t = do_t . o_t          dp = do . value          ds = p (dp - delta)

1. `query_grad_kernel`, one program per tile of queries:      dq = beta sum ds key,   dbeta = sum q . (sum ds key)
2. `dictionary_grad_kernel`, one program per block of centroids, which walks the chunks in reverse with its gradients in
   registers. For running means it holds those of the sums, dS^k = sum beta ds q / c and dS^v = sum p do / c over all
   later chunks, where p / c = exp(beta q.k - lse): the count in the softmax and the count in the mean cancel. When it
   reaches the chunk that made a centroid's version, dS is the gradient that each of that chunk's keys gets from it. It
   is stored in dk and dv at the last of these keys, whose token is the version's row. Past the chunk that founded a
   centroid, its registers hold meaningless values that nothing reads. With a constant rate,

       mu_new = decay mu_old + gain sum of the chunk's keys,     decay = (1-eta)^m, gain = (1 - decay) / m

   and it holds the gradients of the means: each key gets gain dmu, and dmu is multiplied by decay as the walk goes on.
3. `chunk_grad_kernel`, one program per chunk: dk and dv of the causal part, plus the dictionary's part for each token.

A launch covers the chunks, or the centroids, of one table.
"""

# mypy: allow-incomplete-defs

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ovq.ops.ovq_attention.kernels.assign import log2_keep
from ovq.ops.ovq_attention.kernels.blocks import Rows, load_numbers, load_rows, load_tokens, store_tokens, token_at
from ovq.ops.ovq_attention.kernels.configs import arch_of, constants
from ovq.ops.ovq_attention.kernels.plan import Plan
from ovq.ops.ovq_attention.kernels.predict import LOG2E
from ovq.ops.ovq_attention.kernels.tabulate import Table
from ovq.ops.ovq_attention.spec import OVQSpec

QUERY_SCALARS = ["T", "S", "L", "H", "G", "rows", "table_size", "first_chunk", "all_tiles"]
DICTIONARY_SCALARS = ["T", "S", "L", "H", "G", "rows", "table_size", "low", "initial", "log2_keep"]
CHUNK_SCALARS = ["T", "S", "L", "H", "G"]


def query_tiles(plan: Plan, q: Tensor, V: int) -> int:
    """Number of query tiles over all chunks, which is the number of partial sums of dbeta."""
    L = plan.spec.chunk_size
    settings = constants("query_grad", arch_of(q.device), q.dtype, q.shape[3], V, L)
    return plan.chunks * triton.cdiv(L, settings["BLOCK_M"])


def query_grad(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, plan: Plan, rows: Rows, table: Table,
    o: Tensor, do: Tensor, lse: Tensor, delta: Tensor, dq: Tensor, dbeta: Tensor,
) -> None:  # fmt: skip
    """dq, delta [B, H, T] and partial sums of dbeta [B, H, query_tiles, K] for the queries in the table's chunks."""
    (B, T, H, K), (S, G, V) = q.shape, v.shape[1:]
    host, L, (first, last) = plan.tensors(q.device), plan.spec.chunk_size, table.chunks
    settings = constants("query_grad", arch_of(q.device), q.dtype, K, V, L)
    query_grad_kernel[(last - first) * triton.cdiv(L, settings["BLOCK_M"]), B * H](
        q, k, v, beta, *rows[:3], table.rows, host["starts"], host["ends"], host["sizes"], table.offsets,
        o, do, lse, delta, dq, dbeta,
        T, S, L, H, G, rows[2].shape[2], table.size, first, dbeta.shape[2], **settings,
    )  # fmt: skip


def centroid_block(q: Tensor, V: int, spec: OVQSpec) -> int:
    """Number of centroids that one program of `dictionary_grad` owns."""
    return _dictionary_settings(q, V, spec)["BLOCK_N"]


def _dictionary_settings(q: Tensor, V: int, spec: OVQSpec) -> dict[str, Any]:
    flags = {"RATE": spec.rate is not None}
    return constants("dictionary_grad", arch_of(q.device), q.dtype, q.shape[3], V, spec.chunk_size, **flags)


def dictionary_grad(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, plan: Plan, rows: Rows, table: Table,
    do: Tensor, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """dk and dv at the token of each version row of the table's centroids: the gradient of each key and value that went
    into that version. The table covers all chunks."""
    (B, T, H, _), (S, G, V), spec = q.shape, v.shape[1:], plan.spec
    host, settings = plan.tensors(q.device), _dictionary_settings(q, V, spec)
    blocks = plan.blocks(settings["BLOCK_N"], table.centroids, q.device)
    if len(blocks):
        dictionary_grad_kernel[len(blocks), B * G](
            q, beta, *rows, table.rows, blocks, host["sizes"], table.offsets,
            do, lse, delta, dk, dv,
            T, S, spec.chunk_size, H, G, rows[2].shape[2], table.size, table.centroids[0], plan.initial,
            log2_keep(spec.rate), **settings,
        )  # fmt: skip


def chunk_grad(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, plan: Plan, assignment: Tensor,
    do: Tensor, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """Complete the dk and dv that `dictionary_grad` began."""
    (B, T, H, K), (S, G, V), L = q.shape, v.shape[1:], plan.spec.chunk_size
    host = plan.tensors(q.device)
    chunk_grad_kernel[plan.chunks, B * G](
        q, k, v, beta, assignment, host["starts"], host["ends"], do, lse, delta, dk, dv, T, S, L, H, G,
        **constants("chunk_grad", arch_of(q.device), q.dtype, K, V, L),
    )  # fmt: skip


@triton.jit(do_not_specialize=QUERY_SCALARS)
def query_grad_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, S, G, K]
    v_ptr,  # [B, S, G, V]
    beta_ptr,  # [H] float32
    row_key_ptr,  # [B, G, rows, K]
    row_value_ptr,  # [B, G, rows, V]
    row_log_ptr,  # [B, G, rows] float32: log2 of the counts
    table_ptr,  # [B, G, table_size] int32
    starts_ptr,  # [chunks] int32
    ends_ptr,  # [chunks] int32
    sizes_ptr,  # [chunks] int32
    offsets_ptr,  # [chunks of the table] int32
    o_ptr,  # [B, T, H, V]
    do_ptr,  # [B, T, H, V]
    lse_ptr,  # [B, H, T] float32
    delta_ptr,  # [B, H, T] float32 out
    dq_ptr,  # [B, T, H, K] out
    dbeta_ptr,  # [B, H, all_tiles, K] float32 out
    T,
    S,
    L,
    H,
    G,
    rows,
    table_size,
    first_chunk,  # of the table
    all_tiles,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dq, dbeta and delta; the same loops as `predict_kernel`, with ds in place of p."""
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
    lse_offset = tl.cast(tl.program_id(1), tl.int64) * T + first - (S - T)
    row_base = tl.cast(b * G + g, tl.int64) * rows
    row_key_ptr += row_base * K
    row_value_ptr += row_base * V
    row_log_ptr += row_base
    table_ptr += tl.cast(b * G + g, tl.int64) * table_size + tl.load(offsets_ptr + tile // tiles)
    has_queries = (first < end) & (first + BLOCK_M > S - T)
    size = tl.load(sizes_ptr + chunk, mask=has_queries, other=0)

    q = load_tokens(token_at(q_ptr, query, H, h, K), m, H, live, K, BLOCK_K)
    do = load_tokens(token_at(do_ptr, query, H, h, V), m, H, live, V, BLOCK_V)
    o = load_tokens(token_at(o_ptr, query, H, h, V), m, H, live, V, BLOCK_V)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta_ptr + lse_offset + m, delta, mask=live)
    lse = tl.load(lse_ptr + lse_offset + m, mask=live, other=float("inf"))
    beta = tl.load(beta_ptr + h)
    scale = beta * LOG2E
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)

    # A tile's row indices are read one iteration before its rows, in registers, so that gathers need not wait for them.
    row = tl.load(table_ptr + column, mask=column < size, other=0)
    for n in tl.range(0, size, BLOCK_N, num_stages=STAGES):
        held = n + column < size
        key = load_rows(row_key_ptr, row, held, K, BLOCK_K)
        value = load_rows(row_value_ptr, row, held, V, BLOCK_V)
        bias = load_numbers(row_log_ptr, row, held, float("-inf"))
        row = tl.load(table_ptr + n + BLOCK_N + column, mask=n + BLOCK_N + column < size, other=0)
        logit = tl.dot(q, tl.trans(key), input_precision=PRECISION) * scale + bias[None, :]
        p = tl.exp2(logit - lse[:, None])
        dp = tl.dot(do, tl.trans(value), input_precision=PRECISION)
        ds = (p * (dp - delta[:, None])).to(key.dtype)
        acc = tl.dot(ds, key, acc, input_precision=PRECISION)

    for s in tl.range(0, tl.minimum(first + BLOCK_M, end) - start, BLOCK_N, num_stages=STAGES):
        own = s + tl.arange(0, BLOCK_N)
        held = own < end - start
        key = load_tokens(k_ptr, own, G, held, K, BLOCK_K)
        value = load_tokens(v_ptr, own, G, held, V, BLOCK_V)
        logit = tl.dot(q, tl.trans(key), input_precision=PRECISION) * scale
        logit = tl.where(held[None, :] & (own[None, :] <= (first - start + m)[:, None]), logit, float("-inf"))
        p = tl.exp2(logit - lse[:, None])
        dp = tl.dot(do, tl.trans(value), input_precision=PRECISION)
        ds = (p * (dp - delta[:, None])).to(key.dtype)
        acc = tl.dot(ds, key, acc, input_precision=PRECISION)

    # (A sum over both axes, to a single number, makes Triton 3.6 fail for sm_100.)
    part = tl.cast(tl.program_id(1), tl.int64) * all_tiles + first_chunk * tiles + tile
    d = tl.arange(0, BLOCK_K)
    tl.store(dbeta_ptr + part * K + d, tl.sum(acc * q.to(tl.float32), 0), mask=d < K)
    store_tokens(token_at(dq_ptr, query, H, h, K), m, H, live, acc * beta, K, BLOCK_K)


@triton.jit(do_not_specialize=DICTIONARY_SCALARS)
def dictionary_grad_kernel(
    q_ptr,  # [B, T, H, K]
    beta_ptr,  # [H] float32
    row_key_ptr,  # [B, G, rows, K]
    row_value_ptr,  # [B, G, rows, V]
    row_log_ptr,  # [B, G, rows] float32: log2 of the counts
    row_count_ptr,  # [B, G, rows] float32, if RATE
    table_ptr,  # [B, G, table_size] int32
    blocks_ptr,  # [blocks, 5] int32: first centroid, chunk founding it, its document's last chunk and that one's bounds
    sizes_ptr,  # [chunks] int32
    offsets_ptr,  # [chunks] int32
    do_ptr,  # [B, T, H, V]
    lse_ptr,  # [B, H, T] float32
    delta_ptr,  # [B, H, T] float32
    dk_ptr,  # [B, S, G, K] out: at the token of each version row
    dv_ptr,  # [B, S, G, V] out: likewise
    T,
    S,
    L,
    H,
    G,
    rows,
    table_size,
    low,  # the table's first centroid; the table covers whole blocks
    initial,
    log2_keep,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RATE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The centroids' gradients, in one loop over (chunk, query head, query tile) so that all loads can be pipelined."""
    blocks_ptr += 5 * tl.program_id(0)
    n = tl.load(blocks_ptr)
    first = tl.load(blocks_ptr + 1)
    last = tl.load(blocks_ptr + 2)
    last_start = tl.load(blocks_ptr + 3)
    end = tl.load(blocks_ptr + 4)
    batch = tl.cast(tl.program_id(1) // G, tl.int64)
    g = tl.program_id(1) % G
    row_base = tl.cast(tl.program_id(1), tl.int64) * rows
    row_key_ptr += row_base * K
    row_value_ptr += row_base * V
    row_log_ptr += row_base
    row_count_ptr += row_base
    table_ptr += tl.cast(tl.program_id(1), tl.int64) * table_size - low

    tiles = tl.cdiv(L, BLOCK_M)
    group = H // G
    steps = group * tiles
    total = (last + 1 - first) * steps
    centroid = n + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    offset, size = tl.load(offsets_ptr + last), tl.load(sizes_ptr + last)
    row = tl.load(table_ptr + offset + centroid, mask=centroid < size, other=-1)
    if RATE:
        count = tl.load(row_count_ptr + row, mask=row >= 0, other=1.0)
    dkey = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    dvalue = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    # A step's row indices are read one step before its rows, and the indices' offset in the table two steps before.
    before = row
    ahead = last - tl.minimum(1, total - 1) // steps
    offset, size = tl.load(offsets_ptr + ahead), tl.load(sizes_ptr + ahead)

    for step in tl.range(0, total, num_stages=STAGES):
        start = last_start - step // steps * L
        h = g * group + (step % steps) // tiles
        held = before >= 0
        key = load_rows(row_key_ptr, before, held, K, BLOCK_K)
        value = load_rows(row_value_ptr, before, held, V, BLOCK_V)
        beta = tl.load(beta_ptr + h)

        # Where a centroid's version changes, its chunk's keys get their gradient (at a chunk's first step).
        made = before != row
        if RATE:
            old = tl.load(row_count_ptr + before, mask=held, other=1.0)
            bias = load_numbers(row_log_ptr, before, held, float("-inf"))
            added = tl.maximum(count - tl.where(held, old, 0.0), 1.0)
            decay = tl.where(held, tl.exp2(added * log2_keep), 0.0)
            gain = (1 - decay) / added
            count = old
        if step % steps == 0:
            token = row - initial - start
            dk = token_at(dk_ptr, batch * S + start, G, g, K)
            dv = token_at(dv_ptr, batch * S + start, G, g, V)
            if RATE:
                store_tokens(dk, token, G, made, dkey * gain[:, None], K, BLOCK_K)
                store_tokens(dv, token, G, made, dvalue * gain[:, None], V, BLOCK_V)
                dkey = tl.where(made[:, None], dkey * decay[:, None], dkey)
                dvalue = tl.where(made[:, None], dvalue * decay[:, None], dvalue)
            else:
                store_tokens(dk, token, G, made, dkey, K, BLOCK_K)
                store_tokens(dv, token, G, made, dvalue, V, BLOCK_V)
                # (This also keeps the block in place: Triton moves a block that does not affect the accumulators to
                # the end of the loop, and then needs a copy of both.)
                dkey = tl.where(held[:, None], dkey, 0.0)
                dvalue = tl.where(held[:, None], dvalue, 0.0)
        row = before
        before = tl.load(table_ptr + offset + centroid, mask=centroid < size, other=-1)
        ahead = last - tl.minimum(step + 2, total - 1) // steps
        offset, size = tl.load(offsets_ptr + ahead), tl.load(sizes_ptr + ahead)

        position = start + (step % tiles) * BLOCK_M
        live = (position + m < tl.minimum(start + L, end)) & (position + m >= S - T)
        t = position - (S - T)
        q = load_tokens(token_at(q_ptr, batch * T + t, H, h, K), m, H, live, K, BLOCK_K)
        do = load_tokens(token_at(do_ptr, batch * T + t, H, h, V), m, H, live, V, BLOCK_V)
        lse = load_numbers(lse_ptr + (batch * H + h) * T + t, m, live, float("inf"))
        delta = load_numbers(delta_ptr + (batch * H + h) * T + t, m, live, 0.0)
        logit = tl.dot(key, tl.trans(q), input_precision=PRECISION) * (beta * LOG2E)
        if RATE:
            logit += bias[:, None]
        p = tl.exp2(logit - lse[None, :])  # p / count for running means
        dvalue = tl.dot(p.to(do.dtype), do, dvalue, input_precision=PRECISION)
        dp = tl.dot(value, tl.trans(do), input_precision=PRECISION)
        ds = (p * (dp - delta[None, :]) * beta).to(q.dtype)
        dkey = tl.dot(ds, q, dkey, input_precision=PRECISION)


@triton.jit(do_not_specialize=CHUNK_SCALARS)
def chunk_grad_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, S, G, K]
    v_ptr,  # [B, S, G, V]
    beta_ptr,  # [H] float32
    assignment_ptr,  # [B, G, S] int32
    starts_ptr,  # [chunks] int32
    ends_ptr,  # [chunks] int32
    do_ptr,  # [B, T, H, V]
    lse_ptr,  # [B, H, T] float32
    delta_ptr,  # [B, H, T] float32
    dk_ptr,  # [B, S, G, K] in and out
    dv_ptr,  # [B, S, G, V] in and out
    T,
    S,
    L,
    H,
    G,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dk and dv of the chunk's own keys and values.

    The dictionary's gradient for a token is in dk and dv at the chunk's last token with the same centroid. Tiles of
    keys are processed in text order, and each is read before it is written, so nothing is overwritten too early.
    """
    chunk = tl.program_id(0)
    batch = tl.cast(tl.program_id(1) // G, tl.int64)
    g = tl.program_id(1) % G
    start = tl.load(starts_ptr + chunk)
    length = tl.load(ends_ptr + chunk) - start
    committed = length == L
    t = start - (S - T)
    k_ptr = token_at(k_ptr, batch * S + start, G, g, K)
    v_ptr = token_at(v_ptr, batch * S + start, G, g, V)
    dk_ptr = token_at(dk_ptr, batch * S + start, G, g, K)
    dv_ptr = token_at(dv_ptr, batch * S + start, G, g, V)
    assignment_ptr += tl.cast(tl.program_id(1), tl.int64) * S + start

    for s in tl.range(0, length, BLOCK_N, num_stages=1):
        own = s + tl.arange(0, BLOCK_N)
        held = own < length
        key = load_tokens(k_ptr, own, G, held, K, BLOCK_K)
        value = load_tokens(v_ptr, own, G, held, V, BLOCK_V)
        # The chunk's last token with the same centroid as each of these.
        place = tl.load(assignment_ptr + own, mask=held & committed, other=-1)
        last = tl.zeros([BLOCK_N], tl.int32)
        for m in tl.range(s, length, BLOCK_N, num_stages=1):
            other = m + tl.arange(0, BLOCK_N)
            same = tl.load(assignment_ptr + other, mask=other < length, other=-2)[:, None] == place[None, :]
            last = tl.maximum(last, tl.max(tl.where(same, other[:, None], 0), 0))
        dkey = load_tokens(dk_ptr, last, G, held & committed, K, BLOCK_K).to(tl.float32)
        dvalue = load_tokens(dv_ptr, last, G, held & committed, V, BLOCK_V).to(tl.float32)
        for h in tl.range(g * (H // G), (g + 1) * (H // G), num_stages=1):
            beta = tl.load(beta_ptr + h)
            q_head = token_at(q_ptr, batch * T + t, H, h, K)
            do_head = token_at(do_ptr, batch * T + t, H, h, V)
            lse_offset = (batch * H + h) * T + t
            for m in tl.range(s, length, BLOCK_M, num_stages=STAGES):
                query = m + tl.arange(0, BLOCK_M)
                live = (query < length) & (query >= -t)
                q = load_tokens(q_head, query, H, live, K, BLOCK_K)
                do = load_tokens(do_head, query, H, live, V, BLOCK_V)
                lse = load_numbers(lse_ptr + lse_offset, query, live, float("inf"))
                delta = load_numbers(delta_ptr + lse_offset, query, live, 0.0)
                logit = tl.dot(key, tl.trans(q), input_precision=PRECISION) * (beta * LOG2E)
                p = tl.exp2(logit - lse[None, :])
                p = tl.where(own[:, None] <= query[None, :], p, 0.0)
                dvalue = tl.dot(p.to(do.dtype), do, dvalue, input_precision=PRECISION)
                dp = tl.dot(value, tl.trans(do), input_precision=PRECISION)
                ds = (p * (dp - delta[None, :]) * beta).to(q.dtype)
                dkey = tl.dot(ds, q, dkey, input_precision=PRECISION)
        tl.debug_barrier()
        store_tokens(dk_ptr, own, G, held, dkey, K, BLOCK_K)
        store_tokens(dv_ptr, own, G, held, dvalue, V, BLOCK_V)
