"""Compile every shipped kernel, without a GPU, and check what the compilers made of it.

    python -m eval.bench.aot                                     every kernel, width and dtype for every target
    python -m eval.bench.aot targets=[sm_90] quick=true          the main path only: bfloat16
    python -m eval.bench.aot out=docs/results/aot jobs=8

Writes aot.json and aot.md (the same as a table) to `out`; for NVIDIA's chips with the cost of each kernel's loops
(`eval.bench.sass`), which tests/test_aot.py checks against the bars in docs/results/aot/bars.json. The requirements,
none of which the compilers enforce:

- no spills in the attention kernels: a spilled register costs a memory access in the innermost loop;
- shared memory within the chip's limit: the compiler accepts kernels that cannot be launched;
- matrix products on tensor cores: an operand in the wrong layout silently takes a slower path;
- no "wgmma serialized" (C7511, C7514, ...): ptxas then waits after every product, which the machine code does not show.

Exit status 1, naming the kernels, if a requirement is broken; 2 if nothing could be compiled. sm_100 is best effort:
broken requirements are reported but do not count.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from eval.bench import sass
from ovq.cli import command
from ovq.errors import ConfigError
from ovq.files import write_whole
from ovq.machine import command_line
from ovq.schema import setting


@dataclass(frozen=True)
class Chip:
    """A compilation target.

    `backend`, `arch`, `warp`: as Triton names it. `shared_kib`: most shared memory of a program. `matmul`: its matrix
    instructions in 16-bit floats; `matmul_older`: those accepted in float32 (on NVIDIA, products of TF32 parts) and for
    products of fewer than 64 rows (decoding, short chunks). `binding`: whether a broken requirement fails the command.
    """

    backend: str
    arch: int | str
    warp: int
    shared_kib: int
    matmul: tuple[str, ...]
    matmul_older: tuple[str, ...]
    binding: bool = True


CHIPS = {
    "sm_80": Chip("cuda", 80, 32, 163, ("HMMA",), ("HMMA",)),
    "sm_89": Chip("cuda", 89, 32, 99, ("HMMA",), ("HMMA",)),
    "sm_90": Chip("cuda", 90, 32, 227, ("HGMMA",), ("HGMMA", "HMMA")),
    "sm_100": Chip("cuda", 100, 32, 227, ("UTCHMMA",), ("UTCHMMA", "HMMA"), binding=False),
    "gfx942": Chip("hip", "gfx942", 64, 64, ("v_mfma",), ("v_mfma",)),
}
SERIALIZED = ("C7511", "serializ")  # the warning's number depends on the cause
COUNTED = ("HGMMA", "HMMA", "UTCHMMA", "STL", "LDL")
# The TRITON_* variables that a build needs; Triton reads them at each use.
ENVIRONMENT = {"TRITON_ALWAYS_COMPILE": "1", "TRITON_DUMP_PTXAS_LOG": "1"}


@dataclass
class Build:
    """A compiled kernel.

    `matmuls` counts matrix instructions by name, `spills` the loads and stores of spilled registers; `shared` and
    `stack` are bytes; `code` is what its loops cost (NVIDIA); `serialized` is ptxas's warning about serialized
    products, `error` why compilation failed; `flags`: those that differ from the default variant's.
    """

    target: str
    stage: str
    attention: bool
    multiplies: bool
    dtype: str
    K: int
    V: int
    chunk_size: int
    tile: dict[str, Any]
    warps: int
    stages: int
    registers: int = 0
    stack: int = 0
    spills: int = 0
    shared: int = 0
    matmuls: dict[str, int] = field(default_factory=dict)
    code: sass.Code = field(default_factory=sass.Code)
    serialized: str = ""
    seconds: float = 0.0
    error: str = ""
    flags: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return " ".join([self.stage, self.dtype, f"{self.K}x{self.V}", *self.variant, f"on {self.target}"])

    @property
    def variant(self) -> list[str]:
        """How it differs from the default variant, except in width; decode's "chunk" is a group of query heads."""
        chunk = [] if self.chunk_size in (1, 128) else [f"L={self.chunk_size}"]
        return chunk + [name if value is True else f"{name}={value}" for name, value in self.flags.items()]


def offences(build: Build) -> list[str]:
    """The requirements that a build breaks, one line each."""
    chip = CHIPS[build.target]
    if build.error:
        return [f"{build.name}: does not build: {build.error}"]
    found = []
    if build.attention and (build.spills or build.stack):
        found.append(f"{build.name}: {build.spills} spilled loads and stores, {build.stack} bytes of stack")
    if build.shared > chip.shared_kib * 1024:
        found.append(f"{build.name}: {build.shared} bytes of shared memory, the chip has {chip.shared_kib} KiB")
    few_rows = build.stage == "decode" or build.chunk_size < 64 or "FORCED" in build.flags  # (FORCED only sums keys)
    wanted = chip.matmul_older if build.dtype == "float32" or few_rows else chip.matmul
    if build.multiplies and not any(build.matmuls.get(name) for name in wanted):
        found.append(f"{build.name}: no {' or '.join(wanted)} instruction, products do not run on tensor cores")
    if build.serialized:
        found.append(f"{build.name}: {build.serialized}")
    return found


# --- one build -------------------------------------------------------------------------------------------------------


def build(kernel: Any, target: str, **changes: Any) -> Build:
    """Compile a `ShippedKernel` for a target; `changes` override compile-time arguments, num_warps or num_stages.

    A failed compilation is recorded in the result's `error`.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    chip = CHIPS[target]
    options = {name: changes.pop(name, value) for name, value in kernel.options.items()}
    constexprs = {**kernel.constexprs, **changes}
    made = Build(
        target,
        kernel.stage,
        kernel.attention,
        "PRECISION" in kernel.constexprs,
        str(kernel.dtype).removeprefix("torch."),
        kernel.K,
        kernel.V,
        kernel.chunk_size,
        {name: value for name, value in constexprs.items() if name.startswith("BLOCK_") or name == "MOST"},
        options["num_warps"],
        options["num_stages"],
        flags=kernel.flags,
    )
    source = triton.compiler.ASTSource(kernel.kernel, kernel.signature, constexprs, kernel.attrs)
    began, log = time.monotonic(), io.StringIO()
    complaints: list[str] = []
    try:
        # Triton prints ptxas's log, but MLIR writes its errors directly to file descriptor 2.
        with contextlib.redirect_stdout(log), _stderr_lines(complaints):
            compiled = triton.compile(source, target=GPUTarget(chip.backend, chip.arch, chip.warp), options=options)
    except Exception as error:  # anything the compilers raise is a result about this kernel
        why = [str(error), *(line for line in complaints if "error:" in line or "failed" in line)]
        made.error = " ".join(" ".join(why).split())[:160] or repr(error)
        return made
    made.shared = compiled.metadata.shared
    said = [line for line in log.getvalue().splitlines() if any(word in line for word in SERIALIZED)]
    made.serialized = " ".join(said[0].split()) if said else ""
    if chip.backend == "cuda":
        _read_cubin(made, compiled.asm["cubin"])
        made.code.waits = sass.waits(compiled.asm.get("ttgir", ""))
    else:
        _read_amdgcn(made, compiled.asm["amdgcn"])
    made.seconds = round(time.monotonic() - began, 2)
    return made


@contextlib.contextmanager
def _stderr_lines(lines: list[str]) -> Iterator[None]:
    """Append to `lines` what is written to file descriptor 2 inside the block."""
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile() as scratch:
        os.dup2(scratch.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)
            scratch.seek(0)
            lines += scratch.read().decode(errors="replace").splitlines()


def _read_cubin(made: Build, cubin: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _cuobjdump("--dump-resource-usage", path)
        code = _cuobjdump("-sass", path)
    made.registers, made.stack = (int(_find(rf"{name}:(\d+)", usage)) for name in ("REG", "STACK"))
    counts = Counter(re.findall(rf"\b({'|'.join(COUNTED)})\b", code))
    made.spills = counts["STL"] + counts["LDL"]
    made.matmuls = {name: counts[name] for name in ("HGMMA", "HMMA", "UTCHMMA") if counts[name]}
    made.code = sass.measure(code)


def _cuobjdump(option: str, path: Path) -> str:
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([program, option, path], check=True, capture_output=True, text=True).stdout


def _read_amdgcn(made: Build, assembly: str) -> None:
    made.registers = int(_find(r"\.vgpr_count:\s+(\d+)", assembly))  # of 512, including accumulators
    # Only spills to memory. The compiler's own count includes scalars spilled to lanes of vector registers, and vectors
    # spilled to accumulator registers, which are cheap.
    made.spills = len(re.findall(r"^\s+scratch_(?:load|store)", assembly, re.MULTILINE))
    made.stack = int(_find(r"\.private_segment_fixed_size:\s+(\d+)", assembly))
    made.matmuls = {"v_mfma": len(re.findall(r"^\s+v_mfma", assembly, re.MULTILINE))}


def _find(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"{pattern} not found in the compiler's report")
    return found[1]


# --- all builds ------------------------------------------------------------------------------------------------------


def report(targets: Iterable[str], *, quick: bool = False, jobs: int = 2) -> Iterator[Build]:
    """Compile every shipped kernel for the targets in `jobs` processes.

    `quick`: only the default variant in bfloat16, and for targets other than sm_90 only the attention kernels of width
    64.
    """
    wanted = [(target, index) for target in targets for index in _indices(target, quick)]
    with tempfile.TemporaryDirectory() as cache, _environment({**ENVIRONMENT, "TRITON_CACHE_DIR": cache}):
        if jobs == 1:
            yield from map(_build_shipped, wanted)
            return
        with multiprocessing.get_context("spawn").Pool(jobs) as pool:
            yield from pool.imap(_build_shipped, wanted)


def _indices(target: str, quick: bool) -> list[int]:
    kernels = list(enumerate(_shipped(target)))
    if not quick:
        return [i for i, _ in kernels]
    kernels = [(i, kernel) for i, kernel in kernels if str(kernel.dtype) == "torch.bfloat16"]
    kernels = [(i, k) for i, k in kernels if k.K == k.V and k.chunk_size in (1, 128) and not k.flags]
    if target == "sm_90":
        return [i for i, _ in kernels]
    return [i for i, kernel in kernels if kernel.attention and kernel.K == 64]


def _build_shipped(wanted: tuple[str, int]) -> Build:
    target, index = wanted
    return build(_shipped(target)[index], target)


def _shipped(target: str) -> list[Any]:
    from eval.bench.plain_fa2 import PlainFA2
    from ovq.ops.ovq_attention.kernels.shipped import shipped_kernels, variants

    return [*shipped_kernels(target), *variants(target), *([PlainFA2()] if target == "sm_90" else [])]


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


# --- what is written -------------------------------------------------------------------------------------------------

BUILT = (
    *("target", "stage", "dtype", "width", "variant", "tile", "warps", "stages", "registers", "spills", "shared"),
    "products",
)
COLUMNS = (*BUILT, *sass.COLUMNS)
WIDTHS = (6, 15, 8, 6, 12, 6, 5, 6, 9, 6, 14, 16, 12, 12, 5, 9, 4, 4, 4, 16, 5)


def cells(build: Build) -> list[str]:
    """A build as a table row, see `COLUMNS`."""
    names = ("BLOCK_L", "BLOCK_M", "BLOCK_R", "BLOCK_N")
    tile = "x".join(str(build.tile[name]) for name in names if name in build.tile)
    products = " ".join(f"{count} {name}" for name, count in build.matmuls.items())
    numbers = [str(x) for x in (build.warps, build.stages, build.registers, build.spills)]
    shared = f"{build.shared / 1024:.0f} of {CHIPS[build.target].shared_kib} KiB"
    width = str(build.K) if build.K == build.V else f"{build.K}/{build.V}"
    variant = " ".join(build.variant)
    first = [build.target, build.stage, build.dtype, width, variant, tile]
    return [*first, *numbers, shared, products, *sass.cells(build.code)]


def _line(row: Iterable[str]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(row, WIDTHS)).rstrip()


def markdown(builds: list[Build]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (COLUMNS, ["---"] * len(COLUMNS), *map(cells, builds))]
    return "\n".join(lines) + "\n"


def write(builds: list[Build], broken: list[str], out: Path, command: str) -> None:
    """Write aot.json and aot.md to `out`."""
    import torch
    import triton

    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    version = subprocess.run([ptxas, "--version"], check=True, capture_output=True, text=True).stdout
    content = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "ptxas": _find(r"release ([\d.]+)", version),
        "broken": broken,
        "builds": [asdict(build) for build in builds],
    }
    write_whole(out / "aot.json", json.dumps(content, indent=1) + "\n")
    write_whole(out / "aot.md", markdown(builds))


@dataclass
class Options:
    out: str = setting("runs/aot", "output folder", writes="folder")
    targets: list[str] = setting([*CHIPS], "architectures to compile for", choices=tuple(CHIPS))
    quick: bool = setting(False, "only the kernels that training uses most")
    jobs: int = setting(2, "parallel compilation processes", at_least=1)


@command(Options)
def main(options: Options) -> int:
    """The command line described in the module's docstring."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ConfigError("TRITON_INTERPRET=1 interprets the kernels instead of compiling them; unset it")
    began = time.monotonic()
    builds = []
    print(_line(COLUMNS))
    for made in report(options.targets, quick=options.quick, jobs=options.jobs):
        print(_line(cells(made)), flush=True)
        builds.append(made)
    broken = [line for build in builds if CHIPS[build.target].binding for line in offences(build)]
    noted = [line for build in builds if not CHIPS[build.target].binding for line in offences(build)]
    write(builds, broken + noted, Path(options.out), command_line())
    print(f"{len(builds)} kernels compiled in {time.monotonic() - began:.0f} s; written to {options.out}/aot.json")
    for line in noted:
        print(f"NOTE    {line}", file=sys.stderr)
    for line in broken:
        print(f"BROKEN  {line}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
