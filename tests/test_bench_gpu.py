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
from eval.bench.gpu import bars, checks, group
from eval.bench.gpu import bench as bench_gpu
from eval.bench.gpu.bench import Runner
from eval.bench.gpu.checks import CHECKS, Sizes, Wrong
from eval.bench.gpu.plots import draw
from eval.bench.gpu.tasks import START, Bench, Group, Setting, Task
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
def a_short_stopwatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stopwatch as on the GPU, but with two repeats."""
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


HERE = "tests.test_bench_gpu:STAND_IN"
Rows = list[dict[str, Any]]


def in_this_process(given: dict[str, Any], found: Group, seconds: float, hear: Any) -> int | None:
    return group.run(given, lambda row: hear(json.loads(json.dumps(row))))


class Script:
    """A fake child process. `ends`: per group, the task where each of its processes ends (None: the last), status."""

    def __init__(self, **ends: list[Any]) -> None:
        self.ends = ends
        self.given: list[dict[str, Any]] = []

    def __call__(self, given: dict[str, Any], found: Group, seconds: float, hear: Any) -> int | None:
        self.given.append(given)
        assert START < seconds <= 60
        if found.name == "machine":
            hear({"kind": "machine", "gpu": True, "accelerator": "Card 1"})
            return 0
        at, status = (self.ends.get(found.name.replace(" ", "_")) or [(None, 0)]).pop(0)
        for task in found.tasks:
            if task.name in given["skip"]:
                continue
            hear({"kind": "begin", "task": task.name})
            if at is not None and at in task.name:
                return status
            hear({"kind": "end", "task": task.name})
        return 0 if at is not None else status

    def of(self, name: str) -> Rows:
        return [given for given in self.given if given["group"] == name]


def runner(folder: Path, child: Any, seconds: float = 10_000, where: str = "eval.bench.gpu.tasks:GPU") -> Runner:
    return Runner(seconds, folder, where=where, child=child)


def why(run: Runner, task: str) -> str:
    return next(row["why"] for row in run.record.results["skipped"] if task in row["task"])


def test_a_whole_run_checks_measures_and_plots(folder: Path) -> None:
    assert bench_gpu.measure(bench_gpu.Options(10_000, str(folder)), HERE, in_this_process) == 0
    written = json.loads((folder / "results.json").read_text())
    assert written["checks"] and all(check["passed"] for check in written["checks"])
    assert {check["check"].split(",")[0] for check in written["checks"]} == set(CHECKS)
    timed = {(m["op"], m["tokens"]) for m in written["measurements"] if m["total_median_ms"] is not None}
    assert {("ovq", 4), ("ovq", 128), ("ovq", 512), ("sdpa_flash", 128), ("sdpa_flash", 512)} <= timed
    assert all(m["forward_median_ms"] <= m["total_median_ms"] for m in written["measurements"] if not m["error"])
    assert {(d["op"], d["position"]) for d in written["decode"]} >= {("ovq", 8), ("ovq", 2048), ("attention", 2048)}
    assert written["rates"]["matmul_flops"] > 0 and written["rates"]["copy_bytes"] > 0
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    kinds = [row["kind"] for row in lines]
    assert kinds[:3] == ["begin", "machine", "end"] and kinds.count("check") == len(written["checks"])
    assert kinds.count("measurement") == len(written["measurements"]) and all("s" in row for row in lines)
    drawn = draw(written, folder)
    assert all(path.stat().st_size > 10_000 for path in drawn)
    assert {"decode.png", "BH4_D16_N16.png"} <= {path.name for path in drawn}


def test_a_rival_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals.fla_backend, "installed", lambda: False)
    rows: Rows = []
    Bench(STAND_IN, rows.append).measure(STAND_IN.case, ["ovq", "gated_deltanet"], 1)
    assert [(row["kind"], row.get("op")) for row in rows] == [("skipped", None), ("measurement", "ovq")]
    assert "fla-core is not installed" in rows[0]["why"]


def test_the_benchmark_needs_torch_triton_and_numpy_only(tmp_path: Path) -> None:
    """Runs the command and one of its processes, without a GPU."""
    program = (
        "import json, sys\n"
        "for name in ('hydra', 'omegaconf', 'psutil', 'matplotlib', 'pyarrow', 'requests'):\n"
        "    sys.modules[name] = None\n"  # importing them fails
        "from eval.bench.gpu import bench, group\n"
        "rows = []\n"
        "given = {'group': 'machine', 'skip': [], 'setting': 'eval.bench.gpu.tasks:GPU', 'programs': None}\n"
        "assert group.run(given | {'rates': {}, 'best_sdpa': None}, rows.append) == 0\n"
        "assert [row['kind'] for row in rows] == ['begin', 'machine', 'end'] and rows[1]['gpu'] is False, rows\n"
        "assert bench.main(['seconds=300', 'out=' + sys.argv[1]]) == 2\n"
        "from eval.bench.gpu.tasks import Bench, Setting\n"
        "Bench(Setting(device='cpu'), rows.append).machine()\n"
        "assert rows[-1]['torch'] and rows[-1]['triton']\n"
    )
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "there is no GPU here" in done.stderr, done.stderr[-2000:]


def test_the_parent_never_uses_the_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("is_available", "device_count", "init", "_lazy_init", "synchronize", "get_device_name"):
        monkeypatch.setattr(torch.cuda, name, None)
    monkeypatch.setattr(torch, "empty", None)
    run = runner(folder, Script())
    assert run.run() == 0 and run.record.results["machine"]["accelerator"] == "Card 1"


def test_the_order_and_the_limits_are_those_of_the_design() -> None:
    groups = Bench(Setting(), print).groups()
    names = [found.name for found in groups]
    assert names[:9] == [
        *("machine", "1 programs per head", "2 programs per head", "4 programs per head", "16 programs per head"),
        *("checks", "bar", "stages", "profile"),
    ]
    assert names.index("decoding") < names.index("checks in float32") < names.index("rivals")
    for found in groups:
        assert 25 <= found.limit <= 60 and found.seconds <= found.limit, (found.name, found.seconds)
    tasks = [task.name for found in groups for task in found.tasks]
    assert len(tasks) == len(set(tasks)) and len(names) == len(set(names))
    important = groups[: names.index("decoding") + 1]
    assert sum(found.seconds for found in important) < bench_gpu.Options().seconds - bench_gpu.RESERVED


def test_a_task_that_hangs_is_named_and_the_rest_of_its_group_runs_in_a_new_process(folder: Path) -> None:
    child = Script(checks=[("assignments are best", None), (None, 0)])
    run = runner(folder, child)
    assert run.run() == 1
    first, second = child.of("checks")
    assert first["skip"] == [] and [name.split(",")[0] for name in second["skip"]] == [
        "check: against float64",
        "check: assignments are best",
    ]
    assert why(run, "assignments are best").startswith("killed after 60 s")
    (verdict,) = [bar for bar in run.record.results["bars"] if bar["bar"] == "failed checks"]
    assert verdict["verdict"] == "FAIL", "a check that hangs has not passed"
    others = [row for row in run.record.results["skipped"] if "is not installed" not in row["why"]]
    assert len(others) == 1
    assert child.of("bar") and run.record.results["status"] == "complete except for skipped tasks"
    assert json.loads((folder / "results.json").read_text())["status"] == run.record.results["status"]


def test_a_process_that_dies_is_followed_by_another(folder: Path) -> None:
    """After an illegal access that it reports itself, and after a signal; the task it died in is not tried again."""
    child = Script(bar=[("rates", group.SPOILT), (None, 0)], stages=[("stages", -11)], short=[("", -6), ("", -6)])
    run = runner(folder, child)
    assert run.run() == 1
    assert child.of("bar")[1]["skip"] == ["rates of this card"]
    assert why(run, "stages at 65536") == "died: signal SIGSEGV"
    assert len(child.of("short")) == 2 and child.of("decoding")


def test_a_process_that_does_not_start_is_given_up(folder: Path) -> None:
    started: list[str] = []

    def child(given: dict[str, Any], found: Group, seconds: float, hear: Any) -> int | None:
        started.append(found.name)
        return Script()(given, found, seconds, hear) if found.name != "bar" else 1

    run = runner(folder, child)
    assert run.run() == 1 and started.count("bar") == 1 and "stages" in started
    assert why(run, "rates of this card") == "its process died: exit status 1"


def test_if_the_barrier_hangs_the_rest_runs_with_as_many_programs_as_work(folder: Path) -> None:
    def child(given: dict[str, Any], found: Group, seconds: float, hear: Any) -> int | None:
        if found.programs is None:
            return Script.__call__(script, given, found, seconds, hear)
        script.given.append(given)
        hear({"kind": "begin", "task": found.tasks[0].name})
        if found.programs == 4:
            return None
        hear({"kind": "kernel", "stage": "assign", "programs": found.programs})
        hear({"kind": "end", "task": found.tasks[0].name})
        return 0

    script = Script()
    run = runner(folder, child)
    assert run.run() == 1
    assert run.programs == 2 and not script.of("16 programs per head")
    assert why(run, "16 programs") == "2 programs per head are the most that work"
    assert script.of("2 programs per head")[0]["programs"] is None and script.of("checks")[0]["programs"] == 2


def test_groups_without_time_left_are_named(folder: Path) -> None:
    child = Script()
    run = runner(folder, child, seconds=bench_gpu.RESERVED + 30)
    run.run()
    tried = [given["group"] for given in child.given]
    assert (
        tried[:5] == ["machine", *(f"{k} programs per head" for k in (2, 4, 16)), "checks"] and "profile" not in tried
    )
    assert run.programs is None
    assert why(run, "decoding") == why(run, "every kernel alone, 1 ") == "no time left"


def test_a_profiler_that_fails_or_is_missing_is_no_failure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_gpu.shutil, "which", lambda name: None)
    run = runner(folder, Script())
    assert run.run() == 0 and why(run, "profile at 65536") == "ncu is not installed"
    assert why(run, "sanitizer") == "compute-sanitizer is not installed"
    monkeypatch.setattr(bench_gpu.shutil, "which", lambda name: name)
    run = runner(folder, Script(profile=[(None, 1)]))
    assert run.run() == 0 and "between tasks" in why(run, "profile")
    assert runner(folder, Script(sanitizer=[(None, 9)])).run() == 1  # the sanitizer found something


@pytest.mark.parametrize("end", ["hang", "abort", "fine"])
def test_rows_of_a_real_process_arrive_whatever_becomes_of_it(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = (
        "import json, os, sys, time\n"
        "given = json.loads(sys.argv[-1])\n"
        "print(json.dumps({'kind': 'begin', 'task': given['group']}), flush=True)\n"
        "print('a library prints', flush=True)\n"
        "print('{\"kind\": \"half', end='', flush=True)\n"
        "{'hang': lambda: time.sleep(600), 'abort': os.abort, 'fine': lambda: None}[given['end']]()\n"
    )
    monkeypatch.setattr(bench_gpu, "program", lambda given: [sys.executable, "-c", fake, json.dumps(given)])
    rows: Rows = []
    limit = 15.0 if end == "hang" else 120.0
    status = bench_gpu.in_a_process({"group": "g", "end": end, "out": None}, Group("g", 60, []), limit, rows.append)
    assert rows == [{"kind": "begin", "task": "g"}]
    assert status == {"hang": None, "abort": -6, "fine": 0}[end]


def test_a_group_goes_on_after_an_error_and_ends_once_its_process_is_spoilt(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: Rows = []
    bench, ran = Bench(STAND_IN, rows.append), []
    broken: list[bool] = []

    def out_of_memory() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    def illegal() -> None:  # like a check that swallows the error
        broken.append(True)

    def settle(device: torch.device) -> None:
        if broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(group, "settle", settle)
    tasks = [Task("full", 1, out_of_memory), Task("next", 1, lambda: ran.append("next"))]
    tasks += [Task("illegal", 1, illegal), Task("never", 1, lambda: ran.append("never"))]
    assert group.run_tasks(bench, Group("g", 60, tasks), []) == group.SPOILT and ran == ["next"]
    wrong = [(row["task"], row["why"]) for row in rows if row["kind"] == "skipped"]
    assert wrong == [
        ("full", "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"),
        ("illegal", "RuntimeError: CUDA error: an illegal memory access was encountered"),
    ]
    broken.clear()
    assert group.run_tasks(bench, Group("g", 60, tasks[:1] + tasks[3:]), ["full"]) == 0 and ran == ["next", "never"]


def test_memory_is_given_back_within_the_net_that_catches_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal access `empty_cache` fails, too."""

    def fails() -> None:
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", fails)
    rows: Rows = []
    bench = Bench(Setting(), rows.append)
    assert group.run_tasks(bench, Group("g", 60, [Task("one", 1, lambda: None)]), []) == group.SPOILT
    assert [row["kind"] for row in rows] == ["begin", "skipped", "end"]


def test_results_go_to_the_option_or_the_variable_or_the_folder_of_the_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for options, variable, want in (
        (bench_gpu.Options(out="a"), "b", "a"),
        (bench_gpu.Options(), "b", "b"),
        (bench_gpu.Options(), "", "docs/results/gpu/card-1"),
    ):
        monkeypatch.setenv("OUT", variable)
        bench_gpu.measure(options, child=Script())
        assert (tmp_path / want / "results.jsonl").is_file(), want


def test_without_a_gpu_the_error_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def child(given: dict[str, Any], found: Group, seconds: float, hear: Any) -> int | None:
        hear({"kind": "machine", "gpu": False})
        return 0

    monkeypatch.setattr(bench_gpu, "in_a_process", child)
    assert bench_gpu.main([]) == 2
    said = capsys.readouterr()
    assert "no GPU" in said.err and len(said.err.splitlines()) == 1
    for words in (["secnds=3"], ["seconds=0"], ["seconds=x"], ["out"]):
        assert bench_gpu.main(words) == 2
        assert "seconds=540" in capsys.readouterr().err
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
        "from eval.bench.gpu.tasks import Bench, Setting\n"
        "rows, setting = [], Setting(device='cpu', dtypes=(torch.float32,), scale=4, case=case)\n"
        "for k in (1, 2):\n"
        "    Bench(setting, rows.append).alone(k)\n"
        "assert [row['stage'] for row in rows] == 2 * [*calls, 'decode'], rows\n"
        "assert [row['programs'] for row in rows] == 7 * [1] + 7 * [2]\n"
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
