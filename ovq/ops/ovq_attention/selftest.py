"""Self-test of the Triton kernels on this GPU: outputs, gradients and a repeat, compared with the torch backend.

    python -m ovq.ops.ovq_attention.selftest                                          the 70m shape, bfloat16
    python -m ovq.ops.ovq_attention.selftest width=128 num_centroids=4096 packed=true

A training run does this before its first step, at its own shape (`ovq.train.backends`). The kernels run in a process of
their own, so that neither an illegal memory access nor a hang can harm the caller. A pass is remembered in a file per
GPU, driver, Triton version, kernel source and shape, in $XDG_CACHE_HOME/ovq or ~/.cache/ovq; a failure is not, since a
busy GPU may have caused it. The tool itself always runs the test.

Exit status: 0 the kernels are right, 1 they are wrong, fail or hang, 2 a setting is wrong or there is no GPU.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ovq.bounded import how, run_bounded
from ovq.cli import command
from ovq.errors import ConfigError, one_line
from ovq.files import write_whole
from ovq.ops.ovq_attention.spec import OVQSpec
from ovq.ops.ovq_attention.verify import KERNELS, Problem
from ovq.schema import one_of, setting

SECONDS = 240  # mostly to import torch and, once per machine, to compile: Triton caches what it compiles
ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Verdict:
    """Whether the kernels are right; `what`: how far they are off, or what failed; `remembered`: read from a file."""

    passed: bool
    what: str
    remembered: bool = False


def check(
    problem: Problem, device: torch.device, *, seconds: float = SECONDS, kernels: str = KERNELS, again: bool = False
) -> Verdict:
    """The verdict on the kernels in a module: the remembered one, or a new one if there is none or `again` is set."""
    known = folder() / f"{digest(identity(problem, device, kernels))}.json"
    if not again:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a damaged file counts as none
            return Verdict(True, str(json.loads(known.read_text())["passed"]), remembered=True)
    verdict = _test(problem, device, seconds, kernels)
    if verdict.passed:
        content = json.dumps({"passed": verdict.what, **identity(problem, device, kernels)}, indent=1)
        with contextlib.suppress(OSError):  # if it cannot be written, the next start tests again
            write_whole(known, content + "\n")
    return verdict


def _test(problem: Problem, device: torch.device, seconds: float, kernels: str) -> Verdict:
    given = {"problem": asdict(problem), "device": str(device), "kernels": kernels, "seconds": seconds}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    program = [sys.executable, "-P", "-m", "ovq.ops.ovq_attention.verify", json.dumps(given)]
    ended = run_bounded(program, seconds, os.environ | {"PYTHONPATH": path})
    lines = ended.out.splitlines()
    at = next((line.removeprefix("at ") for line in reversed(lines) if line.startswith("at ")), "the start")
    last = lines[-1] if lines else ""
    # The child's own alarm, meant for when its parent is gone, may go off first.
    if ended.status is None or ended.status == -signal.SIGALRM:
        return Verdict(False, f"{at}: no answer within {seconds:g} s")
    for word, passed in (("passed: ", True), ("failed: ", False)):
        if last.startswith(word) and ended.status == int(not passed):
            return Verdict(passed, last.removeprefix(word))
    said = [line for line in ended.err.splitlines() if line.strip()]
    return Verdict(False, f"{at}: {how(ended.status)}{f' ({one_line(Exception(said[-1]))[:200]})' if said else ''}")


# --- what is remembered ----------------------------------------------------------------------------------------------


def folder() -> Path:
    """Where passes are remembered; without a home directory, a path where no file can be written."""
    cache = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(cache) if cache else Path.home() / ".cache") / "ovq" / "selftest"
    except RuntimeError:
        return Path(os.devnull)


def identity(problem: Problem, device: torch.device, kernels: str) -> dict[str, Any]:
    """Everything that a verdict depends on."""
    versions = {"torch": torch.__version__, "triton": triton_version(), "interpreter": interpreter()}
    card = card_of(device)
    return {"card": card, "driver": driver(), **versions, "code": code_hash(kernels), "problem": asdict(problem)}


def digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:24]


def card_of(device: torch.device) -> str:
    """Name, multiprocessors (a slice of a GPU has fewer) and compute capability of a GPU."""
    if device.type != "cuda":
        return device.type
    found = torch.cuda.get_device_properties(device)
    return f"{found.name}, {found.multi_processor_count} processors, {found.major}.{found.minor}"


def driver() -> str:
    """The GPU driver's version, as its kernel module reports it, and the toolkit that torch is built with."""
    stated = []
    for file in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        with contextlib.suppress(OSError):
            stated += Path(file).read_text().splitlines()[:1]
    return "; ".join([*stated, f"torch for {torch.version.cuda or torch.version.hip}"])


def triton_version() -> str | None:
    for package in ("triton", "pytorch-triton-rocm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    return None


@functools.cache
def code_hash(kernels: str = KERNELS) -> str:
    """A hash of the source of the operator, with which the kernels are compared, and of the module to test."""
    here = Path(__file__).parent
    files = [*sorted(here.rglob("*.py")), here.parent / "common.py"]
    spec = importlib.util.find_spec(kernels)
    if spec is not None and spec.origin:
        files.append(Path(spec.origin))
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()[:24]


def interpreter() -> bool:
    """Whether the kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


# --- the tool --------------------------------------------------------------------------------------------------------


@dataclass
class Options:
    batch: int = setting(1, "rows of a micro-batch", at_least=1)
    heads: int = setting(8, "query heads", at_least=1)
    kv_heads: int | None = setting(None, "key/value heads; null: as many as query heads", at_least=1)
    width: int = setting(64, "width of keys", at_least=1)
    value_width: int | None = setting(None, "width of values; null: that of keys", at_least=1)
    dtype: str = one_of("bfloat16", "float16", "float32", help="dtype of q, k and v")
    context: int = setting(8192, "tokens of the longest text, whose last chunks are tested too", at_least=1)
    packed: bool = setting(False, "also test packed documents")
    num_centroids: int = setting(2048, "capacity of the dictionary", at_least=1)
    chunk_size: int = setting(128, "tokens per chunk", at_least=1)
    growth: str = one_of("plateau", "linear", help="see ovq.ops.ovq_attention.spec, as for the next five")
    growth_tokens: int | None = setting(None, "tokens after which linear growth ends", at_least=1)
    seeding: str = one_of("spread", "random", help="which keys found centroids")
    step_size: str = setting("count", "count, or a number in (0, 1]")
    first_chunk: str = one_of("merge", "nearest", help="how an empty dictionary starts")
    assign_on: str = one_of("key", "key_value", help="what a key's centroid is chosen by")
    device: str = setting("cuda", "device; cpu only with TRITON_INTERPRET=1")
    seconds: int = setting(SECONDS, "time after which the kernels count as hung", at_least=1)
    kernels: str = setting(KERNELS, "module to test")


@command(Options)
def main(options: Options) -> int:
    """The command line described in the module's docstring."""
    problem = problem_of(options)
    if options.device != "cpu" and not torch.cuda.is_available():
        raise ConfigError("there is no GPU here; TRITON_INTERPRET=1 and device=cpu run the kernels in the interpreter")
    if options.device == "cpu" and not interpreter():
        raise ConfigError("device=cpu needs TRITON_INTERPRET=1: only Triton's interpreter runs the kernels on a CPU")
    verdict = check(problem, torch.device(options.device), seconds=options.seconds, kernels=options.kernels, again=True)
    print(f"{'passed' if verdict.passed else 'FAILED'}: {verdict.what}")
    return int(not verdict.passed)


def problem_of(options: Options) -> Problem:
    """Raises ConfigError for settings that contradict each other."""
    step: str | float = options.step_size
    with contextlib.suppress(ValueError):
        step = float(options.step_size)
    try:
        spec = OVQSpec(
            num_centroids=options.num_centroids,
            chunk_size=options.chunk_size,
            growth=options.growth,
            growth_tokens=options.growth_tokens,
            seeding=options.seeding,
            step_size=step,
            first_chunk=options.first_chunk,
            assign_on=options.assign_on,
        )
    except ValueError as error:
        raise ConfigError(one_line(error)) from None
    kv_heads, value_width = options.kv_heads or options.heads, options.value_width or options.width
    if options.heads % kv_heads:
        raise ConfigError(f"heads={options.heads} must be a multiple of kv_heads={kv_heads}")
    return Problem(
        batch=options.batch,
        heads=options.heads,
        kv_heads=kv_heads,
        key_width=options.width,
        value_width=value_width,
        dtype=options.dtype,
        context=options.context,
        packed=options.packed,
        settings=spec.text,
    )


if __name__ == "__main__":
    sys.exit(main())
