"""Claims about device copies of the host arrays that the kernels read: streams, eviction and CUDA-graph capture.

CUDA is replaced by a fake that records what would be queued. Only a GPU can show that the events and the allocator do
their part: `tests/test_gpu.py` tests that.
"""

from __future__ import annotations

import importlib
import weakref
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from ovq.ops.ovq_attention.spec import OVQSpec  # noqa: E402

copies = importlib.import_module("ovq.ops.ovq_attention.kernels.copies")
plans = importlib.import_module("ovq.ops.ovq_attention.kernels.plan")
CARD = torch.device("cuda", 0)


class FakeCuda(copies.Streams):
    """Tensors stay on the CPU; `queued` lists what was queued on which stream."""

    def __init__(self) -> None:
        self.stream, self.in_capture = "main", False
        self.queued: list[tuple[Any, ...]] = []

    def current(self, device: torch.device) -> Any:
        return self.stream

    def capturing(self) -> bool:
        return self.in_capture

    def copy(self, host: torch.Tensor, device: torch.device) -> torch.Tensor:
        assert not self.in_capture
        self.queued.append(("copy", self.stream))
        return host.clone()

    def done(self, stream: Any) -> Any:
        return ("event", stream, sum(what[0] == "copy" for what in self.queued))

    def wait(self, stream: Any, event: Any) -> None:
        assert not self.in_capture  # waiting for an event recorded outside a capture breaks it
        self.queued.append(("wait", stream, event))

    def use(self, stream: Any, tensor: torch.Tensor) -> None:
        self.queued.append(("use", stream, tensor.data_ptr()))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(copies, "CUDA", fake)
    monkeypatch.setattr(copies, "_captured", {})
    return fake


def two() -> dict[str, np.ndarray]:
    return {"a": np.arange(3), "b": np.arange(5)}


def test_a_second_stream_waits_for_the_copy_and_keeps_its_memory(cuda: FakeCuda) -> None:
    made = copies.Copies()
    first = made.get("key", CARD, two)
    assert made.get("key", CARD, two) is first
    assert cuda.queued == [("copy", "main"), ("copy", "main")]
    cuda.stream = "side"
    assert made.get("key", CARD, two) is first and made.get("key", CARD, two) is first
    used = [("use", "side", x.data_ptr()) for x in first.values()]
    assert cuda.queued[2:] == [("wait", "side", ("event", "main", 2)), *used]  # once: streams run in order
    assert first["b"].tolist() == list(range(5)) and first["b"].dtype == torch.int32


def test_a_first_call_within_a_capture_is_refused_and_keeps_nothing(cuda: FakeCuda) -> None:
    made = copies.Copies()
    cuda.in_capture = True
    with pytest.raises(RuntimeError, match="first time at this shape within a CUDA-graph capture.*before the capture"):
        made.get("key", CARD, two)
    assert cuda.queued == []
    cuda.in_capture = False
    made.get("key", CARD, two)
    assert cuda.queued == [("copy", "main")] * 2


def test_copies_in_a_captured_graph_outlive_their_owner(cuda: FakeCuda) -> None:
    """A graph holds addresses: what it reads must survive the eviction of a plan. What it does not read is freed."""
    made = copies.Copies()
    read = weakref.ref(made.get("read", CARD, two)["a"])
    unread = weakref.ref(made.get("unread", CARD, two)["a"])
    cuda.stream, cuda.in_capture = "capture", True
    assert made.get("read", CARD, two)["a"] is read()
    cuda.in_capture = False
    del made
    assert read() is not None and unread() is None


def test_every_cache_of_a_plan_is_made_before_a_capture_and_found_in_it(cuda: FakeCuda) -> None:
    """Everything that a forward and a backward pass request from a plan on one device, requested twice."""
    plan = plans.make_plan(OVQSpec(100, 16, seeding="random", seed=11), 0, 0, (0, 5, 37, 69))

    def everything() -> list[torch.Tensor]:
        part = ((0, 3), (0, 10))
        return [
            *plan.tensors(CARD).values(),
            plan.offsets(plan.all_chunks, plan.all_centroids, CARD)[0],
            plan.offsets(*part, CARD)[0],
            plan.document_ranges(plan.all_chunks, CARD),
            plan.document_ranges((0, 3), CARD),
            plan.blocks(16, plan.all_centroids, CARD),
            plan.blocks(32, plan.all_centroids, CARD),
        ]

    first = everything()
    copied = len(cuda.queued)
    assert copied == len(first) == 11
    cuda.stream, cuda.in_capture = "capture", True
    assert all(x is y for x, y in zip(everything(), first)) and len(cuda.queued) == copied
    assert plan.offsets(*((0, 3), (0, 10)), CARD)[1] == plan.layout((0, 3), (0, 10))[1]
    assert first[0].tolist() == plan.starts.tolist()


def test_without_a_gpu_no_stream_is_asked_for(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeCuda, "current", None)
    made = copies.Copies()
    assert made.get("key", torch.device("cpu"), two) is made.get("key", torch.device("cpu"), two)
