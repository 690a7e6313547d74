"""A plain FlashAttention-2 forward loop, to calibrate the cost model on, since its rate on a GPU is published.

Full softmax attention without a mask (arXiv 2307.08691, algorithm 1), bfloat16, width 64. It is only compiled ahead of
time (`eval.bench.aot`), and never run.

Shapes: R rows (batch and heads), T tokens, D width.
"""

# mypy: allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl

WIDTH = 64


@triton.jit(do_not_specialize=["T"])
def fa2_kernel(q_ptr, k_ptr, v_ptr, o_ptr, T, scale, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr):
    """Softmax attention of a tile of queries to all keys, BLOCK_N at a time; `scale` includes log2(e)."""
    base = tl.cast(tl.program_id(1), tl.int64) * T * D
    m, d = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, D)
    rows = base + m[:, None] * D + d[None, :]
    q = tl.load(q_ptr + rows, mask=m[:, None] < T, other=0.0)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total, o = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, D], tl.float32)
    for n0 in tl.range(0, T, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        columns = base + n[:, None] * D + d[None, :]
        k = tl.load(k_ptr + columns)
        logit = tl.dot(q, tl.trans(k)) * scale
        new = tl.maximum(highest, tl.max(logit, 1))
        p = tl.exp2(logit - new[:, None])
        keep = tl.exp2(highest - new)
        total = total * keep + tl.sum(p, 1)
        v = tl.load(v_ptr + columns)
        o = tl.dot(p.to(v.dtype), v, o * keep[:, None])
        highest = new
    tl.store(o_ptr + rows, (o / total[:, None]).to(o_ptr.dtype.element_ty), mask=m[:, None] < T)


@dataclass(frozen=True)
class PlainFA2:
    """The kernel's only build, in the form of a `ShippedKernel`."""

    stage: str = "fa2"
    kernel: Any = fa2_kernel
    dtype: torch.dtype = torch.bfloat16
    K: int = WIDTH
    V: int = WIDTH
    chunk_size: int = 128
    attention: bool = False
    signature: dict[str, str] = field(
        default_factory=lambda: {
            **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "o_ptr"), "*bf16"),
            "T": "i32",
            "scale": "fp32",
            "BLOCK_M": "constexpr",
            "BLOCK_N": "constexpr",
            "D": "constexpr",
        }
    )
    constexprs: dict[str, Any] = field(default_factory=lambda: {"BLOCK_M": 128, "BLOCK_N": 64, "D": WIDTH})
    attrs: dict[tuple[int], list] = field(default_factory=lambda: {(i,): [["tt.divisibility", 16]] for i in range(4)})
    options: dict[str, int] = field(default_factory=lambda: {"num_warps": 4, "num_stages": 3})
    flags: dict[str, Any] = field(default_factory=dict)
