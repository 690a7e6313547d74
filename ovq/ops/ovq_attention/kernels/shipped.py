"""Every kernel as it is launched: configurations, dtypes and argument types, for ahead-of-time builds.

`python -m eval.bench.aot` builds this list. It must run without TRITON_INTERPRET.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ovq.ops.ovq_attention.kernels.assign import assign_kernel
from ovq.ops.ovq_attention.kernels.backward import chunk_grad_kernel, dictionary_grad_kernel, query_grad_kernel
from ovq.ops.ovq_attention.kernels.configs import DTYPES, constants, padded
from ovq.ops.ovq_attention.kernels.decode import SPLITS, combine_kernel, decode_kernel
from ovq.ops.ovq_attention.kernels.predict import predict_kernel
from ovq.ops.ovq_attention.kernels.tabulate import FILL, SCATTER, fill_kernel, scatter_kernel

KERNELS = {
    "assign": assign_kernel,
    "scatter": scatter_kernel,
    "fill": fill_kernel,
    "predict": predict_kernel,
    "query_grad": query_grad_kernel,
    "dictionary_grad": dictionary_grad_kernel,
    "chunk_grad": chunk_grad_kernel,
    "decode": decode_kernel,
    "combine": combine_kernel,
}
ATTENTION = ("predict", "query_grad", "dictionary_grad", "chunk_grad")
TABULATE = {"scatter": SCATTER, "fill": FILL}
FLAGS: dict[str, dict[str, Any]] = {
    "assign": {
        "MOST": 4,
        "PROPOSE": True,
        "COMMIT": True,
        "FORCED": False,
        "RANDOM": False,
        "NEAREST": False,
        "KEY_VALUE": False,
        "RATE": False,
    },
    "dictionary_grad": {"RATE": False},
    "decode": {"SPLITS": SPLITS},
    "combine": {"SPLITS": SPLITS, "PADDED": padded(SPLITS + 1)},
}
WIDTHS = (64, 128)  # of keys and of values
# What is launched besides the default variant: other chunks, values wider or narrower than keys, other numbers of
# programs per walk, a given assignment, and the settings that the kernels know at compile time.
OTHER_CHUNKS = (16, 64, 256, 512)
MIXED_WIDTHS = ((32, 64), (64, 128), (128, 64))
OTHER_FLAGS: dict[str, list[dict[str, Any]]] = {
    "assign": [
        {"MOST": 1},
        {"MOST": 16},
        *({name: True} for name in ("FORCED", "RANDOM", "NEAREST", "KEY_VALUE", "RATE")),
        {"MOST": 1, "NEAREST": True, "KEY_VALUE": True, "RATE": True},
    ],
    "dictionary_grad": [{"RATE": True}],
}
# Types of the arguments by name; all other pointers are to the operands' dtype, all other scalars int32.
TYPES = {
    **dict.fromkeys(("beta_ptr", "row_log_ptr", "row_count_ptr", "lse_ptr", "delta_ptr", "dbeta_ptr"), "*fp32"),
    **dict.fromkeys(("key_sum_ptr", "value_sum_ptr", "count_ptr", "best_ptr", "chosen_ptr", "part_ptr"), "*fp32"),
    **dict.fromkeys(("table_ptr", "sizes_ptr", "starts_ptr", "ends_ptr", "offsets_ptr", "blocks_ptr"), "*i32"),
    **dict.fromkeys(("documents_ptr", "walks_ptr", "forced_ptr", "rank_ptr", "assignment_ptr"), "*i32"),
    **dict.fromkeys(("arg_ptr", "place_ptr", "arrived_ptr"), "*i32"),
    "log2_keep": "fp32",
}
DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class ShippedKernel:
    """One compilation: `triton.compiler.ASTSource(kernel, signature, constexprs, attrs)` with `options`."""

    stage: str
    kernel: Any
    dtype: torch.dtype
    K: int
    V: int
    chunk_size: int
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attrs: dict[tuple[int], list]
    options: dict[str, int]
    flags: dict[str, Any]  # those that differ from the default variant's

    @property
    def attention(self) -> bool:
        """Whether it must be free of spills and use the tensor cores for its products."""
        return self.stage in ATTENTION


def shipped_kernels(arch: str) -> Iterator[ShippedKernel]:
    """Every kernel for an architecture ("sm_80", "sm_90", "sm_100", "gfx942"), with the default variant's flags.

    On AMD chips one program walks a head (`assign.splits`), so MOST is 1 there.

    The kernels that build the table depend on neither dtype nor width: they are listed once, under the last dtype.
    """
    for stage in KERNELS:
        for width in WIDTHS:
            for dtype in DTYPES:
                rows = 1 if stage in ("decode", "combine") else 128
                if stage not in TABULATE or (width, dtype) == (WIDTHS[0], DTYPES[-1]):
                    yield _kernel(stage, arch, dtype, width, width, rows)


def variants(arch: str) -> Iterator[ShippedKernel]:
    """Stages A to C with chunks, widths and flags other than the default variant's; see `OTHER_CHUNKS` and below."""
    stages = ("assign", *ATTENTION)
    for stage in stages:
        for L in OTHER_CHUNKS:
            yield _kernel(stage, arch, torch.bfloat16, 64, 64, L)
        for K, V in MIXED_WIDTHS:
            yield _kernel(stage, arch, torch.bfloat16, K, V, 128)
        if stage == "dictionary_grad":
            yield _kernel(stage, arch, torch.bfloat16, 128, 128, 128, RATE=True)
        for flags in OTHER_FLAGS.get(stage, []):
            if "MOST" not in flags or not arch.startswith("gfx"):
                yield _kernel(stage, arch, torch.bfloat16, 64, 64, 128, **flags)
    for L in OTHER_CHUNKS if not arch.startswith("gfx") else ():
        yield _kernel("assign", arch, torch.bfloat16, 64, 64, L, MOST=16)


def _kernel(stage: str, arch: str, dtype: torch.dtype, K: int, V: int, rows: int, **flags: Any) -> ShippedKernel:
    kernel, tile = KERNELS[stage], "decode" if stage == "combine" else stage
    if stage in TABULATE:
        settings = TABULATE[stage]
    else:
        amd = {"MOST": 1} if stage == "assign" and arch.startswith("gfx") else {}
        settings = constants(tile, arch, dtype, K, V, rows, **FLAGS.get(stage, {}) | amd | flags)
    options = {name: settings[name] for name in ("num_warps", "num_stages")}
    settings = {name: value for name, value in settings.items() if name in kernel.arg_names}
    signature = {name: _type(name, dtype, settings) for name in kernel.arg_names}
    attrs = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(signature.values()) if t[0] == "*"}
    return ShippedKernel(stage, kernel, dtype, K, V, rows, signature, settings, attrs, options, flags)


def _type(name: str, dtype: torch.dtype, constexprs: dict[str, Any]) -> str:
    if name in constexprs:
        return "constexpr"
    return TYPES.get(name, f"*{DTYPE_NAMES[dtype]}" if name.endswith("_ptr") else "i32")
