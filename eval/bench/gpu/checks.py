"""Correctness of the kernels on the present device, checked by `eval.bench.gpu` before anything is timed.

Every check returns a line that describes what it found, and raises `Wrong` if that is outside its bar. Inputs are
random and differ between calls. Outputs and gradients are compared with float64, with assignments forced equal.
Assignments cannot be compared that way, because after one near-tie they diverge for good; they are judged step by step:
was each key's centroid the best one, given the assignments before it?

Shapes: B batch, S tokens, H query heads, G key/value heads, N centroids, K and V widths.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ovq.ops import ovq_attention
from ovq.ops.ovq_attention.interface import MODULES
from ovq.ops.ovq_attention.spec import Dictionary, OVQSpec
from ovq.ops.ovq_attention.verify import BARS, SUMS, Wrong, judge, relative_error


@dataclass(frozen=True)
class Sizes:
    """The size of a check's inputs, and the dictionary's settings."""

    batch: int = 1
    tokens: int = 2000  # not a multiple of 128, so the last chunk is incomplete
    heads: int = 4
    kv_heads: int = 2
    K: int = 64
    V: int = 64
    num_centroids: int = 700
    chunk_size: int = 128

    @property
    def spec(self) -> OVQSpec:
        return OVQSpec(self.num_centroids, self.chunk_size)


def random_inputs(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Random q, k (of unit norm), v and beta, distributed as in a layer."""
    B, S = sizes.batch, sizes.tokens
    q, k = (
        F.normalize(torch.randn(B, S, heads, sizes.K, device=device), dim=-1) for heads in (sizes.heads, sizes.kv_heads)
    )
    v = torch.randn(B, S, sizes.kv_heads, sizes.V, device=device)
    beta = 1 + sizes.K**0.5 * torch.rand(sizes.heads, device=device)
    return [x.to(dtype).requires_grad_() for x in (q, k, v)] + [beta.requires_grad_()]


def empty_dictionary(tensors: list[Tensor], spec: OVQSpec) -> Dictionary:
    """The empty dictionary for q, k, v and beta: float64 for float64 inputs, else float32."""
    (B, _, G, K), V, N = tensors[1].shape, tensors[2].shape[3], spec.num_centroids
    work = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    sums = [torch.zeros(size, dtype=work, device=tensors[0].device) for size in ((B, G, N, K), (B, G, N, V), (B, G, N))]
    return Dictionary(sums[0], sums[1], sums[2], 0, 0)


def run(
    backend: str, tensors: list[Tensor], spec: OVQSpec, do: Tensor, assignment: Tensor | None = None
) -> list[Tensor]:
    """Output, assignment, and the gradients of q, k, v and beta; `assignment` forces one."""
    module = importlib.import_module(f"ovq.ops.ovq_attention.{MODULES[backend]}")
    o, _, placed = module.forward(*tensors, spec, empty_dictionary(tensors, spec), assignment)
    return [o, placed, *torch.autograd.grad(o, tensors, do.to(o.dtype))]


# --- the claims ------------------------------------------------------------------------------------------------------


def against_float64(backend: str, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> str:
    """Compare outputs and gradients with another backend in float64 that is given the same assignment."""
    tensors, spec = random_inputs(sizes, device, dtype), sizes.spec
    do = torch.randn(*tensors[0].shape[:3], sizes.V, device=device).to(dtype)
    o, placed, *grads = run(backend, tensors, spec, do)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    want, _, *want_grads = run("reference" if backend == "torch" else "torch", exact, spec, do.double(), placed)
    errors = {"o": relative_error(o, want)}
    errors |= {f"d{name}": relative_error(g, w) for name, g, w in zip(("q", "k", "v"), grads, want_grads)}
    # dbeta sums terms of both signs, so its error is relative to the norm of the terms.
    terms = (want_grads[0] * exact[0].detach()).sum(-1).norm()
    errors["dbeta"] = float((grads[3].double() - want_grads[3]).norm() / terms)
    forward_bar, backward_bar = BARS[dtype]
    found = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    if not all(error < (forward_bar if name == "o" else backward_bar) for name, error in errors.items()):
        raise Wrong(f"{found}; the bars are {forward_bar:.0e} and {backward_bar:.0e}")
    return found


@torch.no_grad()
def assignments_are_best(backend: str, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> str:
    """Every key is assigned to its nearest centroid, and the keys with the lowest best similarity start new ones."""
    tensors, spec = random_inputs(sizes, device, dtype), sizes.spec
    module = importlib.import_module(f"ovq.ops.ovq_attention.{MODULES[backend]}")
    _, new, placed = module.forward(*tensors, spec, empty_dictionary(tensors, spec))
    exact = [x.double() for x in tensors]
    worst, want = judge(placed, exact[1], exact[2], spec, empty_dictionary(exact, spec), dtype)
    off = max(relative_error(getattr(new, name), getattr(want, name)) for name in ("key_sum", "value_sum"))
    if not torch.equal(new.count.double(), want.count):
        raise Wrong("counts differ from the number of keys assigned")
    found = f"at most {worst:.1e} below the best, sums within {off:.1e}"
    if not off < SUMS:
        raise Wrong(found)
    return found


def repeats_are_bit_equal(backend: str, sizes: Sizes, device: torch.device, dtype: torch.dtype, times: int = 5) -> str:
    """Equal inputs give bit-equal outputs, assignments and gradients in every run."""
    tensors, spec = random_inputs(sizes, device, dtype), sizes.spec
    do = torch.randn(*tensors[0].shape[:3], sizes.V, device=device).to(dtype)
    first = run(backend, tensors, spec, do)
    for _ in range(times):
        _same_bits(run(backend, tensors, spec, do), first)
    return f"{times} repeats"


def poisoned_memory_changes_nothing(backend: str, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> str:
    """Filling new memory with NaN (integers: the maximum) changes no bit, so nothing reads unwritten memory."""
    tensors, spec = random_inputs(sizes, device, dtype), sizes.spec
    do = torch.randn(*tensors[0].shape[:3], sizes.V, device=device).to(dtype)
    clean = run(backend, tensors, spec, do)
    with poisoned_memory():
        _same_bits(run(backend, tensors, spec, do), clean)
    return "outputs, assignments and gradients"


def _same_bits(got: list[Tensor], want: list[Tensor]) -> None:
    for name, x, y in zip(("o", "assignment", "dq", "dk", "dv", "dbeta"), got, want):
        if not torch.equal(x, y):
            raise Wrong(f"{name} differs in {int((x != y).sum())} of {x.numel()} elements")


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Let torch fill uninitialized memory, which exposes reads of it."""
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


@torch.no_grad()
def decoding_is_prefilling(backend: str, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> str:
    """Prefilling a prefix and decoding the rest, across two chunk boundaries, equals one pass over all tokens."""
    q, k, v, beta = random_inputs(sizes, device, dtype)
    settings: dict[str, Any] = {"num_centroids": sizes.num_centroids, "chunk_size": sizes.chunk_size}
    settings |= {"return_state": True, "backend": backend}
    want, want_state = ovq_attention(q, k, v, beta, **settings)
    start = max(sizes.tokens - 2 * sizes.chunk_size - 3, 1)
    o, state = ovq_attention(q[:, :start], k[:, :start], v[:, :start], beta, **settings)
    pieces = [o]
    for t in range(start, sizes.tokens):
        o, state = ovq_attention(q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1], beta, state=state, **settings)
        pieces.append(o)
    assert state is not None and want_state is not None
    error = relative_error(torch.cat(pieces, dim=1)[:, start:], want[:, start:])
    sums = relative_error(state.key_sum, want_state.key_sum)
    found = f"{sizes.tokens - start} tokens, outputs {error:.1e}, sums {sums:.1e}"
    if not (error < BARS[dtype][0] and sums < 1e-5 and state.position == want_state.position):
        raise Wrong(found)
    return found


def packed_documents_are_documents_alone(backend: str, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> str:
    """Outputs and gradients of packed documents equal those of each document in a separate call."""
    lengths = [n for n in (5, sizes.chunk_size, 3 * sizes.chunk_size + 7) if n < sizes.tokens // 4]
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist(), sizes.tokens]
    tensors = random_inputs(replace(sizes, batch=1), device, dtype)
    do = torch.randn(*tensors[0].shape[:3], sizes.V, device=device).to(dtype)
    settings: dict[str, Any] = {"num_centroids": sizes.num_centroids, "chunk_size": sizes.chunk_size}
    settings |= {"backend": backend}
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
    packed = ovq_attention(*tensors, cu_seqlens=cu_seqlens, **settings)[0]
    parts = [slice(*pair) for pair in zip(bounds, bounds[1:])]
    q, k, v, beta = tensors
    alone = torch.cat([ovq_attention(q[:, p], k[:, p], v[:, p], beta, **settings)[0] for p in parts], dim=1)
    grads = [torch.autograd.grad(o, tensors[:3], do) for o in (packed, alone)]
    names = ("o", "dq", "dk", "dv")
    errors = {n: relative_error(x, y) for n, x, y in zip(names, (packed, *grads[0]), (alone, *grads[1]))}
    found = f"{len(parts)} documents, " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    # A tight bar: both run the same kernels on the same chunks.
    if not all(error < 1e-6 for error in errors.values()):
        raise Wrong(found)
    return found


@contextmanager
def programs_per_head(choose: Callable[[int], int]) -> Iterator[None]:
    """Let `choose(usual number)` programs share a head, where the Triton kernels can run; elsewhere do nothing."""
    try:
        assign: Any = importlib.import_module("ovq.ops.ovq_attention.kernels.assign")
    except ImportError:
        yield
        return
    usual = assign.splits
    assign.splits = lambda walks, device, blocks: choose(usual(walks, device, blocks))
    try:
        yield
    finally:
        assign.splits = usual


def programs_that_share_a_head_change_no_bit(
    backend: str, sizes: Sizes, device: torch.device, dtype: torch.dtype
) -> str:
    """At most 2, 4 and 16 programs per head, as far as the GPU has room, give the same bits as one: the barrier between
    them works in both builds of `assign` for several programs."""
    tensors, spec = random_inputs(sizes, device, dtype), sizes.spec
    do = torch.randn(*tensors[0].shape[:3], sizes.V, device=device).to(dtype)
    used: list[int] = []

    def at_most(limit: int) -> list[Tensor]:
        def choose(usual: int) -> int:
            used.append(min(usual, limit))
            return used[-1]

        with programs_per_head(choose):
            return run(backend, tensors, spec, do)

    alone = at_most(1)
    for limit in (2, 4, 16):
        _same_bits(at_most(limit), alone)
    return f"{', '.join(map(str, sorted(set(used))))} programs" if used else "1 program"


Check = Callable[..., str]
CHECKS: dict[str, Check] = {
    "against float64": against_float64,
    "assignments are best": assignments_are_best,
    "k programs are one": programs_that_share_a_head_change_no_bit,
    "repeats are bit-equal": repeats_are_bit_equal,
    "decoding is prefilling": decoding_is_prefilling,
    "poisoned memory": poisoned_memory_changes_nothing,
    "packed documents": packed_documents_are_documents_alone,
}
