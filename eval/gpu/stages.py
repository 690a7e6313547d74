"""The stages of the Triton path, each as a call of its own: what is measured against the cost model's floor."""

from __future__ import annotations

import importlib

import torch

from eval.gpu.rivals import Case, Inputs
from eval.gpu.stopwatch import Marked
from ovq.ops.ovq_attention.cost import Shape
from ovq.ops.ovq_attention.spec import OVQSpec


def shape_of(case: Case) -> Shape:
    """The same case for the cost model."""
    spec = OVQSpec(case.num_centroids, case.chunk_size)
    return Shape(case.batch, case.tokens, case.heads, case.heads, case.width, case.width, spec)


def stage_calls(x: Inputs, case: Case) -> dict[str, Marked]:
    """Calls by the names of `cost.stages`, each with the results of the stages before it as inputs."""
    kernels = importlib.import_module("ovq.ops.ovq_attention.triton")
    spec = OVQSpec(case.num_centroids, case.chunk_size)
    plan = kernels.make_plan(spec, 0, 0, case.tokens)
    q, k, v, beta = (y.detach() for y in (x.q, x.k, x.v, x.beta))
    B, H, N, K = case.batch, case.heads, case.num_centroids, case.width

    def zeros() -> tuple[torch.Tensor, ...]:
        return tuple(torch.zeros(shape, device=k.device) for shape in ((B, H, N, K), (B, H, N, K), (B, H, N)))

    placed, rows = kernels.assign(k, v, plan, *zeros(), None)
    o, lse = kernels.predict(q, k, v, beta, plan, rows)
    dq, delta, _ = kernels.query_grad(q, k, v, beta, plan, rows, o, x.do, lse)
    dk, dv = kernels.dictionary_grad(q, k, v, beta, plan, rows, x.do, lse, delta)
    table = rows[3]
    return {
        "assign": lambda mark: kernels.assign(k, v, plan, *zeros(), None),
        "predict": lambda mark: kernels.predict(q, k, v, beta, plan, rows),
        "query_grad": lambda mark: kernels.query_grad(q, k, v, beta, plan, rows, o, x.do, lse),
        "dictionary_grad": lambda mark: kernels.dictionary_grad(q, k, v, beta, plan, rows, x.do, lse, delta),
        # (It adds to what it finds in dk and dv, so that repeats only grow those.)
        "chunk_grad": lambda mark: kernels.chunk_grad(q, k, v, beta, plan, placed, table, x.do, lse, delta, dk, dv),
    }
