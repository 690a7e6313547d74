"""OVQ-attention's kernels equal the float64 reference: on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1).

`tests/test_ovq_triton.py` runs this file in a separate process, because the interpreter must be selected before Triton
is imported. The interpreter's run time is proportional to the number of tiles, so tiles here are few and large. It
computes bfloat16 wrongly, so bfloat16 is tested only on a GPU.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ovq.ops import ovq_attention
from ovq.ops.common import document_bounds
from ovq.ops.ovq_attention import reference
from ovq.ops.ovq_attention.spec import Dictionary, OVQSpec
from tests.exact_products import exact_products as exact_products
from tests.helpers import relative_error, spec_of

kernels = importlib.import_module("ovq.ops.ovq_attention.kernels")
assign = importlib.import_module("ovq.ops.ovq_attention.kernels.assign")
plans = importlib.import_module("ovq.ops.ovq_attention.kernels.plan")
tabulate = importlib.import_module("ovq.ops.ovq_attention.kernels.tabulate").tabulate
DEVICE = "cuda" if torch.cuda.is_available() and not assign.INTERPRETED else "cpu"
TOLERANCE = {torch.float32: (1e-5, 1e-4), torch.float16: (1e-2, 2e-2), torch.bfloat16: (1e-2, 2e-2)}
HALF = [torch.float16] if assign.INTERPRETED else [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def fresh_seed() -> None:
    seed = torch.seed() % 2**31
    torch.manual_seed(seed)
    print(f"seed {seed}")  # shown if the test fails


def inputs(
    B: int = 1,
    T: int = 50,
    H: int = 2,
    G: int = 2,
    K: int = 16,
    V: int = 32,
    pending: int = 0,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """q of T tokens, k and v of pending + T, and beta; keys and queries have unit norm."""
    unit = torch.nn.functional.normalize
    q, k = unit(torch.randn(B, T, H, K), dim=-1), unit(torch.randn(B, pending + T, G, K), dim=-1)
    tensors = (q, k, torch.randn(B, pending + T, G, V), 1 + 4 * torch.rand(H))
    return [x.to(DEVICE, torch.float32 if x.dim() == 1 else dtype).requires_grad_() for x in tensors]


def double(tensors: list[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in tensors]


def empty(k: Tensor, v: Tensor, spec: OVQSpec) -> Dictionary:
    (B, _, G, K), V, N = k.shape, v.shape[3], spec.num_centroids
    dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    shapes = ((B, G, N, K), (B, G, N, V), (B, G, N))
    return Dictionary(*(torch.zeros(shape, dtype=dtype, device=k.device) for shape in shapes), 0, 0)


def run(forward, tensors: list[Tensor], spec: OVQSpec, assignment: Tensor | None = None, dictionary=None):
    """(o, new dictionary, assignment, gradients), the last for a fixed random gradient of o."""
    dictionary = dictionary or empty(*tensors[1:3], spec)
    o, new, placed = forward(*tensors, spec, dictionary, assignment)
    direction = torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return o, new, placed, torch.autograd.grad(o, tensors, direction.to(o.device, o.dtype))


def check_against_definition(tensors: list[Tensor], spec: OVQSpec, exact_assignment: bool = True) -> None:
    """Compare assignments; then, given the kernels' assignments, outputs, the new dictionary and all gradients."""
    o, new, placed, grads = run(kernels.forward, tensors, spec)
    want, want_new, want_placed, want_grads = run(reference.forward, double(tensors), spec, placed)
    if exact_assignment:
        assert torch.equal(placed, reference.forward(*double(tensors), spec, empty(*double(tensors)[1:3], spec))[2])
    forward_bar, backward_bar = TOLERANCE[o.dtype]
    assert relative_error(o, want) < forward_bar
    assert (new.size, new.position) == (want_new.size, want_new.position)
    for name in ("key_sum", "value_sum", "count"):
        assert relative_error(getattr(new, name), getattr(want_new, name)) < 1e-5
    for name, got, expected in zip(("q", "k", "v", "beta"), grads, want_grads):
        # dbeta sums terms of both signs, so its error is relative to their size; dq vanishes where all keys are equal.
        terms = (want_grads[0] * tensors[0].detach().double()).norm() if name == "beta" else expected.norm()
        scale = torch.maximum(terms, 1e-2 * want_grads[2].norm())
        assert (got.double() - expected).norm() < backward_bar * scale, name


@pytest.mark.parametrize(
    "shape, N, L",
    [
        pytest.param({"T": 50, "B": 2, "H": 1, "G": 1}, 24, 16, id="partial last chunk"),
        pytest.param({"T": 40, "H": 4, "pending": 5}, 40, 16, id="grouped heads and pending keys"),
        pytest.param({"T": 230, "H": 1, "G": 1}, 150, 100, id="several tiles, none of them full"),
        pytest.param({"T": 7}, 24, 16, id="shorter than a chunk"),
        pytest.param({"T": 32, "K": 96, "V": 32}, 300, 32, id="one chunk, padded width"),
        pytest.param({"T": 600, "H": 1, "G": 1, "V": 16}, 40, 512, id="a chunk of many tiles"),
        pytest.param({"T": 48, "K": 32, "V": 128}, 1, 16, id="one centroid"),
    ],
)
def test_outputs_assignments_and_gradients_equal_the_reference(shape: dict, N: int, L: int) -> None:
    check_against_definition(inputs(**shape), OVQSpec(N, L))


@pytest.mark.parametrize(
    "variant",
    [
        {"seeding": "random", "seed": 5},
        {"first_chunk": "nearest"},
        {"step": 0.3},
        {"step": 1.0},
        {"assign_on": "key_value"},
        {"growth": "linear", "growth_tokens": 40},
    ],
    ids=str,
)
def test_variants_equal_the_reference(variant: dict) -> None:
    check_against_definition(inputs(H=1, G=1), spec_of(24, 16, **variant))


@pytest.mark.parametrize("variant", [{"first_chunk": "nearest"}, {"seeding": "random"}, {"step": 0.3}], ids=str)
def test_variants_equal_the_reference_in_a_chunk_of_several_tiles(variant: dict) -> None:
    """The keys of such a chunk are assigned through memory, not in registers."""
    check_against_definition(inputs(T=330, H=1, G=1), spec_of(100, 160, **variant))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_stays_within_its_tolerances(dtype: torch.dtype) -> None:
    check_against_definition(inputs(T=150, H=2, G=1, dtype=dtype), OVQSpec(90, 64), exact_assignment=False)


@pytest.mark.parametrize("distinct", [1, 5])
def test_ties_go_to_the_lowest_centroid_and_the_first_key(distinct: int) -> None:
    """Keys that repeat exactly, on a grid where every sum, mean and product is exact in any dtype."""
    q, k, v, beta = inputs(T=70)
    pool = torch.randint(0, 2, (distinct, k.shape[3]), device=DEVICE) * 0.5 - 0.25
    k = pool[torch.randint(0, distinct, k.shape[:3], device=DEVICE)].requires_grad_()
    check_against_definition([q, k, v, beta], OVQSpec(200, 16))


@pytest.mark.parametrize("splits", [2, 3, 7])
def test_programs_that_share_a_head_change_no_bit(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with more programs than blocks of centroids, so that some own none."""
    tensors, spec = inputs(T=300, H=1, G=1), OVQSpec(400, 100)
    with torch.no_grad():
        alone = kernels.forward(*tensors, spec, empty(*tensors[1:3], spec))
        monkeypatch.setattr(assign, "splits", lambda walks, device, blocks: splits)
        together = kernels.forward(*tensors, spec, empty(*tensors[1:3], spec))
    assert alone[1].size > 2 * 64  # several blocks
    assert torch.equal(alone[0], together[0]) and torch.equal(alone[2], together[2])
    assert all(torch.equal(getattr(alone[1], x), getattr(together[1], x)) for x in ("key_sum", "value_sum", "count"))


@pytest.mark.parametrize("L", [16, 160])
def test_a_given_assignment_is_used(L: int) -> None:
    """An arbitrary assignment that founds all centroids and differs from the one that the kernels would choose."""
    tensors, spec = inputs(T=3 * L + 5, H=1, G=1), OVQSpec(40, L)
    given = torch.full((1, 1, 3 * L + 5), -1, dtype=torch.int32)
    for i in range(3):
        size, after = spec.size_at(i * L), spec.size_at(i * L + L)
        chosen = torch.cat([torch.arange(size, after), torch.randint(0, after, (L - after + size,))])
        given[0, 0, i * L : i * L + L] = chosen
    given = given.to(DEVICE)
    o, new, placed, grads = run(kernels.forward, tensors, spec, given)
    want, want_new, _, want_grads = run(reference.forward, double(tensors), spec, given)
    assert torch.equal(placed, given)
    assert relative_error(o, want) < 1e-5 and relative_error(new.key_sum, want_new.key_sum) < 1e-5
    assert all(relative_error(x, y) < 1e-4 for x, y in zip(grads[:3], want_grads))


@pytest.mark.parametrize("N", [1, 20])
def test_nan_stays_in_its_head(N: int) -> None:
    """The trainer skips a step with NaN; until then the NaN must not spread to other heads."""
    spec, tensors = OVQSpec(N, 16), [x.detach() for x in inputs(T=50)]
    whole = kernels.forward(*tensors, spec, empty(*tensors[1:3], spec))
    tensors[1][:, 3, 0] = float("nan")
    o, new, placed = kernels.forward(*tensors, spec, empty(*tensors[1:3], spec))
    assert o[:, :, 0].isnan().any() and placed[:, :, :48].ge(0).all() and placed.lt(max(N, 1)).all()
    assert torch.equal(o[:, :, 1], whole[0][:, :, 1]) and torch.equal(placed[:, 1], whole[2][:, 1])
    assert torch.equal(new.key_sum[:, 1], whole[1].key_sum[:, 1])


def test_nothing_is_read_before_it_is_written_and_repeats_are_bit_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second run is bit-equal although every buffer starts as NaN (integers: as 1, a valid index)."""
    tensors, spec = inputs(T=45, pending=4, H=4), OVQSpec(30, 16)
    first = run(kernels.forward, tensors, spec)
    poisoned = 0

    def poison(make):
        def poisoned_make(*args, **kwargs) -> Tensor:
            nonlocal poisoned
            poisoned += 1
            x = make(*args, **kwargs)
            return x.fill_(float("nan") if x.is_floating_point() else 1)

        return poisoned_make

    monkeypatch.setattr(Tensor, "new_empty", poison(Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    again = run(kernels.forward, tensors, spec)
    assert poisoned > 10
    assert torch.equal(first[0], again[0]) and torch.equal(first[2], again[2])
    assert all(torch.equal(getattr(first[1], name), getattr(again[1], name)) for name in ("key_sum", "count"))
    assert all(torch.equal(x, y) for x, y in zip(first[3], again[3]))


@pytest.mark.parametrize("variant", [{}, {"step": 0.3, "assign_on": "key_value"}, {"seeding": "random"}], ids=str)
def test_pieces_with_carried_state_equal_one_pass(variant: dict) -> None:
    """Pieces of odd lengths and single tokens (decoding). K = V, so shapes cannot reveal swapped keys and values."""
    q, k, v, beta = (x.detach() for x in inputs(T=53, H=4, K=32))
    settings = {"num_centroids": 30, "chunk_size": 16, **variant}
    exact = [x.double() for x in (q, k, v, beta)]
    want, want_state = ovq_attention(*exact, return_state=True, backend="reference", **settings)
    state, pieces = None, []
    for start, end in ((0, 21), (21, 22), (22, 31), (31, 32), (32, 33), (33, 53)):
        part = slice(start, end)
        o, state = ovq_attention(
            q[:, part], k[:, part], v[:, part], beta, state=state, return_state=True, backend="triton", **settings
        )
        pieces.append(o)
    assert relative_error(torch.cat(pieces, dim=1), want) < 1e-5
    assert (state.size, state.position) == (want_state.size, want_state.position)
    for name in ("key_sum", "value_sum", "count", "pending_key", "pending_value"):
        assert relative_error(getattr(state, name), getattr(want_state, name)) < 1e-5


def test_gradients_after_a_carried_state_equal_the_reference() -> None:
    """Keys that join a centroid of an earlier piece receive its later gradient; the earlier piece receives none."""
    spec, (_, k, v, _) = OVQSpec(30, 16), inputs(T=32, V=16)
    with torch.no_grad():
        start = kernels.forward(*inputs(T=32, V=16)[:1], k, v, inputs()[3], spec, empty(k, v, spec))[1]
    exact = Dictionary(*(getattr(start, x).double() for x in ("key_sum", "value_sum", "count")), start.size, 32)
    tensors = inputs(T=40, V=16)
    o, _, placed, grads = run(kernels.forward, tensors, spec, dictionary=start)
    want, _, want_placed, want_grads = run(reference.forward, double(tensors), spec, dictionary=exact)
    assert torch.equal(placed, want_placed)
    assert relative_error(o, want) < 1e-5
    assert all(relative_error(x, y) < 1e-4 for x, y in zip(grads[:3], want_grads[:3]))


@pytest.mark.parametrize(
    "variant, splits", [({}, 2), ({"seeding": "random"}, 1), ({"first_chunk": "nearest", "step": 0.3}, 2)], ids=str
)
def test_packed_documents_equal_documents_alone(variant: dict, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents: shorter than a chunk, of whole chunks, empty, and with a remainder, in one launch of each kernel."""
    monkeypatch.setattr(assign, "splits", lambda walks, device, blocks: splits)
    tensors = inputs(T=120, H=2, G=1)
    bounds = torch.tensor([0, 3, 35, 67, 67, 120], dtype=torch.int32, device=DEVICE)
    settings = {"num_centroids": 20, "chunk_size": 16, "cu_seqlens": bounds, **variant}
    got, _ = ovq_attention(*tensors, backend="triton", **settings)
    exact = double(tensors)
    want, _ = ovq_attention(*exact, backend="reference", **settings)
    assert relative_error(got, want) < 1e-5
    grads, want_grads = torch.autograd.grad(got.sum(), tensors), torch.autograd.grad(want.sum(), exact)
    assert all(relative_error(x, y) < 1e-4 for x, y in zip(grads[:3], want_grads))
    assert (grads[3] - want_grads[3]).norm() < 1e-4 * (want_grads[0] * exact[0]).norm()


@pytest.mark.parametrize("bounds", [(0, 40, 30, 60), (1, 60), (0, 50), (0, 70)], ids=str)
def test_invalid_bounds_are_rejected(bounds: tuple[int, ...]) -> None:
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the 60 tokens"):
        ovq_attention(*inputs(T=60), num_centroids=20, chunk_size=16, cu_seqlens=cu_seqlens, backend="triton")


def test_bounds_are_read_back_once_for_all_layers_and_again_when_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inference-mode tensors, which do not track changes, are read back every time."""
    read, tolist = [], Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda x: read.append(1) or tolist(x))
    bounds = torch.tensor([0, 20, 60], dtype=torch.int32, device=DEVICE)
    assert [document_bounds(bounds, 60) for _ in range(3)] == [(0, 20, 60)] * 3 and len(read) == 1
    bounds[1] = 30
    assert document_bounds(bounds, 60) == (0, 30, 60) and len(read) == 2
    with torch.inference_mode():
        bounds = torch.tensor([0, 60], dtype=torch.int32, device=DEVICE)
        settings = {"num_centroids": 20, "chunk_size": 16, "cu_seqlens": bounds, "backend": "triton"}
        o, _ = ovq_attention(*inputs(T=60, H=1, G=1), **settings)
        bounds[0] = 1
        with pytest.raises(ValueError, match="must rise from 0"):
            document_bounds(bounds, 60)
    assert torch.isfinite(o).all()


@pytest.mark.parametrize("bounds", [(0, 300), (0, 7, 71, 300)], ids=str)
def test_a_table_holds_the_last_row_assigned_to_each_centroid(bounds: tuple[int, ...]) -> None:
    """For all chunks and centroids, and for ranges of each."""
    spec, assignment = OVQSpec(90, 16), torch.full((1, 2, 300), -1, dtype=torch.int32)
    plan = plans.make_plan(spec, 0, 0, bounds)
    want = torch.full((2, plan.chunks, plan.all_centroids[1]), -1)
    for first, last in plan.documents:
        for c in range(first, last):
            tokens = slice(plan.starts[c], plan.ends[c])
            assignment[0, :, tokens] = torch.randint(0, int(plan.sizes[c + 1]), (2, 16))
            assignment[0, :, plan.starts[c] : plan.starts[c] + plan.sizes[c + 1] - plan.sizes[c]] = torch.arange(
                plan.sizes[c], plan.sizes[c + 1]
            )  # every centroid is founded
            want[:, c + 1] = want[:, c]
            for g in range(2):
                for t in range(tokens.start, tokens.stop):
                    want[g, c + 1, assignment[0, g, t]] = t
    assignment = assignment.to(DEVICE)
    most = plan.all_centroids[1]
    for chunks in (plan.all_chunks, (3, plan.chunks), (5, 9), (plan.chunks - 1, plan.chunks)):
        for low, high in ((0, most), (0, 10), (10, most)):
            table = tabulate(assignment, plan, chunks, (low, high))
            for c in range(*chunks):
                start, width = int(table.offsets[c - chunks[0]]), min(int(plan.sizes[c]), high) - low
                got = table.rows[0, :, start : start + max(width, 0)]
                assert torch.equal(got.cpu(), want[:, c, low : low + max(width, 0)].int()), (chunks, low, c)


@pytest.mark.parametrize("bounds", [None, (0, 90, 300)], ids=str)
def test_small_tables_change_no_bit(bounds: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some chunks, or some centroids, at a time instead of all at once."""
    tensors, made = inputs(T=300, H=2, G=1), []
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device=DEVICE)

    def run() -> tuple[Tensor, ...]:
        o, _ = ovq_attention(*tensors, num_centroids=400, chunk_size=32, cu_seqlens=cu_seqlens, backend="triton")
        return o, *torch.autograd.grad(o.square().sum(), tensors)

    def counted(*args) -> object:
        made.append(args[2:])
        return tabulate(*args)

    monkeypatch.setattr(kernels, "tabulate", counted)
    whole = run()
    assert len(made) == 2  # forward and backward
    monkeypatch.setattr(plans, "TABLE_SHARE", 1e-3)
    monkeypatch.setattr(plans, "MIN_CHUNKS", 0)
    assert all(torch.equal(x, y) for x, y in zip(run(), whole))
    assert len(set(made)) > 10


def test_operators_match_their_registration() -> None:
    """Schema, fake tensors and autograd formula, by PyTorch's opcheck. (Its test_aot_dispatch_dynamic would also
    compare version rows that belong to no centroid, which nothing writes or reads.)"""
    spec, tensors = OVQSpec(20, 16), inputs(T=20, H=1, G=1)
    start = empty(*tensors[1:3], spec)
    numbers = (0, 0, spec.text)
    torch.library.opcheck(
        torch.ops.ovq.ovq_attention.default,
        (*tensors, start.key_sum, start.value_sum, start.count, None, None, *numbers),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize("bounds", [None, (0, 5, 22)], ids=str)
def test_torch_compile_keeps_the_function_whole(bounds: tuple[int, ...] | None) -> None:
    """Also with packed documents."""

    def mixed(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        settings = {"num_centroids": 20, "chunk_size": 16, "cu_seqlens": cu_seqlens}
        return ovq_attention(2 * q, k, v, beta, backend="triton", **settings)[0].square()

    compiled = torch.compile(mixed, fullgraph=True, backend="aot_eager")
    for T in (40, 23):
        tensors = inputs(T=T, H=1, G=1)
        cu_seqlens = None if bounds is None else torch.tensor([*bounds, T], dtype=torch.int32, device=DEVICE)
        want, got = mixed(*tensors, cu_seqlens), compiled(*tensors, cu_seqlens)
        assert torch.equal(got, want)
        for x, y in zip(torch.autograd.grad(got.sum(), tensors), torch.autograd.grad(want.sum(), tensors)):
            assert torch.equal(x, y)


def test_activation_checkpointing_changes_no_bit() -> None:
    tensors, settings = inputs(T=40, H=1, G=1), {"num_centroids": 20, "chunk_size": 16, "backend": "triton"}
    plain = ovq_attention(*tensors, **settings)[0]
    again = checkpoint(lambda *x: ovq_attention(*x, **settings)[0], *tensors, use_reentrant=False)
    for x, y in zip(torch.autograd.grad(plain.sum(), tensors), torch.autograd.grad(again.sum(), tensors)):
        assert torch.equal(x, y)
