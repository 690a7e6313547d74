"""Stage C, backward, in three kernels without atomics: same inputs, same bits.

With p the softmax of the forward pass (recomputed from the stored log-sum-exp) and

    delta_t = do_t . o_t          dp = do . value          ds = p (dp - delta)

1. `query_grad_kernel`, one program a tile of queries:      dq = beta sum ds key,   dbeta = sum q . (sum ds key)
2. `dictionary_grad_kernel`, one program a block of centroids, which walks the chunks in reverse with its gradients in
   registers. For running means it holds those of the sums, dS^k = sum beta ds q / c and dS^v = sum p do / c over all
   chunks that come later, where p / c = exp(beta q.k - lse): the count in the softmax and the count in the mean cancel.
   Where it comes to the chunk that made a centroid's version, dS is what each of that chunk's keys gets from it. It is
   left in dk and dv at the last of them, whose token is the version's row. Past the chunk where a centroid was born its
   registers hold numbers without meaning, which nothing reads. With a constant rate,

       mu_new = decay mu_old + gain sum of the chunk's keys,     decay = (1-eta)^m, gain = (1 - decay) / m

   and it holds the gradients of the means: each key gets gain dmu, and dmu goes on multiplied by decay.
3. `chunk_grad_kernel`, one program a chunk: dk and dv of the causal part, plus what the dictionary left for each token.
"""

# mypy: allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ovq.ops.ovq_attention.triton.assign import log2_keep
from ovq.ops.ovq_attention.triton.blocks import load_rows, load_tokens, store_tokens, token_at
from ovq.ops.ovq_attention.triton.configs import arch_of, constants
from ovq.ops.ovq_attention.triton.plan import Plan, plan_tensors
from ovq.ops.ovq_attention.triton.predict import LOG2E, tile_grid

QUERY_NUMBERS = ["T", "S", "L", "H", "G", "rows", "table_size"]
DICTIONARY_NUMBERS = ["T", "S", "L", "H", "G", "rows", "table_size", "initial", "log2_keep"]
CHUNK_NUMBERS = ["T", "S", "L", "H", "G", "table_size", "initial"]
Rows = tuple[Tensor, Tensor, Tensor, Tensor]  # keys, values and counts of the version rows, and the table


def query_grad(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, plan: Plan, rows: Rows, o: Tensor, do: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, delta [B, H, T] and dbeta [H]."""
    (B, T, H, K), (S, G, V) = q.shape, v.shape[1:]
    sizes, offsets, _ = plan_tensors(plan, q.device)
    settings = constants("query_grad", arch_of(q.device), q.dtype, K, V, plan.spec.chunk_size)
    grid = tile_grid(S, plan, settings["BLOCK_M"], B * H)
    dq, delta = torch.empty_like(q), torch.empty_like(lse)
    dbeta = lse.new_empty(B, H, grid[0])
    query_grad_kernel[grid](
        q, k, v, beta, *rows, sizes, offsets, o, do, lse, delta, dq, dbeta,
        T, S, plan.spec.chunk_size, H, G, plan.rows, plan.table_size, **settings,
    )  # fmt: skip
    return dq, delta, dbeta.sum((0, 2))


def dictionary_grad(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, plan: Plan, rows: Rows, do: Tensor, lse: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor]:
    """dk and dv, filled only at the tokens of version rows: what each key and value of that version's chunk gets."""
    (B, T, H, K), (S, G, V), spec = q.shape, v.shape[1:], plan.spec
    sizes, offsets, _ = plan_tensors(plan, q.device)
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    flags = {"RATE": spec.rate is not None}
    settings = constants("dictionary_grad", arch_of(q.device), q.dtype, K, V, spec.chunk_size, **flags)
    if plan.chunks:
        dictionary_grad_kernel[triton.cdiv(plan.sizes[-1], settings["BLOCK_N"]), B * G](
            q, beta, *rows, sizes, offsets, do, lse, delta, dk, dv,
            T, S, spec.chunk_size, H, G, plan.rows, plan.table_size, plan.initial, log2_keep(spec.rate), **settings,
        )  # fmt: skip
    return dk, dv


def chunk_grad(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, plan: Plan, assignment: Tensor, table: Tensor,
    do: Tensor, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """Completes what `dictionary_grad` began."""
    (B, T, H, K), (S, G, V), L = q.shape, v.shape[1:], plan.spec.chunk_size
    _, offsets, _ = plan_tensors(plan, q.device)
    chunk_grad_kernel[triton.cdiv(S, L), B * G](
        q, k, v, beta, assignment, table, offsets, do, lse, delta, dk, dv,
        T, S, L, H, G, plan.table_size, plan.initial,
        **constants("chunk_grad", arch_of(q.device), q.dtype, K, V, L),
    )  # fmt: skip


@triton.jit(do_not_specialize=QUERY_NUMBERS)
def query_grad_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, S, G, K]
    v_ptr,  # [B, S, G, V]
    beta_ptr,  # [H] float32
    row_key_ptr,  # [B, G, rows, K]
    row_value_ptr,  # [B, G, rows, V]
    row_count_ptr,  # [B, G, rows] float32
    table_ptr,  # [B, G, table_size] int32
    sizes_ptr,  # [chunks + 1] int32
    offsets_ptr,  # [chunks + 1] int64
    o_ptr,  # [B, T, H, V]
    do_ptr,  # [B, T, H, V]
    lse_ptr,  # [B, H, T] float32
    delta_ptr,  # [B, H, T] float32 out
    dq_ptr,  # [B, T, H, K] out
    dbeta_ptr,  # [B, H, tiles] float32 out
    T,
    S,
    L,
    H,
    G,
    rows,
    table_size,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dq, dbeta and delta; the walk of `predict_kernel` with ds in place of p."""
    tiles = tl.cdiv(L, BLOCK_M)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    b = tl.program_id(1) // H
    h = tl.program_id(1) % H
    g = h // (H // G)
    chunk = tile // tiles
    start = chunk * L
    end = tl.minimum(start + L, S)
    first = start + (tile % tiles) * BLOCK_M
    position = first + tl.arange(0, BLOCK_M)
    live = (position < end) & (position >= S - T)  # queries are of the last T tokens
    query = tl.cast(b, tl.int64) * T + first - (S - T)
    m = tl.arange(0, BLOCK_M)

    k_ptr = token_at(k_ptr, tl.cast(b, tl.int64) * S + start, G, g, K)
    v_ptr = token_at(v_ptr, tl.cast(b, tl.int64) * S + start, G, g, V)
    number = tl.cast(tl.program_id(1), tl.int64) * T + first - (S - T)
    row_base = tl.cast(b * G + g, tl.int64) * rows
    row_key_ptr += row_base * K
    row_value_ptr += row_base * V
    row_count_ptr += row_base
    table_ptr += tl.cast(b * G + g, tl.int64) * table_size + tl.load(offsets_ptr + chunk)
    size = tl.load(sizes_ptr + chunk)

    q = load_tokens(token_at(q_ptr, query, H, h, K), m, H, live, K, BLOCK_K)
    do = load_tokens(token_at(do_ptr, query, H, h, V), m, H, live, V, BLOCK_V)
    o = load_tokens(token_at(o_ptr, query, H, h, V), m, H, live, V, BLOCK_V)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta_ptr + number + m, delta, mask=live)
    lse = tl.load(lse_ptr + number + m, mask=live, other=float("inf"))
    beta = tl.load(beta_ptr + h)
    scale = beta * LOG2E
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)

    for n in tl.range(0, size, BLOCK_N, num_stages=STAGES):
        centroid = n + tl.arange(0, BLOCK_N)
        held = centroid < size
        row = tl.load(table_ptr + centroid, mask=held, other=0)
        key = load_rows(row_key_ptr, row, held, K, BLOCK_K)
        value = load_rows(row_value_ptr, row, held, V, BLOCK_V)
        count = tl.load(row_count_ptr + row, mask=held, other=1.0)
        bias = tl.where(held, tl.log2(count), float("-inf"))
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

    tl.store(
        dbeta_ptr + tl.cast(tl.program_id(1), tl.int64) * tl.num_programs(0) + tile,
        tl.sum(tl.sum(acc * q.to(tl.float32), 1), 0),
    )
    store_tokens(token_at(dq_ptr, query, H, h, K), m, H, live, acc * beta, K, BLOCK_K)


@triton.jit(do_not_specialize=DICTIONARY_NUMBERS)
def dictionary_grad_kernel(
    q_ptr,  # [B, T, H, K]
    beta_ptr,  # [H] float32
    row_key_ptr,  # [B, G, rows, K]
    row_value_ptr,  # [B, G, rows, V]
    row_count_ptr,  # [B, G, rows] float32
    table_ptr,  # [B, G, table_size] int32
    sizes_ptr,  # [chunks + 1] int32
    offsets_ptr,  # [chunks + 1] int64
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
    """The centroids' gradients. One loop over (chunk, query head, query tile), so that all loads can be pipelined."""
    n = tl.program_id(0) * BLOCK_N
    batch = tl.cast(tl.program_id(1) // G, tl.int64)
    g = tl.program_id(1) % G
    row_base = tl.cast(tl.program_id(1), tl.int64) * rows
    row_key_ptr += row_base * K
    row_value_ptr += row_base * V
    row_count_ptr += row_base
    table_ptr += tl.cast(tl.program_id(1), tl.int64) * table_size

    whole = S // L
    tiles = tl.cdiv(L, BLOCK_M)
    group = H // G
    steps = group * tiles
    first = _chunks_before(sizes_ptr, whole, n)
    centroid = n + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    row = tl.load(
        table_ptr + tl.load(offsets_ptr + whole) + centroid, mask=centroid < tl.load(sizes_ptr + whole), other=-1
    )
    if RATE:
        count = tl.load(row_count_ptr + row, mask=row >= 0, other=1.0)
    dkey = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    dvalue = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)

    for step in tl.range(0, (tl.cdiv(S, L) - first) * steps, num_stages=STAGES):
        chunk = tl.cdiv(S, L) - 1 - step // steps
        h = g * group + (step % steps) // tiles
        table = table_ptr + tl.load(offsets_ptr + chunk)
        before = tl.load(table + centroid, mask=centroid < tl.load(sizes_ptr + chunk), other=-1)
        held = before >= 0
        key = load_rows(row_key_ptr, before, held, K, BLOCK_K)
        value = load_rows(row_value_ptr, before, held, V, BLOCK_V)
        beta = tl.load(beta_ptr + h)

        # Where a centroid's version changes, its chunk's keys get their share. (Later steps of a chunk see no change.)
        made = before != row
        if RATE:
            old = tl.load(row_count_ptr + before, mask=held, other=1.0)
            bias = tl.where(held, tl.log2(old), float("-inf"))
            number = tl.maximum(count - tl.where(held, old, 0.0), 1.0)
            decay = tl.where(held, tl.exp2(number * log2_keep), 0.0)
            gain = (1 - decay) / number
            count = old
        if step % steps == 0:
            token = row - initial - chunk * L
            dk = token_at(dk_ptr, batch * S + chunk * L, G, g, K)
            dv = token_at(dv_ptr, batch * S + chunk * L, G, g, V)
            if RATE:
                store_tokens(dk, token, G, made, dkey * gain[:, None], K, BLOCK_K)
                store_tokens(dv, token, G, made, dvalue * gain[:, None], V, BLOCK_V)
                dkey = tl.where(made[:, None], dkey * decay[:, None], dkey)
                dvalue = tl.where(made[:, None], dvalue * decay[:, None], dvalue)
            else:
                store_tokens(dk, token, G, made, dkey, K, BLOCK_K)
                store_tokens(dv, token, G, made, dvalue, V, BLOCK_V)
                # (Also keeps this block where it stands: Triton moves one that changes nothing to the loop's end, and
                # then needs a copy of both accumulators.)
                dkey = tl.where(held[:, None], dkey, 0.0)
                dvalue = tl.where(held[:, None], dvalue, 0.0)
        row = before

        position = chunk * L + (step % tiles) * BLOCK_M
        live = (position + m < tl.minimum(chunk * L + L, S)) & (position + m >= S - T)
        t = position - (S - T)
        q = load_tokens(token_at(q_ptr, batch * T + t, H, h, K), m, H, live, K, BLOCK_K)
        do = load_tokens(token_at(do_ptr, batch * T + t, H, h, V), m, H, live, V, BLOCK_V)
        lse = tl.load(lse_ptr + (batch * H + h) * T + t + m, mask=live, other=float("inf"))
        delta = tl.load(delta_ptr + (batch * H + h) * T + t + m, mask=live, other=0.0)
        logit = tl.dot(key, tl.trans(q), input_precision=PRECISION) * (beta * LOG2E)
        if RATE:
            logit += bias[:, None]
        p = tl.exp2(logit - lse[None, :])  # p / count for a running mean
        dvalue = tl.dot(p.to(do.dtype), do, dvalue, input_precision=PRECISION)
        dp = tl.dot(value, tl.trans(do), input_precision=PRECISION)
        ds = (p * (dp - delta[None, :]) * beta).to(q.dtype)
        dkey = tl.dot(ds, q, dkey, input_precision=PRECISION)


@triton.jit
def _chunks_before(sizes_ptr, whole, n):
    """The first chunk after which centroid n exists."""
    first = 0
    for i in tl.range(0, whole, 1024, num_stages=1):
        chunk = i + tl.arange(0, 1024)
        size = tl.load(sizes_ptr + 1 + chunk, mask=chunk < whole, other=2147483647)
        first += tl.sum((size <= n).to(tl.int32), 0)
    return first


@triton.jit(do_not_specialize=CHUNK_NUMBERS)
def chunk_grad_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,  # [B, S, G, K]
    v_ptr,  # [B, S, G, V]
    beta_ptr,  # [H] float32
    assignment_ptr,  # [B, G, S] int32
    table_ptr,  # [B, G, table_size] int32
    offsets_ptr,  # [chunks + 1] int64
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
    table_size,
    initial,
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

    What the dictionary left for a token lies in dk and dv at the last token of its centroid in the chunk. Tiles of keys
    are taken in the order of the text, and each is read before it is written, so nothing is overwritten too soon.
    """
    chunk = tl.program_id(0)
    batch = tl.cast(tl.program_id(1) // G, tl.int64)
    g = tl.program_id(1) % G
    start = chunk * L
    length = tl.minimum(L, S - start)
    committed = length == L
    t = start - (S - T)
    k_ptr = token_at(k_ptr, batch * S + start, G, g, K)
    v_ptr = token_at(v_ptr, batch * S + start, G, g, V)
    dk_ptr = token_at(dk_ptr, batch * S + start, G, g, K)
    dv_ptr = token_at(dv_ptr, batch * S + start, G, g, V)
    assignment_ptr += tl.cast(tl.program_id(1), tl.int64) * S + start
    table_ptr += tl.cast(tl.program_id(1), tl.int64) * table_size
    table_ptr += tl.load(offsets_ptr + chunk + 1, mask=committed, other=0)

    for s in tl.range(0, length, BLOCK_N, num_stages=1):
        own = s + tl.arange(0, BLOCK_N)
        held = own < length
        key = load_tokens(k_ptr, own, G, held, K, BLOCK_K)
        value = load_tokens(v_ptr, own, G, held, V, BLOCK_V)
        place = tl.load(assignment_ptr + own, mask=held & committed, other=0)
        last = tl.load(table_ptr + place, mask=held & committed, other=0) - initial - start
        dkey = load_tokens(dk_ptr, last, G, held & committed, K, BLOCK_K).to(tl.float32)
        dvalue = load_tokens(dv_ptr, last, G, held & committed, V, BLOCK_V).to(tl.float32)
        for h in tl.range(g * (H // G), (g + 1) * (H // G), num_stages=1):
            beta = tl.load(beta_ptr + h)
            q_head = token_at(q_ptr, batch * T + t, H, h, K)
            do_head = token_at(do_ptr, batch * T + t, H, h, V)
            number = (batch * H + h) * T + t
            for m in tl.range(s, length, BLOCK_M, num_stages=STAGES):
                query = m + tl.arange(0, BLOCK_M)
                live = (query < length) & (query >= -t)
                q = load_tokens(q_head, query, H, live, K, BLOCK_K)
                do = load_tokens(do_head, query, H, live, V, BLOCK_V)
                lse = tl.load(lse_ptr + number + query, mask=live, other=float("inf"))
                delta = tl.load(delta_ptr + number + query, mask=live, other=0.0)
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
