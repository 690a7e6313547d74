"""Claims about the cost model: operations equal counted ones, bytes equal allocated ones, times are sums of terms."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from eval.bench import compiled, cost
from eval.bench.cost import CHIPS
from eval.bench.shape import Shape
from ovq.errors import ConfigError
from ovq.ops.ovq_attention import reference
from ovq.ops.ovq_attention.spec import Dictionary, OVQSpec

pytest.importorskip("triton")

SPEC = OVQSpec(num_centroids=40, chunk_size=16)
SHAPE = Shape(batch=2, tokens=72, heads=4, kv_heads=2, K=8, V=12, spec=SPEC)  # four and a half chunks
BAR = Shape(batch=4, tokens=65536, heads=8, kv_heads=8, K=64, V=64, spec=OVQSpec(2048))


def counted(shape: Shape, *, backward: bool) -> int:
    """FLOPs of matrix products that torch counts while the reference runs."""
    B, T, H, G, K, V, N = shape.batch, shape.tokens, shape.heads, shape.kv_heads, shape.K, shape.V, SPEC.num_centroids
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(*size, generator=generator, requires_grad=True)
        for size in ((B, T, H, K), (B, T, G, K), (B, T, G, V))
    )
    empty = Dictionary(torch.zeros(B, G, N, K), torch.zeros(B, G, N, V), torch.zeros(B, G, N), 0, 0)
    with FlopCounterMode(display=False) as counter:
        o, _, _ = reference.forward(q, k, v, torch.ones(H), SPEC, empty)
        if backward:
            counter.flop_counts.clear()
            o.sum().backward()
    return counter.get_total_flops()


def test_forward_flops_equal_those_torch_counts() -> None:
    s, G, H = SHAPE, SHAPE.batch * SHAPE.kv_heads, SHAPE.batch * SHAPE.heads
    whole = s.tokens - s.tokens % SPEC.chunk_size
    # The reference also computes the masked half of each chunk's square, and sums by multiplying with a one-hot matrix.
    masked = sum(tokens * tokens for _, tokens in s.chunks) - s.own_pairs
    one_hot = 2 * whole * SPEC.num_centroids * (s.K + s.V)
    ours = cost.needed_flops(s, backward=False) - G * s.tokens * (s.K + s.V)
    assert counted(s, backward=False) == ours + H * masked * 2 * (s.K + s.V) + G * one_hot


def test_backward_flops_equal_those_torch_counts_plus_the_logits_again() -> None:
    s, H = SHAPE, SHAPE.batch * SHAPE.heads
    old, own = s.dictionary_pairs, sum(tokens * tokens for _, tokens in s.chunks)
    ours = H * (old + own) * (6 * s.K + 4 * s.V)
    logits = H * (old + own) * 2 * s.K  # autograd keeps p
    dp_and_dv = H * (old + own) * 4 * s.V
    dq_and_dk = H * (old + own) * 4 * s.K
    assert ours == logits + dp_and_dv + dq_and_dk
    got = counted(s, backward=True)
    # Autograd also multiplies the one-hot matrix with the gradients of the sums that a later chunk reads.
    one_hot = 2 * s.batch * s.kv_heads * SPEC.num_centroids * (s.K + s.V) * SPEC.chunk_size
    assert (got - dp_and_dv - dq_and_dk) % one_hot == 0
    assert 0 <= (got - dp_and_dv - dq_and_dk) // one_hot <= 4


def test_pair_counts_equal_a_loop_over_tokens() -> None:
    old = own = 0
    for t in range(SHAPE.tokens):
        old += SPEC.size_at(t - t % SPEC.chunk_size)
        own += t % SPEC.chunk_size + 1
    assert (SHAPE.dictionary_pairs, SHAPE.own_pairs) == (old, own)


def test_kernels_compute_logits_and_dp_twice_and_nothing_else_in_excess() -> None:
    work, pairs = cost.stages(SHAPE), SHAPE.dictionary_pairs + SHAPE.own_pairs
    done = sum(work[name].flops for name in (*cost.FORWARD, *cost.BACKWARD))
    twice = SHAPE.batch * SHAPE.heads * pairs * 2 * (SHAPE.K + SHAPE.V)
    assert done == cost.needed_flops(SHAPE, backward=True) + twice


def test_full_attention_at_64k_has_the_usual_flop_count() -> None:
    T, D = BAR.tokens, 64
    assert cost.attention_flops(BAR, backward=False) == pytest.approx(32 * 4 * D * T * T / 2, rel=1e-4)
    assert cost.attention_flops(BAR, backward=True) == pytest.approx(32 * 14 * D * T * T / 2, rel=1e-4)
    assert 10 < cost.attention_flops(BAR, backward=False) / cost.needed_flops(BAR, backward=False) < 14


def test_twice_the_tokens_take_at_most_2_1_times_the_work_and_memory_at_64k() -> None:
    double = dataclasses.replace(BAR, tokens=2 * BAR.tokens)
    for chip in CHIPS.values():
        once, twice = (cost.total_ms(s, chip, cost.FORWARD + cost.BACKWARD) for s in (BAR, double))
        assert all(1.9 <= b / a <= 2.1 for a, b in zip(once, twice))
    assert sum(cost.memory(double).values()) < 2.1 * sum(cost.memory(BAR).values())


@pytest.mark.parametrize("batch,heads", [(1, 1), (1, 8), (4, 8), (4, 16)])
def test_the_assignments_steps_take_longer_than_its_arithmetic_and_bytes(batch: int, heads: int) -> None:
    """So its predicted time is that of the chain of steps, not its floor, up to about one head per multiprocessor."""
    for chip in CHIPS.values():
        for N in (1024, 2048, 8192):
            shape = dataclasses.replace(BAR, batch=batch, heads=heads, kv_heads=heads, spec=OVQSpec(N))
            work = cost.stages(shape, chip)["assign"]
            assert work.predicted_ms(chip)[0] > work.floor_ms(chip)


def test_the_assignment_takes_more_than_half_as_long_for_one_sequence_as_for_a_full_chip() -> None:
    """Its chain of steps does not get shorter with a smaller batch, which makes small batches inefficient."""
    small = dataclasses.replace(BAR, batch=1)
    full, one = (cost.stages(s)["assign"].predicted_ms(CHIPS["h200"])[0] for s in (BAR, small))
    assert one > full / 2


# --- the compiled loops ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["predict", "query_grad", "dictionary_grad", "chunk_grad"])
def test_iterations_equal_those_that_a_launch_makes(stage: str) -> None:
    """Counted by walking the kernels' programs and their loops, with chunks of two tiles and a partial one."""
    s, tile = dataclasses.replace(SHAPE, spec=OVQSpec(num_centroids=20, chunk_size=16)), {"BLOCK_M": 8, "BLOCK_N": 4}
    M, N, group = 8, 4, s.heads // s.kv_heads
    programs = []
    if stage == "dictionary_grad":
        for block in range(0, s.spec.num_centroids, N):
            steps = [(m, h) for n, tokens in s.chunks if n > block for m in range(0, tokens, M) for h in range(group)]
            programs += [[len(steps)]] * (s.batch * s.kv_heads)
    for n, tokens in s.chunks:
        if stage in ("predict", "query_grad"):
            for first in range(0, tokens, M):
                loops = [len(range(0, n, N)), len(range(0, min(first + M, tokens), N))]
                programs += [loops] * (s.batch * s.heads)
        if stage == "chunk_grad":
            outer = range(0, tokens, N)
            inner = sum(len(range(start, tokens, M)) for start in outer) * group
            programs += [[len(outer), inner]] * (s.batch * s.kv_heads)
    whole, longest = compiled.iterations(stage, s, tile)
    assert whole == [sum(loop) for loop in zip(*programs)]
    assert longest == [max(loop) for loop in zip(*programs)]


def test_a_multiprocessor_holds_what_its_registers_and_shared_memory_allow() -> None:
    build = {"target": "sm_90", "registers": 255, "warps": 4, "shared": 65 * 1024}
    assert compiled.resident(build) == 2  # limited by 65,536 registers
    assert compiled.resident(build | {"registers": 128}) == 3  # limited by 228 KiB
    assert compiled.resident(build | {"registers": 32, "shared": 0, "warps": 8}) == 8  # limited by 64 warps
    assert compiled.resident(build | {"target": "sm_80", "registers": 64, "shared": 81 * 1024}) == 2
    assert compiled.cycles(build, 100, 900) == 450 and compiled.cycles(build, 600, 900) == 600


def test_the_calibration_is_the_ratio_of_the_loops_rate_to_the_published_one() -> None:
    h100 = CHIPS["h100"]
    slowed = compiled.calibration(h100.processors, h100.clock)
    build = compiled.builds()["sm_90", "fa2", "bfloat16", 64, 64, 128, "{}"]
    per_tile = compiled.cycles(build, *(build["code"][name][0] for name in ("instructions", "stalls")))
    seconds = 1e9 / (128 * 64) * per_tile / h100.processors / h100.clock  # for a billion pairs
    assert 4 * 64 * 1e9 / seconds == pytest.approx(slowed * compiled.PUBLISHED_FA2) and 1 < slowed < 3


def test_every_shape_that_ships_has_a_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for chip in CHIPS.values():
        for width, size in ((64, 2), (128, 2), (96, 2), (64, 4), (128, 4)):
            for L in (16, 48, 128, 512):
                shape = dataclasses.replace(BAR, tokens=4096, K=width, V=width, itemsize=size, spec=OVQSpec(512, L))
                assert all(work.predicted_ms(chip)[0] > 0 for work in cost.stages(shape, chip).values())
    monkeypatch.setattr(compiled, "REPORT", tmp_path / "aot.json")
    compiled.builds.cache_clear()
    with pytest.raises(ConfigError, match="is missing; make it: python -m eval.bench.aot out="):
        compiled.builds()
    compiled.builds.cache_clear()


# --- memory, and what is quoted --------------------------------------------------------------------------------------


def test_memory_is_what_the_operators_allocate() -> None:
    """In the backward pass, where memory peaks; the sums are already freed by then."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    kernels = importlib.import_module("ovq.ops.ovq_attention.kernels")
    s = dataclasses.replace(SHAPE, tokens=4096 + 5, spec=OVQSpec(512, 64), K=64, V=32)
    N = s.spec.num_centroids
    with FakeTensorMode():
        bf16 = {"dtype": torch.bfloat16, "device": "cuda"}
        q = torch.empty(s.batch, s.tokens, s.heads, s.K, **bf16)
        k = torch.empty(s.batch, s.tokens, s.kv_heads, s.K, **bf16)
        v = torch.empty(s.batch, s.tokens, s.kv_heads, s.V, **bf16)
        beta = torch.empty(s.heads, device="cuda")
        sums = [torch.zeros(s.batch, s.kv_heads, N, width, device="cuda") for width in (s.K, s.V)]
        count = torch.zeros(s.batch, s.kv_heads, N, device="cuda")
        out = torch.ops.ovq.ovq_attention(q, k, v, beta, *sums, count, None, None, 0, 0, s.spec.text)
        do = torch.empty_like(out[0])
        saved = [out[0], *out[4:]]
        grads = torch.ops.ovq.ovq_attention_backward(do, q, k, v, beta, *saved, None, 0, 0, s.spec.text)
        allocated = sum(x.numel() * x.element_size() for x in (*saved, do, *grads[:3]))
        delta = s.batch * s.heads * s.tokens * 4
    plan = kernels.make_plan(s.spec, 0, 0, (0, s.tokens))
    table = s.batch * s.kv_heads * 4 * plan.layout(plan.all_chunks, plan.all_centroids)[1]
    assert sum(cost.memory(s).values()) == pytest.approx(allocated + delta + table, rel=0.01)


def test_peak_memory_is_within_the_limit_at_64k() -> None:
    for width in (64, 128):
        for N in (1024, 2048, 16384):
            for L in (16, 128, 512):
                assert cost.memory_ratio(dataclasses.replace(BAR, K=width, V=width, spec=OVQSpec(N, L))) <= 3


def test_the_documentation_quotes_this_model() -> None:
    """docs/kernels.md quotes the memory table, one row of the times and the parts of a step."""
    text = (Path(__file__).parent.parent / "docs" / "kernels.md").read_text()
    rows = {"D = 64, 8k tokens": (64, 8192), "D = 64, 64k": (64, 65536), "D = 128, 64k": (128, 65536)}
    for row, (D, T) in (rows | {"D = 64, 256k": (64, 262144)}).items():
        shapes = [dataclasses.replace(BAR, K=D, V=D, tokens=T, spec=OVQSpec(1024 << i)) for i in range(5)]
        assert f"| {row} | " + " | ".join(f"{cost.memory_ratio(shape):.2f}" for shape in shapes) + " |" in text
    chip, attention = cost.CHIPS["h200"], 1e3 * cost.attention_flops(BAR, backward=True) / 470e12
    low, high = cost.total_ms(BAR, chip, cost.FORWARD + cost.BACKWARD)
    times = f"{low:.1f} to {high:.1f} | {attention:.1f} | {attention / high:.1f} to {attention / low:.1f} |"
    assert "| B x H = 32, 64k tokens | " + times in text
    step = cost.step_parts_us(BAR, BAR.spec.size_at(BAR.tokens), chip)
    assert ", ".join(f"{name} {us:.1f}" for name, us in step.items()) in " ".join(text.split())


def test_programs_per_head_equal_those_the_kernel_is_launched_with() -> None:
    assign = pytest.importorskip("ovq.ops.ovq_attention.kernels.assign")
    with pytest.MonkeyPatch.context() as patch:
        for heads, N, programs in (
            (1, 2048, 16),
            (8, 2048, 16),
            (32, 2048, 4),
            (256, 2048, 1),
            (1, 256, 4),
            (1, 64, 1),
        ):
            shape, chip = dataclasses.replace(BAR, batch=1, kv_heads=heads, spec=OVQSpec(N)), cost.CHIPS["h200"]
            properties = type("Properties", (), {"multi_processor_count": chip.processors})
            patch.setattr(torch.cuda, "get_device_properties", lambda _, found=properties: found)
            assert assign.splits(heads, torch.device("cuda"), -(-N // 64)) == cost.splits(shape, chip) == programs


def test_the_command_prints_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cost.main(["tokens=4096", "chip=a100"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*cost.FORWARD, *cost.BACKWARD, "A100", "predicted, not measured"))
    assert cost.main(["chip=tpu"]) == 2
    assert "h200" in capsys.readouterr().err
