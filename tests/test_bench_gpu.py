"""Claims about the GPU benchmark's logic, run on a CPU at tiny sizes: order, time budget, records and verdicts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.bench import rivals
from eval.bench.gpu import bars, checks
from eval.bench.gpu import bench as bench_gpu
from eval.bench.gpu.bench import Bench, Setting, Task
from eval.bench.gpu.checks import CHECKS, Sizes, Wrong
from eval.bench.gpu.plots import draw
from eval.bench.rivals import Case
from eval.bench.stopwatch import Stopwatch

CPU = torch.device("cpu")
SMALL = Sizes(tokens=75, K=8, V=12, num_centroids=20, chunk_size=16)
STAND_IN = Setting(
    device="cpu",
    backend="torch",
    dtypes=(torch.float32,),
    sizes=(SMALL,),
    scale=512,  # 64k tokens become 128
    case=Case(batch=2, tokens=128, heads=2, width=16, num_centroids=16, chunk_size=16),
    rivals=("ovq", "sdpa_flash", "gated_deltanet"),
    matmul_size=64,
    copy_bytes=1 << 16,
)


@pytest.fixture(autouse=True)
def one_thread_and_a_short_stopwatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on the GPU, but with two repeats."""
    turns = Stopwatch.turns
    monkeypatch.setattr(Stopwatch, "turns", lambda self, calls, **_: turns(self, calls, seconds=0, least=2, most=2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu")


def row(op: str, tokens: int, ms: float | None, **changes: Any) -> dict[str, Any]:
    shape = {"batch": 4, "heads": 8, "width": 64, "num_centroids": 2048, "chunk_size": 128}
    return {"op": op, "tokens": tokens, **shape, "total_median_ms": ms, "peak_bytes": 2 << 30, **changes}


def results(*rows: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {"measurements": list(rows), "rates": {"matmul_flops": 790e12}, "checks": [], "decode": [], **others}


def verdict(found: dict[str, Any], words: str) -> tuple[Any, str]:
    bar = next(bar for bar in bars.evaluate(found) if words in bar["bar"])
    return bar["found"], bar["verdict"]


# --- whole runs ------------------------------------------------------------------------------------------------------


def test_a_whole_run_checks_measures_and_plots(folder: Path) -> None:
    bench = Bench(folder, STAND_IN, seconds=10_000)
    assert bench.run() == 0
    written = json.loads((folder / "results.json").read_text())
    assert written["checks"] and all(check["passed"] for check in written["checks"])
    assert {check["check"].split(",")[0] for check in written["checks"]} == set(CHECKS)
    timed = {(m["op"], m["tokens"]) for m in written["measurements"] if m["total_median_ms"] is not None}
    assert {("ovq", 4), ("ovq", 128), ("ovq", 512), ("sdpa_flash", 128), ("sdpa_flash", 512)} <= timed
    assert all(m["forward_median_ms"] <= m["total_median_ms"] for m in written["measurements"] if not m["error"])
    assert {(d["op"], d["position"]) for d in written["decode"]} >= {("ovq", 8), ("ovq", 2048), ("attention", 2048)}
    assert written["rates"]["matmul_flops"] > 0 and written["rates"]["copy_bytes"] > 0
    drawn = draw(written, folder)
    assert all(path.stat().st_size > 10_000 for path in drawn)
    assert {"decode.png", "BH4_D16_N16.png"} <= {path.name for path in drawn}


def test_a_rival_that_is_not_installed_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals.fla_backend, "installed", lambda: False)
    bench = Bench(folder, STAND_IN, seconds=10_000)
    bench.measure(STAND_IN.case, ["ovq", "gated_deltanet"], 1)
    assert [m["op"] for m in bench.results["measurements"]] == ["ovq"]
    assert "fla-core is not installed" in bench.results["skipped"][0]["why"]


def test_without_options_the_benchmark_does_not_need_hydra(tmp_path: Path) -> None:
    """A bare GPU machine has torch, Triton and numpy. Run here without a GPU: it writes a record, then reports that."""
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "sys.modules['hydra'] = sys.modules['omegaconf'] = None\n"  # importing them fails
        "from eval.bench.gpu import bench as bench_gpu\n"
        "import eval.bench.gpu.plots\n"
        "setting = bench_gpu.Setting(device='cpu', backend='torch')\n"
        "bench_gpu.Bench(Path(sys.argv[1]), setting, seconds=1).write()\n"
        "sys.exit(bench_gpu.main([]))\n"
    )
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, env=env)
    assert done.returncode == 2 and "there is no GPU here" in done.stderr, done.stderr[-2000:]
    assert json.loads((tmp_path / "results.json").read_text())["checks"] == []


def test_tasks_without_time_left_are_named_and_the_most_important_run_first(folder: Path) -> None:
    bench = Bench(folder, STAND_IN, seconds=bench_gpu.RESERVED + 30)
    order = [task.name for task in bench.tasks()]
    assert order[0] == "rates of this card"
    assert order[1].startswith("check: against float64")
    first_timed = next(name for name in order if name.startswith("B x H"))
    assert "T = 128: ovq, sdpa_flash" in first_timed
    ran: list[str] = []
    bench.tasks = lambda: [  # type: ignore[method-assign]
        Task("long", 60, lambda: ran.append("long")),
        Task("short", 1, lambda: ran.append("short")),
    ]
    bench.run()
    assert ran == ["short"]
    assert bench.results["skipped"] == [{"task": "long", "why": "no time left"}]
    assert "skipped" in json.loads((folder / "results.json").read_text())["status"]


def test_the_important_tasks_fit_the_time_limit_of_the_command() -> None:
    """By their estimates, including tasks that only some installations can run."""
    bench = Bench(Path("unused"), Setting(device="cpu"), seconds=1)
    important = []
    for task in bench.tasks():
        important.append(task)
        if task.name == "decoding":
            break
    assert sum(task.seconds for task in important) < bench_gpu.Options().seconds - bench_gpu.RESERVED


def test_every_measurement_is_on_disk_before_the_next_starts(folder: Path) -> None:
    bench = Bench(folder, STAND_IN, seconds=10_000)
    seen: list[int] = []

    def look() -> None:
        seen.append(len(json.loads((folder / "results.json").read_text())["measurements"]))

    bench.tasks = lambda: [  # type: ignore[method-assign]
        Task("one", 1, lambda: bench.results["measurements"].append(row("ovq", 2048, 1.0))),
        Task("look", 1, look),
        Task("breaks", 1, lambda: 1 / 0),  # type: ignore[arg-type, return-value]
        Task("look again", 1, look),
    ]
    bench.run()
    assert seen == [1, 1]
    assert "ZeroDivisionError" in bench.results["skipped"][0]["why"]


def test_a_task_that_hangs_is_named_and_ends_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(bench_gpu, "HANG", 0.05)
    monkeypatch.setattr(os, "_exit", ended.append)
    bench = Bench(folder, STAND_IN, seconds=10_000)

    def hang() -> None:
        while not ended:
            time.sleep(0.01)

    bench.tasks = lambda: [Task("spins", 0, hang)]  # type: ignore[method-assign]
    written: list[str] = []
    monkeypatch.setattr(
        os, "_exit", lambda code: (written.append((folder / "results.json").read_text()), ended.append(code))
    )
    bench.run()
    assert ended == [3]
    assert json.loads(written[0])["status"] == "hung in: spins"


def test_without_a_gpu_the_error_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_gpu.main([]) == 2
    said = capsys.readouterr()
    assert "no GPU" in said.err and len(said.err.splitlines()) == 1
    assert bench_gpu.main(["secnds=3"]) == 2
    assert "seconds" in capsys.readouterr().err
    assert bench_gpu.main(["--help"]) == 0
    assert "seconds=540" in capsys.readouterr().out


def test_each_gpu_has_its_own_results_folder() -> None:
    assert bench_gpu.folder_of("NVIDIA H100 80GB HBM3") == Path("docs/results/gpu/nvidia-h100-80gb-hbm3")


# --- the stopwatch ---------------------------------------------------------------------------------------------------


def test_calls_take_turns_and_one_that_fails_is_dropped() -> None:
    order: list[str] = []

    def broken(mark: Any) -> None:
        order.append("broken")
        if order.count("broken") == 2:
            raise RuntimeError("no kernel for this shape")

    timings = Stopwatch(CPU).turns({"good": lambda mark: order.append("good"), "broken": broken}, seconds=0)
    assert order == ["good", "broken", "good", "broken", "good"]  # each warmed up once, then in turns
    assert timings["good"].error is None and len(timings["good"].whole_ms) == 2
    assert timings["broken"].error == "RuntimeError: no kernel for this shape"


def test_the_first_half_ends_at_the_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def call(mark: Any) -> None:
        clock[0] += 0.004
        mark()
        clock[0] += 0.006

    assert Stopwatch(CPU).once(call) == pytest.approx((4.0, 10.0))
    assert Stopwatch(CPU).once(lambda mark: clock.__setitem__(0, clock[0] + 0.005)) == pytest.approx((5.0, 5.0))


# --- the checks ------------------------------------------------------------------------------------------------------


def broken_backend(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Change what the torch backend returns."""
    import importlib

    module = importlib.import_module("ovq.ops.ovq_attention.chunked")
    forward = module.forward
    monkeypatch.setattr(module, "forward", lambda *args: change(*forward(*args)))


def test_a_wrong_output_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    broken_backend(monkeypatch, lambda o, new, placed: (o * 1.001, new, placed))
    with pytest.raises(Wrong, match="the bars are"):
        checks.against_float64("torch", SMALL, CPU, torch.float32)


def test_a_wrong_gradient_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    broken_backend(monkeypatch, lambda o, new, placed: (o + 0.01 * (o - o.detach()), new, placed))
    with pytest.raises(Wrong, match="dq"):
        checks.against_float64("torch", SMALL, CPU, torch.float32)


def test_nan_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    broken_backend(monkeypatch, lambda o, new, placed: (o * float("nan"), new, placed))
    with pytest.raises(Wrong, match="o inf"):
        checks.against_float64("torch", SMALL, CPU, torch.float32)


@pytest.mark.parametrize("where", [3, 20, 50])
def test_a_wrong_assignment_is_caught(where: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(o: Any, new: Any, placed: torch.Tensor) -> Any:
        wrong = placed.clone()
        wrong[..., where] = torch.where(wrong[..., where] == 0, 1, 0)
        return o, new, wrong

    broken_backend(monkeypatch, change)
    with pytest.raises(Wrong):
        checks.assignments_are_best("torch", SMALL, CPU, torch.float32)


def test_a_changing_bit_and_unwritten_memory_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(100))

    def unwritten(o: torch.Tensor, new: Any, placed: Any) -> Any:
        partly = torch.empty_like(o)
        partly[:, 1:] = o[:, 1:]
        partly[:, :1] = torch.where(torch.empty_like(o[:, :1]).isnan(), torch.nan, o[:, :1])
        return partly, new, placed

    with monkeypatch.context() as patch:
        broken_backend(patch, lambda o, new, placed: (o + 1e-7 * next(calls), new, placed))
        with pytest.raises(Wrong, match="o differs"):
            checks.repeats_are_bit_equal("torch", SMALL, CPU, torch.float32)
    broken_backend(monkeypatch, unwritten)
    with pytest.raises(Wrong, match="differs"):
        checks.poisoned_memory_changes_nothing("torch", SMALL, CPU, torch.float32)


def test_the_stages_of_the_kernels_run_one_by_one() -> None:
    """In the interpreter, in a separate process: everything that `stages` calls must still exist."""
    pytest.importorskip("triton")
    program = (
        "import torch\n"
        "from eval.bench.rivals import Case, make_inputs\n"
        "from eval.bench.gpu.stages import shape_of, stage_calls\n"
        "from eval.bench import cost\n"
        "case = Case(batch=1, tokens=40, heads=1, width=16, num_centroids=12, chunk_size=16)\n"
        "calls = stage_calls(make_inputs(case, torch.device('cpu'), torch.float32), case)\n"
        "assert list(calls) == list(cost.stages(shape_of(case))), list(calls)\n"
        "for call in calls.values(): call(lambda: None)\n"
    )
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]


# --- the targets -----------------------------------------------------------------------------------------------------


def test_a_target_without_measurements_does_not_pass() -> None:
    assert {bar["verdict"] for bar in bars.evaluate(results())} == {"not measured"}
    failed = results(row("ovq", 65536, None), row("sdpa_flash", 65536, 100.0))
    assert verdict(failed, "forward+backward at 64k") == (None, "not measured")


def test_the_speedup_is_over_the_fastest_of_torchs_own_kernels() -> None:
    measured = [row("ovq", 65536, 10.0), row("sdpa_flash", 65536, 120.0), row("flash_attention_3", 65536, 60.0)]
    assert verdict(results(*measured), "forward+backward at 64k") == (12.0, "PASS")
    measured.append(row("sdpa_cudnn", 65536, 79.0))
    assert verdict(results(*measured), "forward+backward at 64k") == (7.9, "FAIL")
    small = [row("ovq", 65536, 10.0, batch=1), row("sdpa_flash", 65536, 31.0, batch=1)]
    assert verdict(results(*small), "B=1, H=8") == (3.1, "PASS")
    assert verdict(results(*small), "forward+backward at 64k")[1] == "not measured"


def test_break_even_is_the_length_from_which_ovq_stays_faster() -> None:
    def at(speedups: dict[int, float]) -> tuple[Any, str]:
        rows = [row("ovq", t, 1.0) for t in speedups] + [row("sdpa_flash", t, s) for t, s in speedups.items()]
        return verdict(results(*rows), "break-even")

    assert at({2048: 0.5, 4096: 1.1, 8192: 1.6, 65536: 9}) == (4096, "PASS")
    assert at({2048: 1.5, 4096: 0.9, 8192: 0.95, 16384: 1.2}) == (16384, "FAIL")
    assert at({65536: 0.8}) == (0, "FAIL")


def test_rate_scaling_and_memory_are_judged_against_their_targets() -> None:
    qkv = 3 * 4 * 65536 * 8 * 64 * 2
    measured = results(row("ovq", 65536, 10.0, peak_bytes=2 * qkv), row("ovq", 131072, 21.5))
    share, passed = verdict(measured, "matmul rate")
    assert share == pytest.approx(4.03e12 / 10e-3 / 790e12, rel=0.01) and passed == "PASS"
    assert verdict(measured, "128k") == (2.15, "FAIL")
    assert verdict(measured, "peak memory") == (2.333, "PASS")
    slow = results(row("ovq", 65536, 20.0, peak_bytes=3 * qkv))
    assert verdict(slow, "matmul rate")[1] == verdict(slow, "peak memory")[1] == "FAIL"


def test_decoding_is_judged_only_if_measured_over_the_whole_range() -> None:
    def at(times: dict[int, float]) -> tuple[Any, str]:
        decode = [{"op": "ovq", "position": t, "us_per_token": us} for t, us in times.items()]
        return verdict(results(decode=decode), "decoding")

    assert at({4096: 100.0, 1 << 20: 109.0}) == (1.09, "PASS")
    assert at({4096: 100.0, 65536: 115.0, 1 << 20: 101.0}) == (1.15, "FAIL")
    assert at({4096: 100.0, 65536: 101.0}) == (None, "not measured")


def test_a_failed_check_fails_the_run() -> None:
    assert verdict(results(checks=[{"passed": True}, {"passed": False}]), "failed checks") == (1, "FAIL")
