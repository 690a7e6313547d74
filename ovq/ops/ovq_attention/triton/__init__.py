"""OVQ-attention in Triton: what `backend="triton"` runs on a GPU.

Only the assignment is sequential. Stage A (assign.py) walks the chunks and writes the dictionary's history as version
rows; prediction (predict.py) and the backward pass (backward.py) read those and run in parallel over chunks. Decoding
one token (decode.py) reads the sums alone. All stages are deterministic.

The stages are two custom operators, forward and backward, so that torch.compile keeps a model whole around them.

Shapes: B batch, T queries, S tokens, L chunk, H query heads, G key/value heads, N centroids, K and V widths.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from ovq.ops.ovq_attention.spec import Dictionary, OVQSpec
from ovq.ops.ovq_attention.triton.assign import assign
from ovq.ops.ovq_attention.triton.backward import chunk_grad, dictionary_grad, query_grad
from ovq.ops.ovq_attention.triton.blocks import INTERPRETED
from ovq.ops.ovq_attention.triton.configs import DTYPES, MAX_WIDTH, padded
from ovq.ops.ovq_attention.triton.decode import decode
from ovq.ops.ovq_attention.triton.plan import make_plan
from ovq.ops.ovq_attention.triton.predict import predict

LATEST_NVIDIA = 9  # compute capability; query_grad in half precision does not build for sm_100 with Triton 3.6

_announced: set[tuple] = set()


def unsupported(q: Tensor, k: Tensor, v: Tensor, spec: OVQSpec) -> str | None:
    """What of this call the kernels cannot do, in a line; None if they can."""
    K, V, L = q.shape[3], v.shape[3], spec.chunk_size
    if not q.is_cuda and not INTERPRETED:
        return f"needs a GPU, got a tensor on {q.device.type} (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    if q.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(q.device)[0] > LATEST_NVIDIA:
        return f"has no tiles for chips after sm_{LATEST_NVIDIA}0 that compile (docs/kernels.md)"
    if q.dtype not in DTYPES:
        return f"needs float32, float16 or bfloat16, got {q.dtype}"
    if INTERPRETED and q.dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 wrongly in silence; give it float32 or float16"
    if max(K, V) > MAX_WIDTH:
        return f"needs key and value widths of at most {MAX_WIDTH}, got {K} and {V}"
    if not 16 <= L <= 512:
        return f"needs a chunk_size in 16 .. 512, got {L}"
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
        dictionary.size,
        dictionary.position,
        *_settings(spec),
    )
    position = dictionary.position + S - S % spec.chunk_size
    size = spec.size_at(position) if spec.chunk_size <= S else dictionary.size
    return o, Dictionary(key_sum, value_sum, count, size, position), placed


def _settings(spec: OVQSpec) -> tuple:
    """A spec as an operator takes it; `_spec` is the inverse."""
    return (
        spec.num_centroids,
        spec.chunk_size,
        spec.growth,
        spec.growth_tokens,
        spec.seeding,
        spec.seed,
        spec.rate or 0.0,
        spec.first_chunk,
        spec.assign_on,
    )


def _spec(
    num_centroids: int,
    chunk_size: int,
    growth: str,
    growth_tokens: int | None,
    seeding: str,
    seed: int,
    rate: float,
    first_chunk: str,
    assign_on: str,
) -> OVQSpec:
    step = rate or "count"
    return OVQSpec(num_centroids, chunk_size, growth, growth_tokens, seeding, seed, step, first_chunk, assign_on)


@torch.library.custom_op("ovq::ovq_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    key_sum: Tensor,
    value_sum: Tensor,
    count: Tensor,
    assignment: Tensor | None,
    size: int,
    position: int,
    num_centroids: int,
    chunk_size: int,
    growth: str,
    growth_tokens: int | None,
    seeding: str,
    seed: int,
    rate: float,
    first_chunk: str,
    assign_on: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, the new sums and counts, the assignment; then what the backward pass needs: log-sum-exp, rows and table."""
    spec = _spec(num_centroids, chunk_size, growth, growth_tokens, seeding, seed, rate, first_chunk, assign_on)
    plan = make_plan(spec, size, position, k.shape[1])
    q, k, v, beta = q.contiguous(), k.contiguous(), v.contiguous(), beta.float().contiguous()
    _announce(q, v, chunk_size)
    key_sum, value_sum, count = (x.clone(memory_format=torch.contiguous_format) for x in (key_sum, value_sum, count))
    sums = (key_sum, value_sum, count)
    with torch.cuda.device_of(q):
        placed, rows = assign(k, v, plan, *sums, assignment)
        o, lse = predict(q, k, v, beta, plan, rows)
    return o, *sums, placed, lse, *rows


@_forward.register_fake
def _(q, k, v, beta, key_sum, value_sum, count, assignment, size, position, *settings):
    plan = make_plan(_spec(*settings), size, position, int(k.shape[1]))
    B, T, H, K = q.shape
    S, G, V = k.shape[1], k.shape[2], v.shape[3]
    sums = (x.new_empty(x.shape) for x in (key_sum, value_sum, count))
    return (
        q.new_empty(B, T, H, V),
        *sums,
        q.new_empty(B, G, S, dtype=torch.int32),
        q.new_empty(B, H, T, dtype=torch.float32),
        q.new_empty(B, G, plan.rows, K),
        q.new_empty(B, G, plan.rows, V),
        q.new_empty(B, G, plan.rows, dtype=torch.float32),
        q.new_empty(B, G, plan.table_size, dtype=torch.int32),
    )


@torch.library.custom_op("ovq::ovq_attention_backward", mutates_args=())
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
    row_count: Tensor,
    table: Tensor,
    size: int,
    position: int,
    num_centroids: int,
    chunk_size: int,
    growth: str,
    growth_tokens: int | None,
    seeding: str,
    seed: int,
    rate: float,
    first_chunk: str,
    assign_on: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dbeta."""
    spec = _spec(num_centroids, chunk_size, growth, growth_tokens, seeding, seed, rate, first_chunk, assign_on)
    plan = make_plan(spec, size, position, k.shape[1])
    beta_float = beta.float().contiguous()
    do, q, k, v = do.contiguous(), q.contiguous(), k.contiguous(), v.contiguous()
    rows = (row_key, row_value, row_count, table)
    with torch.cuda.device_of(q):
        dq, delta, dbeta = query_grad(q, k, v, beta_float, plan, rows, o, do, lse)
        dk, dv = dictionary_grad(q, k, v, beta_float, plan, rows, do, lse, delta)
        chunk_grad(q, k, v, beta_float, plan, assignment, table, do, lse, delta, dk, dv)
    return dq, dk, dv, dbeta.to(beta.dtype)


@_backward.register_fake
def _(do, q, k, v, beta, *_):
    like = torch.contiguous_format
    return tuple(torch.empty_like(x, memory_format=like) for x in (q, k, v, beta))


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, beta, *_ = inputs
    o, key_sum, value_sum, count, *saved = output
    # No gradient flows through the state, and none into what only the backward pass reads.
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, beta, o, *saved)
    ctx.numbers = inputs[8:]


def _differentiate(ctx, do, *_):
    nothing = (None,) * (4 + len(ctx.numbers))
    if do is None:
        return None, None, None, None, *nothing
    return *torch.ops.ovq.ovq_attention_backward(do, *ctx.saved_tensors, *ctx.numbers), *nothing


_forward.register_autograd(_differentiate, setup_context=_setup_context)


@torch.library.custom_op("ovq::ovq_attention_decode", mutates_args=())
def _decode(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, key_sum: Tensor, value_sum: Tensor, count: Tensor, size: int
) -> Tensor:
    """o of one query a head; no gradient."""
    beta = beta.float().contiguous()
    _announce(q, v, 1)
    sums = (key_sum.contiguous(), value_sum.contiguous(), count.contiguous())
    with torch.cuda.device_of(q):
        return decode(q.contiguous(), k.contiguous(), v.contiguous(), beta, *sums, size)


@_decode.register_fake
def _(q, k, v, beta, *_):
    return q.new_empty(*q.shape[:3], v.shape[3])


def _announce(q: Tensor, v: Tensor, rows: int) -> None:
    """One line where kernels are about to be compiled: a first call takes seconds, and nobody should wonder why."""
    key = (q.device.type, q.dtype, q.shape[3], v.shape[3], min(padded(rows), 128))
    if INTERPRETED or key in _announced:
        return
    _announced.add(key)
    what = f"{str(q.dtype).removeprefix('torch.')}, widths {q.shape[3]} and {v.shape[3]}"
    print(f"ovq: compiling the OVQ-attention kernels ({what}); some seconds, once a machine", file=sys.stderr)
