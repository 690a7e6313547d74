"""Claims about the self-test of the Triton kernels, run on wrong kernels in Triton's interpreter, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ovq import cli, identity
from ovq.bounded import how, run_bounded
from ovq.errors import ConfigError
from ovq.mixers.ovq import OVQ
from ovq.ops.common import BackendError
from ovq.ops.ovq_attention import interface, selftest, verify
from ovq.ops.ovq_attention.selftest import Verdict
from ovq.ops.ovq_attention.spec import OVQSpec
from ovq.ops.ovq_attention.verify import Problem, Wrong, judge
from ovq.processes import World
from ovq.train import backends as before_training
from ovq.train.backends import choose_backends
from tests.helpers import small_config, small_model

CPU = torch.device("cpu")
WRONG = "tests.wrong_kernels"
TINY = Problem(1, 1, 1, 16, 16, "float32", 24, False, OVQSpec(8, 16).text)
SECONDS = 300.0  # generous, because this machine may be busy


@pytest.fixture(autouse=True)
def a_cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def verdict_with(fault: str, monkeypatch: pytest.MonkeyPatch, problem: Problem = TINY, seconds: float = SECONDS) -> Any:
    monkeypatch.setenv("OVQ_TEST_FAULT", fault)
    return selftest.check(problem, CPU, seconds=seconds, kernels=WRONG)


# --- the kernels in the interpreter ----------------------------------------------------------------------------------


def test_right_kernels_pass_and_are_not_tested_again(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    first = selftest.check(TINY, CPU, seconds=SECONDS)
    assert first.passed and not first.remembered and "first chunks: o " in first.what and "dbeta" in first.what
    monkeypatch.setattr(selftest, "run_bounded", None)  # any attempt to start a test fails
    assert selftest.check(TINY, CPU) == Verdict(True, first.what, remembered=True)
    for name, change in (
        ("code_hash", lambda kernels: "other code"),
        ("driver", lambda: "other driver"),
        ("card_of", lambda device: "other card"),
        ("triton_version", lambda: "other Triton"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(selftest, name, change)
            with pytest.raises(TypeError):  # tests again
                selftest.check(TINY, CPU)
    for change in ({"batch": 2}, {"packed": True}, {"settings": OVQSpec(9, 16).text}, {"dtype": "float16"}):
        with pytest.raises(TypeError):
            selftest.check(replace(TINY, **change), CPU)
    with pytest.raises(TypeError):
        selftest.check(TINY, CPU, again=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault, said",
    [
        ("output", "the first chunks: o is off by 1.0e-02, its bar is 1e-05"),
        ("gradient", "the first chunks: dq is off by 1.0e-01, its bar is 1e-04, dk is off by"),
        ("bits", "the first chunks: a repeat differs: o in "),
        (
            "exception",
            "the first chunks: RuntimeError: CUDA error: an illegal memory access was encountered Search for it",
        ),
        ("crash", "the first chunks: signal SIGABRT"),
        ("import", "the import of the kernels: ImportError: libcuda.so.1 is too old"),
    ],
)
def test_wrong_kernels_fail_with_what_is_wrong(
    fault: str, said: str, interpreter: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdict = verdict_with(fault, monkeypatch)
    assert not verdict.passed and verdict.what.startswith(said) and len(verdict.what.splitlines()) == 1, verdict
    assert not list(selftest.folder().rglob("*.json"))  # a failure is not remembered


def test_kernels_that_hang_are_stopped_and_named(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The timeout expires as soon as the hanging kernel is running, however long the imports take."""
    communicate = subprocess.Popen.communicate

    def until_it_hangs(process: Any, timeout: float | None = None) -> Any:
        if timeout != 7.0:
            return communicate(process, timeout=timeout)
        seen = b""
        end = time.monotonic() + SECONDS
        while b"at the first chunks" not in seen and time.monotonic() < end:
            seen += os.read(process.stdout.fileno(), 1000)
        read.append(seen)
        raise subprocess.TimeoutExpired(process.args, timeout)

    read: list[bytes] = []
    with monkeypatch.context() as patch:
        patch.setattr(subprocess.Popen, "communicate", until_it_hangs)
        verdict = verdict_with("hang", patch, seconds=7.0)
    assert b"at the first chunks" in read[0]
    assert not verdict.passed and verdict.what.endswith("no answer within 7 s")


def test_packed_documents_are_tested_where_they_are_asked_for(
    interpreter: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdict = verdict_with("packed", monkeypatch, replace(TINY, packed=True, context=40))
    assert not verdict.passed and verdict.what.startswith("packed documents: o is off by")


@pytest.mark.slow
def test_the_tool_runs_alone(interpreter: None) -> None:
    words = ["heads=1", "width=16", "context=24", "num_centroids=8", "chunk_size=16", "dtype=float32", "device=cpu"]
    command = [sys.executable, "-m", "ovq.ops.ovq_attention.selftest", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("passed: first chunks"), done
    env = os.environ | {"OVQ_TEST_FAULT": "import"}
    done = subprocess.run([*command, f"kernels={WRONG}"], capture_output=True, text=True, env=env)
    assert done.returncode == 1 and done.stdout.startswith("FAILED: the import of the kernels"), done


def test_the_tool_needs_a_gpu_and_explains_itself(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for words, said in (([], "there is no GPU"), (["device=cpu"], "TRITON_INTERPRET=1"), (["widht=3"], "mean width")):
        assert selftest.main(words) == 2
        err = capsys.readouterr().err
        assert said in err and len(err.splitlines()) == 1
    assert selftest.main(["heads=3", "kv_heads=2", "device=cpu"]) == selftest.main(["step_size=2"]) == 2
    capsys.readouterr()
    assert cli.main(["selftest", "--help"]) == 0
    assert "num_centroids=2048" in capsys.readouterr().out


# --- what is remembered ----------------------------------------------------------------------------------------------


def test_a_cache_that_is_damaged_or_takes_no_file_costs_a_test_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []
    monkeypatch.setattr(selftest, "_test", lambda *_: ran.append(1) or Verdict(True, "fine"))
    for _ in range(2):
        selftest.check(TINY, CPU)
    assert len(ran) == 1
    (file,) = selftest.folder().rglob("*.json")
    assert json.loads(file.read_text())["problem"]["context"] == 24  # states in plain text what passed
    for damage in ("", "[]", "{}", '{"passed": '):
        file.write_text(damage)
        assert selftest.check(TINY, CPU) == Verdict(True, "fine")
    assert len(ran) == 5
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert selftest.check(TINY, CPU) == selftest.check(TINY, CPU) == Verdict(True, "fine")
    assert len(ran) == 7


def test_the_code_hash_covers_the_kernels_and_what_they_are_compared_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "ops" / "ovq_attention"
    (package / "kernels").mkdir(parents=True)
    for name in ("kernels/assign.py", "chunked.py", "selftest.py", "../common.py"):
        (package / name).write_text("")
    monkeypatch.setattr(selftest, "__file__", str(package / "selftest.py"))

    def found() -> str:
        selftest.code_hash.cache_clear()
        return selftest.code_hash()

    hashes = [found()]
    for name in ("kernels/assign.py", "chunked.py", "../common.py"):
        (package / name).write_text("x = 1\n")
        hashes.append(found())
    assert len(set(hashes)) == 4 and found() == hashes[-1]
    selftest.code_hash.cache_clear()


# --- what is compared -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said, change",
    [
        ("not finite", lambda o, new, a: (o * float("nan"), new, a)),
        ("sums is off by 1.0e-03", lambda o, new, a: (o, replace(new, key_sum=new.key_sum * 1.001), a)),
        ("counts differ", lambda o, new, a: (o, replace(new, count=new.count + 1), a)),
        ("in token order", lambda o, new, a: (o, new, torch.where((a == 1) | (a == 2), 3 - a, a))),
        ("outside 0 to", lambda o, new, a: (o, new, torch.where(a > 2, 1000, a))),
        ("incomplete chunk", lambda o, new, a: (o, new, a.clamp_min(0))),
        ("the first row alone differs: o", lambda o, new, a: (o * 1.001 if len(o) == 1 else o, new, a)),
    ],
)
def test_every_result_is_compared(said: str, change: Any) -> None:
    """With the torch backend in place of the kernels."""

    class Changed:
        @staticmethod
        def forward(*args: Any) -> Any:
            return change(*verify.chunked.forward(*args))

    said_at: list[str] = []
    problem = replace(TINY, batch=2, context=300, settings=OVQSpec(40, 16).text)
    assert "dbeta" in verify.verify(problem, CPU, verify.chunked, said_at.append)
    assert said_at == ["the first chunks", "the last chunks"]
    with pytest.raises(Wrong, match=said):
        verify.verify(problem, CPU, Changed, said_at.append)


# --- the judge of assignments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant",
    [{}, {"seeding": "random", "seed": 3}, {"first_chunk": "nearest"}, {"assign_on": "key_value", "step_size": 0.3}],
    ids=str,
)
def test_the_judge_accepts_the_definition_and_no_other_assignment(variant: dict[str, Any]) -> None:
    spec = OVQSpec(40, 16, **variant)
    problem = replace(TINY, batch=1, heads=2, kv_heads=2, settings=spec.text)
    torch.manual_seed(0)
    (_, k, v, _), _ = verify._inputs(problem, CPU, 1, 75)
    q, k, v = (x.detach().double() for x in (k, k, v))
    start = verify._dictionary([q, k, v], spec, 0).map(lambda x: x.double())
    beta = torch.ones(2, dtype=torch.float64)
    _, new, placed = verify.reference.forward(q, k, v, beta, spec, start)
    worst, found = judge(placed, k, v, spec, start, torch.float32)
    assert worst == 0 and torch.equal(found.count, new.count) and torch.equal(found.key_sum, new.key_sum)
    for where in (17, 40, 63, 70):  # in a later chunk; in an unfinished one
        wrong = placed.clone()
        wrong[0, 1, where] = torch.where(wrong[0, 1, where] == 0, 1, 0)
        with pytest.raises(Wrong):
            judge(wrong, k, v, spec, start, torch.float32)


# --- before training -------------------------------------------------------------------------------------------------


def run_with(
    verdict: Any, monkeypatch: pytest.MonkeyPatch, *overrides: str, rank: int = 0, local_rank: int = 0, size: int = 1
) -> tuple[list[str], list[Problem]]:
    """The backends of the OVQ layers after `choose_backends`, and what was tested. `verdict` may also be a `check`."""
    tested: list[Problem] = []

    def check(problem: Problem, device: torch.device, **options: Any) -> Verdict:
        tested.append(problem)
        return verdict if isinstance(verdict, Verdict) else verdict(problem, device, **options)

    monkeypatch.setattr(selftest, "check", check)
    monkeypatch.setattr(selftest, "card_of", lambda device: "a card")
    monkeypatch.setattr(before_training, "backend_of", lambda backend, *_: "triton" if backend == "auto" else backend)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, device=None, **kw: empty(*size, **kw))
    cfg = small_config("sw_ovq", "trainer.context=64", "trainer.micro_batch=4", *overrides)
    model = small_model("sw_ovq", *overrides)
    world = World(rank, size, local_rank, torch.device("cuda", 0), "bf16")
    choose_backends(model, cfg, world)
    return [mixer.backend for mixer in model.mixers() if isinstance(mixer, OVQ)], tested


BAD = Verdict(False, "the last chunks: dq is off by 3.0e-01, its bar is 2e-02")


def test_kernels_that_pass_are_used_and_are_tested_at_the_shape_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    backends, tested = run_with(Verdict(True, "fine"), monkeypatch)
    assert set(backends) == {"auto"} and len(tested) == 1  # identical layers are tested once
    (problem,) = tested
    cfg = small_config("sw_ovq")
    assert (problem.batch, problem.heads, problem.context) == (4, cfg.model.num_heads, 64)
    assert problem.dtype == "bfloat16" and not problem.packed
    assert problem.spec.num_centroids == cfg.model.mixers["ovq"]["num_centroids"]
    assert not problem.several_ranks
    (problem,) = run_with(Verdict(True, "fine"), monkeypatch, "data.isolate_documents=true")[1]
    assert problem.packed and problem.batch == 1
    (problem,) = run_with(Verdict(True, "fine"), monkeypatch, size=2)[1]
    assert problem.several_ranks


def test_layers_that_hand_their_state_over_use_torch_untested(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels have no gradient for a carried state, and each rank mixes all heads."""
    monkeypatch.setattr(OVQ, "hands_over", True)
    for settings, backend in (((), "torch"), (("model.mixers.ovq.backend=triton",), "triton")):
        backends, tested = run_with(BAD, monkeypatch, *settings)
        assert set(backends) == {backend} and not tested


def test_kernels_that_fail_are_replaced_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backends, _ = run_with(BAD, monkeypatch)
    assert set(backends) == {"torch"}
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    for words in ("a card", BAD.what, "uses the torch backend", "trainer.kernel_test_s=0"):
        assert words in said


def test_kernels_that_fail_and_are_asked_for_by_name_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError) as error:
        run_with(BAD, monkeypatch, "model.mixers.ovq.backend=triton")
    said = str(error.value)
    assert said.startswith("model.mixers.ovq.backend=triton, but the Triton kernels fail") and BAD.what in said
    assert "backend=torch" in said and "trainer.kernel_test_s=0" in said and len(said.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault, seconds, said",
    [
        ("exception", 300, "illegal memory access"),
        ("gradient", 300, "dq is off by"),
        ("hang", 3, "no answer within 3 s"),
    ],
)
def test_from_wrong_kernels_to_the_run(
    fault: str,
    seconds: int,
    said: str,
    interpreter: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Everything in between is real except the GPU. (Three seconds may pass before the kernels are even imported.)"""
    monkeypatch.setenv("OVQ_TEST_FAULT", fault)
    real = selftest.check

    def check(problem: Problem, device: torch.device, **options: Any) -> Verdict:
        tiny = replace(problem, batch=1, heads=1, kv_heads=1, context=24, settings=TINY.settings, dtype="float32")
        return real(tiny, CPU, **options | {"kernels": WRONG})

    short = f"trainer.kernel_test_s={seconds}"
    assert set(run_with(check, monkeypatch, short)[0]) == {"torch"}
    assert said in (line := capsys.readouterr().err) and len(line.splitlines()) == 1
    if fault == "hang":
        with pytest.raises(ConfigError, match=said):
            run_with(check, monkeypatch, short, "model.mixers.ovq.backend=triton")


def test_nothing_is_tested_where_the_kernels_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for overrides in (["model.mixers.ovq.backend=torch"], ["trainer.kernel_test_s=0"]):
        backends, tested = run_with(BAD, monkeypatch, *overrides)
        assert not tested and set(backends) <= {"torch", "auto"}


def test_the_first_rank_of_a_machine_tests_and_all_follow_its_verdict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 5 is the second on its machine. The kernels fail on the first machine, on none, or (rank 4) on its own."""
    monkeypatch.setattr(before_training, "gather_objects", lambda own: ["there (bad)", None, own])
    backends, tested = run_with(BAD, monkeypatch, rank=5, local_rank=1)
    assert set(backends) == {"torch"} and not tested and capsys.readouterr().err == ""
    monkeypatch.setattr(before_training, "gather_objects", lambda own: [None, None, own])
    backends, tested = run_with(BAD, monkeypatch, rank=5, local_rank=1)
    assert set(backends) == {"auto"} and not tested
    backends, tested = run_with(BAD, monkeypatch, rank=4, local_rank=0)
    assert set(backends) == {"torch"} and len(tested) == 1 and capsys.readouterr().err == ""


def test_without_a_gpu_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the choice of a backend, whatever its name."""
    monkeypatch.setattr(before_training, "problem_of", None)
    monkeypatch.setattr(before_training, "gather_objects", None)
    for backend in ("auto", "triton"):
        model = small_model("sw_ovq", f"model.mixers.ovq.backend={backend}")
        choose_backends(model, small_config("sw_ovq"), World())
        assert {m.backend for m in model.mixers() if isinstance(m, OVQ)} == {backend}


def test_the_backend_of_a_call_is_that_of_attend() -> None:
    x, spec = torch.zeros(1, 1, 1, 16), OVQSpec(8, 16)
    assert [interface.backend_of(name, x, x, x, spec) for name in ("auto", "reference")] == ["torch", "reference"]
    if not torch.cuda.is_available() and "triton" not in interface._MODULES:
        with pytest.raises(BackendError):
            interface.backend_of("triton", x, x, x, spec)


def test_a_resumed_run_may_change_the_time_of_the_test() -> None:
    old, new = small_config("sw_ovq"), small_config("sw_ovq", "trainer.kernel_test_s=0")
    assert not identity.changed(old, new)


# --- programs with a limit -------------------------------------------------------------------------------------------


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_program_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    program = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "print('began', flush=True)\n"
        "time.sleep(600)\n"
    )
    began = time.monotonic()
    ended = run_bounded([sys.executable, "-c", program], 3.0)
    assert ended.status is None and time.monotonic() - began < 60
    if (tmp_path / "pid").exists():
        pid = int((tmp_path / "pid").read_text() or 0)
        while pid and runs(pid) and time.monotonic() - began < 60:  # a busy machine takes a while to kill it
            time.sleep(0.1)
        assert not pid or not runs(pid)


def test_a_program_ends_soon_after_the_process_that_waits_for_it(tmp_path: Path) -> None:
    """As when a trainer is killed during the test: no process is left on the GPU."""
    child = (
        "import os, time\n"
        "from ovq.bounded import end_with_parent\n"
        "end_with_parent()\n"
        f"open({str(tmp_path / 'pid.tmp')!r}, 'w').write(str(os.getpid()))\n"
        f"os.replace({str(tmp_path / 'pid.tmp')!r}, {str(tmp_path / 'pid')!r})\n"
        "time.sleep(600)\n"
    )
    parent = f"import sys\nfrom ovq.bounded import run_bounded\nrun_bounded([sys.executable, '-c', {child!r}], 500)\n"
    process = subprocess.Popen([sys.executable, "-c", parent])
    end = time.monotonic() + SECONDS
    while not (tmp_path / "pid").exists() and time.monotonic() < end:
        time.sleep(0.1)
    process.kill()
    process.wait()
    pid = int((tmp_path / "pid").read_text())
    while runs(pid) and time.monotonic() < end:
        time.sleep(0.1)
    assert time.monotonic() < end


def test_a_program_runs_as_if_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    ended = run_bounded([sys.executable, "-c", "import os; print('RANK' in os.environ); raise SystemExit(3)"], 60)
    assert (ended.status, ended.out) == (3, "False\n")
    assert (how(3), how(-11), how(-99)) == ("exit status 3", "signal SIGSEGV", "signal 99")
