"""Claims about full and sliding-window attention: equal to the definition in any shape, without a T x T matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.flop_counter import FlopCounterMode

from ovq.ops.attention import flex, full_attention
from ovq.ops.common import first_max
from ovq.ops.sliding_window import sliding_window_attention
from ovq.ops.sliding_window.chunked import banded_attention
from tests.helpers import InsideOperators, Largest, relative_error

# (T, S, H, G, K, V, window): carried keys, grouped heads, unequal widths, windows at and beyond every limit.
SHAPES = [
    (40, 40, 2, 2, 16, 16, 7),
    (33, 39, 4, 1, 8, 8, 7),
    (1, 7, 2, 2, 8, 8, 7),
    (1, 90, 4, 2, 8, 8, 7),
    (50, 50, 2, 2, 8, 8, 64),
    (20, 83, 2, 2, 8, 8, 64),
    (130, 150, 4, 2, 8, 5, 33),
    (65, 128, 2, 1, 5, 8, 64),
    (90, 90, 2, 2, 8, 8, 1),
]


def inputs(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64, batch: int = 2) -> list[Tensor]:
    """q, k, v and a gradient of the output."""
    T, S, H, G, K, V = shape[:6]
    generator = torch.Generator().manual_seed(seed)
    sizes = [(batch, T, H, K), (batch, S, G, K), (batch, S, G, V), (batch, T, H, V)]
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def attention(window: int | None, backend: str = "auto") -> Callable[..., Tensor]:
    if window is None:
        return lambda q, k, v, **more: full_attention(q, k, v, backend=backend, **more)
    return lambda q, k, v, **more: sliding_window_attention(q, k, v, window=window, backend=backend, **more)


def with_gradients(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in tensors[:3]]
    o = function(*leaves)
    return [o, *torch.autograd.grad(o, leaves, tensors[3])]


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("windowed", [False, True], ids=["full", "window"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients_equal_those_of_the_definition(
    shape: tuple[int, ...], windowed: bool, dtype: torch.dtype, tolerance: float
) -> None:
    window = shape[6] if windowed else None
    tensors = inputs(shape, seed=shape[0], dtype=dtype)
    want = with_gradients(attention(window, "reference"), [x.double() for x in tensors])
    got = with_gradients(attention(window), tensors)
    assert got[0].dtype == dtype
    for name, a, b in zip(("output", "q", "k", "v"), got, want):
        # The absolute term is for gradients that are 0, such as that of a query that sees a single key.
        assert torch.isfinite(a).all(), name
        assert (a.double() - b).norm() <= tolerance * b.norm() + tolerance * 1e-3, name


@pytest.mark.parametrize("window", [None, 7, 200], ids=str)
@pytest.mark.parametrize("pieces", [[61, 60, 3, 1, 75], [1, 199], [200]], ids=str)
def test_pieces_with_carried_keys_equal_one_pass(window: int | None, pieces: list[int]) -> None:
    q, k, v, _ = inputs((200, 200, 2, 1, 8, 8), seed=1)
    whole, end, outputs = attention(window)(q, k, v), 0, []
    for piece in pieces:
        start, end = end, end + piece
        first = 0 if window is None else max(0, start - window + 1)
        outputs.append(attention(window)(q[:, start:end], k[:, first:end], v[:, first:end]))
    assert relative_error(torch.cat(outputs, dim=1), whole) < 1e-12


@pytest.mark.parametrize("window", [None, 9], ids=str)
def test_output_before_t_ignores_key_t_to_the_last_bit(window: int | None) -> None:
    q, k, v, _ = inputs((150, 150, 2, 2, 8, 8), seed=2)
    before = attention(window)(q, k, v)
    for t in (0, 31, 32, 149):
        changed_k, changed_v = k.clone(), v.clone()
        changed_k[:, t] += 1e3
        changed_v[:, t] -= 1e3
        after = attention(window)(q, changed_k, changed_v)
        assert torch.equal(after[:, :t], before[:, :t]) and not torch.equal(after[:, t], before[:, t])


@pytest.mark.parametrize("window", [None, 9], ids=str)
def test_packed_documents_equal_documents_alone(window: int | None) -> None:
    tensors = inputs((100, 100, 4, 2, 8, 8), seed=3, batch=1)
    bounds = [0, 1, 34, 34, 90, 100]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    packed = with_gradients(lambda q, k, v: attention(window)(q, k, v, cu_seqlens=cu_seqlens), tensors)
    alone = [
        with_gradients(attention(window), [x[:, a:b] for x in tensors]) for a, b in zip(bounds, bounds[1:]) if b > a
    ]
    for got, want in zip(packed, zip(*alone)):
        assert relative_error(got, torch.cat(want, dim=1)) < 1e-12


@pytest.mark.parametrize("window,T", [(16, 4096), (None, 2048)], ids=str)
def test_no_tensor_of_T_x_T_is_ever_made(window: int | None, T: int) -> None:
    """Forward and backward; full attention with carried keys, for which torch itself would materialise a mask."""
    carried = 0 if window else T
    tensors = inputs((T, T + carried, 1, 1, 16, 16), seed=4, dtype=torch.float32, batch=1)
    with Largest() as largest, InsideOperators():
        with_gradients(attention(window), tensors)
    assert tensors[1].numel() <= largest.elements < T * (T + carried) / 16


def test_the_work_of_a_window_is_linear_in_T() -> None:
    """Forward and backward: seven products of each query with a strip of keys only slightly longer than the window.

    Counted rather than timed: the FLOPs of matrix products are the same on a busy machine.
    """
    window, K = 256, 16

    def flops(T: int) -> int:
        with FlopCounterMode(display=False) as counter, InsideOperators():
            with_gradients(attention(window), inputs((T, T, 1, 1, K, K), seed=5, dtype=torch.float32, batch=1))
        return counter.get_total_flops()

    needed = 7 * 2 * 2048 * window * K
    assert needed <= flops(2048) <= 1.5 * needed
    assert flops(4096) == 2 * flops(2048)


# --- FlexAttention's shapes and masks, which can be checked on a CPU without compiling -------------------------------


@pytest.mark.parametrize(
    "T,S,window,bounds",
    [
        (512, 512, 130, None),
        (300, 300, None, [0, 1, 128, 200, 300]),
        (1000, 1000, 257, [0, 5, 640, 640, 1000]),
        (200, 455, 256, None),
        (129, 129, 1, None),
    ],
)
def test_block_masks_cover_every_visible_key_and_mask_every_hidden_one(
    T: int, S: int, window: int | None, bounds: list[int] | None
) -> None:
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    mask = flex.block_mask(T, S, window, cu_seqlens, torch.device("cpu"))
    query, key = torch.arange(T)[:, None] + S - T, torch.arange(S)
    visible = (key <= query) & (key > query - (window or S))
    if cu_seqlens is not None:
        document = torch.searchsorted(cu_seqlens, torch.arange(T), right=True)
        visible &= document[:, None] == document
    zero = torch.tensor(0)
    assert torch.equal(mask.mask_mod(zero, zero, torch.arange(T)[:, None], key), visible)
    partial = _blocks(mask.kv_num_blocks, mask.kv_indices)
    whole = _blocks(mask.full_kv_num_blocks, mask.full_kv_indices)
    padded = F.pad(visible, (0, -S % flex.BLOCK, 0, -T % flex.BLOCK))
    tiles = padded.unflatten(0, (-1, flex.BLOCK)).unflatten(2, (-1, flex.BLOCK)).transpose(1, 2)
    assert torch.equal(whole, tiles.all(-1).all(-1))
    assert torch.equal(partial, tiles.any(-1).any(-1) & ~whole)


def _blocks(number: Tensor, index: Tensor) -> Tensor:
    """bool [Q, M]: which blocks of keys are listed for each block of queries."""
    listed = torch.arange(index.shape[-1]) < number[0, 0, :, None]
    return torch.zeros_like(listed).scatter(1, index[0, 0].long(), listed)


def test_the_mask_of_documents_is_made_once_for_all_layers_and_again_when_the_bounds_change() -> None:
    cpu = torch.device("cpu")
    bounds = torch.tensor([0, 100, 256], dtype=torch.int32)
    first = flex.block_mask(256, 256, 64, bounds, cpu)
    assert flex.block_mask(256, 256, 64, bounds, cpu) is first
    bounds[1] = 200
    changed = flex.block_mask(256, 256, 64, bounds, cpu)
    query, key, zero = torch.tensor(150), torch.tensor(99), torch.tensor(0)
    assert not first.mask_mod(zero, zero, query, key) and changed.mask_mod(zero, zero, query, key)


def test_operators_can_be_nodes_of_a_compiled_model() -> None:
    """By torch's own check of what compilation relies on: schemas, fake shapes and strides, registered gradients."""
    q, k, v, _ = inputs((70, 75, 4, 2, 8, 5), seed=7, batch=1)
    for x in (q, k, v):
        x.requires_grad_()
    torch.library.opcheck(banded_attention, (q, k, v, 20))
    bounds = torch.tensor([0, 60, 200], dtype=torch.int32)
    torch.library.opcheck(flex.visible_blocks, (200, 200, 50, bounds, torch.device("cpu")))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 40], ids=str)
def test_without_gradients_few_shapes_are_compiled(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = set()

    def uncompiled(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
        shapes.add((q.shape[2], k.shape[2]))
        return flex_attention(q, k, v, **how)

    monkeypatch.setattr(flex, "_compiled", lambda: uncompiled)
    for T in (1, 100, 128, 129, 200):
        q, k, v, _ = (x.float() for x in inputs((T, T + 39, 2, 1, 16, 16), seed=T))
        with torch.no_grad():
            got = attention(window, "flex")(q, k, v)
        assert relative_error(got, attention(window, "reference")(q, k, v)) < 1e-5
    assert shapes == {(128, 128 + 39), (256, 256 + 39)}


def test_torch_without_a_limit_for_one_function_gets_it_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_of_torch_2_11(model: Any, *, dynamic: bool) -> Any:
        return model

    monkeypatch.setattr(torch, "compile", compile_of_torch_2_11)
    with torch._dynamo.config.patch(recompile_limit=8):
        assert flex._compiled.__wrapped__() is flex_attention
        assert torch._dynamo.config.recompile_limit == flex.MAX_SHAPES


# --- bad settings ----------------------------------------------------------------------------------------------------


def test_bad_settings_fail_with_the_legal_values() -> None:
    q, k, v, _ = inputs((10, 10, 4, 2, 16, 16), seed=6, batch=1)
    bounds = torch.tensor([0, 10], dtype=torch.int32)
    with pytest.raises(ValueError, match="legal: auto, reference, torch, flex"):
        full_attention(q, k, v, backend="fast")
    with pytest.raises(ValueError, match="window=0 .* at least 1"):
        sliding_window_attention(q, k, v, window=0)
    with pytest.raises(ValueError, match="shapes do not match"):
        full_attention(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match="10 queries and 9 keys"):
        full_attention(q, k[:, :9], v[:, :9])
    with pytest.raises(ValueError, match="mutually exclusive"):
        full_attention(q[:, 5:], k, v, cu_seqlens=bounds)
    with pytest.raises(ValueError, match="batch of 1"):
        full_attention(*(x.repeat(2, 1, 1, 1) for x in (q, k, v)), cu_seqlens=bounds)
    with pytest.raises(ValueError, match="no float64 kernels; use backend=torch"):
        sliding_window_attention(q, k, v, window=4, backend="flex")
    with pytest.raises(ValueError, match="no gradients on cpu; use backend=torch"):
        sliding_window_attention(q.float().requires_grad_(), k.float(), v.float(), window=4, backend="flex")


@pytest.mark.parametrize("n", [1, 31, 64, 96, 100, 513])
@pytest.mark.parametrize("case", ["random", "ties", "ruled out", "nan"])
def test_first_max_equals_torchs(n: int, case: str) -> None:
    x = torch.randn(3, 7, n)
    if case == "ties":
        x = x.round()
    if case == "ruled out":
        x[..., torch.rand(n) < 0.9] = -torch.inf
    if case == "nan":
        x[0, 0, n // 2] = x[1, 2, n - 1] = x[2, 3, 0] = torch.nan
    best, index = first_max(x)
    want, at = x.max(-1)
    assert torch.equal(index, at) and torch.equal(best.nan_to_num(), want.nan_to_num())
    assert torch.equal(best.isnan(), want.isnan())
    strided = x.transpose(0, 1)
    assert torch.equal(first_max(strided)[1], strided.max(-1).indices)


def test_on_a_gpu_flex_attention_is_used_where_gradients_must_be_deterministic(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch's own kernels for CUDA only warn if they may warn."""

    class OnGPU:
        is_cuda, dtype, shape = True, torch.bfloat16, (1, 256, 2, 64)

    def taken() -> bool:
        return flex.takes("auto", OnGPU(), OnGPU(), wanted=False)  # type: ignore[arg-type]

    assert not taken()
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert taken()
    with torch.no_grad():  # an evaluation needs no kernel for every length
        assert not taken()
