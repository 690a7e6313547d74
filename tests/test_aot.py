"""Claims about kernels built without a GPU: they meet the limits on spills and shared memory and use tensor cores."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eval.bench import aot as aot_report
from eval.bench import sass
from eval.bench.aot import Build, offences

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

GOOD = Build(
    "sm_90", "predict", True, True, "bfloat16", 64, 64, 128, {"BLOCK_M": 128, "BLOCK_N": 64}, 4, 3, 200, 0, 0, 65536,
    {"HGMMA": 32},
)  # fmt: skip


def run(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a separate process, because this one may have loaded kernels for the interpreter."""
    command = [sys.executable, "-m", "eval.bench.aot", *argv]
    env = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")} | environment
    return subprocess.run(command, capture_output=True, text=True, env=env)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report on the main path for every chip that the limits apply to, built once."""
    out = tmp_path_factory.mktemp("aot")
    done = run("quick=true", "targets=[sm_80,sm_90,gfx942]", f"out={out}", "jobs=1")
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr[-2000:]
    return {**json.loads((out / "aot.json").read_text()), "out": out, "status": done.returncode, "errors": done.stderr}


def test_every_kernel_of_the_main_path_meets_the_limits(report: dict[str, Any]) -> None:
    assert report["broken"] == []
    assert report["status"] == 0


def test_every_kernel_is_built_for_every_chip(report: dict[str, Any]) -> None:
    attention = {"predict", "query_grad", "dictionary_grad", "chunk_grad"}
    everything = attention | {"assign", "decode", "combine"}
    wanted = {
        ("sm_80", 64): attention,
        ("sm_90", 64): everything,
        ("sm_90", 128): everything,
        ("gfx942", 64): attention,
    }
    for (target, width), stages in wanted.items():
        built = {b["stage"] for b in report["builds"] if (b["target"], b["K"]) == (target, width)}
        assert stages <= built, f"{target} at {width}"
    assert all(b["registers"] > 0 and b["shared"] >= 0 for b in report["builds"])


def test_no_loop_of_the_main_path_costs_more_than_its_bar(report: dict[str, Any]) -> None:
    held = json.loads((Path(__file__).parent.parent / "docs" / "results" / "aot" / "bars.json").read_text())
    if report["triton"] != held["triton"]:
        pytest.skip(f"the bars are of Triton {held['triton']}")
    main = [held[name] for name in ("target", "dtype", "width")]
    builds = {b["stage"]: b for b in report["builds"] if [b["target"], b["dtype"], b["K"]] == main}
    broken = []
    for stage, bars in held["bars"].items():
        b = builds[stage]
        broken += sass.broken_bars(stage, sass.figures(b["code"], b["registers"], b["spills"]), bars)
    assert not broken, "\n".join(broken)
    for stage, loops in {"predict": 2, "query_grad": 2, "dictionary_grad": 1, "chunk_grad": 1}.items():
        assert len(builds[stage]["code"]["instructions"]) == loops
    assert builds["assign"]["code"]["step"] > 1000


def test_the_table_has_a_row_for_every_build(report: dict[str, Any]) -> None:
    lines = (report["out"] / "aot.md").read_text().splitlines()
    assert len(lines) == 2 + len(report["builds"])
    assert len({line.count("|") for line in lines}) == 1


def test_the_documentation_quotes_the_committed_report() -> None:
    docs = Path(__file__).parent.parent / "docs"
    quoted = (docs / "kernels.md").read_text().partition("<!-- aot: begin -->")[2].partition("<!-- aot: end -->")[0]
    rows = [line for line in quoted.splitlines() if line.startswith("|")]
    committed = (docs / "results" / "aot" / "aot.md").read_text().splitlines()
    assert len(rows) > 10
    assert all(row in committed for row in rows)


def test_a_tile_too_large_for_the_registers_is_reported_as_spilling() -> None:
    """Shows that a limit can be broken: the same kernel with too few warps."""
    program = (
        "import dataclasses, json\n"
        "from eval.bench.aot import ENVIRONMENT, _environment, build, offences, _shipped\n"
        "import torch\n"
        "kernel = next(k for k in _shipped('sm_90') if (k.stage, k.dtype, k.K) == ('predict', torch.bfloat16, 64))\n"
        "with _environment(ENVIRONMENT):\n"
        "    made = build(kernel, 'sm_90', BLOCK_M=128, num_warps=2)\n"
        "print(json.dumps([dataclasses.asdict(made), offences(made)]))\n"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    made, broken = json.loads(done.stdout.splitlines()[-1])
    assert made["spills"] > 100
    assert any("spilled" in line for line in broken)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"spills": 2}, "2 spilled"),
        ({"stack": 16}, "16 bytes of stack"),
        ({"shared": 228 * 1024}, "the chip has 227 KiB"),
        ({"matmuls": {"HMMA": 64}}, "no HGMMA"),
        ({"matmuls": {}}, "do not run on tensor cores"),
        ({"serialized": "(C7511) wgmma is serialized"}, "C7511"),
        ({"error": "PassManager::run failed"}, "does not build"),
        ({"target": "sm_80", "shared": 164 * 1024, "matmuls": {"HMMA": 1}}, "the chip has 163 KiB"),
        ({"target": "gfx942", "shared": 65 * 1024, "matmuls": {"v_mfma": 1}}, "the chip has 64 KiB"),
        ({"target": "sm_90", "dtype": "float32", "matmuls": {"FFMA": 9}}, "tensor cores"),
    ],
)
def test_a_broken_limit_is_named(change: dict[str, Any], words: str) -> None:
    assert offences(GOOD) == []
    found = offences(dataclasses.replace(GOOD, **change))
    assert len(found) == 1
    assert words in found[0]
    assert "predict" in found[0]


def test_a_kernel_without_products_needs_no_tensor_cores() -> None:
    assert offences(dataclasses.replace(GOOD, stage="combine", multiplies=False, matmuls={})) == []


def test_only_attention_kernels_must_be_free_of_spills() -> None:
    assert offences(dataclasses.replace(GOOD, stage="assign", attention=False, spills=4, stack=16)) == []


def test_serialised_products_are_found_in_the_log_of_ptxas(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log is what Triton prints while it builds."""
    import triton

    kernel = dataclasses.make_dataclass("Kernel", ["stage", "kernel", "dtype", "K", "V", "chunk_size", "attention"])(
        "predict", None, "torch.bfloat16", 64, 64, 128, True
    )
    kernel.constexprs, kernel.signature, kernel.attrs = {"PRECISION": "ieee"}, {}, {}
    kernel.options = {"num_warps": 4, "num_stages": 2}
    kernel.flags = {}
    warning = "ptxas info : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ..."
    metadata = dataclasses.make_dataclass("Metadata", ["shared"])(1024)
    compiled = dataclasses.make_dataclass("Compiled", ["asm", "metadata"])({"cubin": b""}, metadata)
    monkeypatch.setattr(triton.compiler, "ASTSource", lambda *args: None)
    monkeypatch.setattr(triton, "compile", lambda *args, **options: print(warning) or compiled)
    monkeypatch.setattr(aot_report, "_read_cubin", lambda made, _: made.matmuls.update(HGMMA=1))
    made = aot_report.build(kernel, "sm_90")
    assert made.serialized == warning
    assert "C7511" in offences(made)[0]


def test_the_interpreter_and_unknown_chips_are_rejected(tmp_path: Path) -> None:
    done = run(f"out={tmp_path}", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr
    assert aot_report.main(["targets=[sm_75]"]) == 2
    assert list(tmp_path.iterdir()) == []
