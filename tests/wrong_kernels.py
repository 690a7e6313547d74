"""The Triton kernels with the fault named by $OVQ_TEST_FAULT, which the self-test must find."""

from __future__ import annotations

import importlib
import itertools
import os
import time

import torch
from torch import Tensor

kernels = importlib.import_module("ovq.ops.ovq_attention.kernels")
FAULT = os.environ.get("OVQ_TEST_FAULT", "")
calls = itertools.count()

if FAULT == "import":
    raise ImportError("libcuda.so.1 is too old")


def forward(q, k, v, beta, spec, dictionary, assignment=None):  # type: ignore[no-untyped-def]
    if FAULT == "exception":
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nSearch for it")
    if FAULT == "crash":
        os.abort()
    if FAULT == "hang":
        time.sleep(3600)
    o, new, placed = kernels.forward(q, k, v, beta, spec, dictionary, assignment)
    call = next(calls)
    if FAULT == "output":
        o = o * 1.01
    if FAULT == "gradient":
        o = o + 0.1 * (o - o.detach())
    if FAULT == "bits" and call % 2:
        o = o + 1e-7 * torch.sign(o)
    return o, new, placed


def forward_packed(q, k, v, beta, spec, cu_seqlens) -> Tensor:  # type: ignore[no-untyped-def]
    o = kernels.forward_packed(q, k, v, beta, spec, cu_seqlens)
    return o.roll(1, 1) if FAULT == "packed" else o
