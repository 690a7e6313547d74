"""The table of version rows: table[c, n] is the row of centroid n before chunk c, rebuilt from the assignment.

A token changes one centroid, the one it is assigned to, and a version's row is that of the chunk's last token assigned
to it (numbered after the rows of the initial dictionary). So table[c, n] is the largest row that any earlier chunk of
the document gave to n:

    scatter   table[c + 1, a_t] = max of the rows of the tokens t of chunk c
    fill      a running maximum down the chunks of each document

Building it is not part of the sequential walk, and it need not be kept from the forward to the backward pass. It can be
built for some chunks, or some centroids, at a time, so that its size is bounded however long the text and however large
the dictionary. Its rows are ragged: chunk c has as many entries as there are centroids before it.
"""

# mypy: allow-incomplete-defs

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ovq.ops.ovq_attention.kernels.plan import Plan

# Launch settings on every chip: these kernels do no matmuls and are memory-bound.
SCATTER = {"BLOCK_L": 128, "num_warps": 4, "num_stages": 1}
FILL = {"BLOCK_N": 128, "BLOCK_C": 8, "num_warps": 4, "num_stages": 1}
SCATTER_SCALARS = ["S", "L", "first_chunk", "begin", "low", "high", "initial", "size"]
FILL_SCALARS = ["first_chunk", "low", "high", "initial", "size"]


class Table(NamedTuple):
    """`rows` int32 [B, G, size]: chunk c of `chunks` starts at offsets[c - chunks[0]], with centroid centroids[0]."""

    rows: Tensor
    offsets: Tensor
    chunks: tuple[int, int]
    centroids: tuple[int, int]

    @property
    def size(self) -> int:
        return self.rows.shape[2]


def tabulate(assignment: Tensor, plan: Plan, chunks: tuple[int, int], centroids: tuple[int, int]) -> Table:
    """The table of some chunks and some centroids, from the assignment int32 [B, G, S]."""
    (B, G, S), (first, last), (low, high) = assignment.shape, chunks, centroids
    device = assignment.device
    offsets, size = plan.offsets(chunks, centroids, device)
    rows = torch.full((B, G, size), -1, dtype=torch.int32, device=device)
    table, host = Table(rows, offsets, chunks, centroids), plan.tensors(device)
    if low == high:
        return table
    # Earlier chunks of the first chunk's document count too: their rows are scattered into its entries.
    begin = max(start for start, _ in plan.documents if start <= first)
    if last - 1 > begin:
        scatter_kernel[last - 1 - begin, B * G](
            assignment, host["starts"], host["ends"], offsets, rows,
            S, plan.spec.chunk_size, first, begin, low, high, plan.initial, size, **SCATTER,
        )  # fmt: skip
    documents = plan.document_ranges(chunks, device)
    # The first axis has no limit of 65,535: there may be more documents.
    fill_kernel[len(documents), triton.cdiv(high - low, FILL["BLOCK_N"]), B * G](
        documents, host["sizes"], offsets, rows, first, low, high, plan.initial, size, **FILL,
    )  # fmt: skip
    return table


@triton.jit(do_not_specialize=SCATTER_SCALARS)
def scatter_kernel(
    assignment_ptr,  # [B, G, S] int32
    starts_ptr,  # [chunks] int32
    ends_ptr,  # [chunks] int32
    offsets_ptr,  # [chunks of the table] int32
    table_ptr,  # [B, G, size] int32 in and out
    S,
    L,
    first_chunk,  # of the table
    begin,  # the first chunk that contributes
    low,  # the table's centroids
    high,
    initial,  # rows of the initial dictionary
    size,
    BLOCK_L: tl.constexpr,
):
    """One program per chunk."""
    chunk = begin + tl.program_id(0)
    start = tl.load(starts_ptr + chunk)
    if tl.load(ends_ptr + chunk) - start == L:  # committed
        assignment_ptr += tl.cast(tl.program_id(1), tl.int64) * S + start
        entry = tl.maximum(chunk + 1 - first_chunk, 0)
        table_ptr += tl.cast(tl.program_id(1), tl.int64) * size + tl.load(offsets_ptr + entry)
        for l0 in tl.range(0, L, BLOCK_L, num_stages=1):
            l = l0 + tl.arange(0, BLOCK_L)
            place = tl.load(assignment_ptr + l, mask=l < L, other=-1)
            tl.atomic_max(
                table_ptr + place - low, initial + start + l, mask=(place >= low) & (place < high), sem="relaxed"
            )


@triton.jit(do_not_specialize=FILL_SCALARS)
def fill_kernel(
    documents_ptr,  # [documents of the table, 2] int32: first and last chunk
    sizes_ptr,  # [chunks] int32
    offsets_ptr,  # [chunks of the table] int32
    table_ptr,  # [B, G, size] int32 in and out
    first_chunk,
    low,
    high,
    initial,
    size,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program per block of centroids of a document, over its chunks."""
    table_ptr += tl.cast(tl.program_id(2), tl.int64) * size
    first = tl.load(documents_ptr + 2 * tl.program_id(0))
    last = tl.load(documents_ptr + 2 * tl.program_id(0) + 1)
    n = low + tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_C)
    row = tl.where(n < initial, n, -1)
    for c0 in tl.range(first, last + 1, BLOCK_C, num_stages=1):
        chunk = c0 + c
        valid = chunk <= last
        offset = tl.load(offsets_ptr + chunk - first_chunk, mask=valid, other=0)
        held = tl.load(sizes_ptr + chunk, mask=valid, other=0)
        held = (n[None, :] < held[:, None]) & (n < high)[None, :]
        entry = table_ptr + offset[:, None] + (n - low)[None, :]
        rows = tl.load(entry, mask=held, other=-1)
        # The running maximum over a few chunks, by comparing all pairs of them.
        earlier = (c[None, :] <= c[:, None])[:, :, None]
        rows = tl.maximum(tl.max(tl.where(earlier, rows[None, :, :], -1), 1), row[None, :])
        tl.store(entry, rows, mask=held)
        row = tl.max(rows, 0)
