"""The stages of the Triton path as separate calls, to be compared with the cost model's floor."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

from eval.bench.rivals import Case, Inputs
from eval.bench.shape import Shape
from eval.bench.stopwatch import Marked
from ovq.ops.ovq_attention.spec import OVQSpec


def shape_of(case: Case) -> Shape:
    """The shape of a case in the cost model's terms."""
    spec = OVQSpec(case.num_centroids, case.chunk_size)
    return Shape(case.batch, case.tokens, case.heads, case.heads, case.width, case.width, spec)


def stage_calls(x: Inputs, case: Case, done: Callable[[str], None] = lambda stage: None) -> dict[str, Marked]:
    """A call for every stage of `cost.stages`, by name, with the results of the stages before it as inputs.

    Each is called once, so that the next reads real results; `done` is then called with its name.
    """
    kernels = importlib.import_module("ovq.ops.ovq_attention.kernels")
    spec = OVQSpec(case.num_centroids, case.chunk_size)
    plan = kernels.make_plan(spec, 0, 0, (0, case.tokens))
    q, k, v, beta = (y.detach() for y in (x.q, x.k, x.v, x.beta))
    B, H, N, K = case.batch, case.heads, case.num_centroids, case.width

    def zeros() -> tuple[torch.Tensor, ...]:
        return tuple(torch.zeros(shape, device=k.device) for shape in ((B, H, N, K), (B, H, N, K), (B, H, N)))

    placed, rows = kernels.assign(k, v, plan, *zeros(), None)
    done("assign")
    table = kernels.tabulate(placed, plan, plan.all_chunks, plan.all_centroids)
    done("tabulate")
    o, lse = torch.empty_like(v), q.new_empty(B, H, case.tokens, dtype=torch.float32)
    dq, dk, dv, delta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(lse)
    dbeta = lse.new_empty(B, H, kernels.query_tiles(plan, q, K), K)
    calls: dict[str, Marked] = {
        "assign": lambda mark: kernels.assign(k, v, plan, *zeros(), None),
        "tabulate": lambda mark: kernels.tabulate(placed, plan, plan.all_chunks, plan.all_centroids),
        "predict": lambda mark: kernels.predict(q, k, v, beta, plan, rows, table, o, lse),
        "query_grad": lambda mark: kernels.query_grad(q, k, v, beta, plan, rows, table, o, x.do, lse, delta, dq, dbeta),
        "dictionary_grad": lambda mark: kernels.dictionary_grad(
            q, k, v, beta, plan, rows, table, x.do, lse, delta, dk, dv
        ),
        # It adds to dk and dv, so repeating it changes only their values.
        "chunk_grad": lambda mark: kernels.chunk_grad(q, k, v, beta, plan, placed, x.do, lse, delta, dk, dv),
    }
    for name, call in calls.items():
        if name not in ("assign", "tabulate"):
            call(lambda: None)
            done(name)
    return calls
