"""Sliding windows and packed documents on CUDA: FlexAttention with block masks made without any T x S matrix.

What a query may see is an interval of keys, from `first` (the window's edge or the document's start) to itself, and
`first` never decreases. So which blocks of keys a block of queries needs, and which of those need no mask, follows from
the interval of its first and its last query alone.

Shapes: B batch, T queries, S keys, Q and M blocks of queries and keys, H, G heads, K key, V value width.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ovq.ops.common import each_document

BLOCK = 128
# Below this many queries the torch form is a handful of small products: nothing is compiled for them.
FEWEST_QUERIES = 128
# Compiled shapes kept. Beyond it torch would run flex uncompiled, with a T x S matrix.
MOST_SHAPES = 64


def takes(backend: str, q_BTHK: Tensor, v_BSGV: Tensor, *, wanted: bool) -> bool:
    """Whether FlexAttention runs these inputs: where it is asked for, or on CUDA where it is `wanted` and can.

    Raises:
        ValueError: backend=flex where it cannot.
    """
    if backend == "flex":
        if reason := _cannot(q_BTHK, v_BSGV):
            raise ValueError(f"backend=flex {reason}; use backend=torch")
        return True
    if backend != "auto" or not wanted or not q_BTHK.is_cuda or q_BTHK.shape[1] < FEWEST_QUERIES:
        return False
    if reason := _cannot(q_BTHK, v_BSGV):
        _note(reason)
        return False
    return True


def _cannot(q_BTHK: Tensor, v_BSGV: Tensor) -> str | None:
    if q_BTHK.dtype == torch.float64:
        return "has no float64 kernels"
    if min(q_BTHK.shape[3], v_BSGV.shape[3]) < 16:
        return f"needs heads of at least 16, got {min(q_BTHK.shape[3], v_BSGV.shape[3])}"
    if not q_BTHK.is_cuda and (q_BTHK.requires_grad or v_BSGV.requires_grad):
        return f"has no gradients on {q_BTHK.device.type}"
    return None


@functools.cache
def _note(reason: str) -> None:
    warnings.warn(f"FlexAttention {reason}: sliding windows and documents run in their torch form", stacklevel=2)


def forward(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    window: int | None,
    cu_seqlens: Tensor | None,
    *,
    fallback: Callable[[Tensor, Tensor, Tensor], Tensor] | None,
) -> Tensor:
    """Attention to the keys of the same document at most `window` - 1 positions back; as `reference.forward`.

    Args:
        fallback: the operator's torch form for one document, run with a warning where FlexAttention fails;
            None: whatever the compiler raises is raised.
    """
    T, S = q_BTHK.shape[1], k_BSGK.shape[1]
    mask = block_mask(T, S, window, cu_seqlens, q_BTHK.device)
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGV))
    grouped = q.shape[1] != k.shape[1]
    if torch.compiler.is_compiling():
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=grouped).transpose(1, 2)
    try:
        return _compiled()(q, k, v, block_mask=mask, enable_gqa=grouped).transpose(1, 2)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        if fallback is None:
            raise
        _note(f"cannot run here ({' '.join(str(error).split())[:200]})")
    if cu_seqlens is None:
        return fallback(q_BTHK, k_BSGK, v_BSGV)
    return each_document(fallback, cu_seqlens, (q_BTHK, k_BSGK, v_BSGV))


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False, recompile_limit=MOST_SHAPES)  # type: ignore[call-overload]


# --- the mask --------------------------------------------------------------------------------------------------------

_of_documents: dict[tuple, tuple[weakref.ref, int, BlockMask]] = {}


def block_mask(T: int, S: int, window: int | None, cu_seqlens: Tensor | None, device: torch.device) -> BlockMask:
    """The mask of a shape, made once; with documents, once for the bounds that all layers of a model share."""
    if torch.compiler.is_compiling():
        return _make(T, S, window, cu_seqlens, device)
    if cu_seqlens is None:
        return _of_shape(T, S, window, device)
    key, version = (T, window, device), 0 if cu_seqlens.is_inference() else cu_seqlens._version
    held = _of_documents.get(key)
    if held is None or held[0]() is not cu_seqlens or held[1] != version:
        with torch.inference_mode(False):  # a mask made in an evaluation must serve training too
            made = _make(T, S, window, cu_seqlens, device)
        _of_documents[key] = held = (weakref.ref(cu_seqlens), version, made)
    return held[2]


@functools.lru_cache(maxsize=MOST_SHAPES)
def _of_shape(T: int, S: int, window: int | None, device: torch.device) -> BlockMask:
    with torch.inference_mode(False):
        return _make(T, S, window, None, device)


def _make(T: int, S: int, window: int | None, cu_seqlens: Tensor | None, device: torch.device) -> BlockMask:
    first_T, number, index, whole_number, whole_index = visible_blocks(T, S, window, cu_seqlens, device)
    offset = S - T

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= first_T[query]) & (key <= query + offset)

    return BlockMask.from_kv_blocks(
        number, index, whole_number, whole_index, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(T, S)
    )


@torch.library.custom_op("ovq::visible_blocks", mutates_args=())
def visible_blocks(
    T: int, S: int, window: int | None, cu_seqlens: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(first key of each query [T]; for each block of queries the number [1, 1, Q] and the indices [1, 1, Q, M] of the
    blocks of keys that it sees in part, and of those that it sees whole).

    One operator, so that a compiled model takes these as they are: compiled into the graph, flex finds no kernel for
    a mask that is not yet in memory.
    """
    offset = S - T
    first_T = _first_key(T, offset, window, cu_seqlens, device)
    # First and last query, first and last key of every block.
    q_low = torch.arange(0, T, BLOCK, device=device)
    q_high = (q_low + BLOCK - 1).clamp_max(T - 1)
    m_low = torch.arange(0, S, BLOCK, device=device)
    m_high = (m_low + BLOCK - 1).clamp_max(S - 1)
    needed_QM = (m_high >= first_T[q_low, None]) & (m_low <= q_high[:, None] + offset)
    whole_QM = (m_low >= first_T[q_high, None]) & (m_high <= q_low[:, None] + offset)
    whole_QM &= (m_low + BLOCK <= S) & (q_low[:, None] + BLOCK <= T)
    return first_T, *_ordered(needed_QM & ~whole_QM), *_ordered(whole_QM)


@visible_blocks.register_fake
def _(T: int, S: int, window: int | None, cu_seqlens: Tensor | None, device: torch.device) -> tuple[Tensor, ...]:
    number = torch.empty(1, 1, -(-T // BLOCK), dtype=torch.int32, device=device)
    index = torch.empty(*number.shape, -(-S // BLOCK), dtype=torch.int32, device=device)
    empty = torch.empty_like
    return torch.empty(T, dtype=torch.int64, device=device), number, index, empty(number), empty(index)


def _first_key(T: int, offset: int, window: int | None, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """int64 [T]: the first key that each query may see."""
    own_T = torch.arange(T, device=device) + offset
    first_T = torch.zeros_like(own_T) if window is None else (own_T - window + 1).clamp_min(0)
    if cu_seqlens is None:
        return first_T
    bounds = cu_seqlens.to(device, torch.int64)
    start_T = bounds[(torch.searchsorted(bounds, own_T, right=True) - 1).clamp_min(0)]
    return torch.maximum(first_T, start_T)


def _ordered(blocks_QM: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, and which: those first, in order."""
    number_Q = blocks_QM.sum(-1, dtype=torch.int32)
    index_QM = blocks_QM.to(torch.int32).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return number_Q[None, None].contiguous(), index_QM[None, None].contiguous()
