"""Stage A, assignment and update: the only sequential stage, a walk over the chunks of each document and head.

For chunk i with n_i centroids (means mu = S / c):

    propose   best_t = max_n k_t.mu^k_n, arg_t the lowest such n
    found     the new_i keys with the lowest best_t (or the lowest hash) become centroids n_i, n_i + 1, ... in text
              order; all others are assigned to arg_t
    commit    S_n += sum of its keys / values, c_n += their number

and the dictionary's history is written as *version rows*: when a chunk touches a centroid, its new mean key, mean value
and log count are written to the row of the chunk's last token assigned to it, so that all versions together are no
larger than k and v. Which row each centroid has before each chunk follows from the assignment alone (tabulate.py).

A head is walked by `splits` programs. Program p owns the centroids of blocks p, p + splits, ...: it proposes only among
them, and commits only to them. The only barrier lies between the two: after it, every program reads all proposals and
makes the same assignment. (Proposals are double-buffered by chunk parity; the next barrier keeps them from being
overwritten.) A chunk that fits one tile is assigned in registers; a longer one tile by tile, through memory. Sums stay
in float32 in global memory (in effect, in L2); a chunk is added to them by a product with a one-hot matrix.
"""

# mypy: allow-incomplete-defs

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ovq.ops.ovq_attention.kernels.blocks import INTERPRETED, Rows, load_rows, load_tokens, store_rows, token_at
from ovq.ops.ovq_attention.kernels.configs import BUILDS, arch_of, constants, tile_of
from ovq.ops.ovq_attention.kernels.plan import Plan

SCALARS = ["S", "L", "G", "M", "rows", "initial", "documents", "skipped", "most", "splits", "log2_keep"]
LEFT_TO_NCCL = 16  # multiprocessors
several_ranks: bool | None = None  # set in a process that alone tests the kernels for a job of several ranks
CONCURRENT = not INTERPRETED  # Triton's interpreter runs the programs of a launch one after another
NOTHING = tl.constexpr(2147483647)  # larger than every index and rank


def assign(
    k: Tensor, v: Tensor, plan: Plan, key_sum: Tensor, value_sum: Tensor, count: Tensor, forced: Tensor | None
) -> tuple[Tensor, Rows]:
    """Commit all whole chunks to the sums [B, G, M, K or V] and counts [B, G, M], in place.

    M is the capacity; for packed documents, whose sums are concatenated, the number of centroids of all documents.

    Returns:
        The assignment, int32 [B, G, S], -1 in an unfinished chunk; and the version rows: keys [B, G, rows, K], values
        [B, G, rows, V], log2 of the counts [B, G, rows] and, for a constant rate, the counts (else [B, G, 0]). The rows
        of the initial dictionary come first, then one per token.
    """
    (B, S, G, K), V, spec, M = k.shape, v.shape[3], plan.spec, count.shape[2]
    L, initial, device = spec.chunk_size, plan.initial, k.device
    host, empty = plan.tensors(device), k.new_empty
    row_key, row_value = empty(B, G, initial + S, K), empty(B, G, initial + S, V)
    row_log = empty(B, G, initial + S, dtype=torch.float32)
    row_count = torch.empty_like(row_log) if spec.rate is not None else row_log.new_empty(B, G, 0)
    assignment = torch.full((B, G, S), -1, dtype=torch.int32, device=device)
    mean_key = empty(B, G, M, K)
    key_value = spec.assign_on == "key_value" and forced is None
    mean_value = empty(B, G, M, V) if key_value else mean_key  # unused then
    if initial:
        inverse = count[:, :, :initial, None].reciprocal()
        row_key[:, :, :initial] = key_sum[:, :, :initial] * inverse
        row_value[:, :, :initial] = value_sum[:, :, :initial] * inverse
        row_log[:, :, :initial] = count[:, :, :initial].log2()
        if spec.rate is not None:
            row_count[:, :, :initial] = count[:, :, :initial]
        mean_key[:, :, :initial] = row_key[:, :, :initial]
        if key_value:
            mean_value[:, :, :initial] = row_value[:, :, :initial]
    rows = (row_key, row_value, row_log, row_count)
    if not plan.committed:
        return assignment, rows
    documents = len(plan.walks)
    walks = B * G * documents
    columns = tile_of("assign", arch_of(device), k.dtype, K, V).columns
    programs_each = splits(walks, device, -(-int(plan.sizes.max()) // columns))
    flags = {
        "MOST": next(most for most in BUILDS if programs_each <= most),
        "FORCED": forced is not None,
        "RANDOM": spec.seeding == "random",
        "NEAREST": spec.first_chunk == "nearest" and initial == 0,
        "KEY_VALUE": key_value,
        "RATE": spec.rate is not None,
    }
    programs = walks * programs_each
    best, arg = empty(2, programs, L, dtype=torch.float32), empty(2, programs, L, dtype=torch.int32)
    chosen, place = empty(programs, L, dtype=torch.float32), empty(programs, 2, L, dtype=torch.int32)
    arrived = torch.zeros(walks, dtype=torch.int32, device=device)
    settings = constants("assign", arch_of(device), k.dtype, K, V, L, **flags)

    def launch(skipped: int, most: int, propose: bool, commit: bool) -> None:
        assign_kernel[(programs,)](
            k, v, assignment if forced is None else forced.to(torch.int32).contiguous(), host["ranks"],
            host["starts"], host["sizes"], host["walks"],
            key_sum, value_sum, count, mean_key, mean_value, *rows, assignment,
            best, arg, chosen, place, arrived,
            S, L, G, M, initial + S, initial, documents, skipped, most, programs_each, log2_keep(spec.rate),
            PROPOSE=propose, COMMIT=commit, **settings,
            # Programs that share a barrier must all be resident: a cooperative launch guarantees it, whatever other
            # streams occupy.
            launch_cooperative_grid=programs_each > 1,
        )  # fmt: skip

    longest = max(last - first for first, last, _ in plan.walks)
    if programs_each > 1 and not CONCURRENT:
        # The first program would wait at the barrier forever, so each side of the barrier is a launch of its own.
        for chunk in range(longest):
            launch(chunk, chunk + 1, True, False)
            launch(chunk, chunk + 1, False, True)
    else:
        launch(0, longest, True, True)
    return assignment, rows


def splits(walks: int, device: torch.device, blocks: int) -> int:
    """Programs per walk: no more than can run at the same time, since they wait for each other, nor more than the
    blocks of centroids that there will be, as those in excess would only wait.

    With several ranks, some multiprocessors are left to NCCL: otherwise its kernels could not start until the walk has
    ended, and other ranks would wait for them.
    """
    # (On AMD always 1: there, Triton 3.6 does not wait for the stores of all of a program's waves before a release.)
    if device.type != "cuda" or torch.version.hip:
        return 1
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    several = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    if several if several_ranks is None else several_ranks:
        processors -= LEFT_TO_NCCL
    return min(max(processors // walks, 1), max(blocks, 1), BUILDS[-1])


def log2_keep(rate: float | None) -> float:
    """log2(1 - eta) for a constant rate eta; -inf for eta = 1 and for running means."""
    return math.log2(1 - rate) if rate is not None and rate < 1 else -math.inf


@triton.jit(do_not_specialize=SCALARS)
def assign_kernel(
    k_ptr,  # [B, S, G, K]
    v_ptr,  # [B, S, G, V]
    forced_ptr,  # [B, G, S] int32: the assignment to use, if FORCED
    rank_ptr,  # [chunks, L] int32: the keys' ranks in the founding order, if RANDOM
    starts_ptr,  # [chunks] int32: the first token of chunk i
    sizes_ptr,  # [chunks] int32: centroids before chunk i
    walks_ptr,  # [documents, 3] int32: first chunk, the chunk that is not committed, offset in the sums
    key_sum_ptr,  # [B, G, M, K] float32 in and out
    value_sum_ptr,  # [B, G, M, V] float32 in and out
    count_ptr,  # [B, G, M] float32 in and out
    mean_key_ptr,  # [B, G, M, K] in and out: the current means, in the operands' dtype
    mean_value_ptr,  # [B, G, M, V] likewise, if KEY_VALUE
    row_key_ptr,  # [B, G, rows, K] out
    row_value_ptr,  # [B, G, rows, V] out
    row_log_ptr,  # [B, G, rows] float32 out: log2 of the counts
    row_count_ptr,  # [B, G, rows] float32 out, if RATE
    assignment_ptr,  # [B, G, S] int32 out
    best_ptr,  # [2, walks, splits, L] float32: similarities of the proposals
    arg_ptr,  # [2, walks, splits, L] int32: centroids of the proposals
    chosen_ptr,  # [walks * splits, L] float32, private to a program
    place_ptr,  # [walks * splits, 2, L] int32, private to a program
    arrived_ptr,  # [walks] int32, initially 0: arrivals at the barrier
    S,
    L,
    G,
    M,
    rows,
    initial,  # rows of the initial dictionary
    documents,
    skipped,  # chunks of each document to skip
    most,  # end of the chunks of each document to walk, counting the skipped ones
    splits,  # programs per walk, at most MOST
    log2_keep,  # log2(1 - eta)
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_L: tl.constexpr,  # keys per tile when proposing
    BLOCK_C: tl.constexpr,  # keys per tile when founding
    BLOCK_W: tl.constexpr,  # centroids per tile when committing
    BLOCK_N: tl.constexpr,
    ONE: tl.constexpr,  # a chunk fits one commit tile
    MOST: tl.constexpr,
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
    if MOST == 1:
        splits = 1
    walks = tl.num_programs(0) // splits
    walk = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    head = walk // documents
    b = head // G
    g = head % G
    walks_ptr += 3 * (walk % documents)
    first_chunk = tl.load(walks_ptr)
    last_chunk = tl.minimum(tl.load(walks_ptr + 1), first_chunk + most)
    dictionary = tl.cast(head, tl.int64) * M + tl.load(walks_ptr + 2)
    k_ptr += tl.cast(b, tl.int64) * S * G * K
    v_ptr += tl.cast(b, tl.int64) * S * G * V
    forced_ptr += tl.cast(head, tl.int64) * S
    assignment_ptr += tl.cast(head, tl.int64) * S
    key_sum_ptr += dictionary * K
    value_sum_ptr += dictionary * V
    mean_key_ptr += dictionary * K
    mean_value_ptr += dictionary * V
    count_ptr += dictionary
    row_key_ptr += tl.cast(head, tl.int64) * rows * K
    row_value_ptr += tl.cast(head, tl.int64) * rows * V
    row_log_ptr += tl.cast(head, tl.int64) * rows
    row_count_ptr += tl.cast(head, tl.int64) * rows
    chosen_ptr += tl.program_id(0) * L
    arg_own_ptr = place_ptr + tl.program_id(0) * 2 * L
    place_ptr = arg_own_ptr + L
    l = tl.arange(0, BLOCK_C)

    for i in tl.range(first_chunk + skipped, last_chunk, num_stages=1):
        start = tl.load(starts_ptr + i)
        chunk_k = token_at(k_ptr, start, G, g, K)
        chunk_v = token_at(v_ptr, start, G, g, V)
        size = tl.load(sizes_ptr + i)
        founded = tl.load(sizes_ptr + i + 1) - size
        slot = ((i % 2) * walks + walk) * splits

        if PROPOSE and not FORCED:
            for l0 in tl.range(0, L, BLOCK_L, num_stages=1):
                key = l0 + tl.arange(0, BLOCK_L)
                best, arg = _propose(
                    chunk_k, chunk_v, mean_key_ptr, mean_value_ptr, key, L, G, size, split, splits,
                    K, V, BLOCK_K, BLOCK_V, BLOCK_L, BLOCK_N, KEY_VALUE, PRECISION, STAGES,
                )  # fmt: skip
                tl.store(best_ptr + (slot + split) * L + key, best, mask=key < L)
                tl.store(arg_ptr + (slot + split) * L + key, arg, mask=key < L)
            if COMMIT and MOST > 1:
                _barrier(arrived_ptr + walk, splits * (i - first_chunk - skipped + 1))
            else:
                tl.debug_barrier()

        if COMMIT:
            if ONE:
                if FORCED:
                    place = tl.load(forced_ptr + start + l, mask=l < L, other=-1)
                else:
                    best, arg = _choose(best_ptr + slot * L, arg_ptr + slot * L, l, size, L, splits, MOST)
                    rank = _rank(best, l, chosen_ptr, rank_ptr + i * L, L, BLOCK_C, ONE, RANDOM)
                    place = _place(
                        rank, arg, l, place_ptr, chunk_k, size, founded, L, G,
                        K, BLOCK_K, BLOCK_C, BLOCK_W, ONE, NEAREST, PRECISION,
                    )  # fmt: skip
                    if NEAREST and size == 0:
                        # (Registers cannot be indexed, so places are looked up through memory.)
                        tl.store(place_ptr + l, place, mask=l < L)
                        tl.debug_barrier()
                        place = tl.load(place_ptr + tl.where(place < 0, -1 - place, l), mask=l < L, other=0)
                    place = tl.where(l < L, place, -1)
                _settle(
                    place, l, place_ptr, chunk_k, chunk_v, key_sum_ptr, value_sum_ptr, count_ptr, mean_key_ptr,
                    mean_value_ptr, row_key_ptr, row_value_ptr, row_log_ptr, row_count_ptr, assignment_ptr + start,
                    initial + start, split, splits, L, G, log2_keep,
                    K, V, BLOCK_K, BLOCK_V, BLOCK_C, BLOCK_W, BLOCK_N, ONE, KEY_VALUE, RATE, PRECISION,
                )  # fmt: skip
            else:
                if FORCED:
                    for l0 in tl.range(0, L, BLOCK_C, num_stages=1):
                        place = tl.load(forced_ptr + start + l0 + l, mask=l0 + l < L)
                        tl.store(place_ptr + l0 + l, place, mask=l0 + l < L)
                else:
                    for l0 in tl.range(0, L, BLOCK_C, num_stages=1):
                        best, arg = _choose(best_ptr + slot * L, arg_ptr + slot * L, l0 + l, size, L, splits, MOST)
                        tl.store(chosen_ptr + l0 + l, best, mask=l0 + l < L)
                        tl.store(arg_own_ptr + l0 + l, arg, mask=l0 + l < L)
                    tl.debug_barrier()
                    for l0 in tl.range(0, L, BLOCK_C, num_stages=1):
                        best = tl.load(chosen_ptr + l0 + l, mask=l0 + l < L, other=0.0)
                        rank = _rank(best, l0 + l, chosen_ptr, rank_ptr + i * L, L, BLOCK_C, ONE, RANDOM)
                        tl.store(place_ptr + l0 + l, rank, mask=l0 + l < L)
                    tl.debug_barrier()
                    for l0 in tl.range(0, L, BLOCK_C, num_stages=1):
                        rank = tl.load(place_ptr + l0 + l, mask=l0 + l < L, other=NOTHING)
                        arg = tl.load(arg_own_ptr + l0 + l, mask=l0 + l < L, other=0)
                        place = _place(
                            rank, arg, l0 + l, place_ptr, chunk_k, size, founded, L, G,
                            K, BLOCK_K, BLOCK_C, BLOCK_W, ONE, NEAREST, PRECISION,
                        )  # fmt: skip
                        tl.store(arg_own_ptr + l0 + l, place, mask=l0 + l < L)
                    tl.debug_barrier()
                    for l0 in tl.range(0, L, BLOCK_C, num_stages=1):
                        place = tl.load(arg_own_ptr + l0 + l, mask=l0 + l < L, other=0)
                        if NEAREST and size == 0:
                            place = tl.load(arg_own_ptr + tl.where(place < 0, -1 - place, l0 + l), mask=l0 + l < L)
                        tl.store(place_ptr + l0 + l, place, mask=l0 + l < L)
                tl.debug_barrier()
                for l0 in tl.range(0, L, BLOCK_C, num_stages=1):
                    place = tl.load(place_ptr + l0 + l, mask=l0 + l < L, other=-1)
                    _settle(
                        place, l0 + l, place_ptr, chunk_k, chunk_v, key_sum_ptr, value_sum_ptr, count_ptr, mean_key_ptr,
                        mean_value_ptr, row_key_ptr, row_value_ptr, row_log_ptr, row_count_ptr, assignment_ptr + start,
                        initial + start, split, splits, L, G, log2_keep,
                        K, V, BLOCK_K, BLOCK_V, BLOCK_C, BLOCK_W, BLOCK_N, ONE, KEY_VALUE, RATE, PRECISION,
                    )  # fmt: skip
            tl.debug_barrier()


@triton.jit
def _propose(
    k_ptr, v_ptr, mean_key_ptr, mean_value_ptr, l, L, G, size, split, splits,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr, KEY_VALUE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Similarity and index of each key's best centroid among this program's; -inf if it owns none.

    A running best is kept for every column of the tile, so that indices are compared across columns only once, at the
    end.
    """
    key = load_tokens(k_ptr, l, G, l < L, K, BLOCK_K)
    column = tl.arange(0, BLOCK_N)
    best = tl.full([BLOCK_L, BLOCK_N], float("-inf"), tl.float32)
    arg = tl.zeros([BLOCK_L, BLOCK_N], tl.int32)
    if KEY_VALUE:
        value = load_tokens(v_ptr, l, G, l < L, V, BLOCK_V)
        own = _square(key) + _square(value)
    if size == 0:
        # Empty dictionary: the first key is centroid 0, and only the first program proposes it.
        held = (column == 0) & (split == 0)
        mean = load_tokens(k_ptr, column * 0, G, held, K, BLOCK_K)
        similarity = tl.dot(key, tl.trans(mean), input_precision=PRECISION)
        if KEY_VALUE:
            mean_v = load_tokens(v_ptr, column * 0, G, held, V, BLOCK_V)
            similarity = 2 * (similarity + tl.dot(value, tl.trans(mean_v), input_precision=PRECISION))
            similarity = similarity - (_square(mean) + _square(mean_v))[None, :] - own[:, None]
        best = tl.where(held[None, :], similarity, float("-inf"))
    else:
        for n in tl.range(split * BLOCK_N, size, splits * BLOCK_N, num_stages=STAGES):
            held = n + column < size
            mean = load_rows(mean_key_ptr, n + column, held, K, BLOCK_K)
            similarity = tl.dot(key, tl.trans(mean), input_precision=PRECISION)
            if KEY_VALUE:
                mean_v = load_rows(mean_value_ptr, n + column, held, V, BLOCK_V)
                similarity = 2 * (similarity + tl.dot(value, tl.trans(mean_v), input_precision=PRECISION))
                similarity = similarity - (_square(mean) + _square(mean_v))[None, :] - own[:, None]
            better = held[None, :] & (similarity > best)
            best = tl.where(better, similarity, best)
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
    """Wait for all programs of the walk; what they stored before the barrier is visible after it."""
    tl.debug_barrier()
    tl.atomic_add(arrived_ptr, 1, sem="release")
    while tl.atomic_add(arrived_ptr, 0, sem="acquire") < awaited:
        pass
    tl.debug_barrier()


@triton.jit
def _choose(best_ptr, arg_ptr, l, size, L, splits, MOST: tl.constexpr):
    """The best of all programs' proposals for some keys; ties go to the lowest centroid."""
    # All proposals in one load, for a single trip to memory. (.cg: other SMs wrote them, so L1 may be stale.)
    split = tl.arange(0, MOST)
    proposed = (split < splits)[:, None] & (l < L)[None, :]
    offset = split[:, None] * L + l[None, :]
    bests = tl.load(best_ptr + offset, mask=proposed, other=float("-inf"), cache_modifier=".cg")
    args = tl.load(arg_ptr + offset, mask=proposed, other=NOTHING, cache_modifier=".cg")
    best = tl.where(l < L, tl.max(bests, 0), float("inf"))
    arg = tl.min(tl.where(bests == best[None, :], args, NOTHING), 0)
    if size == 0:
        best = tl.where(l == 0, float("-inf"), best)  # the first key always founds centroid 0
        arg = arg * 0  # the only centroid; a NaN would have chosen another
    return best, arg


@triton.jit
def _peer(mine, ptr, m, L, other, ONE: tl.constexpr):
    """The values a tile is compared with: its own if it holds the whole chunk, else those of keys m, from memory."""
    return mine if ONE else tl.load(ptr + m, mask=m < L, other=other)


@triton.jit
def _rank(best, l, chosen_ptr, rank_ptr, L, BLOCK_C: tl.constexpr, ONE: tl.constexpr, RANDOM: tl.constexpr):
    """Each key's rank in the founding order: by similarity, ties by text order; or as given, if RANDOM."""
    if RANDOM:
        rank = tl.load(rank_ptr + l, mask=l < L, other=NOTHING)
    else:
        rank = tl.zeros([BLOCK_C], tl.int32)
        for m0 in tl.range(0, BLOCK_C if ONE else L, BLOCK_C, num_stages=1):
            m = m0 + tl.arange(0, BLOCK_C)
            other = _peer(best, chosen_ptr, m, L, float("inf"), ONE)
            tie = (other[:, None] == best[None, :]) & (m[:, None] < l[None, :])
            # (Past the chunk's end, `other` is infinite and m no smaller than l.)
            rank += tl.sum(((other[:, None] < best[None, :]) | tie).to(tl.int32), 0)
    return rank


@triton.jit
def _place(
    rank, arg, l, rank_ptr, k_ptr, size, founded, L, G,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr, ONE: tl.constexpr,
    NEAREST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Each key's centroid: the keys of lowest rank found new ones, numbered in text order; the others go to `arg`. In
    the first chunk, if NEAREST, a negative place refers to the centroid of the chunk's key `-1 - place`."""
    if founded > 0:
        if NEAREST and size == 0:
            arg = _nearest(rank, l, rank_ptr, k_ptr, founded, L, G, K, BLOCK_K, BLOCK_C, ONE, PRECISION)
        if BLOCK_W < BLOCK_C:  # (not with MOST = 1: there a scan's layout makes everything after it spill)
            founds = ((rank < founded) & (l < L)).to(tl.int32)
            ordinal = tl.cumsum(founds, 0) - founds
        else:
            ordinal = tl.zeros([BLOCK_C], tl.int32)
            for m0 in tl.range(0, BLOCK_C if ONE else L, BLOCK_C, num_stages=1):
                m = m0 + tl.arange(0, BLOCK_C)
                founds = (_peer(rank, rank_ptr, m, L, NOTHING, ONE) < founded) & (m < L)
                ordinal += tl.sum((founds[:, None] & (m[:, None] < l[None, :])).to(tl.int32), 0)
        arg = tl.where(rank < founded, size + ordinal, arg)
    return arg


@triton.jit
def _nearest(
    rank, l, rank_ptr, k_ptr, founded, L, G,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, ONE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """-1 - (index in the chunk of the founding key with the largest dot product); ties go to the lowest index."""
    key = load_tokens(k_ptr, l, G, l < L, K, BLOCK_K)
    best = tl.full([BLOCK_C, BLOCK_C], float("-inf"), tl.float32)
    arg = tl.zeros([BLOCK_C, BLOCK_C], tl.int32)
    column = tl.arange(0, BLOCK_C)
    for m0 in tl.range(0, BLOCK_C if ONE else L, BLOCK_C, num_stages=1):
        m = m0 + column
        founds = (_peer(rank, rank_ptr, m, L, NOTHING, ONE) < founded) & (m < L)
        other = load_tokens(k_ptr, m, G, m < L, K, BLOCK_K)
        similarity = tl.dot(key, tl.trans(other), input_precision=PRECISION)
        better = founds[None, :] & (similarity > best)
        best = tl.where(better, similarity, best)
        arg = tl.where(better, m0, arg)
    top = tl.max(best, 1)
    return -1 - tl.min(tl.where(best == top[:, None], arg + column[None, :], NOTHING), 1)


@triton.jit
def _settle(
    place, l, place_ptr, k_ptr, v_ptr, key_sum_ptr, value_sum_ptr, count_ptr, mean_key_ptr, mean_value_ptr,
    row_key_ptr, row_value_ptr, row_log_ptr, row_count_ptr, assignment_ptr, first_row, split, splits, L, G, log2_keep,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr, ONE: tl.constexpr, KEY_VALUE: tl.constexpr,
    RATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Commit some keys to their centroids; each centroid of this program is written for its last key in the chunk."""
    if split == 0:
        tl.store(assignment_ptr + l, place, mask=l < L)
    owned = (l < L) & ((place // BLOCK_N) % splits == split)
    if BLOCK_W == BLOCK_C:
        # Issue the load before counting the keys.
        old = tl.load(count_ptr + place, mask=owned, other=0.0)
        added = tl.zeros([BLOCK_C], tl.int32)
    later = tl.zeros([BLOCK_C], tl.int32)
    for m0 in tl.range(0, BLOCK_C if ONE else L, BLOCK_C, num_stages=1):
        m = m0 + tl.arange(0, BLOCK_C)
        same = _peer(place, place_ptr, m, L, -2, ONE)[:, None] == place[None, :]
        if BLOCK_W == BLOCK_C:
            added += tl.sum(same.to(tl.int32), 0)
        later += tl.sum((same & (m[:, None] > l[None, :])).to(tl.int32), 0)
    writes = owned & (later == 0)
    if BLOCK_W == BLOCK_C:
        _write(
            place, first_row + l, writes, old, old + added, place, place_ptr, k_ptr, v_ptr, key_sum_ptr, value_sum_ptr,
            count_ptr, mean_key_ptr, mean_value_ptr, row_key_ptr, row_value_ptr, row_log_ptr, row_count_ptr,
            L, G, log2_keep, K, V, BLOCK_K, BLOCK_V, BLOCK_C, BLOCK_W, ONE, KEY_VALUE, RATE, PRECISION,
        )  # fmt: skip
    else:
        # Few of a chunk's keys are the last ones of a centroid of this program: only these write, BLOCK_W at a time.
        order = tl.where(writes, tl.cumsum(writes.to(tl.int32), 0) - 1, -1)
        writers = tl.sum(writes.to(tl.int32), 0)
        for w0 in tl.range(0, writers, BLOCK_W, num_stages=1):
            w = w0 + tl.arange(0, BLOCK_W)
            both = tl.sum(tl.where(order[:, None] == w[None, :], (place * BLOCK_C + l)[:, None], 0), 0)
            own = both // BLOCK_C
            old = tl.load(count_ptr + own, mask=w < writers, other=0.0)
            new = old + tl.sum((place[:, None] == own[None, :]).to(tl.int32), 0)
            _write(
                own, first_row + both % BLOCK_C, w < writers, old, new, place, place_ptr, k_ptr, v_ptr, key_sum_ptr,
                value_sum_ptr, count_ptr, mean_key_ptr, mean_value_ptr, row_key_ptr, row_value_ptr, row_log_ptr,
                row_count_ptr, L, G, log2_keep, K, V, BLOCK_K, BLOCK_V, BLOCK_C, BLOCK_W, ONE, KEY_VALUE, RATE,
                PRECISION,
            )  # fmt: skip


@triton.jit
def _write(
    own, row, writes, old, new, place, place_ptr, k_ptr, v_ptr, key_sum_ptr, value_sum_ptr, count_ptr, mean_key_ptr,
    mean_value_ptr, row_key_ptr, row_value_ptr, row_log_ptr, row_count_ptr, L, G, log2_keep,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr, ONE: tl.constexpr, KEY_VALUE: tl.constexpr, RATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Update all that is stored of the centroids `own`, from counts `old` to `new`; if ONE, `place` is of all keys."""
    _commit(
        k_ptr, key_sum_ptr, mean_key_ptr, row_key_ptr, own, row, writes, old, new, place, place_ptr,
        L, G, log2_keep, K, BLOCK_K, BLOCK_C, BLOCK_W, ONE, RATE, True, PRECISION,
    )  # fmt: skip
    _commit(
        v_ptr, value_sum_ptr, mean_value_ptr, row_value_ptr, own, row, writes, old, new, place, place_ptr,
        L, G, log2_keep, V, BLOCK_V, BLOCK_C, BLOCK_W, ONE, RATE, KEY_VALUE, PRECISION,
    )  # fmt: skip
    tl.debug_barrier()  # several threads may hold the same token: all must have read its old count
    tl.store(count_ptr + own, new, mask=writes)
    tl.store(row_log_ptr + row, tl.log2(new), mask=writes)
    if RATE:
        tl.store(row_count_ptr + row, new, mask=writes)


@triton.jit
def _commit(
    x_ptr, sum_ptr, mean_ptr, row_ptr, own, row, writes, old, new, place, place_ptr, L, G, log2_keep,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr, ONE: tl.constexpr,
    RATE: tl.constexpr, MEAN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Update the sums, means and version rows of the centroids `own`.

    With a constant rate eta, m keys move the mean to (1-eta)^m mu + (1 - (1-eta)^m) mean(keys), and the stored sum is
    count x mean. A mean is the sum times the rounded 1 / count, as in every backend: one division per centroid.
    """
    total = load_rows(sum_ptr, own, writes, WIDTH, BLOCK)
    more = tl.zeros([BLOCK_W, BLOCK], tl.float32)
    for m0 in tl.range(0, BLOCK_C if ONE else L, BLOCK_C, num_stages=1):
        m = m0 + tl.arange(0, BLOCK_C)
        same = own[:, None] == _peer(place, place_ptr, m, L, -2, ONE)[None, :]
        x = load_tokens(x_ptr, m, G, m < L, WIDTH, BLOCK)
        more = tl.dot(same.to(x.dtype), x, more, input_precision=PRECISION)
    if RATE:
        added = new - old
        keep = tl.where(old > 0, tl.exp2(added * log2_keep), 0.0)
        total = total * (keep * new / tl.maximum(old, 1.0))[:, None]
        more = more * ((1 - keep) * new / tl.maximum(added, 1.0))[:, None]
    total += more
    store_rows(sum_ptr, own, writes, total, WIDTH, BLOCK)
    mean = total * tl.div_rn(1.0, tl.maximum(new, 1.0))[:, None]
    store_rows(row_ptr, row, writes, mean, WIDTH, BLOCK)
    if MEAN:
        store_rows(mean_ptr, own, writes, mean, WIDTH, BLOCK)
