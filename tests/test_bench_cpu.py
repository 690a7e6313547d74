"""Claims about the CPU benchmark: every section measures what it says, nothing measured is lost, FLOPs are counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.bench import cpu, plain_gpt, profile, reading, steps
from eval.bench.against_sdpa import ovq_flops, sdpa_flops
from eval.bench.rivals import Case
from eval.bench.stopwatch import Stopwatch, ratio_in_turns
from tests.helpers import TINY

MODELS = ["std_att", "sw_ovq"]
SMALL = [
    *TINY,
    *("models=[std_att,sw_ovq]", "threads=1", "repeats=1", "memory=false"),
    *("matmul_size=32", "lengths=[64,256]", "peer_limit=64", "contexts=[32,64]", "precision_contexts=[32]"),
    "profile_contexts=[32]",
    *("step_tokens=64", "prefix=80", "piece=32", "decode=3"),
]


def run(out: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    status = cpu.main([*SMALL, *arguments, f"out={out}"])
    return status, json.loads(out.read_text())


def test_every_section_has_all_its_measurements(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = run(tmp_path / "deep" / "cpu.json")
    said = capsys.readouterr()
    assert status == 0, said.err
    assert found["finished"] and set(found["seconds"]) == set(cpu.SECTION_NAMES)
    assert found["machine"]["threads"] == 1 and found["settings"]["overrides"] == TINY

    assert [row["dtype"] for row in found["matmul"]] == ["float32", "bfloat16"]
    assert all(row["gflops"] > 0 for row in found["matmul"])

    assert [(row["op"], row["tokens"]) for row in found["operator"]] == [
        ("ovq_torch", 64),
        ("sdpa", 64),
        ("ovq_torch", 256),
    ]
    short, peer, long = found["operator"]
    assert peer["total_speedup"] == 1 and short["total_speedup"] == peer["total_ms"][0] / short["total_ms"][0]
    assert long["total_speedup"] is None and long["total_growth"] == long["total_ms"][0] / short["total_ms"][0]
    for row in found["operator"]:
        assert row["total_gflops"] == pytest.approx(row["total_flops"] / row["total_median_ms"] / 1e6)
        assert row["of_peak"] == pytest.approx(row["total_gflops"] / found["matmul"][0]["gflops"])
        assert 0 < row["forward_median_ms"] < row["total_median_ms"]

    assert [(row["model"], row["context"]) for row in found["step"]] == [
        (name, context) for context in (32, 64) for name in ("plain_gpt", *MODELS)
    ]
    for row in found["step"]:
        assert row["tokens"] == 64 and len(row["step_ms"]) == 1
        assert row["tokens_per_s"] == pytest.approx(64e3 / row["step_median_ms"])
        assert row["speedup"] == 1 or row["model"] != "plain_gpt"

    assert [(row["precision"], row["context"]) for row in found["precision"]] == [("fp32", 32), ("bf16", 32)]
    assert found["precision"][0]["speedup"] == 1 != found["precision"][1]["speedup"]

    assert [(row["model"], row["context"]) for row in found["profile"]] == [("plain_gpt", 32), ("sw_ovq", 32)]
    for row in found["profile"]:
        assert list(row["parts_ms"]) == list(profile.KINDS) and row["parts_ms"]["products"] > 0
        assert sum(row["parts_ms"].values()) >= row["step_ms"] * 0.999

    assert [row["model"] for row in found["inference"]] == MODELS
    for row in found["inference"]:
        assert len(row["piece_ms"]) == 3 and len(row["token_ms"]) == 3  # 32 + 32 + 16 tokens
        assert row["prefill_tokens_per_s"] == pytest.approx(80e3 / sum(row["piece_ms"]))
    assert found["inference"][0]["state_bytes"] == 2 * 2 * 2 * 16 * 80 * 4  # layers, keys and values, heads, width
    assert "note: sdpa is not measured at 256" in said.out and found["notes"]


def test_the_peer_of_inference_is_measured_even_if_it_is_not_named(tmp_path: Path) -> None:
    status, found = run(tmp_path / "cpu.json", "sections=[inference]", "models=[sw]")
    assert status == 0 and [row["model"] for row in found["inference"]] == ["std_att", "sw"]
    assert found["step"] == found["operator"] == [] and list(found["seconds"]) == ["inference"]


def test_what_the_time_budget_cuts_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = run(tmp_path / "cpu.json", "sections=[step]", "contexts=[32]", "repeats=5", "seconds=0")
    assert status == 0 and [len(row["step_ms"]) for row in found["step"]] == [3, 3, 3]
    assert "note: context 32: 3 repeats instead of 5 (seconds=0)" in capsys.readouterr().out


def test_an_interruption_loses_nothing_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(steps, "rows", interrupted)
    status, found = run(tmp_path / "cpu.json", "sections=[matmul,inference,step]")
    assert status == 130 and not found["finished"]
    assert len(found["matmul"]) == 2 and len(found["inference"]) > 1 and found["step"] == []


def test_a_model_that_fails_is_named_and_the_rest_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(plain_gpt, "train_step", broken)
    status, found = run(tmp_path / "cpu.json", "sections=[step]", "contexts=[32]")
    assert status == 1 and found["step"][0]["error"] == "OutOfMemoryError: no room"
    assert all(row["step_median_ms"] > 0 and row["speedup"] is None for row in found["step"][1:])
    assert "1 of 3 measurements failed" in capsys.readouterr().err
    status, found = run(tmp_path / "cpu.json", "sections=[profile]")
    assert status == 1 and found["profile"][0]["error"] == "OutOfMemoryError: no room"
    assert found["profile"][1]["step_ms"] > 0 and "plain_gpt" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("sections=[speed]", "sections=[speed] is not a legal value; legal: matmul, operator"),
        ("models=[gpt]", "models: 'gpt' does not exist; legal: gdn"),
        ("model.dimm=3", "there is no setting 'model.dimm'"),
    ],
)
def test_a_wrong_option_is_a_one_line_error(
    argument: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cpu.json"
    assert cpu.main([argument, f"out={out}"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not out.exists()


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        ("aten::bmm", "products"),
        ("aten::_softmax_backward_data", "exp and max"),
        ("aten::exp2_", "exp and max"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "SDPA"),
        ("aten::index_put_", "rows"),
        ("aten::copy_", "copies"),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::linalg_vector_norm", "sums and norms"),
        ("autograd::engine::evaluate_function: MmBackward0", "the rest"),
        ("aten::mul", "element-wise"),
        ("aten::expand_as", "the rest"),
    ],
)
def test_an_operation_is_of_one_kind(operation: str, kind: str) -> None:
    assert profile.kind_of(operation) == kind


# --- what is counted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [8, 64, 100])
def test_flops_of_the_operators_are_those_of_every_product(tokens: int) -> None:
    """Counted one query or key at a time; the last chunk of 100 tokens is partial, so its keys are not assigned."""
    case = Case(batch=2, tokens=tokens, heads=3, width=16, num_centroids=24, chunk_size=8)
    L, N, dot = case.chunk_size, case.num_centroids, 2 * case.width
    forward = backward = causal = 0
    for t in range(tokens):
        start = t // L * L
        n, own = start * N // (start + N), t - start + 1
        forward += dot * n if tokens - start >= L else 0  # k.mu
        forward += sum(dot for _ in range(n + own))  # q.mu and q.k
        forward += sum(dot for _ in range(n + own))  # p v
        for _ in ("q.k again", "do.v", "ds k", "p do", "ds q"):
            backward += dot * (n + own)
        causal += dot * (t + 1)
    rows = case.batch * case.heads
    assert ovq_flops(case) == (rows * forward, rows * (forward + backward))
    assert sdpa_flops(case) == (rows * 2 * causal, rows * 7 * causal)


def test_the_plain_gpt_has_the_parameters_of_full_attention(tmp_path: Path) -> None:
    plan = steps.Plan("tiny", 64, 1, 0)
    cfg = steps.config_of("std_att", 64, plan)
    with steps.worlds(cfg.trainer) as (world,):
        ours = steps.our_step(cfg, world, str(tmp_path))
    assert steps.plain_step(cfg).parameters == pytest.approx(ours.parameters, rel=0.02)


def test_the_plain_gpt_learns() -> None:
    torch.manual_seed(0)
    model = plain_gpt.PlainGPT(vocab_size=11, layers=2, dim=16, heads=2, head_dim=8, ffn_dim=32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.arange(44).view(2, 22) % 11
    losses = [plain_gpt.train_step(model, optimizer, tokens, 1.0) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]


def test_every_memory_has_the_capacity_of_the_demos_dictionary() -> None:
    plan = steps.Plan("tiny", 64, 1, 0)
    held = steps.config_of("sw_ovq", 64, plan).model.mixers["ovq"]["num_centroids"]
    for model in ("sw_fifo", "sw_kvm", "sw_compression", "sw_reservoir"):
        mixers = steps.config_of(model, 64, plan).model.mixers
        assert [m["capacity"] for m in mixers.values() if "capacity" in m] == [held]
        assert mixers["sliding_window"]["window"] == 128


def test_a_reader_continues_where_it_stopped() -> None:
    """Reading in pieces (the first one twice, as a warm-up) ends with the state and the next token of one pass."""
    plan = steps.Plan("tiny", 64, 1, 0, tuple(TINY))
    tokens = torch.randint(200, (1, 40), generator=torch.Generator().manual_seed(1))
    whole, pieces = (reading.Reader(steps.config_of("std_att", 40, plan), tokens, piece) for piece in (40, 16))
    whole.read()
    for _ in range(4):
        pieces.read()
    for reader in (whole, pieces):
        reader.write()
    assert whole.state is not None and pieces.state is not None
    assert pieces.state[0].position == whole.state[0].position == 41
    torch.testing.assert_close(pieces.state[1].key, whole.state[1].key)


def test_a_slow_call_may_have_fewer_turns_and_ratios_are_taken_within_turns() -> None:
    order: list[str] = []
    calls = {name: lambda mark, name=name: order.append(name) for name in ("fast", "slow")}
    Stopwatch(torch.device("cpu")).turns(calls, seconds=0, least=3, most=3, fewer={"slow": 1})
    assert order == ["fast", "slow", "fast", "slow", "fast", "fast"]  # the first two warm up
    assert ratio_in_turns([10.0, 200.0, 30.0], [5.0, 100.0]) == 2 and ratio_in_turns([], [1.0]) is None
