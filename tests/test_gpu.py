"""Claims about OVQ-attention on a real GPU, in every dtype: the interpreter's tests, and those it cannot run.

Skipped where there is no CUDA device. `python -m pytest tests/test_gpu.py` takes a few minutes, mostly for compilation.
"""

from __future__ import annotations

import importlib

import pytest
import torch

pytest.importorskip("triton")

from eval.bench import cost  # noqa: E402
from eval.bench.gpu import checks  # noqa: E402
from eval.bench.gpu.checks import CHECKS, Sizes  # noqa: E402
from eval.bench.shape import Shape  # noqa: E402
from ovq.ops import ovq_attention  # noqa: E402
from ovq.ops.ovq_attention.spec import OVQSpec  # noqa: E402
from tests.ovq_triton_cases import *  # noqa: E402, F403  every interpreter case, on the GPU

plans = importlib.import_module("ovq.ops.ovq_attention.kernels.plan")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SIZES = [
    Sizes(),
    Sizes(K=128, V=128, heads=2, num_centroids=300),
    Sizes(K=32, V=96, tokens=1111, num_centroids=2048),
    Sizes(K=96, V=32, tokens=515, chunk_size=16, num_centroids=64),
    Sizes(K=64, V=64, tokens=1500, chunk_size=512, heads=8, kv_heads=1),
    Sizes(K=64, V=64, tokens=90, num_centroids=16384),
    Sizes(batch=3, K=64, V=128, tokens=640, chunk_size=64, heads=3, kv_heads=3, num_centroids=1),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", list(CHECKS))
def test_kernels_pass_every_check(name: str, sizes: Sizes, dtype: torch.dtype) -> None:
    """Float64, best assignments, bit-exact repeats, decoding, poisoned memory: see `eval.bench.gpu.checks`."""
    CHECKS[name]("triton", sizes, torch.device("cuda"), dtype)


@pytest.mark.parametrize("heads", [1, 8, 25, 32, 200])
def test_programs_that_share_a_head_agree_however_many_there_are(heads: int) -> None:
    """The barrier between 16 down to 1 programs per head, over 256 chunks: bit-equal over runs and to one program."""
    sizes = Sizes(tokens=256 * 64, chunk_size=64, heads=heads, kv_heads=heads, num_centroids=1500)
    tensors = checks.random_inputs(sizes, torch.device("cuda"), torch.bfloat16)
    do = torch.randn_like(tensors[0])
    runs = [checks.run("triton", tensors, sizes.spec, do) for _ in range(3)]
    with checks.programs_per_head(lambda usual: 1):
        alone = checks.run("triton", tensors, sizes.spec, do)
    assert all(torch.equal(x, y) for together in runs for x, y in zip(together, alone))


def test_peak_memory_at_64k_is_within_three_times_q_k_v() -> None:
    sizes = Sizes(batch=1, tokens=65536, heads=8, kv_heads=8, num_centroids=2048)
    q, k, v, beta = checks.random_inputs(sizes, torch.device("cuda"), torch.bfloat16)
    do = torch.randn_like(q)

    def run() -> None:
        o, _ = ovq_attention(q, k, v, beta, num_centroids=2048, backend="triton")
        torch.autograd.grad(o, (q, k, v, beta), do)

    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() - do.numel() * do.element_size()
    run()
    peak = torch.cuda.max_memory_allocated() - before
    qkv = sum(x.numel() * x.element_size() for x in (q, k, v))
    assert peak <= 3 * qkv
    shape = Shape(1, 65536, 8, 8, 64, 64, OVQSpec(2048))
    assert peak == pytest.approx(sum(cost.memory(shape).values()), rel=0.15)


def test_offsets_beyond_two_to_the_31_elements_are_right() -> None:
    """q has more than 2^31 elements: the last sequence equals the same sequence alone."""
    T, H, D = 32768, 33, 2
    B = -(-(2**31) // (T * H * 64)) + 1
    if torch.cuda.get_device_properties(0).total_memory < 70 * 2**30:
        pytest.skip("needs 70 GiB")
    q = torch.nn.functional.normalize(torch.randn(B, T, H, 64, device="cuda", dtype=torch.bfloat16), dim=-1)
    beta = torch.full((H,), 8.0, device="cuda")
    with torch.no_grad():
        whole = ovq_attention(q, q, q, beta, num_centroids=64 * D, backend="triton")[0]
        alone = ovq_attention(q[-1:], q[-1:], q[-1:], beta, num_centroids=64 * D, backend="triton")[0]
    assert torch.equal(whole[-1:], alone)


def test_streams_that_share_a_plan_read_it_whole() -> None:
    """A new plan, used at once from a second stream and dropped while that stream still runs, gives the same bits."""
    sizes = Sizes(tokens=4000, num_centroids=1000)
    tensors = checks.random_inputs(sizes, torch.device("cuda"), torch.bfloat16)
    settings = {"num_centroids": 1000, "backend": "triton"}
    with torch.no_grad():
        want = ovq_attention(*tensors, **settings)[0]
        for _ in range(20):
            plans.make_plan.cache_clear()
            torch.cuda.synchronize()
            side = torch.cuda.Stream()
            got = [ovq_attention(*tensors, **settings)[0]]
            with torch.cuda.stream(side):
                got += [ovq_attention(*tensors, **settings)[0] for _ in range(3)]
            plans.make_plan.cache_clear()
            scribble = [torch.full((1000,), -1, dtype=torch.int32, device="cuda") for _ in range(50)]
            torch.cuda.synchronize()
            assert scribble and all(torch.equal(o, want) for o in got)


def test_a_captured_graph_outlives_its_plan_and_a_first_call_in_a_capture_is_refused() -> None:
    sizes = Sizes(tokens=1500, num_centroids=300)
    tensors = checks.random_inputs(sizes, torch.device("cuda"), torch.bfloat16)
    settings = {"num_centroids": 300, "backend": "triton"}
    with torch.no_grad():
        want = ovq_attention(*tensors, **settings)[0]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = ovq_attention(*tensors, **settings)[0]
        plans.make_plan.cache_clear()
        scribble = [torch.full((1000,), -1, dtype=torch.int32, device="cuda") for _ in range(50)]
        graph.replay()
        torch.cuda.synchronize()
        assert scribble and torch.equal(got, want)
        plans.make_plan.cache_clear()
        with pytest.raises(RuntimeError, match="within a CUDA-graph capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            ovq_attention(*tensors, **settings)
        assert torch.equal(ovq_attention(*tensors, **settings)[0], want)


def test_torch_compile_keeps_a_layer_whole_on_the_gpu() -> None:
    sizes = Sizes(tokens=500)
    tensors = checks.random_inputs(sizes, torch.device("cuda"), torch.bfloat16)

    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
        return ovq_attention(2 * q, k, v, beta, num_centroids=200, backend="triton")[0].square()

    want, got = layer(*tensors), torch.compile(layer, fullgraph=True)(*tensors)
    assert checks.relative_error(got, want) < 1e-2
    for x, y in zip(torch.autograd.grad(got.sum(), tensors), torch.autograd.grad(want.sum(), tensors)):
        assert checks.relative_error(x, y) < 2e-2
