"""Claims about the dry run: every number it prints equals one computed another way."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import train
from ovq.compose import compose
from ovq.plan import report

V, D, LAYERS, HEADS, K, FFN = 1000, 128, 4, 2, 64, 384  # model/size=tiny
MIB = 2**20


def plan(*overrides: str, data: dict[str, Any] | None = None, world_size: int = 1) -> dict[str, str]:
    """The report's rows by name; rows of the state table are keyed by context."""
    text = report(compose(list(overrides)), V, data or {}, world_size, Path("runs/x"))
    rows = [(line[:16].strip(), line[17:].strip()) for line in text.splitlines() if line[:10].strip()]
    table = {line.split()[0]: " ".join(line.split()[1:]) for line in text.splitlines() if line.startswith("    ")}
    return dict(rows) | table


def mib(text: str) -> float:
    number, unit = re.search(r"([\d.e+]+) (KiB|MiB|GiB)", text).groups()  # type: ignore[union-attr]
    return float(number) * {"KiB": 1 / 1024, "MiB": 1, "GiB": 1024}[unit]


def test_parameters_and_flops_equal_a_count_by_hand() -> None:
    rows = plan("model=std_att", "trainer.context=512", "trainer.global_batch=6", "trainer.micro_batch=2")
    matrices = LAYERS * (4 * D * HEADS * K + 3 * D * FFN)
    norms = (2 * LAYERS + 1) * D
    assert rows["parameters"].startswith(f"{matrices + norms + 2 * V * D:,} in total, {matrices + norms:,} without")
    flops = 3 * (2 * (matrices + V * D) + LAYERS * 4 * HEADS * K * (512 + 1) / 2)
    compute = f"{flops:.4g} per token at context 512; {flops * 6 * 512 * 1000:.3g} in total"
    assert rows["training FLOPs"].startswith(compute)
    assert rows["tokens"] == f"{6 * 512:,} per step (6 x 512); {6 * 512 * 1000:,} in total"
    assert rows["steps"] == "1,000" and rows["processes"] == "1, micro-batch 2, accumulation 3"


@pytest.mark.parametrize(
    ("pattern", "shown"),
    [
        ("[sliding_window,ovq]", "4: (sliding_window, ovq) x 2"),
        ("[sliding_window]", "4: (sliding_window) x 4"),
        (
            "[sliding_window,sliding_window,sliding_window,ovq]",
            "4: sliding_window, sliding_window, sliding_window, ovq",
        ),
        ("[sliding_window,ovq,ovq]", "4: sliding_window, ovq, ovq, sliding_window"),
    ],
)
def test_layers_show_the_pattern_repeated_to_fill_the_depth(pattern: str, shown: str) -> None:
    assert plan("model=sw_ovq", f"model.pattern={pattern}")["layers"] == shown


def test_a_bf16_cache_grows_with_the_context_and_a_float32_dictionary_does_not() -> None:
    full = plan("model=std_att")
    for context in (2048, 65536):
        elements = LAYERS * 2 * HEADS * K * context
        assert full[f"{context:,}"] == f"{elements:,} {2 * elements / MIB:.4g} MiB"
    ovq = plan("model=sw_ovq", "model.pattern=[ovq]", "model.mixers.ovq.num_centroids=1024")
    elements = LAYERS * HEADS * 1024 * (2 * K + 1)  # no chunk is pending at these contexts
    assert {ovq[context] for context in ("2,048", "65,536")} == {f"{elements:,} {4 * elements / MIB:.4g} MiB"}


def test_state_bytes_equal_those_a_model_holds() -> None:
    from ovq.model import build_model, state_bytes

    cfg = compose(["model=sw_ovq", "model.mixers.ovq.num_centroids=32", "model.mixers.sliding_window.window=16"])
    model = build_model(cfg.model, 50).to(torch.bfloat16)
    model.init_weights(0)
    with torch.no_grad():
        state = model(torch.zeros(1, 130, dtype=torch.int64), return_state=True).state
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(state) if isinstance(leaf, torch.Tensor)]
    assert state_bytes(model, 130) == sum(leaf.numel() * leaf.element_size() for leaf in leaves)


def test_memory_falls_with_sharding_and_recomputation() -> None:
    one = plan("model=sw", "trainer.global_batch=64")["device memory"]
    eight = plan("model=sw", "trainer.global_batch=64", world_size=8)["device memory"]
    hybrid = plan("model=sw", "trainer.global_batch=64", "trainer.shard=hybrid", "trainer.replicas=4", world_size=8)[
        "device memory"
    ]
    copies = plan("model=sw", "trainer.global_batch=64", "trainer.shard=none", world_size=8)["device memory"]
    weights = [mib(text.split("optimizer")[1]) for text in (one, eight, hybrid, copies)]
    assert weights == pytest.approx([weights[0], weights[0] / 8, weights[0] / 2, weights[0]], rel=1e-3)
    total = LAYERS * (4 * D * HEADS * K + 3 * D * FFN) + (2 * LAYERS + 1) * D + 2 * V * D
    assert weights[0] == pytest.approx(16 * total / MIB, rel=1e-3)  # float32: weights, gradients, two moments
    matrices = LAYERS * (4 * D * HEADS * K + 3 * D * FFN)
    for settings, numbers in (
        (["optim=muon"], 4 * total - matrices),  # one moment per matrix
        (["optim.ema=0.999"], 5 * total),
        (["optim=muon", "optim.ema=0.999"], 5 * total - matrices),
    ):
        shown = plan("model=sw", "trainer.global_batch=64", *settings)["device memory"].split("optimizer")[1]
        assert mib(shown) == pytest.approx(4 * numbers / MIB, rel=1e-3), settings
    kept = {
        how: mib(plan("model=sw", f"trainer.activation_checkpointing={how}")["device memory"].split("activations")[1])
        for how in ("none", "selective", "full")
    }
    assert kept["none"] > kept["selective"] > kept["full"] > 0
    halves = plan("model=sw", "trainer.context_parallel=2", world_size=2)["device memory"].split("activations")[1]
    assert mib(halves) == pytest.approx(kept["none"] / 2, rel=2e-3)


@pytest.mark.parametrize(
    ("overrides", "world_size", "says"),
    [
        (
            ["trainer.global_batch=8", "trainer.micro_batch=4"],
            3,
            "3: impossible, trainer.global_batch=8 is not a multiple",
        ),
        (
            ["trainer.global_batch=8", "trainer.micro_batch=8"],
            2,
            "2: impossible, trainer.global_batch=8 is not a multiple",
        ),
        (["trainer.shard=hybrid", "trainer.replicas=4"], 1, "1: impossible, trainer.replicas=4 must divide"),
        (["trainer.replicas=4"], 8, "8: impossible, trainer.replicas=4 is only used with trainer.shard=hybrid"),
        (["trainer.shard=hybrid", "trainer.replicas=4"], 8, "8, micro-batch 1, accumulation 1"),
        (["trainer.context_parallel=2"], 8, "8, 2 share each sequence, micro-batch 1, accumulation 2"),
        (["trainer.context_parallel=2"], 3, "3: impossible, trainer.context_parallel=2 does not divide 3"),
        (["trainer.context_parallel=4"], 4, "4, 4 share each sequence, micro-batch 1, accumulation 8"),
        (
            ["model=vq", "trainer.context_parallel=4"],
            4,
            "4: impossible, trainer.context_parallel=4 must divide model.num_",
        ),
    ],
)
def test_processes_that_cannot_share_the_batch_are_reported(overrides: list[str], world_size: int, says: str) -> None:
    rows = plan("model=sw", "trainer.micro_batch=1", *overrides, world_size=world_size)
    assert rows["processes"].startswith(says) and mib(rows["device memory"]) > 0


def test_data_are_shown_by_split_with_what_is_missing() -> None:
    found = {
        "train": {"shards": 23, "missing": 0, "bytes": 7 * 2**30, "documents": None, "commit": "c0ffee"},
        "validation": {"shards": 2, "missing": 1, "bytes": 2048, "documents": 50},
        "test": {"error": "data.test: no file matches x"},
    }
    rows = plan("model=sw", data=found)
    assert rows["data train"] == "23 shards, 7 GiB, commit: c0ffee"
    assert rows["data validation"] == "2 shards, 1 missing, 2 KiB, 50 documents"
    assert rows["data test"] == "error: data.test: no file matches x"
    assert plan("model=sw")["data"] == "none: data.train is empty"


def test_a_large_model_is_described_without_allocating_it() -> None:
    before = psutil.Process().memory_info().rss
    rows = plan("model=sw_ovq", "model/size=480m")
    parameters = int(rows["parameters"].split()[0].replace(",", ""))
    assert parameters > 400e6
    assert psutil.Process().memory_info().rss - before < parameters  # a quarter of its float32 weights


def test_dry_run_prints_the_plan_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["experiment=cpu_demo", "dry_run=true", f"run_dir={tmp_path / 'run'}"]) == 0
    shown = capsys.readouterr().out
    for name in ("layers", "parameters", "training FLOPs", "tokens", "steps", "device memory", "data train"):
        assert re.search(rf"^{name} +\S", shown, re.MULTILINE), name
    assert re.search(r"^ +65,536 +[\d,]+ +[\d.]+ MiB$", shown, re.MULTILINE)
    assert not (tmp_path / "run").exists()
