"""OVQ-attention in Triton: the GPU kernels behind `backend="triton"`.

Only the assignment is sequential. Stage A (assign.py) walks the chunks and writes the dictionary's history as version
rows; a table of each centroid's current row (tabulate.py) follows from the assignment; prediction (predict.py) and the
backward pass (backward.py) read both and run in parallel over chunks. Decoding one token (decode.py) reads only the
sums. All stages are deterministic.

The stages run in custom operators (forward, backward, decode), so that torch.compile need not split a model at them.

Shapes: B batch, T queries, S tokens, L chunk, H query heads, G key/value heads, N centroids, K and V widths.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor

from ovq.ops.common import document_bounds
from ovq.ops.ovq_attention.kernels.assign import assign
from ovq.ops.ovq_attention.kernels.backward import (
    centroid_block,
    chunk_grad,
    dictionary_grad,
    query_grad,
    query_tiles,
)
from ovq.ops.ovq_attention.kernels.blocks import INTERPRETED
from ovq.ops.ovq_attention.kernels.configs import DTYPES, KEY_VALUE_WIDTHS, MAX_WIDTH, padded
from ovq.ops.ovq_attention.kernels.decode import decode
from ovq.ops.ovq_attention.kernels.plan import Plan, make_plan, most_entries
from ovq.ops.ovq_attention.kernels.predict import predict
from ovq.ops.ovq_attention.kernels.tabulate import tabulate
from ovq.ops.ovq_attention.spec import Dictionary, OVQSpec, parse_spec

MAX_HEADS = 65535  # batch x heads: the limit on a grid's second axis
# A first call copies its plan to the device, which a CUDA graph must not capture (kernels/copies.py), so the
# compiler is kept from capturing it. Whoever captures by hand must make one call first.
NO_GRAPHS = (torch.Tag.cudagraph_unsafe,)

_announced: set[tuple] = set()


def unsupported(q: Tensor, k: Tensor, v: Tensor, spec: OVQSpec) -> str | None:
    """Why the kernels do not support this call, in one line; None if they do."""
    K, V, L = q.shape[3], v.shape[3], spec.chunk_size
    if not q.is_cuda and not INTERPRETED:
        return f"needs a GPU, got a tensor on {q.device.type} (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    nvidia = q.is_cuda and torch.version.hip is None
    major, minor = torch.cuda.get_device_capability(q.device) if nvidia else (0, 0)
    if nvidia and not 8 <= major <= 9:
        return f"is made for sm_80 to sm_90 (docs/kernels.md), and this is sm_{major}{minor}"
    if q.dtype not in DTYPES:
        return f"needs float32, float16 or bfloat16, got {q.dtype}"
    if INTERPRETED and q.dtype == torch.bfloat16:
        return "Triton's interpreter silently computes bfloat16 incorrectly; give it float32 or float16"
    if max(K, V) > MAX_WIDTH:
        return f"needs key and value widths of at most {MAX_WIDTH}, got {K} and {V}"
    if q.shape[0] * q.shape[2] > MAX_HEADS:
        return f"needs at most {MAX_HEADS} heads in a batch, got {q.shape[0]} x {q.shape[2]}"
    if not 16 <= L <= 512:
        return f"needs a chunk_size in 16 .. 512, got {L}"
    if (spec.num_centroids + k.shape[1]) * max(K, V) >= 2**31:
        return f"needs fewer than {2**31 // max(K, V):,} centroids and tokens of this width (offsets have 32 bits)"
    half, float32 = KEY_VALUE_WIDTHS.get(arch := f"sm_{major}{minor}", (MAX_WIDTH, MAX_WIDTH))
    widest = float32 if q.dtype == torch.float32 else half
    if spec.assign_on == "key_value" and max(K, V) > widest:
        dtype = str(q.dtype).removeprefix("torch.")
        return f"needs more shared memory than {arch} has for assign_on=key_value with {dtype} widths above {widest}"
    return None


def forward(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    beta_H: Tensor,
    spec: OVQSpec,
    dictionary: Dictionary,
    assignment: Tensor | None = None,
) -> tuple[Tensor, Dictionary, Tensor]:
    """Outputs of the last T tokens, the dictionary after the last whole chunk, and each token's centroid [B, G, S]."""
    S = k_BSGK.shape[1]
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q_BTHK, k_BSGK, v_BSGV, beta_H))
    if q_BTHK.shape[1] == 1 and spec.chunk_size > S and not needs_grad:
        sums = (dictionary.key_sum, dictionary.value_sum, dictionary.count)
        o = torch.ops.ovq.ovq_attention_decode(q_BTHK, k_BSGK, v_BSGV, beta_H, *sums, dictionary.size)
        return o, dictionary, k_BSGK.new_full((k_BSGK.shape[0], k_BSGK.shape[2], S), -1, dtype=torch.int32)
    o, key_sum, value_sum, count, placed, *_ = torch.ops.ovq.ovq_attention(
        q_BTHK,
        k_BSGK,
        v_BSGV,
        beta_H,
        dictionary.key_sum,
        dictionary.value_sum,
        dictionary.count,
        assignment,
        None,
        dictionary.size,
        dictionary.position,
        spec.text,
    )
    position = dictionary.position + S - S % spec.chunk_size
    size = spec.size_at(position) if spec.chunk_size <= S else dictionary.size
    return o, Dictionary(key_sum, value_sum, count, size, position), placed


def forward_packed(
    q_1THK: Tensor, k_1TGK: Tensor, v_1TGV: Tensor, beta_H: Tensor, spec: OVQSpec, cu_seqlens: Tensor
) -> Tensor:
    """Outputs of packed documents, each with its own dictionary, in as few launches as one document takes.

    Raises:
        ValueError: `cu_seqlens` are not valid bounds of these tokens.
    """
    (_, _, G, K), V = k_1TGK.shape, v_1TGV.shape[3]
    nothing = functools.partial(k_1TGK.new_zeros, dtype=torch.float32)
    sums = (nothing(1, G, 0, K), nothing(1, G, 0, V), nothing(1, G, 0))
    return torch.ops.ovq.ovq_attention(q_1THK, k_1TGK, v_1TGV, beta_H, *sums, None, cu_seqlens, 0, 0, spec.text)[0]


@torch.library.custom_op("ovq::ovq_attention", mutates_args=(), tags=NO_GRAPHS)
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    key_sum: Tensor,
    value_sum: Tensor,
    count: Tensor,
    assignment: Tensor | None,
    cu_seqlens: Tensor | None,
    size: int,
    position: int,
    spec_text: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, the new sums and counts (unchanged for packed documents), the assignment; then what only the backward pass
    reads: log-sum-exp and version rows."""
    spec = parse_spec(spec_text)
    plan = _plan(spec, size, position, cu_seqlens, k.shape[1])
    q, k, v, beta = q.contiguous(), k.contiguous(), v.contiguous(), beta.float().contiguous()
    _announce(q, v, spec.chunk_size)
    key_sum, value_sum, count = (x.clone(memory_format=torch.contiguous_format) for x in (key_sum, value_sum, count))
    sums = (key_sum, value_sum, count)
    (B, T, H, _), V = q.shape, v.shape[3]
    with torch.cuda.device_of(q):
        work = sums if cu_seqlens is None else _empty_sums(k, v, plan)
        placed, rows = assign(k, v, plan, *work, assignment)
        del work
        o, lse = q.new_empty(B, T, H, V), q.new_empty(B, H, T, dtype=torch.float32)
        for chunks in plan.chunk_ranges(_most_entries(q, v, spec)):
            table = None  # free its memory before the next table is allocated
            table = tabulate(placed, plan, chunks, plan.all_centroids)
            predict(q, k, v, beta, plan, rows, table, o, lse)
    return o, *sums, placed, lse, *rows


def _plan(spec: OVQSpec, size: int, position: int, cu_seqlens: Tensor | None, tokens: int) -> Plan:
    bounds = (0, tokens) if cu_seqlens is None else document_bounds(cu_seqlens, tokens)
    return make_plan(spec, size, position, bounds)


def _empty_sums(k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Zero sums and counts for the dictionaries of all documents, at the size that each will reach."""
    (B, _, G, K), V, M = k.shape, v.shape[3], max(plan.sums, 1)
    zeros = functools.partial(k.new_zeros, dtype=torch.float32)
    return zeros(B, G, M, K), zeros(B, G, M, V), zeros(B, G, M)


def _most_entries(q: Tensor, v: Tensor, spec: OVQSpec) -> int:
    (H, K), (S, G, V) = q.shape[2:], v.shape[1:]
    return most_entries(S, H // G, K, V, q.element_size(), spec.num_centroids)


@_forward.register_fake
def _(q, k, v, beta, key_sum, value_sum, count, assignment, cu_seqlens, size, position, spec_text):
    B, T, H, K = q.shape
    S, G, V = k.shape[1], k.shape[2], v.shape[3]
    sums = (x.new_empty(x.shape) for x in (key_sum, value_sum, count))
    return (
        q.new_empty(B, T, H, V),
        *sums,
        q.new_empty(B, G, S, dtype=torch.int32),
        q.new_empty(B, H, T, dtype=torch.float32),
        q.new_empty(B, G, size + S, K),
        q.new_empty(B, G, size + S, V),
        q.new_empty(B, G, size + S, dtype=torch.float32),
        q.new_empty(B, G, 0 if parse_spec(spec_text).rate is None else size + S, dtype=torch.float32),
    )


@torch.library.custom_op("ovq::ovq_attention_backward", mutates_args=(), tags=NO_GRAPHS)
def _backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    o: Tensor,
    assignment: Tensor,
    lse: Tensor,
    row_key: Tensor,
    row_value: Tensor,
    row_log: Tensor,
    row_count: Tensor,
    cu_seqlens: Tensor | None,
    size: int,
    position: int,
    spec_text: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dbeta."""
    spec = parse_spec(spec_text)
    plan = _plan(spec, size, position, cu_seqlens, k.shape[1])
    beta_float = beta.float().contiguous()
    do, q, k, v = do.contiguous(), q.contiguous(), k.contiguous(), v.contiguous()
    rows, (B, _, H, _), V = (row_key, row_value, row_log, row_count), q.shape, v.shape[3]
    with torch.cuda.device_of(q):
        dq, delta = torch.empty_like(q), torch.empty_like(lse)
        dbeta = lse.new_empty(B, H, query_tiles(plan, q, V), q.shape[3])
        most, table = _most_entries(q, v, spec), None
        for chunks in plan.chunk_ranges(most):
            table = None  # free its memory before the next table is allocated
            table = tabulate(assignment, plan, chunks, plan.all_centroids)
            query_grad(q, k, v, beta_float, plan, rows, table, o, do, lse, delta, dq, dbeta)
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        for centroids in plan.centroid_ranges(most, centroid_block(q, V, spec)):
            if table is None or (table.chunks, table.centroids) != (plan.all_chunks, centroids):
                table = None
                table = tabulate(assignment, plan, plan.all_chunks, centroids)
            dictionary_grad(q, k, v, beta_float, plan, rows, table, do, lse, delta, dk, dv)
        chunk_grad(q, k, v, beta_float, plan, assignment, do, lse, delta, dk, dv)
    return dq, dk, dv, dbeta.sum((0, 2, 3)).to(beta.dtype)


@_backward.register_fake
def _(do, q, k, v, beta, *_):
    like = torch.contiguous_format
    return tuple(torch.empty_like(x, memory_format=like) for x in (q, k, v, beta))


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, beta, *_ = inputs
    o, key_sum, value_sum, count, *saved = output
    # No gradient flows through the state or the outputs that only the backward pass reads.
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, beta, o, *saved, inputs[8])
    ctx.settings = inputs[9:]


def _differentiate(ctx, do, *_):
    nothing = (None,) * (5 + len(ctx.settings))
    if do is None:
        return None, None, None, None, *nothing
    return *torch.ops.ovq.ovq_attention_backward(do, *ctx.saved_tensors, *ctx.settings), *nothing


_forward.register_autograd(_differentiate, setup_context=_setup_context)


@torch.library.custom_op("ovq::ovq_attention_decode", mutates_args=())
def _decode(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, key_sum: Tensor, value_sum: Tensor, count: Tensor, size: int
) -> Tensor:
    """o for one query per head; not differentiable."""
    beta = beta.float().contiguous()
    _announce(q, v, 1)
    sums = (key_sum.contiguous(), value_sum.contiguous(), count.contiguous())
    with torch.cuda.device_of(q):
        return decode(q.contiguous(), k.contiguous(), v.contiguous(), beta, *sums, size)


@_decode.register_fake
def _(q, k, v, beta, *_):
    return q.new_empty(*q.shape[:3], v.shape[3])


def _announce(q: Tensor, v: Tensor, rows: int) -> None:
    """Print one line before kernels are compiled, to explain why a first call takes seconds."""
    key = (q.device.type, q.dtype, q.shape[3], v.shape[3], min(padded(rows), 128))
    if INTERPRETED or key in _announced:
        return
    _announced.add(key)
    what = f"{str(q.dtype).removeprefix('torch.')}, widths {q.shape[3]} and {v.shape[3]}"
    print(f"ovq: compiling the OVQ-attention kernels ({what}); takes some seconds, once per machine", file=sys.stderr)
