"""Sliding windows and packed documents on CUDA: FlexAttention with block masks built without a T x S matrix.

A query attends to an interval of keys, from `first` (the window's edge or the start of its document) to itself, and
`first` never decreases. So the intervals of a query block's first and last query alone determine which key blocks it
needs, and which of those need no mask.

Shapes: B batch, T queries, S keys, Q query blocks, M key blocks, H query heads, G key/value heads, K key width,
V value width.
"""

from __future__ import annotations

import functools
import inspect
import warnings
import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ovq.ops.common import each_document

BLOCK = 128
# With fewer queries the torch form is a handful of small matmuls, not worth compiling a kernel for.
MIN_QUERIES = 128
# Limit on compiled shapes. Past torch's recompile limit flex would run uncompiled, with a T x S matrix.
MAX_SHAPES = 64


def takes(backend: str, q_BTHK: Tensor, v_BSGV: Tensor, *, wanted: bool) -> bool:
    """Whether to run FlexAttention: if the backend demands it, or by default on CUDA if it is supported and either
    `wanted` or needed for deterministic gradients.

    Raises:
        ValueError: backend=flex for inputs that it does not support.
    """
    if backend == "flex":
        if reason := _cannot(q_BTHK, v_BSGV):
            raise ValueError(f"backend=flex {reason}; use backend=torch")
        return True
    # With warn_only, torch's own kernels for CUDA only warn that their gradients are not deterministic.
    wanted = wanted or (torch.are_deterministic_algorithms_enabled() and torch.is_grad_enabled())
    if backend != "auto" or not wanted or not q_BTHK.is_cuda or q_BTHK.shape[1] < MIN_QUERIES:
        return False
    if reason := _cannot(q_BTHK, v_BSGV):
        _warn_once(reason)
        return False
    return True


def _cannot(q_BTHK: Tensor, v_BSGV: Tensor) -> str | None:
    if q_BTHK.dtype == torch.float64:
        return "has no float64 kernels"
    if min(q_BTHK.shape[3], v_BSGV.shape[3]) < 16:
        return f"needs head widths of at least 16, got {min(q_BTHK.shape[3], v_BSGV.shape[3])}"
    if not q_BTHK.is_cuda and (q_BTHK.requires_grad or v_BSGV.requires_grad):
        return f"has no gradients on {q_BTHK.device.type}"
    return None


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"FlexAttention {reason}: sliding windows and packed documents use the torch backend", stacklevel=2)


def forward(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    window: int | None,
    cu_seqlens: Tensor | None,
    *,
    fallback: Callable[[Tensor, Tensor, Tensor], Tensor] | None,
) -> Tensor:
    """As `reference.forward`: attention to the keys of the same document at most `window` - 1 positions back.

    A kernel is compiled for each number of queries and of keys. Without gradients, both are therefore padded at the
    end, which the causal mask hides, until the number of queries is a multiple of BLOCK.

    Args:
        fallback: the operator's torch form for one document, used with a warning if FlexAttention fails; None to let
            the compiler's error propagate.
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGV))
    T = q.shape[2]
    if cu_seqlens is None and not torch.is_grad_enabled():  # a prompt's pieces may have any length
        q, k, v = (F.pad(x, (0, 0, 0, -T % BLOCK)) for x in (q, k, v))
    mask = block_mask(q.shape[2], k.shape[2], window, cu_seqlens, q.device)
    grouped = q.shape[1] != k.shape[1]
    if torch.compiler.is_compiling():
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=grouped)[:, :, :T].transpose(1, 2)
    try:
        return _compiled()(q, k, v, block_mask=mask, enable_gqa=grouped)[:, :, :T].transpose(1, 2)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        if fallback is None:
            raise
        _warn_once(f"cannot run here ({' '.join(str(error).split())[:200]})")
    if cu_seqlens is None:
        return fallback(q_BTHK, k_BSGK, v_BSGV)
    return each_document(fallback, cu_seqlens, (q_BTHK, k_BSGK, v_BSGV))


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        return torch.compile(flex_attention, dynamic=False, recompile_limit=MAX_SHAPES)  # type: ignore[call-overload]
    torch._dynamo.config.recompile_limit = max(MAX_SHAPES, torch._dynamo.config.recompile_limit)  # torch 2.11
    return torch.compile(flex_attention, dynamic=False)


# --- the mask --------------------------------------------------------------------------------------------------------

_document_masks: dict[tuple, tuple[weakref.ref, int, BlockMask]] = {}


def block_mask(T: int, S: int, window: int | None, cu_seqlens: Tensor | None, device: torch.device) -> BlockMask:
    """The mask for a shape, cached; for packed documents, built once per `cu_seqlens`, which all layers share."""
    if torch.compiler.is_compiling():
        return _make(T, S, window, cu_seqlens, device)
    if cu_seqlens is None:
        return _shape_mask(T, S, window, device)
    key, version = (T, window, device), 0 if cu_seqlens.is_inference() else cu_seqlens._version
    cached = _document_masks.get(key)
    if cached is None or cached[0]() is not cu_seqlens or cached[1] != version:
        with torch.inference_mode(False):  # a mask built during evaluation is reused in training
            mask = _make(T, S, window, cu_seqlens, device)
        _document_masks[key] = cached = (weakref.ref(cu_seqlens), version, mask)
    return cached[2]


@functools.lru_cache(maxsize=MAX_SHAPES)
def _shape_mask(T: int, S: int, window: int | None, device: torch.device) -> BlockMask:
    with torch.inference_mode(False):
        return _make(T, S, window, None, device)


def _make(T: int, S: int, window: int | None, cu_seqlens: Tensor | None, device: torch.device) -> BlockMask:
    first_T, count, index, full_count, full_index = visible_blocks(T, S, window, cu_seqlens, device)
    offset = S - T

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= first_T[query]) & (key <= query + offset)

    return BlockMask.from_kv_blocks(
        count, index, full_count, full_index, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(T, S)
    )


@torch.library.custom_op("ovq::visible_blocks", mutates_args=())
def visible_blocks(
    T: int, S: int, window: int | None, cu_seqlens: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(first key of each query [T]; for each query block the count [1, 1, Q] and the indices [1, 1, Q, M] of the key
    blocks that it sees partially, then of those that it sees fully).

    A custom operator, so that to a compiled model its results are opaque tensors: if it were traced into the graph,
    flex would find no kernel for a mask that is not yet in memory.
    """
    offset = S - T
    first_T = _first_key(T, offset, window, cu_seqlens, device)
    # First and last query of every query block, first and last key of every key block.
    q_low = torch.arange(0, T, BLOCK, device=device)
    q_high = (q_low + BLOCK - 1).clamp_max(T - 1)
    m_low = torch.arange(0, S, BLOCK, device=device)
    m_high = (m_low + BLOCK - 1).clamp_max(S - 1)
    needed_QM = (m_high >= first_T[q_low, None]) & (m_low <= q_high[:, None] + offset)
    full_QM = (m_low >= first_T[q_high, None]) & (m_high <= q_low[:, None] + offset)
    full_QM &= (m_low + BLOCK <= S) & (q_low[:, None] + BLOCK <= T)
    return first_T, *_ordered(needed_QM & ~full_QM), *_ordered(full_QM)


@visible_blocks.register_fake
def _(T: int, S: int, window: int | None, cu_seqlens: Tensor | None, device: torch.device) -> tuple[Tensor, ...]:
    count = torch.empty(1, 1, -(-T // BLOCK), dtype=torch.int32, device=device)
    index = torch.empty(*count.shape, -(-S // BLOCK), dtype=torch.int32, device=device)
    empty = torch.empty_like
    return torch.empty(T, dtype=torch.int64, device=device), count, index, empty(count), empty(index)


def _first_key(T: int, offset: int, window: int | None, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """int64 [T]: the first key that each query may attend to."""
    position_T = torch.arange(T, device=device) + offset
    first_T = torch.zeros_like(position_T) if window is None else (position_T - window + 1).clamp_min(0)
    if cu_seqlens is None:
        return first_T
    bounds = cu_seqlens.to(device, torch.int64)
    start_T = bounds[(torch.searchsorted(bounds, position_T, right=True) - 1).clamp_min(0)]
    return torch.maximum(first_T, start_T)


def _ordered(blocks_QM: Tensor) -> tuple[Tensor, Tensor]:
    """The count of marked key blocks of each query block, and the indices of all key blocks, the marked ones first."""
    count_Q = blocks_QM.sum(-1, dtype=torch.int32)
    index_QM = blocks_QM.to(torch.int32).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return count_Q[None, None].contiguous(), index_QM[None, None].contiguous()
