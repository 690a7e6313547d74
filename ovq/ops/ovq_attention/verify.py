"""Compare the Triton kernels with the torch backend on random inputs: a claim about correctness on the present device.

    python -m ovq.ops.ovq_attention.verify JSON        one `Problem`, in this process; see `selftest` for the tool

Outputs and gradients are compared with the torch backend in float64, which is given the same assignment. Assignments
cannot be compared that way, because after one near-tie they diverge for good; they are judged step by step: was each
key's centroid the best one, and did the right keys found new ones, given all earlier assignments?

Exit status: 0 the kernels are right, 1 they are not. Lines "at ..." say what is running; the last line is the verdict.

Shapes: B batch, S tokens, L chunk, H query heads, G key/value heads, N centroids, n in use, K and V widths.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ovq.bounded import end_with_parent
from ovq.ops.ovq_attention import chunked, reference
from ovq.ops.ovq_attention.spec import Dictionary, OVQSpec, parse_spec

KERNELS = "ovq.ops.ovq_attention.kernels"
# Bounds on ||got - want|| / ||want||, of outputs and of gradients.
BARS = {torch.float32: (1e-5, 1e-4), torch.float16: (1e-2, 2e-2), torch.bfloat16: (1e-2, 2e-2)}
SUMS = 1e-5  # the same for sums of keys and values, which are float32 whatever the dtype
SAME = 1e-6  # and for packed documents against each alone: the same kernels on the same chunks
# How far a chosen centroid's similarity may be below the best one: the error of rounding a mean to the dtype.
NEAR_TIE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
CHUNKS = 4  # whole chunks per case, followed by an unfinished one
NAMES = ("o", "dq", "dk", "dv", "dbeta")


class Wrong(AssertionError):
    """The kernels are wrong; the message says where and by how much."""


@dataclass(frozen=True)
class Problem:
    """What a run asks of the kernels: the shapes of q, k and v, their dtype, the dictionary, and the longest text.

    `packed`: rows are packed documents that see nothing of each other. `settings`: an `OVQSpec.text`. `several_ranks`:
    whether the run has several, which leaves fewer multiprocessors to the kernels and may take another build of them.
    """

    batch: int
    heads: int
    kv_heads: int
    key_width: int
    value_width: int
    dtype: str
    context: int
    packed: bool
    settings: str
    several_ranks: bool = False

    @property
    def spec(self) -> OVQSpec:
        return parse_spec(self.settings)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


def verify(problem: Problem, device: torch.device, kernels: Any, say: Callable[[str], None]) -> str:
    """One line on how far off the kernels are in every case; `say` is called with the name of each before it starts.

    Raises:
        Wrong: an error exceeds its bar, or a repeat differs.
    """
    torch.manual_seed(0)
    L, found = problem.spec.chunk_size, []
    most = min(problem.context, CHUNKS * L + L // 2 + 1)
    say("the first chunks")
    found.append(f"first chunks: {_case(problem, device, kernels, 0, most)}")
    late = (problem.context // L - CHUNKS) * L
    if late >= CHUNKS * L:  # with a dictionary as large as at the end of a text
        say("the last chunks")
        found.append(f"last chunks: {_case(problem, device, kernels, late, most)}")
    if problem.packed:
        say("packed documents")
        found.append(f"packed: {_packed(problem, device, kernels, most)}")
    return "; ".join(found)


# --- the cases -------------------------------------------------------------------------------------------------------


def _case(problem: Problem, device: torch.device, kernels: Any, position: int, tokens: int) -> str:
    """Check assignments, sums, outputs, gradients, a repeat and the first row alone, for a text from `position` on."""
    spec, dtype = problem.spec, problem.torch_dtype
    tensors, do = _inputs(problem, device, 1 if problem.packed else problem.batch, tokens)
    start = _dictionary(tensors, spec, position)

    def run() -> tuple[list[Tensor], Dictionary, Tensor]:
        o, new, placed = kernels.forward(*tensors, spec, start)
        return [o, *torch.autograd.grad(o, tensors, do)], new, placed

    got, new, placed = run()
    if not all(bool(torch.isfinite(x).all()) for x in got):
        raise Wrong("an output or a gradient is not finite")
    again, new_again, placed_again = run()
    _same_bits(("assignment", *NAMES), [placed_again, *again], [placed, *got])
    _same_bits(("sums of keys", "sums of values"), _sums(new_again)[:2], _sums(new)[:2])
    if len(do) > 1:  # as in evaluation: then more programs share a head, in another build
        first = [x if x.dim() == 1 else x[:1].detach().requires_grad_() for x in tensors]
        o, _, placed_alone = kernels.forward(*first, spec, start.map(lambda x: x[:1]))
        alone = [placed_alone, o, *torch.autograd.grad(o, first[:3], do[:1])]
        _same_bits(("assignment", *NAMES[:4]), alone, [x[:1] for x in (placed, *got[:4])], "the first row alone")
    errors = dict.fromkeys(NAMES, 0.0)
    sums, ties = 0.0, 0.0
    dbeta, terms = torch.zeros_like(tensors[3], dtype=torch.float64), 0.0
    for b in range(len(do)):  # one row at a time: float64 needs memory
        row = slice(b, b + 1)
        exact = [(x if x.dim() == 1 else x[row]).detach().double().requires_grad_() for x in tensors]
        began = start.map(functools.partial(_row, row=row))
        worst, want_new = judge(placed[row], exact[1].detach(), exact[2].detach(), spec, began, dtype)
        ties = max(ties, worst)
        for name in ("key_sum", "value_sum"):
            sums = max(sums, relative_error(getattr(new, name)[row], getattr(want_new, name)))
        if not torch.equal(new.count[row].double(), want_new.count):
            raise Wrong("counts differ from the number of keys assigned")
        o, _, _ = chunked.forward(*exact, spec, began, placed[row])
        grads = torch.autograd.grad(o, exact, do[row].double())
        for name, x, y in zip(NAMES[:4], got, (o, *grads)):
            errors[name] = max(errors[name], relative_error(x[row], y))
        dbeta += grads[3]
        terms += float((grads[0] * exact[0].detach()).sum(-1).square().sum())
    # dbeta sums terms of both signs, so its error is relative to the norm of the terms.
    errors["dbeta"] = float((got[4].double() - dbeta).norm() / max(terms**0.5, 1e-30))
    bars = dict(zip(NAMES, (BARS[dtype][0], *[BARS[dtype][1]] * 4))) | {"sums": SUMS}
    errors["sums"] = sums
    _within(errors, bars)
    return f"{', '.join(f'{name} {error:.0e}' for name, error in errors.items())}, assigned within {ties:.0e}"


def _packed(problem: Problem, device: torch.device, kernels: Any, tokens: int) -> str:
    """Check outputs and gradients of packed documents against each document alone, and a repeat."""
    spec, L = problem.spec, problem.spec.chunk_size
    lengths = [n for n in (5, L, L + 7) if n < tokens // 3]
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist(), tokens]
    tensors, do = _inputs(problem, device, 1, tokens)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)

    def run() -> list[Tensor]:
        o = kernels.forward_packed(*tensors, spec, cu_seqlens)
        return [o, *torch.autograd.grad(o, tensors[:3], do)]

    got = run()
    _same_bits(NAMES, run(), got)
    q, k, v, beta = tensors
    parts = [slice(*pair) for pair in zip(bounds, bounds[1:])]
    alone = [
        kernels.forward(q[:, p], k[:, p], v[:, p], beta, spec, _dictionary([q[:, p], k[:, p], v[:, p]], spec, 0))[0]
        for p in parts
    ]
    want = torch.cat(alone, dim=1)
    wanted = [want, *torch.autograd.grad(want, tensors[:3], do)]
    errors = {name: relative_error(x, y) for name, x, y in zip(NAMES, got, wanted)}
    _within(errors, dict.fromkeys(errors, SAME))
    return ", ".join(f"{name} {error:.0e}" for name, error in errors.items())


def _inputs(problem: Problem, device: torch.device, batch: int, tokens: int) -> tuple[list[Tensor], Tensor]:
    """Random q, k (of unit norm), v and beta, distributed as in a layer, and the gradient of the output."""
    H, G, K, V, dtype = problem.heads, problem.kv_heads, problem.key_width, problem.value_width, problem.torch_dtype
    q, k = (F.normalize(torch.randn(batch, tokens, heads, K, device=device), dim=-1) for heads in (H, G))
    v, do = (torch.randn(batch, tokens, heads, V, device=device) for heads in (G, H))
    beta = 1 + K**0.5 * torch.rand(H, device=device)
    return [*(x.to(dtype).requires_grad_() for x in (q, k, v)), beta.requires_grad_()], do.to(dtype)


@torch.no_grad()
def _dictionary(tensors: list[Tensor], spec: OVQSpec, position: int) -> Dictionary:
    """The dictionary after `position` tokens: empty at 0, else random means whose counts add up to about as many."""
    (B, _, G, K), V, N, device = tensors[1].shape, tensors[2].shape[3], spec.num_centroids, tensors[1].device
    n = spec.size_at(position)
    zeros = [torch.zeros(shape, device=device) for shape in ((B, G, N, K), (B, G, N, V), (B, G, N))]
    if n:
        count = torch.randint(1, max(2 * position // n, 2), (B, G, n), device=device).float()
        zeros[2][:, :, :n] = count
        zeros[0][:, :, :n] = count[..., None] * F.normalize(torch.randn(B, G, n, K, device=device), dim=-1)
        zeros[1][:, :, :n] = count[..., None].sqrt() * torch.randn(B, G, n, V, device=device)
    return Dictionary(zeros[0], zeros[1], zeros[2], n, position)


# --- comparisons -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def judge(
    placed: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, spec: OVQSpec, dictionary: Dictionary, dtype: torch.dtype
) -> tuple[float, Dictionary]:
    """Whether an assignment [B, G, S] of keys and values in float64 is one that the settings allow.

    With first_chunk="nearest", the first chunk's assignment does not tell which keys founded centroids: there, the only
    check is that all its centroids have keys.

    Returns:
        How far the worst choice is below the best one (0: none is), and the dictionary that follows from it.

    Raises:
        Wrong: it is off by more than a near-tie in `dtype`, or centroids are not founded in text order.
    """
    k, v = k_BSGK.transpose(1, 2), v_BSGV.transpose(1, 2)
    S_k, S_v, c, n = dictionary.key_sum, dictionary.value_sum, dictionary.count, dictionary.size
    L, position, worst = spec.chunk_size, dictionary.position, 0.0
    for i, a in enumerate(placed.long().split(L, dim=2)):
        if a.shape[2] < L:
            if not bool((a == -1).all()):
                raise Wrong("an incomplete chunk was assigned")
            break
        part = slice(i * L, (i + 1) * L)
        after = spec.size_at(position + L)
        if not bool(((a >= 0) & (a < after)).all()):
            raise Wrong(f"chunk {i} is assigned to centroids outside 0 to {after - 1}")
        if n == 0 and spec.first_chunk == "nearest":
            if not bool((F.one_hot(a, after).sum(2) > 0).all()):
                raise Wrong(f"chunk {i} leaves a centroid without keys")
        else:
            # In the first chunk, keys that found no centroid are assigned to the first key's.
            founds = a >= n if n else (a > 0) | (torch.arange(L, device=a.device) == 0)
            in_order = (founds.cumsum(-1) + n - 1 == a) | ~founds
            if not bool(in_order.all()) or not bool((founds.sum(-1) == after - n).all()):
                raise Wrong(f"chunk {i} does not found centroids {n} to {after - 1} in token order")
            mu_k = S_k[:, :, :n] / c[:, :, :n, None] if n else k[:, :, :1]
            mu_v = S_v[:, :, :n] / c[:, :, :n, None] if n else v[:, :, :1]
            similarity = reference.similarities(k[:, :, part], v[:, :, part], mu_k, mu_v, spec, dtype)
            off = _regret(similarity, a, founds, position, spec, first=n == 0)
            worst = max(worst, off)
            tie = NEAR_TIE[dtype] * max(1.0, float(similarity.abs().max()))
            if not off <= tie:
                raise Wrong(f"a key of chunk {i} is assigned {off:.1e} below the best; a near-tie is {tie:.1e}")
        S_k, S_v, c = reference.commit(S_k, S_v, c, k[:, :, part], v[:, :, part], a, spec)
        n, position = after, position + L
    return worst, Dictionary(S_k, S_v, c, n, position)


def _regret(similarity: Tensor, a: Tensor, founds: Tensor, position: int, spec: OVQSpec, first: bool) -> float:
    """How far the assignment of a chunk is from the best, in similarity; infinite if the random founders are wrong."""
    best = similarity.amax(-1)
    lost = best - similarity.gather(-1, a.clamp_max(similarity.shape[3] - 1)[..., None])[..., 0]
    off = float(lost.masked_fill(founds, 0).max())
    asked = torch.ones_like(founds)
    if first:  # the first key always founds centroid 0, so it is compared with neither group
        asked[..., 0] = False
    if spec.seeding == "random":
        rank = spec.hash_order(position, a.device).argsort().expand_as(a)
        order = rank.double()
    else:
        order = best
    highest = torch.where(founds & asked, order, -torch.inf).amax(-1)
    lowest = torch.where(~founds & asked, order, torch.inf).amin(-1)
    gap = float((highest - lowest).max())
    return max(off, (torch.inf if gap > 0 else 0.0) if spec.seeding == "random" else gap, 0.0)


@torch.no_grad()
def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want|| in float64 of two tensors of equal shape; infinite if either holds NaN or infinity."""
    assert got.shape == want.shape, f"{list(got.shape)} is compared with {list(want.shape)}"
    got, want = got.double(), want.double()
    if not (torch.isfinite(got).all() and torch.isfinite(want).all()):
        return float("inf")
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


def _row(x: Tensor, row: slice) -> Tensor:
    return x[row].double()


def _sums(d: Dictionary) -> list[Tensor]:
    return [d.key_sum, d.value_sum, d.count]


def _same_bits(names: tuple[str, ...], got: list[Tensor], want: list[Tensor], what: str = "a repeat") -> None:
    for name, x, y in zip(names, got, want):
        if not torch.equal(x, y):
            raise Wrong(f"{what} differs: {name} in {int((x != y).sum())} of {x.numel()} elements")


def _within(errors: dict[str, float], bars: dict[str, float]) -> None:
    wrong = [f"{name} is off by {error:.1e}, its bar is {bars[name]:.0e}" for name, error in errors.items()]
    wrong = [text for text, (name, error) in zip(wrong, errors.items()) if not error < bars[name]]
    if wrong:
        raise Wrong(", ".join(wrong))


# --- this process ----------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    """See the module's docstring. JSON: {"problem": {...}, "device": "cuda:0", "kernels": a module, "seconds": 240}."""
    if argv[:1] in (["-h"], ["--help"]):
        print(f"{__doc__}\nStarted by: python -m ovq.ops.ovq_attention.selftest --help")
        return 0
    given, began, at = json.loads(argv[0]), time.monotonic(), "the import of the kernels"
    print(f"at {at}", flush=True)

    def say(what: str) -> None:
        nonlocal at
        at = what
        print(f"at {at}", flush=True)

    end_with_parent()
    if "seconds" in given:  # works even if a hang holds the GIL
        signal.alarm(int(given["seconds"]) + 5)
    try:
        kernels = importlib.import_module(given["kernels"])
        device = torch.device(given["device"])
        if device.type == "cuda":
            torch.cuda.set_device(device)
        problem = Problem(**given["problem"])
        assign: Any = importlib.import_module(f"{KERNELS}.assign")
        assign.several_ranks = problem.several_ranks
        found = verify(problem, device, kernels, say)
    except Exception as error:
        what = " ".join(str(error).split())[:300]
        kind = "" if isinstance(error, Wrong) else f"{type(error).__name__}: "
        print(f"failed: {at}: {kind}{what}", flush=True)
        return 1
    print(f"passed: {found} ({time.monotonic() - began:.0f} s)", flush=True)
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(status)  # after an illegal access, an orderly exit may hang
