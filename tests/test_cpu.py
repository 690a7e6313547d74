"""Claims about training on a CPU: idle threads, retained memory, and bfloat16 in a single process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ovq import cpu
from ovq.compose import CONFIG_DIR
from ovq.processes import World
from tests.training import trainer_for

ROOT = CONFIG_DIR.parent
MODELS = ("sw_ovq", "sw_gdn", "sw_vq", "sw_mamba2", "sw_mesa", "sw_kvm", "std_att")


def python(code: str, **environment: str) -> str:
    """What a fresh Python process prints, on stdout and stderr."""
    kept = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=kept | environment, capture_output=True, text=True, check=True
    )
    return done.stdout + done.stderr


@pytest.mark.skipif(platform.system() != "Linux", reason="torch has GNU's OpenMP on Linux only")
@pytest.mark.parametrize("first_import", ["ovq.model", "eval.bench.ops", "train, ovq.train.loop"])
def test_idle_threads_sleep_unless_the_user_decides(first_import: str) -> None:
    """GNU's OpenMP prints at startup which settings are in effect."""
    shown = python(f"import {first_import}; import torch", OMP_DISPLAY_ENV="verbose")
    assert "GOMP_SPINCOUNT = '1000'" in shown
    own = python(f"import {first_import}; import torch", OMP_DISPLAY_ENV="verbose", OMP_WAIT_POLICY="active")
    assert "OMP_WAIT_POLICY = 'ACTIVE'" in own and "GOMP_SPINCOUNT = '1000'" not in own


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc has the setting")
@pytest.mark.parametrize("kept", [True, False])
def test_freed_memory_is_kept(kept: bool) -> None:
    code = (
        "import resource, torch\nfrom ovq import cpu\n"
        f"{'cpu.keep_freed_memory()' if kept else ''}\n"
        "def step():\n"
        "    x = torch.ones(2**22)\n"
        "    for _ in range(12): x = x * 1.5 + 1\n"
        "    return [x * i for i in range(6)]\n"
        "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "def more(): before = faults(); step(); return faults() - before\n"
        "late = [more() for _ in range(12)][4:]\n"
        "print(min(late), max(late))"
    )
    # A step makes about thirty allocations of 4,096 pages (or 8 huge ones). How freed memory is fragmented differs from
    # process to process: with the setting, a late step may still need new pages, and without it one may need none.
    least, most = map(int, python(code).split())
    assert least < 50 if kept else most > 50


@pytest.mark.parametrize(
    ("amx", "ratio", "chosen"),
    [(True, 6.8, "bf16"), (True, 0.9, "fp32"), (False, 87.0, "fp32")],  # the last was measured on a busy machine
)
def test_auto_takes_bf16_only_with_amx_that_is_used(
    amx: bool, ratio: float, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]

    def seconds(dtype: torch.dtype) -> float:
        assert setting.fp32_precision == "none"  # or float32 products would be measured in bfloat16
        return 1.0 if dtype == torch.bfloat16 else ratio

    monkeypatch.setattr(cpu, "has_amx", lambda: amx)
    monkeypatch.setattr(cpu, "_seconds", seconds)
    try:
        setting.fp32_precision = "bf16"
        assert cpu.choose_precision("auto") == chosen
        assert setting.fp32_precision == ("bf16" if chosen == "bf16" else "none")
        assert cpu.choose_precision("fp32") == "fp32" and setting.fp32_precision == "none"
        assert cpu.choose_precision("bf16") == "bf16" and setting.fp32_precision == "bf16"
    finally:
        cpu.choose_precision("fp32")


def losses(run_dir: Path, *overrides: str, model: str, precision: str) -> list[float]:
    trainer = trainer_for(run_dir, *overrides, model=model, world=World(precision=precision))
    trainer.fit()
    assert all(p.dtype == torch.float32 and p.grad is not None for p in trainer.model.parameters())
    assert all(s.dtype == torch.float32 for state in trainer.optimizer.state.values() for s in state.values())
    from ovq.train.metrics import read_rows

    return [row["loss"] for row in read_rows(trainer.metrics.path) if "loss" in row]


@pytest.mark.parametrize("model", MODELS)
def test_a_lone_process_in_bf16_learns_as_in_float32(model: str, tmp_path: Path) -> None:
    seen = set()
    linear = torch.nn.functional.linear

    def watched(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.add((x.dtype, weight.dtype))
        return linear(x, weight, bias)

    want = losses(tmp_path / "fp32", model=model, precision="fp32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", watched)
        got = losses(tmp_path / "bf16", model=model, precision="bf16")
    assert seen == {(torch.bfloat16, torch.bfloat16)}
    assert got != want and got == pytest.approx(want, rel=2e-2)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_in_bf16_changes_nothing(recompute: str, tmp_path: Path) -> None:
    plain = losses(tmp_path / "plain", model="sw_ovq", precision="bf16")
    setting = f"trainer.activation_checkpointing={recompute}"
    assert losses(tmp_path / "recomputed", setting, model="sw_ovq", precision="bf16") == plain


class RoundedProducts(TorchDispatchMode):
    """Rounds the operands of every float32 matrix product to bfloat16, as oneDNN does on a processor with AMX."""

    PRODUCTS = {"mm": 2, "bmm": 2, "addmm": 2, "addmm_": 2, "baddbmm": 2, "baddbmm_": 2}
    rounded = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in self.PRODUCTS:
            self.rounded += 1
            first = len([a for a in args if isinstance(a, Tensor)]) - 2
            args = tuple(
                a.to(torch.bfloat16).to(a.dtype) if isinstance(a, Tensor) and i >= first else a
                for i, a in enumerate(args)
            )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("model", ["sw_ovq", "sw"])
def test_products_in_bf16_leave_the_loss_curve_as_it_is(model: str, tmp_path: Path) -> None:
    want = losses(tmp_path / "exact", model=model, precision="fp32")
    with RoundedProducts() as mode:
        got = losses(tmp_path / "rounded", model=model, precision="fp32")
    assert mode.rounded > 100
    assert got != want and got == pytest.approx(want, rel=5e-3)


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="this processor has no AMX")
def test_with_amx_products_of_float32_matrices_are_rounded() -> None:
    code = (
        "import torch\nfrom ovq import cpu\nprint(cpu.choose_precision('auto'))\n"
        "a, b = torch.randn(2, 512, 512).unbind()\nexact = a.double() @ b.double()\n"
        "print(float((a @ b - exact).norm() / exact.norm()))"
    )
    precision, error = python(code, ONEDNN_MAX_CPU_ISA="DEFAULT").split()
    assert precision == "bf16" and 1e-4 < float(error) < 1e-2
