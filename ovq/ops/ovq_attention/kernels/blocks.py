"""Helpers shared by the kernels: loads and stores of tiles of tokens and of version rows.

Every tensor is contiguous; widths that are not a power of two are padded by masks (WIDTH is the real width, BLOCK the
padded one). Offsets that grow with tokens x heads are 64-bit, offsets within one head's rows 32-bit.
"""

# mypy: allow-incomplete-defs

import triton
import triton.language as tl
from torch import Tensor

# The version rows: keys, values, log2 of the counts and, for a constant rate, the counts.
Rows = tuple[Tensor, Tensor, Tensor, Tensor]


@triton.jit
def token_at(ptr, token, heads, head, WIDTH: tl.constexpr):
    """Pointer to x[token, head, :] of a [..., heads, WIDTH] tensor, for a scalar `token`."""
    return ptr + (tl.cast(token, tl.int64) * heads + head) * WIDTH


@triton.jit
def load_tokens(ptr, token, heads, valid, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Vectors of tokens, indexed relative to the one at `ptr`, as a [len(token), BLOCK] tile; zero where not valid."""
    d = tl.arange(0, BLOCK)
    mask = valid[:, None] if WIDTH == BLOCK else valid[:, None] & (d < WIDTH)[None, :]
    return tl.load(ptr + (token * heads)[:, None] * WIDTH + d[None, :], mask=mask, other=0.0)


@triton.jit
def store_tokens(ptr, token, heads, valid, x, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Store x, rounded to the tensor's dtype, at tokens indexed relative to the one at `ptr`, where valid."""
    d = tl.arange(0, BLOCK)
    mask = valid[:, None] if WIDTH == BLOCK else valid[:, None] & (d < WIDTH)[None, :]
    tl.store(ptr + (token * heads)[:, None] * WIDTH + d[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_rows(ptr, row, valid, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of one head's [rows, WIDTH] matrix as a [len(row), BLOCK] tile; zero where not valid."""
    d = tl.arange(0, BLOCK)
    mask = valid[:, None] if WIDTH == BLOCK else valid[:, None] & (d < WIDTH)[None, :]
    return tl.load(ptr + row[:, None] * WIDTH + d[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(ptr, row, valid, x, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Store x, rounded to the matrix's dtype, in rows of one head's [rows, WIDTH] matrix, where valid."""
    d = tl.arange(0, BLOCK)
    mask = valid[:, None] if WIDTH == BLOCK else valid[:, None] & (d < WIDTH)[None, :]
    tl.store(ptr + row[:, None] * WIDTH + d[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_numbers(ptr, index, valid, other):
    """ptr[index], float32, for a tile that is multiplied as rows or columns of a matrix; `other` where not valid.

    A one-dimensional load would be repeated by every thread whose part of the product needs the number. The sum over a
    second, masked column gives the load a layout of its own: one thread reads each number and passes it on.
    """
    first = (tl.arange(0, 2) == 0)[None, :]
    pair = tl.load(
        ptr + index[:, None] + tl.arange(0, 2)[None, :], mask=valid[:, None] & first, other=tl.where(first, other, 0.0)
    )
    return tl.sum(pair, 1)


# Whether the kernels run in Triton's interpreter (TRITON_INTERPRET=1 when this module was imported).
INTERPRETED = not isinstance(load_rows, triton.JITFunction)
