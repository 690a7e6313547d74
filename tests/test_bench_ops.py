"""The operator benchmark measures what it says, and says on what."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval.bench import ops as bench_ops

SMALL = ["heads=2", "head_dim=8", "num_centroids=16", "chunk_size=16", "window=16", "threads=1", "repeats=2"]


def test_it_times_every_operator_at_every_length_and_writes_where_it_ran(
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
    """Causal SDPA at 4096 x 64 floats: output and gradients alone are 4 MiB a head, the scores would be 64 MiB."""
    settings = bench_ops.fill_in(bench_ops.Options(heads=4, head_dim=64, threads=1))
    extra = bench_ops.extra_memory("sdpa", 4096, settings)
    assert 12 * 2**20 < extra < 128 * 2**20


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
def test_a_wrong_option_is_one_line(argument: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_ops.main([argument, "device=cpu"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
