"""Stage A, assignment and update: the only sequential stage, a walk over the chunks of each key/value head.

For chunk i with n_i centroids (means mu = S / c):

    propose   best_t = max_n k_t.mu^k_n, arg_t the lowest such n
    found     the new_i keys with the lowest best_t (or the lowest hash) become centroids n_i, n_i + 1, ... in their
              order in the text; all others go to arg_t
    commit    S_n += sum of its keys / values, c_n += their number

and the dictionary's history is written as *version rows*: when a chunk touches a centroid, its new mean key, mean value
and count go to the row of the last of the chunk's tokens that went there, so that all versions together are no bigger
than k and v. table[i, n] is the row of centroid n before chunk i; everything later reads that and nothing sequential.

A head is walked by SPLITS programs. Program p owns the centroids of blocks p, p + SPLITS, ...: it proposes among them,
and commits to them alone. Between the two lies the only barrier: all programs read all proposals, and decide alike
where every key goes. (Proposals are double-buffered by chunk parity: the next barrier keeps them from being
overwritten.)
Sums stay in float32 in global memory, which is L2; the scatter of a chunk is a product with a one-hot matrix.
"""

# mypy: allow-incomplete-defs

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ovq.ops.ovq_attention.triton.blocks import INTERPRETED, load_rows, load_tokens, store_rows, token_at
from ovq.ops.ovq_attention.triton.configs import arch_of, constants
from ovq.ops.ovq_attention.triton.plan import Plan, plan_tensors

NUMBERS = ["S", "L", "G", "N", "rows", "table_size", "initial", "first_chunk", "last_chunk", "log2_keep"]
MAX_SPLITS = 16


def assign(
    k: Tensor, v: Tensor, plan: Plan, key_sum: Tensor, value_sum: Tensor, count: Tensor, forced: Tensor | None
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Commits all whole chunks to the sums and counts, in place.

    Returns:
        assignment int32 [B, G, S], -1 in an unfinished chunk; and rows: keys [B, G, rows, K], values, counts, table.
    """
    (B, S, G, K), V, spec, N = k.shape, v.shape[3], plan.spec, plan.spec.num_centroids
    L, initial, whole = spec.chunk_size, plan.initial, plan.chunks * spec.chunk_size
    sizes, offsets, ranks = plan_tensors(plan, k.device)
    empty = k.new_empty
    row_key, row_value = empty(B, G, plan.rows, K), empty(B, G, plan.rows, V)
    row_count = empty(B, G, plan.rows, dtype=torch.float32)
    table = empty(B, G, plan.table_size, dtype=torch.int32)
    assignment = empty(B, G, S, dtype=torch.int32)
    assignment[:, :, whole:] = -1
    mean_key, current = empty(B, G, N, K), empty(B, G, N, dtype=torch.int32)
    key_value = spec.assign_on == "key_value" and forced is None
    mean_value = empty(B, G, N, V) if key_value else mean_key  # not touched then
    if initial:
        row_key[:, :, :initial] = key_sum[:, :, :initial] / count[:, :, :initial, None]
        row_value[:, :, :initial] = value_sum[:, :, :initial] / count[:, :, :initial, None]
        row_count[:, :, :initial] = count[:, :, :initial]
        mean_key[:, :, :initial] = row_key[:, :, :initial]
        if key_value:
            mean_value[:, :, :initial] = row_value[:, :, :initial]
        current[:, :, :initial] = torch.arange(initial, dtype=torch.int32, device=k.device)
        table[:, :, :initial] = current[:, :, :initial]
    rows = (row_key, row_value, row_count, table)
    if not plan.chunks:
        return assignment, rows
    flags = {
        "SPLITS": splits(B * G, k.device),
        "FORCED": forced is not None,
        "RANDOM": spec.seeding == "random",
        "NEAREST": spec.first_chunk == "nearest" and initial == 0,
        "KEY_VALUE": key_value,
        "RATE": spec.rate is not None,
    }
    programs = B * G * flags["SPLITS"]
    best, arg = empty(2, programs, L, dtype=torch.float32), empty(2, programs, L, dtype=torch.int32)
    chosen, place = empty(programs, L, dtype=torch.float32), empty(programs, 2, L, dtype=torch.int32)
    arrived = torch.zeros(B * G, dtype=torch.int32, device=k.device)
    settings = constants("assign", arch_of(k.device), k.dtype, K, V, L, **flags)

    def launch(first: int, last: int, propose: bool, commit: bool) -> None:
        assign_kernel[(programs,)](
            k, v, assignment if forced is None else forced.to(torch.int32).contiguous(), ranks, sizes, offsets,
            key_sum, value_sum, count, mean_key, mean_value, current, *rows, assignment,
            best, arg, chosen, place, arrived,
            S, L, G, N, plan.rows, plan.table_size, initial, first, last, log2_keep(spec.rate),
            PROPOSE=propose, COMMIT=commit, **settings,
        )  # fmt: skip

    if INTERPRETED and flags["SPLITS"] > 1:
        # The interpreter runs programs one after another: a barrier would never be passed.
        for chunk in range(plan.chunks):
            launch(chunk, chunk + 1, True, False)
            launch(chunk, chunk + 1, False, True)
    else:
        launch(0, plan.chunks, True, True)
    return assignment, rows


def splits(heads: int, device: torch.device) -> int:
    """Programs a head: a power of two, and no more than run at the same time, since they wait for each other."""
    if device.type != "cuda":
        return 1
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    fitting = max(processors // heads, 1)
    return min(1 << (fitting.bit_length() - 1), MAX_SPLITS)


def log2_keep(rate: float | None) -> float:
    """log2(1 - eta) of a constant rate eta."""
    return math.log2(1 - rate) if rate is not None and rate < 1 else -math.inf


@triton.jit(do_not_specialize=NUMBERS)
def assign_kernel(
    k_ptr,  # [B, S, G, K]
    v_ptr,  # [B, S, G, V]
    forced_ptr,  # [B, G, S] int32: the assignment to use, if FORCED
    rank_ptr,  # [chunks, L] int32: the keys' ranks in the order of founding, if RANDOM
    sizes_ptr,  # [chunks + 1] int32: centroids before chunk i
    offsets_ptr,  # [chunks + 1] int64: where the table of chunk i starts
    key_sum_ptr,  # [B, G, N, K] float32 in and out
    value_sum_ptr,  # [B, G, N, V] float32 in and out
    count_ptr,  # [B, G, N] float32 in and out
    mean_key_ptr,  # [B, G, N, K] in and out: means as they are now, in the operands' dtype
    mean_value_ptr,  # [B, G, N, V] likewise, if KEY_VALUE
    current_ptr,  # [B, G, N] int32 in and out: each centroid's row now
    row_key_ptr,  # [B, G, rows, K] out
    row_value_ptr,  # [B, G, rows, V] out
    row_count_ptr,  # [B, G, rows] float32 out
    table_ptr,  # [B, G, table_size] int32 out
    assignment_ptr,  # [B, G, S] int32 out
    best_ptr,  # [2, B * G, SPLITS, L] float32, proposals
    arg_ptr,  # [2, B * G, SPLITS, L] int32, proposals
    chosen_ptr,  # [B * G * SPLITS, L] float32, private to a program
    place_ptr,  # [B * G * SPLITS, 2, L] int32, private to a program
    arrived_ptr,  # [B * G] int32, zeros: how many programs have come to the barrier
    S,
    L,
    G,
    N,
    rows,
    table_size,
    initial,  # rows of the dictionary at the start
    first_chunk,
    last_chunk,
    log2_keep,  # log2(1 - eta)
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_L: tl.constexpr,  # keys of a tile that proposes
    BLOCK_C: tl.constexpr,  # and of one that commits
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    PROPOSE: tl.constexpr,
    COMMIT: tl.constexpr,
    FORCED: tl.constexpr,
    RANDOM: tl.constexpr,
    NEAREST: tl.constexpr,
    KEY_VALUE: tl.constexpr,
    RATE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    heads = tl.num_programs(0) // SPLITS
    head = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    b = head // G
    g = head % G
    k_ptr += tl.cast(b, tl.int64) * S * G * K
    v_ptr += tl.cast(b, tl.int64) * S * G * V
    forced_ptr += tl.cast(head, tl.int64) * S
    assignment_ptr += tl.cast(head, tl.int64) * S
    key_sum_ptr += tl.cast(head, tl.int64) * N * K
    value_sum_ptr += tl.cast(head, tl.int64) * N * V
    mean_key_ptr += tl.cast(head, tl.int64) * N * K
    mean_value_ptr += tl.cast(head, tl.int64) * N * V
    count_ptr += tl.cast(head, tl.int64) * N
    current_ptr += tl.cast(head, tl.int64) * N
    row_key_ptr += tl.cast(head, tl.int64) * rows * K
    row_value_ptr += tl.cast(head, tl.int64) * rows * V
    row_count_ptr += tl.cast(head, tl.int64) * rows
    table_ptr += tl.cast(head, tl.int64) * table_size
    chosen_ptr += tl.program_id(0) * L
    arg_own_ptr = place_ptr + tl.program_id(0) * 2 * L
    place_ptr = arg_own_ptr + L

    for i in tl.range(first_chunk, last_chunk, num_stages=1):
        start = i * L
        chunk_k = token_at(k_ptr, start, G, g, K)
        chunk_v = token_at(v_ptr, start, G, g, V)
        size = tl.load(sizes_ptr + i)
        after = tl.load(sizes_ptr + i + 1)
        slot = ((i % 2) * heads + head) * SPLITS

        if PROPOSE and not FORCED:
            for l0 in tl.range(0, L, BLOCK_L, num_stages=1):
                l = l0 + tl.arange(0, BLOCK_L)
                best, arg = _propose(
                    chunk_k, chunk_v, mean_key_ptr, mean_value_ptr, l, L, G, size, split,
                    K, V, BLOCK_K, BLOCK_V, BLOCK_L, BLOCK_N, SPLITS, KEY_VALUE, PRECISION, STAGES,
                )  # fmt: skip
                tl.store(best_ptr + (slot + split) * L + l, best, mask=l < L)
                tl.store(arg_ptr + (slot + split) * L + l, arg, mask=l < L)
            if COMMIT and SPLITS > 1:
                _barrier(arrived_ptr + head, SPLITS * (i - first_chunk + 1))
            else:
                tl.debug_barrier()

        if COMMIT:
            if FORCED:
                for l0 in tl.range(0, L, BLOCK_C, num_stages=1):
                    l = l0 + tl.arange(0, BLOCK_C)
                    tl.store(place_ptr + l, tl.load(forced_ptr + start + l, mask=l < L), mask=l < L)
                tl.debug_barrier()
            else:
                _choose(best_ptr + slot * L, arg_ptr + slot * L, chosen_ptr, arg_own_ptr, size, L, BLOCK_C, SPLITS)
                _place(
                    chunk_k, chosen_ptr, arg_own_ptr, place_ptr, rank_ptr + i * L, size, after, L, G,
                    K, BLOCK_K, BLOCK_C, RANDOM, NEAREST, PRECISION,
                )  # fmt: skip
            for l0 in tl.range(0, L, BLOCK_C, num_stages=1):
                l = l0 + tl.arange(0, BLOCK_C)
                place = tl.load(place_ptr + l, mask=l < L, other=-1)
                if split == 0:
                    tl.store(assignment_ptr + start + l, place, mask=l < L)
                number, later = _company(place, l, place_ptr, L, BLOCK_C)
                # The last of the tokens that went to a centroid speaks for all of them.
                speaks = (l < L) & (later == 0) & ((place // BLOCK_N) % SPLITS == split)
                old = tl.load(count_ptr + place, mask=speaks, other=0.0)
                new = old + number
                row = initial + start + l
                _commit(
                    chunk_k, key_sum_ptr, mean_key_ptr, row_key_ptr, place, row, speaks, old, new, place_ptr,
                    L, G, log2_keep, K, BLOCK_K, BLOCK_C, RATE, True, PRECISION,
                )  # fmt: skip
                _commit(
                    chunk_v, value_sum_ptr, mean_value_ptr, row_value_ptr, place, row, speaks, old, new, place_ptr,
                    L, G, log2_keep, V, BLOCK_V, BLOCK_C, RATE, KEY_VALUE, PRECISION,
                )  # fmt: skip
                tl.debug_barrier()  # several threads may hold a token: all have read its old count
                tl.store(count_ptr + place, new, mask=speaks)
                tl.store(row_count_ptr + row, new, mask=speaks)
                tl.store(current_ptr + place, row, mask=speaks)
            tl.debug_barrier()
            table = table_ptr + tl.load(offsets_ptr + i + 1)
            for n in tl.range(split * BLOCK_N, after, SPLITS * BLOCK_N, num_stages=1):
                centroid = n + tl.arange(0, BLOCK_N)
                row = tl.load(current_ptr + centroid, mask=centroid < after, other=0)
                tl.store(table + centroid, row, mask=centroid < after)


@triton.jit
def _propose(
    k_ptr, v_ptr, mean_key_ptr, mean_value_ptr, l, L, G, size, split,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, KEY_VALUE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Similarity and index of each key's best centroid among this program's; -inf where it owns none.

    A running best is kept for every column of the tile, so that indices are compared across columns once, at the end.
    """
    key = load_tokens(k_ptr, l, G, l < L, K, BLOCK_K)
    column = tl.arange(0, BLOCK_N)
    best = tl.full([BLOCK_L, BLOCK_N], float("-inf"), tl.float32)
    arg = tl.zeros([BLOCK_L, BLOCK_N], tl.int32)
    if KEY_VALUE:
        value = load_tokens(v_ptr, l, G, l < L, V, BLOCK_V)
        own = _square(key) + _square(value)
    if size == 0:
        # The empty dictionary: the first key is centroid 0, and only the first program proposes it.
        held = (column == 0) & (split == 0)
        mean = load_tokens(k_ptr, column * 0, G, held, K, BLOCK_K)
        likeness = tl.dot(key, tl.trans(mean), input_precision=PRECISION)
        if KEY_VALUE:
            mean_v = load_tokens(v_ptr, column * 0, G, held, V, BLOCK_V)
            likeness = 2 * (likeness + tl.dot(value, tl.trans(mean_v), input_precision=PRECISION))
            likeness = likeness - (_square(mean) + _square(mean_v))[None, :] - own[:, None]
        best = tl.where(held[None, :], likeness, float("-inf"))
    else:
        for n in tl.range(split * BLOCK_N, size, SPLITS * BLOCK_N, num_stages=STAGES):
            held = n + column < size
            mean = load_rows(mean_key_ptr, n + column, held, K, BLOCK_K)
            likeness = tl.dot(key, tl.trans(mean), input_precision=PRECISION)
            if KEY_VALUE:
                mean_v = load_rows(mean_value_ptr, n + column, held, V, BLOCK_V)
                likeness = 2 * (likeness + tl.dot(value, tl.trans(mean_v), input_precision=PRECISION))
                likeness = likeness - (_square(mean) + _square(mean_v))[None, :] - own[:, None]
            better = held[None, :] & (likeness > best)
            best = tl.where(better, likeness, best)
            arg = tl.where(better, n, arg)
    top = tl.max(best, 1)
    lowest = tl.min(tl.where(best == top[:, None], arg + column[None, :], 2147483647), 1)
    return top, lowest


@triton.jit
def _square(x):
    x = x.to(tl.float32)
    return tl.sum(x * x, 1)


@triton.jit
def _barrier(arrived_ptr, awaited):
    """Wait until all programs of the head have come here: what they stored before is visible after."""
    tl.debug_barrier()
    tl.atomic_add(arrived_ptr, 1, sem="release")
    while tl.atomic_add(arrived_ptr, 0, sem="acquire") < awaited:
        pass
    tl.debug_barrier()


@triton.jit
def _choose(best_ptr, arg_ptr, chosen_ptr, arg_own_ptr, size, L, BLOCK_C: tl.constexpr, SPLITS: tl.constexpr):
    """The best of all programs' proposals; ties go to the lowest centroid."""
    for l0 in tl.range(0, L, BLOCK_C, num_stages=1):
        l = l0 + tl.arange(0, BLOCK_C)
        # All proposals at once: one trip to memory. (.cg: other processors wrote them, L1 knows nothing of it.)
        split = tl.arange(0, SPLITS)
        valid = (split >= 0)[:, None] & (l < L)[None, :]
        offset = split[:, None] * L + l[None, :]
        bests = tl.load(best_ptr + offset, mask=valid, other=0.0, cache_modifier=".cg")
        args = tl.load(arg_ptr + offset, mask=valid, other=0, cache_modifier=".cg")
        best = tl.max(bests, 0)
        arg = tl.min(tl.where(bests == best[None, :], args, 2147483647), 0)
        if size == 0:
            best = tl.where(l == 0, float("-inf"), best)  # the first key founds centroid 0, whatever the order
        tl.store(chosen_ptr + l, best, mask=l < L)
        tl.store(arg_own_ptr + l, arg, mask=l < L)
    tl.debug_barrier()


@triton.jit
def _place(
    k_ptr, chosen_ptr, arg_ptr, place_ptr, rank_ptr, size, after, L, G,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    RANDOM: tl.constexpr, NEAREST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """place_t: where key t goes. The after - size keys of lowest rank found centroids, numbered in their order in the
    text. Ranks and numbers are counted by comparing all pairs of keys, tile by tile."""
    founded = after - size
    if founded == 0:
        for l0 in tl.range(0, L, BLOCK_C, num_stages=1):
            l = l0 + tl.arange(0, BLOCK_C)
            tl.store(place_ptr + l, tl.load(arg_ptr + l, mask=l < L), mask=l < L)
    else:
        # place holds the ranks first. (Both loops read one array and write the other.)
        for l0 in tl.range(0, L, BLOCK_C, num_stages=1):
            l = l0 + tl.arange(0, BLOCK_C)
            if RANDOM:
                rank = tl.load(rank_ptr + l, mask=l < L, other=0)
            else:
                mine = tl.load(chosen_ptr + l, mask=l < L, other=0.0)
                rank = tl.zeros([BLOCK_C], tl.int32)
                for m0 in tl.range(0, L, BLOCK_C, num_stages=1):
                    m = m0 + tl.arange(0, BLOCK_C)
                    other = tl.load(chosen_ptr + m, mask=m < L, other=float("inf"))
                    tie = (other[None, :] == mine[:, None]) & (m[None, :] < l[:, None])
                    ahead = (other[None, :] < mine[:, None]) | tie
                    rank += tl.sum((ahead & (m < L)[None, :]).to(tl.int32), 1)
            tl.store(place_ptr + l, rank, mask=l < L)
        tl.debug_barrier()
        for l0 in tl.range(0, L, BLOCK_C, num_stages=1):
            l = l0 + tl.arange(0, BLOCK_C)
            founds = tl.load(place_ptr + l, mask=l < L, other=0) < founded
            number = tl.zeros([BLOCK_C], tl.int32)
            for m0 in tl.range(0, L, BLOCK_C, num_stages=1):
                m = m0 + tl.arange(0, BLOCK_C)
                other = tl.load(place_ptr + m, mask=m < L, other=2147483647) < founded
                number += tl.sum((other[None, :] & (m[None, :] < l[:, None])).to(tl.int32), 1)
            arg = tl.load(arg_ptr + l, mask=l < L, other=0)
            if NEAREST and size == 0:
                arg = _nearest(k_ptr, place_ptr, l, founded, L, G, K, BLOCK_K, BLOCK_C, PRECISION)
            tl.store(arg_ptr + l, tl.where(founds, size + number, arg), mask=l < L)
        tl.debug_barrier()
        for l0 in tl.range(0, L, BLOCK_C, num_stages=1):
            l = l0 + tl.arange(0, BLOCK_C)
            place = tl.load(arg_ptr + l, mask=l < L, other=0)
            if NEAREST and size == 0:
                # `arg` of the others is the place of their founding key in the text, minus one, negated.
                place = tl.load(arg_ptr + tl.where(place < 0, -1 - place, l), mask=l < L, other=0)
            tl.store(place_ptr + l, place, mask=l < L)
    tl.debug_barrier()


@triton.jit
def _nearest(
    k_ptr, rank_ptr, l, founded, L, G,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """-1 - (place in the chunk of the founding key with the largest product); ties go to the lowest."""
    key = load_tokens(k_ptr, l, G, l < L, K, BLOCK_K)
    best = tl.full([BLOCK_C, BLOCK_C], float("-inf"), tl.float32)
    arg = tl.zeros([BLOCK_C, BLOCK_C], tl.int32)
    column = tl.arange(0, BLOCK_C)
    for m0 in tl.range(0, L, BLOCK_C, num_stages=1):
        m = m0 + column
        founds = tl.load(rank_ptr + m, mask=m < L, other=2147483647) < founded
        other = load_tokens(k_ptr, m, G, m < L, K, BLOCK_K)
        likeness = tl.dot(key, tl.trans(other), input_precision=PRECISION)
        better = founds[None, :] & (likeness > best)
        best = tl.where(better, likeness, best)
        arg = tl.where(better, m0, arg)
    top = tl.max(best, 1)
    return -1 - tl.min(tl.where(best == top[:, None], arg + column[None, :], 2147483647), 1)


@triton.jit
def _company(place, l, place_ptr, L, BLOCK_C: tl.constexpr):
    """How many of the chunk's keys went where this one went, and how many of them come later in the text."""
    number = tl.zeros([BLOCK_C], tl.int32)
    later = tl.zeros([BLOCK_C], tl.int32)
    for m0 in tl.range(0, L, BLOCK_C, num_stages=1):
        m = m0 + tl.arange(0, BLOCK_C)
        same = place[:, None] == tl.load(place_ptr + m, mask=m < L, other=-2)[None, :]
        number += tl.sum(same.to(tl.int32), 1)
        later += tl.sum((same & (m[None, :] > l[:, None])).to(tl.int32), 1)
    return number, later


@triton.jit
def _commit(
    x_ptr, sum_ptr, mean_ptr, row_ptr, place, row, speaks, old, new, place_ptr, L, G, log2_keep,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, RATE: tl.constexpr, MEAN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums, means and version rows of the centroids for which one of these tokens speaks.

    With a constant rate eta, m keys move the mean to (1-eta)^m mu + (1 - (1-eta)^m) mean(keys), and the sum kept is
    count x mean.
    """
    more = tl.zeros([BLOCK_C, BLOCK], tl.float32)
    for m0 in tl.range(0, L, BLOCK_C, num_stages=1):
        m = m0 + tl.arange(0, BLOCK_C)
        same = place[:, None] == tl.load(place_ptr + m, mask=m < L, other=-2)[None, :]
        x = load_tokens(x_ptr, m, G, m < L, WIDTH, BLOCK)
        more = tl.dot(same.to(x.dtype), x, more, input_precision=PRECISION)
    total = load_rows(sum_ptr, place, speaks, WIDTH, BLOCK)
    if RATE:
        number = new - old
        keep = tl.where(old > 0, tl.exp2(number * log2_keep), 0.0)
        total = total * (keep * new / tl.maximum(old, 1.0))[:, None]
        more = more * ((1 - keep) * new / tl.maximum(number, 1.0))[:, None]
    total += more
    store_rows(sum_ptr, place, speaks, total, WIDTH, BLOCK)
    mean = tl.div_rn(total, tl.maximum(new, 1.0)[:, None])
    store_rows(row_ptr, row, speaks, mean, WIDTH, BLOCK)
    if MEAN:
        store_rows(mean_ptr, place, speaks, mean, WIDTH, BLOCK)
