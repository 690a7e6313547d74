"""Claims about OVQ-attention's kernels without a GPU: the cases in `ovq_triton_cases.py`, and host-side decisions.

The cases run in Triton's interpreter, which must be selected before Triton is imported: hence the separate process. On
a machine with a GPU they run compiled, on the GPU.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ovq.ops import ovq_attention
from ovq.ops.ovq_attention.spec import OVQSpec

pytest.importorskip("triton")

CASES = Path(__file__).with_name("ovq_triton_cases.py")
plans = importlib.import_module("ovq.ops.ovq_attention.kernels.plan")
configs = importlib.import_module("ovq.ops.ovq_attention.kernels.configs")


@pytest.mark.slow
def test_kernels_equal_the_reference() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", str(CASES)]
    done = subprocess.run(command, env=environment, cwd=CASES.parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and " skipped" not in done.stdout


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dtype": torch.bfloat16}, "interpreter silently computes bfloat16 incorrectly"),
        ({"dtype": torch.float64}, "needs float32, float16 or bfloat16, got torch.float64"),
        ({"K": 136}, "widths of at most 128, got 136 and 32"),
        ({"V": 256}, "widths of at most 128, got 16 and 256"),
        ({"chunk_size": 8}, "chunk_size in 16 .. 512, got 8"),
        ({"chunk_size": 1024}, "chunk_size in 16 .. 512, got 1024"),
    ],
    ids=str,
)
def test_unsupported_inputs_are_explained(change: dict, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = importlib.import_module("ovq.ops.ovq_attention.kernels")
    monkeypatch.setattr(kernels, "INTERPRETED", True)
    dtype, K, V = change.get("dtype", torch.float32), change.get("K", 16), change.get("V", 32)
    q, v = torch.randn(1, 20, 1, K).to(dtype), torch.randn(1, 20, 1, V).to(dtype)
    reason = kernels.unsupported(q, q, v, OVQSpec(20, change.get("chunk_size", 16)))
    assert reason is not None and message in reason
    assert kernels.unsupported(torch.randn(1, 20, 1, 16), q, torch.randn(1, 20, 1, 32), OVQSpec(20, 16)) is None


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "assign_on", "message"),
    [
        ((7, 5), torch.bfloat16, 64, "key", "is made for sm_80 to sm_90 .*, and this is sm_75"),
        ((10, 0), torch.bfloat16, 64, "key", "is made for sm_80 to sm_90 .*, and this is sm_100"),
        ((8, 9), torch.bfloat16, 128, "key_value", "memory than sm_89 has for assign_on=key_value .* above 64"),
        ((8, 9), torch.float32, 64, "key_value", "memory than sm_89 .* with float32 widths above 32"),
        ((8, 0), torch.float32, 128, "key_value", "memory than sm_80 .* with float32 widths above 64"),
        ((8, 9), torch.float32, 128, "key", None),
        ((8, 9), torch.float16, 64, "key_value", None),
        ((8, 0), torch.bfloat16, 128, "key_value", None),
        ((9, 0), torch.float32, 128, "key_value", None),
    ],
)
def test_chips_that_cannot_run_the_kernels_are_named(
    capability: tuple[int, int],
    dtype: torch.dtype,
    width: int,
    assign_on: str,
    message: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernels = importlib.import_module("ovq.ops.ovq_attention.kernels")
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    with FakeTensorMode():
        q = torch.empty(1, 64, 1, width, dtype=dtype, device="cuda")
        reason = kernels.unsupported(q, q, q, OVQSpec(20, 16, assign_on=assign_on))
    assert reason is None if message is None else re.search(message, reason)


def test_offsets_of_32_bits_limit_the_tokens_of_a_call() -> None:
    kernels = importlib.import_module("ovq.ops.ovq_attention.kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "INTERPRETED", True)
        q = torch.empty(1, 1, 1, 128).expand(1, 2**24, 1, 128)
        assert "fewer than 16,777,216 centroids and tokens" in kernels.unsupported(q, q, q, OVQSpec(20, 16))
        assert kernels.unsupported(q[:, :-20], q[:, :-21], q[:, :-20], OVQSpec(20, 16)) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu_the_error_names_a_backend_that_works() -> None:
    x = torch.randn(1, 20, 1, 16)
    with pytest.raises(ValueError, match="backend=triton of ovq_attention:? needs .*use backend=torch"):
        ovq_attention(x, x, x, torch.ones(1), num_centroids=20, chunk_size=16, backend="triton")


@pytest.mark.parametrize("position", [0, 64])
def test_a_plan_has_the_size_at_every_chunk_and_tables_do_not_overlap(position: int) -> None:
    spec = OVQSpec(100, 16)
    plan = plans.make_plan(spec, spec.size_at(position), position, (0, 16 * 20 + 5))
    assert (plan.committed, plan.documents) == (20, ((0, 20),))
    assert plan.sizes.tolist() == [spec.size_at(position + 16 * i) for i in range(21)]
    assert (int(plan.starts[-1]), int(plan.ends[-1])) == (320, 325)
    for chunks, (low, high) in ((plan.all_chunks, plan.all_centroids), ((3, 9), (20, 40))):
        starts, size = plan.layout(chunks, (low, high))
        widths = (plan.sizes[slice(*chunks)] - low).clip(0, high - low)
        ends = (starts + widths).tolist()
        assert len(ends) == chunks[1] - chunks[0] and (starts % 16 == 0).all()
        assert all(end <= start for end, start in zip(ends, starts.tolist()[1:])) and ends[-1] <= size


def test_a_plan_of_documents_has_a_partial_chunk_after_each() -> None:
    plan = plans.make_plan(OVQSpec(100, 16), 0, 0, (0, 5, 5, 37, 69))
    assert plan.documents == ((0, 0), (1, 3), (4, 6))
    assert plan.starts.tolist() == [0, 5, 21, 37, 37, 53, 69]
    assert plan.ends.tolist() == [5, 21, 37, 37, 53, 69, 69]
    assert plan.sizes.tolist() == [0, 0, 13, 24, 0, 13, 24]
    assert plan.walks == ((1, 3, 0), (4, 6, 24)) and plan.sums == 48  # a document of five tokens commits nothing
    blocks = plan.blocks(16, plan.all_centroids, torch.device("cpu")).tolist()
    assert sorted(blocks) == [[0, 1, 3, 37, 37], [0, 4, 6, 69, 69], [16, 2, 3, 37, 37], [16, 5, 6, 69, 69]]


@pytest.mark.parametrize("entries", [1, 100, 1000, 10**9])
def test_parts_of_a_table_cover_it_and_stay_within_bounds(entries: int) -> None:
    plan = plans.make_plan(OVQSpec(300, 16), 0, 0, (0, 50, 600))
    chunks, centroids = plan.chunk_ranges(entries), plan.centroid_ranges(entries, 64)
    for parts, whole in ((chunks, plan.all_chunks), (centroids, plan.all_centroids)):
        assert [parts[0][0], *(end for _, end in parts)] == [*(start for start, _ in parts), whole[1]]
    for part in chunks:
        assert plan.layout(part, plan.all_centroids)[1] <= entries or part[1] - part[0] == 1
    for low, high in centroids:
        assert plan.layout(plan.all_chunks, (low, high))[1] <= entries or high - low <= 64
        assert low % 64 == 0


def test_random_seeding_ranks_give_the_order_of_the_definition() -> None:
    spec = OVQSpec(100, 16, seeding="random", seed=3)
    for position, bounds in ((0, (0, 40)), (48, (0, 40)), (0, (0, 20, 60))):
        plan = plans.make_plan(spec, spec.size_at(position), position, bounds)
        ranks = plan.tensors(torch.device("cpu"))["ranks"]
        for first, last in plan.documents:
            for c in range(first, last):
                start = position + int(plan.starts[c] - plan.starts[first])
                order = spec.hash_order(start, torch.device("cpu")).tolist()
                if start == 0:  # the very first key founds centroid 0
                    order = [0, *(place for place in order if place)]
                assert ranks[c].argsort().tolist() == order


@pytest.mark.parametrize("D, N, L", [(64, 2048, 128), (64, 16384, 128), (128, 16384, 128), (64, 2048, 16)])
def test_a_training_step_at_64k_takes_at_most_three_times_q_k_and_v(D: int, N: int, L: int) -> None:
    """Memory in use at once. Forward pass: inputs and outputs, its copy of the means, and a table. Backward pass: what
    the forward operator saved, the gradients, delta, and a table."""
    importlib.import_module("ovq.ops.ovq_attention.kernels")
    T, spec = 65536, OVQSpec(N, L)
    plan = plans.make_plan(spec, 0, 0, (0, T))
    most = plans.most_entries(T, 1, D, D, 2, N)
    parts = [plan.layout(part, plan.all_centroids)[1] for part in plan.chunk_ranges(most)]
    parts += [plan.layout(plan.all_chunks, part)[1] for part in plan.centroid_ranges(most, 128)]
    with FakeTensorMode():
        q = torch.empty(1, T, 1, D, dtype=torch.bfloat16)
        sums = (torch.empty(1, 1, N, D), torch.empty(1, 1, N, D), torch.empty(1, 1, N))
        kept = torch.ops.ovq.ovq_attention(q, q, q, torch.empty(1), *sums, None, None, 0, 0, spec.text)
        o, placed, saved = kept[0], kept[4], kept[5:]
        numbers = (None, 0, 0, spec.text)
        grads = torch.ops.ovq.ovq_attention_backward(o, q, q, q, torch.empty(1), o, placed, *saved, *numbers)

        def size(*tensors: torch.Tensor) -> int:
            return sum(x.numel() * x.itemsize for x in tensors) + 4 * max(parts)

        backward, forward = size(o, o, placed, *saved, *grads) + 4 * T, size(*sums, *kept) + 2 * N * D
        assert max(backward, forward) < 3 * 3 * q.numel() * q.itemsize


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "gfx942", "interpreter"])
def test_a_new_length_compiles_nothing(arch: str) -> None:
    """No compile-time argument depends on tokens, heads or centroids, and integer arguments are never specialised."""
    parameters = inspect.signature(configs.constants).parameters
    assert not {"T", "S", "N", "H", "G", "tokens"} & set(parameters)
    for stage in ("assign", "predict", "query_grad", "dictionary_grad", "chunk_grad"):
        for L in (16, 100, 128, 512):
            settings = configs.constants(stage, arch, torch.bfloat16, 64, 64, L)
            rows = settings.get("BLOCK_M", settings.get("BLOCK_L"))
            assert rows <= configs.padded(L) and settings["BLOCK_N"] >= 16


def test_any_number_of_programs_that_fits_the_card_shares_a_walk_and_nccl_keeps_room() -> None:
    assign = importlib.import_module("ovq.ops.ovq_attention.kernels.assign")

    def splits(walks: int, device: torch.device) -> int:
        return assign.splits(walks, device, 32)

    with pytest.MonkeyPatch.context() as patch:
        properties = type("Properties", (), {"multi_processor_count": 132})
        patch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        device = torch.device("cuda")
        assert [splits(walks, device) for walks in (1, 8, 16, 32, 34, 64, 67)] == [16, 16, 8, 4, 3, 2, 1]
        assert [assign.splits(1, device, blocks) for blocks in (0, 1, 4, 32)] == [1, 1, 4, 16]
        patch.setattr(assign, "several_ranks", True)
        tested_alone = {walks: splits(walks, device) for walks in range(1, 300)}
        patch.setattr(assign, "several_ranks", None)
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "get_world_size", lambda: 8)
        found = {walks: splits(walks, device) for walks in range(1, 300)}
        assert found == tested_alone
        assert all(walks * programs <= 116 or programs == 1 for walks, programs in found.items())
        assert [found[walks] for walks in (1, 8, 16, 32, 58, 59)] == [16, 14, 7, 3, 2, 1]
        patch.setattr(torch.version, "hip", "6.4")
        assert splits(1, device) == 1


def test_every_shipped_kernel_names_all_its_arguments() -> None:
    """Run in a separate process, because this one may have loaded kernels for the interpreter."""
    program = (
        "from ovq.ops.ovq_attention.kernels.shipped import KERNELS, shipped_kernels, variants\n"
        "for arch in ('sm_80', 'sm_90', 'gfx942'):\n"
        "    kernels = list(shipped_kernels(arch))\n"
        "    assert {k.stage for k in kernels} == set(KERNELS) and len(kernels) == 6 * (len(KERNELS) - 2) + 2\n"
        "    for k in kernels:\n"
        "        constexprs = {p.name for p in k.kernel.params if p.is_constexpr}\n"
        "        assert constexprs == set(k.constexprs), (k.stage, constexprs ^ set(k.constexprs))\n"
        "        numbers = {n for n, t in k.signature.items() if t in ('i32', 'fp32')}\n"
        "        assert numbers == {p.name for p in k.kernel.params if p.do_not_specialize}, k.stage\n"
        "others = list(variants('sm_90'))\n"
        "assert all(k.constexprs.keys() == kernels[0].constexprs.keys() for k in others if k.stage == 'assign')\n"
        "assert {L for k in others for L in [k.chunk_size]} == {16, 64, 128, 256, 512}\n"
        "assert {k.constexprs['MOST'] for k in others if k.stage == 'assign'} == {1, 4, 16}\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
