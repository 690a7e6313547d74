"""Claims about the operator benchmark: it measures what it says, and records where."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from eval.bench import ops as bench_ops
from eval.bench import rivals
from eval.bench.rivals import Case, Inputs, make_inputs
from eval.bench.stopwatch import Timing

SMALL = ["heads=2", "head_dim=8", "num_centroids=16", "chunk_size=16", "window=16", "threads=1", "repeats=2"]


def test_every_operator_is_timed_at_every_length_and_the_machine_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "bench.json"
    limits = ["lengths=[64,256]", "peer_limit=64", "reference_limit=64", "memory=false"]
    assert bench_ops.main([*SMALL, *limits, f"out={out}"]) == 0
    report = json.loads(out.read_text())
    cells = {(row["op"], row["tokens"]) for row in report["results"]}
    everywhere = {(op, t) for op in ("ovq_torch", "sliding_window") for t in (64, 256)}
    assert cells == everywhere | {("sdpa", 64), ("ovq_reference", 64)}
    for row in report["results"]:
        assert len(row["total_ms"]) == 2 and 0 < row["forward_median_ms"] < row["total_median_ms"]
    assert set(report["summary"]["growth"]["ovq_torch"]) == {"64->256"}
    assert report["summary"]["speedup_over_sdpa"]["sdpa"] == {"64": 1.0}
    assert report["machine"]["threads"] == 1 and report["machine"]["torch"] and report["machine"]["command"]
    assert "ovq_torch" in capsys.readouterr().out


def test_extra_memory_is_that_of_the_call() -> None:
    """Causal SDPA on 4 x 4096 x 64 floats, 4 MiB: an output and four gradients. Scores would be 64 MiB a head."""
    settings = bench_ops.fill_in(bench_ops.Options(heads=4, head_dim=64, threads=1))
    extra = bench_ops.extra_memory(Timing(), "sdpa", 4096, settings)
    assert 20 * 2**20 <= extra < 64 * 2**20


def test_extra_memory_of_a_gpu_is_the_allocators_and_the_outputs_gradient() -> None:
    settings = bench_ops.fill_in(bench_ops.Options(batch=2, heads=3, head_dim=16, dtype="bfloat16"))
    assert bench_ops.extra_memory(Timing(peak_bytes=1000), "sdpa", 8, settings) == 1000 + 2 * 3 * 16 * 8 * 2


def test_an_operator_that_fails_is_named_and_the_rest_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(x: Inputs, case: Case) -> torch.Tensor:
        raise torch.OutOfMemoryError(f"no room for {case.tokens} tokens")

    monkeypatch.setitem(rivals.RIVALS, "sliding_window", broken)
    out = tmp_path / "bench.json"
    ops = ["ops=[sliding_window,sdpa]", "lengths=[32]", "memory=false", f"out={out}"]
    assert bench_ops.main([*SMALL, *ops]) == 1
    assert [row["op"] for row in json.loads(out.read_text())["results"]] == ["sdpa"]
    said = capsys.readouterr()
    assert "no room for 32 tokens" in said.out and "1 of 2 measurements failed" in said.err


@pytest.mark.parametrize("op", [op for op in bench_ops.OPERATORS if op != "ovq_triton"])
def test_inputs_stored_heads_first_are_the_same_problem(op: str) -> None:
    case = Case(batch=2, tokens=24, heads=3, width=8, num_centroids=8, chunk_size=8, window=8)
    made = []
    for heads_first in (False, True):
        x = make_inputs(case, torch.device("cpu"), torch.float32, heads_first=heads_first)
        assert x.q.shape == x.do.shape == (2, 24, 3, 8)
        assert x.q.transpose(1, 2).is_contiguous() == x.do.transpose(1, 2).is_contiguous() == heads_first
        made.append(x)
    with torch.no_grad():
        for name in ("q", "k", "v"):
            getattr(made[1], name).copy_(getattr(made[0], name))
    outputs = [rivals.RIVALS[op](x, case) for x in made]
    torch.testing.assert_close(outputs[0], outputs[1])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("lenghts=[64]", "there is no option 'lenghts'"),
        ("lengths=[a]", "lengths=[a] must be a list of whole numbers"),
        ("dtype=int8", "dtype=int8 is not a legal value; legal: float32"),
        ("repeats=0", "repeats=0 must be"),
        ("ops=[ovq_numpy]", "ops=ovq_numpy cannot run on cpu; legal: ovq_torch"),
    ],
)
def test_a_wrong_option_is_a_one_line_error(argument: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_ops.main([argument, "device=cpu"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
