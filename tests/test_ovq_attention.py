"""Claims about OVQ-attention: the fast form equals the reference, which equals a second one written from the formulas.

Inputs differ on every run; a failure prints the seed, and OVQ_TEST_SEED=<seed> reproduces it.
"""

from __future__ import annotations

import math
import os
import random
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from ovq.mixers.base import detach_state
from ovq.ops import OVQState, ovq_attention
from ovq.ops.ovq_attention import chunked as fast
from ovq.ops.ovq_attention import loops, pieces, reference
from ovq.ops.ovq_attention.spec import Dictionary, OVQSpec
from ovq.ops.ovq_attention.table import LARGE
from ovq.ops.parallel import run_pieces
from ovq.ops.position_hash import position_hash
from tests.helpers import relative_error, spec_of

SEED = int(os.environ.get("OVQ_TEST_SEED", random.SystemRandom().randrange(10**6)))
NOTE = f"OVQ_TEST_SEED={SEED}"

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "random": {"seeding": "random", "seed": 5},
    "linear": {"growth": "linear", "growth_tokens": 40},
    "constant step": {"step": 0.3},
    "step of one": {"step": 1},
    "nearest": {"first_chunk": "nearest"},
    "key and value": {"assign_on": "key_value"},
    "all at once": {
        "seeding": "random",
        "growth": "linear",
        "growth_tokens": 30,
        "step": 0.5,
        "first_chunk": "nearest",
        "assign_on": "key_value",
    },
}

# B, T, H, G, K, V, N, L: whole and partial chunks, less than a chunk, K != V, grouped heads, one centroid, chunks of 1.
SHAPES = [
    (2, 45, 4, 2, 8, 6, 12, 8),
    (1, 40, 2, 2, 5, 9, 64, 8),
    (1, 5, 3, 1, 4, 4, 16, 8),
    (2, 23, 6, 2, 3, 7, 1, 5),
    (1, 19, 2, 1, 4, 3, 7, 1),
    (3, 33, 1, 1, 16, 2, 5, 16),
]


def make_inputs(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k (unit norm), v, beta."""
    B, T, H, G, K, V = shape[:6]
    g = torch.Generator().manual_seed(SEED + seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, dtype=torch.float64)

    q, k = F.normalize(normal(B, T, H, K), dim=-1), F.normalize(normal(B, T, G, K), dim=-1)
    beta = 1 + 4 * torch.rand(H, generator=g, dtype=torch.float64)
    return [q.to(dtype), k.to(dtype), normal(B, T, G, V).to(dtype), beta.to(dtype if dtype.itemsize > 2 else None)]


def empty(k: Tensor, v: Tensor, N: int) -> Dictionary:
    B, _, G, K = k.shape
    work = torch.float64 if k.dtype == torch.float64 else torch.float32
    zeros = torch.zeros(B, G, N, K + v.shape[3] + 1, dtype=work).split([K, v.shape[3], 1], dim=-1)
    return Dictionary(zeros[0], zeros[1], zeros[2][..., 0], 0, 0)


def run(
    backend: ModuleType,
    inputs: list[Tensor],
    spec: OVQSpec,
    *,
    dtype: torch.dtype | None = None,
    forced: Tensor | None = None,
    dictionary: Dictionary | None = None,
) -> dict[str, Tensor]:
    """Everything a backend returns: output, assignments, the new dictionary, and the gradients of a random loss."""
    leaves = [x.detach().to(dtype or x.dtype, copy=True).requires_grad_() for x in inputs]
    q, k, v, beta = leaves
    held = dictionary or empty(k, v, spec.num_centroids)
    o, new, a = backend.forward(q, k, v, beta, spec, held, forced)
    assert a.dtype == torch.int32 and o.dtype == q.dtype
    weight = torch.randn(o.shape, generator=torch.Generator().manual_seed(SEED + 1), dtype=torch.float64)
    (o.double() * weight).sum().backward()
    got = {"o": o, "key_sum": new.key_sum, "value_sum": new.value_sum, "count": new.count}
    got |= {f"d{name}": leaf.grad for name, leaf in zip(("q", "k", "v", "beta"), leaves)}  # type: ignore[misc]
    return got | {"a": a, "place": torch.tensor([new.size, new.position])}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], *, output: float, grad: float) -> None:
    assert torch.equal(got["a"], want["a"]) and torch.equal(got["place"], want["place"]), NOTE
    assert torch.equal(got["count"].double(), want["count"].double()), NOTE
    for name in ("o", "key_sum", "value_sum", "dq", "dk", "dv", "dbeta"):
        bar = grad if name.startswith("d") else output
        error = relative_error(got[name], want[name])
        assert error < bar, f"{name} is off by {error:.1e} (bar {bar:.0e}); {NOTE}"


def by_formula(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, beta: float, N: int, L: int, **options: Any
) -> tuple[np.ndarray, list[int]]:
    """One head, token by token and centroid by centroid, written only from the design's formulas."""
    T = len(k)
    mu_k: list[np.ndarray] = []
    mu_v: list[np.ndarray] = []
    count: list[int] = []
    outputs, assigned = [], []

    def similarity(t: int, key: np.ndarray, value: np.ndarray) -> float:
        if options.get("assign_on", "key") == "key":
            return float(k[t] @ key)
        return -float(((k[t] - key) ** 2).sum() + ((v[t] - value) ** 2).sum())

    for start in range(0, T, L):
        tokens = list(range(start, min(start + L, T)))
        for t in tokens:
            pairs = [(beta * q[t] @ key + math.log(c), value) for key, value, c in zip(mu_k, mu_v, count)]
            pairs += [(beta * q[t] @ k[s], v[s]) for s in tokens if s <= t]
            weights = np.exp([logit for logit, _ in pairs])
            outputs.append(sum(w * value for w, (_, value) in zip(weights, pairs)) / weights.sum())
        if len(tokens) < L:
            return np.array(outputs), assigned + [-1] * len(tokens)
        end = start + L
        size = math.floor(end * N / (end + N))
        if options.get("growth") == "linear":
            size = math.floor(N * min(1, end / options["growth_tokens"]))
        new = min(max(size, 1), end) - len(count)
        first = not count
        seen = [(k[0], v[0])] if first else list(zip(mu_k, mu_v))
        score = {t: [similarity(t, key, value) for key, value in seen] for t in tokens}
        home = {t: int(np.argmax(score[t])) for t in tokens}  # argmax takes the first of equal values
        rank = {t: max(score[t]) for t in tokens}
        if options.get("seeding") == "random":
            rank = {t: float(position_hash(options.get("seed", 0), torch.tensor(t))) for t in tokens}
        candidates = sorted(tokens, key=lambda t: (rank[t], t))
        if first:
            candidates = [0] + [t for t in candidates if t != 0]
        founders = sorted(candidates[:new])
        if first and options.get("first_chunk") == "nearest":
            home = {t: int(np.argmax([k[t] @ k[s] for s in founders])) for t in tokens}
        for place, t in enumerate(founders):
            home[t] = len(count) + place
        held = len(count)
        for n in range(held + new):
            mine = [t for t in tokens if home[t] == n]
            mean_k, mean_v = (np.mean([x[t] for t in mine], axis=0) if mine else 0.0 for x in (k, v))
            m = len(mine)
            if n >= held:
                mu_k, mu_v, count = [*mu_k, mean_k], [*mu_v, mean_v], [*count, m]
                continue
            step = options.get("step", "count")
            rate = m / (count[n] + m) if step == "count" else 1 - (1 - step) ** m
            mu_k[n], mu_v[n] = (1 - rate) * mu_k[n] + rate * mean_k, (1 - rate) * mu_v[n] + rate * mean_v
            count[n] += m
        assigned += [home[t] for t in tokens]
    return np.array(outputs), assigned


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_equals_the_formulas(variant: str, shape: tuple[int, ...]) -> None:
    *_, H, G, _, _, N, L = shape
    inputs = make_inputs(shape, seed=2)
    q, k, v, beta = inputs
    spec = spec_of(N, L, **VARIANTS[variant])
    o, _, a = reference.forward(*inputs, spec, empty(k, v, N))
    for b in range(shape[0]):
        for h in range(H):
            g = h * G // H
            head = [x.numpy() for x in (q[b, :, h], k[b, :, g], v[b, :, g])]
            want, assigned = by_formula(*head, float(beta[h]), N, L, **VARIANTS[variant])
            assert a[b, g].tolist() == assigned, NOTE
            assert relative_error(o[b, :, h], torch.from_numpy(want)) < 1e-12, NOTE


def test_five_tokens_equal_a_computation_by_hand() -> None:
    """beta = log 2, so a dot product of 1 has weight 2 and one of 0 weight 1; chunks of 2, capacity 4."""
    k = torch.tensor([[1, 0], [0, 1], [1, 0], [-1, 0], [0, 1]], dtype=torch.float64)
    v = torch.tensor([[1], [3], [6], [8], [0]], dtype=torch.float64)
    q = torch.tensor([[1, 0], [1, 0], [0, 1], [1, 0], [1, 0]], dtype=torch.float64)
    beta = torch.tensor([math.log(2)], dtype=torch.float64)
    root = 2**0.5
    # Tokens 0 and 1 see only their chunk. n(2) = 2*4/6 -> 1: both become one centroid, (1/2, 1/2), value 2, count 2.
    # Weights at token 2: centroid: 2^(1/2) * 2, itself: 1. At token 3: centroid: 2^(1/2) * 2, token 2: 2, itself: 1/2.
    # n(4) = 4*4/8 = 2: token 3, whose product -1/2 is lowest, founds centroid 1; token 2 joins centroid 0, now
    # (2/3, 1/3), value 10/3, count 3. Weights at token 4: centroid 0: 2^(2/3) * 3, centroid 1: 1/2, itself: 1.
    third = 2 ** (2 / 3)
    want = [
        1,
        (2 * 1 + 1 * 3) / 3,
        (2 * root * 2 + 1 * 6) / (2 * root + 1),
        (2 * root * 2 + 2 * 6 + 8 / 2) / (2 * root + 2 + 1 / 2),
        (3 * third * 10 / 3 + 8 / 2 + 1 * 0) / (3 * third + 1 / 2 + 1),
    ]
    for backend in (reference, fast):
        spec = OVQSpec(num_centroids=4, chunk_size=2)
        rows = [x[None, :, None] for x in (q, k, v)]
        o, new, a = backend.forward(*rows, beta, spec, empty(rows[1], rows[2], 4))
        torch.testing.assert_close(o.flatten(), torch.tensor(want, dtype=torch.float64), rtol=1e-14, atol=0)
        assert a.flatten().tolist() == [0, 0, 0, 1, -1]
        assert new.count.flatten().tolist() == [3, 1, 0, 0] and (new.size, new.position) == (2, 4)
        assert new.key_sum[0, 0, :2].tolist() == [[2, 1], [-1, 0]] and new.value_sum.flatten().tolist() == [10, 8, 0, 0]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", [reference, fast], ids=["reference", "torch"])
def test_gradients_equal_finite_differences(backend: ModuleType, variant: str) -> None:
    """With the assignments fixed, because by definition they carry no gradient."""
    inputs = make_inputs((1, 9, 2, 1, 2, 2), seed=3)
    spec = spec_of(5, 2, **VARIANTS[variant])
    held = empty(inputs[1], inputs[2], 5)
    a = backend.forward(*inputs, spec, held)[2]
    leaves = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: backend.forward(*x, spec, held, a)[0], leaves), NOTE


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_torch_backend_equals_the_reference(variant: str, shape: tuple[int, ...]) -> None:
    inputs = make_inputs(shape, seed=4)
    spec = spec_of(shape[6], shape[7], **VARIANTS[variant])
    assert_close(run(fast, inputs, spec), run(reference, inputs, spec), output=1e-12, grad=1e-11)


@pytest.mark.parametrize("variant", ["default", "key and value"])
def test_large_products_equal_the_reference(variant: str) -> None:
    """Products large enough to be computed one by one (`table.product`), with several heads in a piece."""
    shape = (1, 300, 4, 2, 64, 48)
    assert LARGE < 128 * 64 * 256
    inputs, spec = make_inputs(shape, seed=5), spec_of(160, 128, **VARIANTS[variant])
    assert_close(run(fast, inputs, spec), run(reference, inputs, spec), output=1e-12, grad=1e-11)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loops_give_the_same_results_compiled_and_as_python(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = SHAPES[0]
    inputs, spec = make_inputs(shape, seed=6, dtype=torch.float32), spec_of(shape[6], shape[7], **VARIANTS[variant])
    compiled = run(fast, inputs, spec)
    for name in ("forward_chunks", "backward_chunks"):
        monkeypatch.setattr(fast, name, getattr(loops, name).__wrapped__)
    plain = run(fast, inputs, spec)
    assert all(torch.equal(compiled[name], plain[name]) for name in plain), NOTE


@pytest.mark.parametrize("variant", ["default", "constant step", "key and value"])
@pytest.mark.parametrize(
    ("dtype", "output", "grad"),
    [(torch.float32, 1e-5, 1e-4), (torch.float16, 2e-3, 4e-3), (torch.bfloat16, 1e-2, 2e-2)],
    ids=["float32", "float16", "bfloat16"],
)
def test_low_precision_is_near_float64(variant: str, dtype: torch.dtype, output: float, grad: float) -> None:
    """Against the float64 reference on the same rounded inputs, with the same assignments imposed."""
    shape = (2, 300, 4, 2, 16, 12, 40, 32)
    inputs = make_inputs(shape, seed=5, dtype=dtype)
    spec = spec_of(40, 32, **VARIANTS[variant])
    got = run(fast, inputs, spec)
    assert got["key_sum"].dtype == torch.float32 and got["dk"].dtype == dtype
    assert_close(got, run(reference, inputs, spec, dtype=torch.float64, forced=got["a"]), output=output, grad=grad)
    # In this dtype, both make the same assignments except at near-ties.
    own = run(reference, inputs, spec)["a"]
    assert (own == got["a"]).double().mean() > 0.97, NOTE


def test_undoing_a_long_sum_loses_no_precision() -> None:
    """Thousands of similar keys in one centroid: in float32, plain subtraction would put its first mean off by 1e-3."""
    q, k, v, beta = make_inputs((1, 4096, 1, 1, 8, 8), seed=6)
    k = F.normalize(k + 8 * k[:, :1], dim=-1)
    inputs = [x.float() for x in (q, k, v, 4 * beta)]
    spec = OVQSpec(num_centroids=4, chunk_size=128)
    got = run(fast, inputs, spec)
    want = run(reference, inputs, spec, dtype=torch.float64, forced=got["a"])
    assert got["count"].max() > 1000
    assert_close(got, want, output=1e-5, grad=1e-4)
    for name in ("dk", "dv"):
        assert relative_error(got[name][:, :128], want[name][:, :128]) < 1e-4, f"{name} of the first chunk; {NOTE}"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_streamed_in_pieces_equals_one_pass(variant: str, dtype: torch.dtype) -> None:
    T, settings = 70, {"num_centroids": 12, "chunk_size": 8, **VARIANTS[variant]}
    q, k, v, beta = make_inputs((2, T, 4, 2, 8, 6), seed=7, dtype=dtype)
    whole, last = ovq_attention(q, k, v, beta, return_state=True, **settings)
    rng = random.Random(SEED)
    cuts = [sorted(rng.sample(range(1, T), rng.randrange(1, 9))) for _ in range(4)]
    for inner in [list(range(1, T)), list(range(8, T, 8)), list(range(7, T, 7)), *cuts]:
        state, pieces, bounds = None, [], [0, *inner, T]
        for a, b in zip(bounds, bounds[1:]):
            o, state = ovq_attention(q[:, a:b], k[:, a:b], v[:, a:b], beta, state=state, return_state=True, **settings)
            pieces.append(o)
        note = f"cut at {inner}; {NOTE}"
        assert relative_error(torch.cat(pieces, dim=1), whole) < (1e-13 if dtype == torch.float64 else 1e-6), note
        assert state is not None and last is not None
        for a, b in zip(pytree.tree_leaves(state), pytree.tree_leaves(last)):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=note)
        assert (state.size, state.position) == (last.size, last.position) == (spec_of(**settings).size_at(T), T)


@pytest.mark.parametrize("variant", ["default", "constant step"])
@pytest.mark.parametrize("position", [16, 21])
def test_backends_agree_on_gradients_after_a_carried_state(variant: str, position: int) -> None:
    """Also when the state ends in the middle of a chunk."""
    spec = spec_of(12, 8, **VARIANTS[variant])
    q, k, v, beta = make_inputs((2, 50, 4, 2, 8, 6), seed=8)
    start = position - position % 8
    before = reference.forward(q[:, :start], k[:, :start], v[:, :start], beta, spec, empty(k, v, 12))[1]
    piece = [q[:, position:], k[:, start:], v[:, start:], beta]
    assert_close(
        run(fast, piece, spec, dictionary=before),
        run(reference, piece, spec, dictionary=before),
        output=1e-12,
        grad=1e-11,
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradients_through_a_carried_state_equal_those_of_one_pass(backend: str, variant: str) -> None:
    """Gradients of the outputs and of the last state itself; cut at chunk boundaries and in the middle of chunks."""
    T, settings = 50, {"num_centroids": 12, "chunk_size": 8, "backend": backend, **VARIANTS[variant]}
    inputs = make_inputs((2, T, 4, 2, 8, 6), seed=8)
    weight = torch.randn(2, T, 4, 6, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)

    def gradients(bounds: list[int]) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        *tokens, beta = leaves
        state, loss = None, torch.zeros((), dtype=torch.float64)
        for a, b in zip(bounds, bounds[1:]):
            o, state = ovq_attention(*(x[:, a:b] for x in tokens), beta, state=state, return_state=True, **settings)
            loss = loss + (o * weight[:, a:b]).sum()
        assert state is not None
        loss = loss + state.key_sum.sum() + state.value_sum.square().sum() + state.pending_key.sum()
        return list(torch.autograd.grad(loss, leaves))

    whole = gradients([0, T])
    for cuts in ([16], [21], [3, 5, 8, 30, 48]):
        got = gradients([0, *cuts, T])
        assert max(relative_error(a, b) for a, b in zip(got, whole)) < 1e-12, (cuts, NOTE)


def test_a_detached_state_gets_no_gradient_and_a_chunk_that_does_not_end_passes_it_on() -> None:
    q, k, v, beta = make_inputs((2, 50, 4, 2, 8, 6), seed=9)
    settings = {"num_centroids": 12, "chunk_size": 8, "return_state": True}
    leaves = [x.requires_grad_() for x in (q, k, v)]
    _, state = ovq_attention(*(x[:, :21] for x in leaves), beta, **settings)
    assert state is not None and state.key_sum.requires_grad and not state.count.requires_grad
    for x in detach_state(state).tensors():
        assert not x.requires_grad
    ovq_attention(*(x[:, 21:] for x in leaves), beta, state=detach_state(state), **settings)[0].sum().backward()
    for leaf in leaves:
        assert leaf.grad is not None and not leaf.grad[:, :21].any() and leaf.grad[:, 21:].any()
    _, later = ovq_attention(*(x[:, 21:23] for x in leaves), beta, state=state, **settings)
    assert later is not None
    (gradient,) = torch.autograd.grad(later.key_sum.sum(), k)
    assert torch.equal(gradient[:, :16], torch.ones_like(gradient[:, :16])) and not gradient[:, 16:].any()


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_state_is_not_modified_and_survives_a_round_trip(backend: str) -> None:
    settings = {"num_centroids": 6, "chunk_size": 4, "backend": backend, "return_state": True}
    q, k, v, beta = make_inputs((1, 30, 2, 1, 4, 5), seed=9)
    _, state = ovq_attention(q[:, :14], k[:, :14], v[:, :14], beta, **settings)
    assert isinstance(state, OVQState)
    copy = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, state)
    first, _ = ovq_attention(q[:, 14:], k[:, 14:], v[:, 14:], beta, state=state, **settings)
    for a, b in zip(pytree.tree_leaves(state), pytree.tree_leaves(copy)):
        assert torch.equal(a, b)
    again, _ = ovq_attention(q[:, 14:], k[:, 14:], v[:, 14:], beta, state=copy, **settings)
    assert torch.equal(first, again)


def saved_elements(backend: ModuleType, T: int, spec: OVQSpec) -> int:
    """Number of elements saved for the backward pass, counting each storage once."""
    q, k, v, beta = (x.requires_grad_() for x in make_inputs((1, T, 4, 2, 8, 6), seed=10))
    held: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        o = backend.forward(q, k, v, beta, spec, empty(k, v, spec.num_centroids))[0]
    assert o.requires_grad
    return sum(held.values())


@pytest.mark.parametrize("step", ["count", 0.3])
def test_saved_memory_is_a_few_elements_per_token_and_never_a_dictionary_per_chunk(step: str | float) -> None:
    spec = OVQSpec(num_centroids=256, chunk_size=16, step_size=step)
    queries, keys = 4 * (8 + 1), 2 * (8 + 6 + 2)  # q and its highest logit; k, v, assignment and count
    overwritten = 0 if step == "count" else 2 * (8 + 6 + 1)
    growth = saved_elements(fast, 512, spec) - saved_elements(fast, 256, spec)
    assert growth == 256 * (queries + keys + overwritten)
    # The measurement would detect saved dictionaries: autograd through the reference does save them.
    dictionary = 2 * 256 * (8 + 6)
    assert saved_elements(reference, 512, spec) - saved_elements(reference, 256, spec) > 16 * dictionary


@pytest.mark.parametrize("variant", VARIANTS)
def test_output_before_t_ignores_token_t(variant: str) -> None:
    settings = {"num_centroids": 12, "chunk_size": 8, **VARIANTS[variant]}
    q, k, v, beta = make_inputs((1, 37, 2, 1, 8, 6), seed=11)
    before = ovq_attention(q, k, v, beta, **settings)[0]
    for t in (0, 1, 7, 8, 20, 36):
        changed = [x.clone() for x in (q, k, v)]
        for x, fresh in zip(changed, make_inputs((1, 1, 2, 1, 8, 6), seed=12 + t)):
            x[:, t] = fresh[:, 0]
        after = ovq_attention(*changed, beta, **settings)[0]
        assert torch.equal(after[:, :t], before[:, :t]), NOTE
        assert not torch.equal(after[:, t], before[:, t]), NOTE


@pytest.mark.parametrize("backend", [reference, fast], ids=["reference", "torch"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_ties_go_to_the_lowest_index(backend: ModuleType, dtype: torch.dtype) -> None:
    """Keys whose sums are exact, so that equal means are bit-equal."""
    same = torch.full((1, 24, 1, 4), 0.5, dtype=dtype)
    spec = OVQSpec(num_centroids=8, chunk_size=8)
    v = make_inputs((1, 24, 1, 1, 4, 4), seed=13)[2].to(dtype)
    a = backend.forward(same, same, v, torch.ones(1), spec, empty(same, v, 8))[2].flatten().tolist()
    # n = 4, 5, 6: of equally dissimilar keys, the earliest become centroids; the others join the lowest equal centroid.
    assert a == [0, 1, 2, 3, 0, 0, 0, 0] + [4] + [0] * 7 + [5] + [0] * 7
    # Centroids 1 and 2 are equal; a key equal to both does not tie with centroid 0.
    k = same.clone()
    k[:, 1:3] = torch.tensor([0.5, -0.5, 0.5, -0.5], dtype=dtype)
    k[:, 3] = torch.tensor([0.5, 0.5, -0.5, -0.5], dtype=dtype)
    k[:, 9:] = k[:, 1:2]
    a = backend.forward(k, k, v, torch.ones(1), spec, empty(k, v, 8))[2].flatten().tolist()
    assert a[:4] == [0, 1, 2, 3] and a[9:16] == [1] * 7, a


def test_all_keys_equal_gives_the_running_mean_of_values() -> None:
    """Equal keys have equal weight however they were assigned: the counts compensate exactly."""
    q, k, v, beta = make_inputs((2, 50, 2, 2, 8, 6), seed=14)
    k = k[:, :1].expand_as(k).contiguous()
    o, _ = ovq_attention(q, k, v, beta, num_centroids=8, chunk_size=8)
    for t in range(50):
        torch.testing.assert_close(o[:, t], v[:, : t + 1].mean(1), rtol=1e-10, atol=1e-12, msg=f"token {t}; {NOTE}")


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_packed_documents_equal_documents_alone(backend: str) -> None:
    inputs = make_inputs((1, 45, 4, 2, 8, 6), seed=15)
    bounds = [0, 1, 9, 9, 29, 45]
    settings = {"num_centroids": 12, "chunk_size": 8, "backend": backend}
    packed, alone = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    o, state = ovq_attention(*packed, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), **settings)
    assert state is None
    pieces = [
        ovq_attention(*(x[:, a:b] for x in alone[:3]), alone[3], **settings)[0]
        for a, b in zip(bounds, bounds[1:])
        if b > a
    ]
    assert torch.equal(o, torch.cat(pieces, dim=1)), NOTE
    weight = torch.randn(o.shape, generator=torch.Generator().manual_seed(SEED), dtype=o.dtype)
    (o * weight).sum().backward()
    (torch.cat(pieces, dim=1) * weight).sum().backward()
    assert all(relative_error(x.grad, y.grad) < 1e-12 for x, y in zip(packed, alone)), NOTE  # type: ignore[arg-type]


def test_grouped_heads_equal_repeated_ones() -> None:
    inputs = make_inputs((2, 45, 6, 2, 8, 5), seed=16)
    spec = OVQSpec(num_centroids=12, chunk_size=8)
    grouped = run(fast, inputs, spec)
    repeated = run(fast, [inputs[0], *(x.repeat_interleave(3, dim=2) for x in inputs[1:3]), inputs[3]], spec)
    for name in ("o", "dq", "dbeta"):
        assert relative_error(grouped[name], repeated[name]) < 1e-12, NOTE
    for name in ("dk", "dv"):
        assert relative_error(grouped[name], repeated[name].unflatten(2, (2, 3)).sum(3)) < 1e-12, NOTE


@pytest.mark.parametrize("beta", [0.0, -3.0, 60.0])
def test_any_inverse_temperature_equals_the_reference(beta: float) -> None:
    q, k, v, _ = make_inputs((1, 45, 2, 1, 8, 5), seed=17)
    inputs = [q, 5 * k, v, torch.full((2,), beta, dtype=torch.float64)]
    spec = OVQSpec(num_centroids=12, chunk_size=8)
    got, want = run(fast, inputs, spec), run(reference, inputs, spec)
    assert_close(got, want, output=1e-12, grad=1e-9)


def test_recomputing_a_checkpointed_call_gives_the_same_gradients() -> None:
    inputs = make_inputs((1, 45, 2, 1, 8, 5), seed=18, dtype=torch.float32)
    grads = []
    for recompute in (False, True):
        leaves = [x.clone().requires_grad_() for x in inputs]

        def call(*x: Tensor) -> Tensor:
            return ovq_attention(*x, num_centroids=12, chunk_size=8)[0]

        o = checkpoint(call, *leaves, use_reentrant=False) if recompute else call(*leaves)
        o.square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*grads)), NOTE


@pytest.mark.parametrize("variant", ["default", "constant step"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_heads_on_several_cores_give_the_same_results(
    threads: int, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs((3, 37, 6, 2, 8, 6), seed=20)
    spec = spec_of(12, 8, **VARIANTS[variant])
    whole = run(fast, inputs, spec)
    monkeypatch.setattr(pieces, "SMALL_CALL", 0)  # parallelise even small calls
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for piece in (1, 3 * 8 * 20, 10**9):  # pieces of one head; of a few; as few pieces as threads
            monkeypatch.setattr(pieces, "PIECE", piece)
            assert_close(run(fast, inputs, spec), whole, output=1e-13, grad=1e-12)
            with torch.inference_mode():
                q, k, v, beta = inputs
                o = fast.forward(q, k, v, beta, spec, empty(k, v, 12))[0]
            assert relative_error(o, whole["o"]) < 1e-13, NOTE
        assert torch.get_num_threads() == threads, "the pool's own setting leaked"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("threads", "cores_each"), [(2, 1), (9, 2)])
def test_four_pieces_share_the_cores_and_an_error_on_one_is_raised(threads: int, cores_each: int) -> None:
    done = []

    def work(piece: int) -> None:
        done.append((torch.is_grad_enabled(), torch.get_num_threads()))
        if piece == 2:
            raise ArithmeticError("piece 2")

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with pytest.raises(ArithmeticError, match="piece 2"):
            run_pieces(work, [0, 1, 2, 3])
    finally:
        torch.set_num_threads(before)
    assert done and set(done) == {(False, cores_each)}


def test_dictionary_sizes_follow_the_growth_law() -> None:
    plateau = OVQSpec(num_centroids=1024, chunk_size=128)
    assert [plateau.size_at(t) for t in (0, 127, 128, 255, 256, 32768)] == [0, 0, 113, 113, 204, 992]
    linear = OVQSpec(num_centroids=100, chunk_size=10, growth="linear", growth_tokens=1000)
    assert [linear.size_at(t) for t in (10, 15, 500, 1000, 5000)] == [1, 1, 50, 100, 100]
    steep = OVQSpec(num_centroids=100, chunk_size=10, growth="linear", growth_tokens=30)
    assert [steep.size_at(t) for t in (10, 20, 90, 100, 110)] == [10, 20, 90, 100, 100]
    assert OVQSpec(num_centroids=1, chunk_size=8).size_at(8) == 1
    for spec in (plateau, linear, steep):
        sizes = [spec.size_at(t) for t in range(0, 3000, spec.chunk_size)]
        assert all(0 <= b - a <= spec.chunk_size for a, b in zip(sizes, sizes[1:]))


def test_random_seeding_depends_only_on_the_seed_and_the_position() -> None:
    q, k, v, beta = make_inputs((2, 32, 2, 2, 8, 6), seed=19)
    founders = {}
    for seed in (0, 1):
        spec = OVQSpec(num_centroids=16, chunk_size=8, seeding="random", seed=seed)
        for name, keys in (("given", k), ("others", k.flip(1))):
            a = fast.forward(q, keys, v, beta, spec, empty(k, v, 16))[2]
            first = [(a == n).int().argmax(-1) for n in range(spec.size_at(32))]  # where each centroid first occurs
            founders[seed, name] = torch.stack(first)[1:]
            assert (founders[seed, name] == founders[seed, name][:, :1, :1]).all(), "heads and rows differ"
    assert torch.equal(founders[0, "given"], founders[0, "others"])
    assert not torch.equal(founders[0, "given"], founders[1, "given"])


SMALL = (1, 10, 4, 2, 8, 6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_centroids": 0}, "num_centroids=0 must be a whole number of at least 1"),
        ({"chunk_size": -3}, "chunk_size=-3 must be"),
        ({"growth": "cubic"}, "growth=cubic is not a legal value; legal: plateau, linear"),
        ({"growth": "linear"}, "growth=linear needs growth_tokens"),
        ({"growth": "linear", "growth_tokens": 0}, "growth_tokens=0 must be"),
        ({"seeding": "none"}, "seeding=none is not a legal value; legal: spread, random"),
        ({"step": 0.0}, r"step=0.0 is not a legal value; legal: count, or a number in \(0, 1\]"),
        ({"step": 1.5}, "step=1.5 is not"),
        ({"step": "half"}, "step=half is not"),
        ({"first_chunk": "drop"}, "first_chunk=drop is not a legal value; legal: merge, nearest"),
        ({"assign_on": "value"}, "assign_on=value is not a legal value; legal: key, key_value"),
        ({"backend": "numpy"}, "backend=numpy of ovq_attention is not a legal value; legal: auto, reference, torch"),
        ({"cu_seqlens": torch.tensor([0, 4], dtype=torch.int32)}, "cu_seqlens must rise from 0 to the 10 tokens"),
        ({"cu_seqlens": torch.tensor([0, 6, 4, 10], dtype=torch.int32)}, "cu_seqlens must rise"),
        ({"cu_seqlens": torch.tensor([0.0, 10.0])}, "cu_seqlens must be int32"),
        ({"cu_seqlens": torch.tensor([0, 10], dtype=torch.int32), "return_state": True}, "cu_seqlens excludes state"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_an_illegal_setting_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        ovq_attention(*make_inputs(SMALL), **{"num_centroids": 8, **settings})
    assert "\n" not in str(caught.value)


def test_tensors_of_mismatched_shapes_are_rejected() -> None:
    q, k, v, beta = make_inputs(SMALL)
    for inputs, message in [
        ((q[:, :9], k, v, beta), "must agree in batch and tokens"),
        ((q, k, v[:, :, :1], beta), "k and v in heads"),
        ((q[..., :4], k, v, beta), "q and k in width"),
        ((q[:, :, :3], k, v, beta[:3]), "3 query heads must be a multiple of the 2 key/value heads"),
        ((q, k, v, beta[:3]), r"beta must be one number per query head, \[4\], got \[3\]"),
        ((q, k.float(), v, beta), "one floating-point dtype"),
        ((q[0], k, v, beta), r"must be \[B, T, heads, width\]"),
        ((q[:, :0], k[:, :0], v[:, :0], beta), "at least one token"),
        ((q.repeat(2, 1, 1, 1), k.repeat(2, 1, 1, 1), v.repeat(2, 1, 1, 1), beta), "batch of 1"),
    ]:
        bounds = torch.tensor([0, 10], dtype=torch.int32) if "batch" in message and "of 1" in message else None
        with pytest.raises(ValueError, match=message):
            ovq_attention(*inputs, num_centroids=8, cu_seqlens=bounds)


def test_a_state_of_other_settings_is_rejected() -> None:
    q, k, v, beta = make_inputs(SMALL)
    _, state = ovq_attention(q, k, v, beta, num_centroids=8, chunk_size=4, return_state=True)
    for settings, message in [
        ({"num_centroids": 9, "chunk_size": 4}, "num_centroids"),
        ({"num_centroids": 8, "chunk_size": 5}, "another chunk_size or growth"),
        ({"num_centroids": 8, "chunk_size": 4, "growth": "linear", "growth_tokens": 8}, "chunk_size or growth"),
    ]:
        with pytest.raises(ValueError, match=message):
            ovq_attention(q, k, v, beta, state=state, **settings)
    with pytest.raises(ValueError, match="state was made with torch.float64"):
        ovq_attention(q.float(), k.float(), v.float(), beta, num_centroids=8, chunk_size=4, state=state)
    with pytest.raises(ValueError, match="state is of"):
        ovq_attention(*(x.repeat(2, 1, 1, 1) for x in (q, k, v)), beta, num_centroids=8, chunk_size=4, state=state)
