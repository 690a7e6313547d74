"""Claims about counted memory: memory predicted without running a model matches what running it takes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor

import train
from launch import plan as planning
from launch.plan import CARDS, Options, communication, largest, mean_flops_per_token, report
from ovq import memory
from ovq.compose import compose
from ovq.config import Config
from ovq.memory import MemoryPlan, Meter, memory_of, optimizer_bytes
from ovq.model import Transformer, build_model, count_parameters, flops_per_token
from ovq.ops.ovq_attention.spec import OVQSpec
from ovq.train.loop import Trainer
from ovq.train.optim import build_optimizer
from ovq.train.parallelize import recomputed
from ovq.train.rehearse import moments_of, passes
from tests.helpers import small_config, small_model

TOLERANCE = 0.13  # of the measured peak; stated in docs/operations.md
VOCABULARY, ROWS, TOKENS = 500, 2, 512
SMALL = [
    "model/size=tiny",
    f"trainer.context={TOKENS}",
    f"trainer.micro_batch={ROWS}",
    "trainer.precision=fp32",
    "trainer.loss_chunk_tokens=256",
]


def network_of(cfg: Config, device: str = "meta") -> Transformer:
    with torch.device(device):
        return build_model(cfg.model, VOCABULARY)


def measured(cfg: Config) -> int:
    """Peak bytes of tensors in the second of two training steps on this CPU."""
    model = network_of(cfg, "cpu")
    model.init_weights(0)
    model.loss_chunk_tokens = cfg.trainer.loss_chunk_tokens
    how = cfg.trainer.activation_checkpointing
    for block in model.blocks():
        part = {"none": None, "selective": block.mlp, "full": block}[how]
        if part is not None:
            part.forward = recomputed(part.forward)  # type: ignore[method-assign]
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    with Meter() as meter:
        for _ in range(2):
            meter.peak = meter.live
            out = model(tokens, targets_BT=tokens)
            loss = out.loss + out.aux_loss if out.aux_loss is not None else out.loss
            loss.backward()
            del out, loss
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)  # as when gradients of several micro-batches are summed
    return meter.peak + sum(4 * p.numel() for p in model.parameters())


@pytest.mark.parametrize("how", ["none", "selective", "full"])
@pytest.mark.parametrize("model", ["sw", "std_att", "linear", "sw_vq"])
def test_predicted_memory_is_what_a_step_takes(model: str, how: str) -> None:
    cfg = compose([f"model={model}", *SMALL, f"trainer.activation_checkpointing={how}"])
    predicted = memory_of(cfg, network_of(cfg), world_size=1).total
    assert predicted == pytest.approx(measured(cfg), rel=TOLERANCE)


def test_the_meter_counts_what_is_alive_once() -> None:
    with Meter() as meter:
        a = torch.zeros(1000)
        b = a.view(10, 100)[1:]  # another view of the same bytes
        assert b.shape == (9, 100)
        c = a + 1
        assert meter.live == 8000
        del a, b
        assert (meter.live, meter.peak) == (4000, 8000)
        del c
    assert meter.live == 0


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("step", ["count", 0.1])
def test_ovq_keeps_what_the_kernels_keep(step: str | float) -> None:
    """The stand-in for the kernels saves tensors of the shapes and dtypes that the custom operator declares."""
    pytest.importorskip("ovq.ops.ovq_attention.kernels")
    B, T, H, G, K, V, N = 2, 96, 4, 2, 16, 24, 32
    spec = OVQSpec(N, 16, step_size=step)
    with torch.device("meta"):
        q, k, v = (torch.empty(B, T, n, d, dtype=torch.bfloat16) for n, d in ((H, K), (G, K), (G, V)))
        sums = torch.empty(B, G, N, K), torch.empty(B, G, N, V), torch.empty(B, G, N)
        beta = torch.empty(H)
        arguments = (q, k, v, beta, *sums, None, None, 0, 0, spec.text)
        o, *_, placed, lse, row_key, row_value, row_log, row_count = torch.ops.ovq.ovq_attention(*arguments)
    kept = [q, k, v, beta, o, placed, lse, row_key, row_value, row_log, row_count]
    saved: list[Tensor] = []
    leaves = [x.requires_grad_() for x in (q, k, v, beta)]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x), lambda x: x):
        memory._OVQ.apply(*leaves, spec)
    assert [(x.shape, x.dtype) for x in saved] == [(x.shape, x.dtype) for x in kept]


def test_memory_is_divided_by_what_shares_it() -> None:
    cfg = compose(["model=sw", *SMALL])
    network = network_of(cfg)
    one, eight = (memory_of(cfg, network, size) for size in (1, 8))
    assert (one.weights, one.optimizer) == (8 * eight.weights, 8 * eight.optimizer)
    assert one.activations == eight.activations and one.gathered == 0 < eight.gathered
    cfg.trainer.global_batch = 2 * 8 * ROWS  # two micro-batches each: their gradients are summed before the reduction
    accumulating = memory_of(cfg, network, 8)
    assert (accumulating.gradients, eight.gradients) == (one.gradients, one.gradients / 8)
    assert accumulating.weights == eight.weights
    twice = memory_of(cfg, network, 1, rows=2 * ROWS)
    assert twice.activations == pytest.approx(2 * one.activations) and twice.weights == one.weights


def test_the_largest_that_fits_is_found() -> None:
    def plan(n: int) -> MemoryPlan:
        return MemoryPlan(5.0, 0, 0, 0, 3.0 * n, 0)

    assert [largest(plan, room, 100) for room in (7.9, 8, 13.9, 14, 10_000)] == [0, 1, 2, 3, 100]


def test_the_plan_of_a_cluster_follows_from_the_settings() -> None:
    cfg = compose(["model=sw", *SMALL, "trainer.precision=bf16", "trainer.global_batch=64", "trainer.steps=1000"])
    network = network_of(cfg)
    text = "\n".join(report(cfg, network, Options(gpus=16, gpu="h100", mfu=0.5)))
    tokens = 64 * TOKENS
    seconds = flops_per_token(network, TOKENS) * tokens / (16 * 0.5 * 989e12)
    assert f"{tokens:,} tokens (64 x {TOKENS})" in text
    assert f"{tokens / seconds:,.0f} tokens/s" in text
    assert f"{16 * 1000 * seconds / 3600:,.0f} GPU-hours" in text
    cfg.trainer.lengths = {0: cfg.trainer.context // 2}
    half = flops_per_token(network, cfg.trainer.context // 2)
    assert mean_flops_per_token(network, cfg.trainer) == half < flops_per_token(network, cfg.trainer.context)
    assert f"{half * tokens:.3g} FLOPs" in "\n".join(report(cfg, network, Options(gpus=16, gpu="h100", mfu=0.5)))
    # Two micro-batches per GPU gather bf16 weights twice each; gradients are reduced once, over two nodes' network.
    moved = 15 / 16 * count_parameters(network)[0] * (2 * 2 * 2 + 4) / 50e9
    assert communication(cfg, network, 16, 8, CARDS["h100"], 2) == pytest.approx(moved)
    cfg.trainer.context_parallel, cfg.trainer.activation_checkpointing = 2, "none"
    layers, dim = cfg.model.num_layers, cfg.model.dim  # queries, keys, values and outputs in bf16, forward and backward
    exchanged = 2 * 2 * 4 * layers * (ROWS * TOKENS / 2) * dim * 2 * (1 / 2) / 450e9
    assert communication(cfg, network, 16, 8, CARDS["h100"], 2) == pytest.approx(moved + exchanged)
    assert f"{moved:.3g} s" in next(line for line in text.splitlines() if line.split()[:2] == ["16", "2"])
    for ranks, handed in ((2, False), (3, True)):  # of two heads
        cfg.trainer.context_parallel = ranks
        said = "does not divide the heads (SlidingWindow)" in "\n".join(report(cfg, network, Options(gpus=48)))
        assert said == handed


def test_a_plan_finds_the_size_of_the_vocabulary_or_says_how_to_give_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert planning.main(["experiment=cpu_demo"]) == 0
    with torch.device("meta"):
        parameters = count_parameters(build_model(compose(["experiment=cpu_demo"]).model, 257))[0]
    assert f"{parameters:,} parameters" in capsys.readouterr().out
    assert planning.main(["experiment=pg19_cpu", "tokenizer.model_path=gone.model"]) == 2
    said = capsys.readouterr().err
    assert "gone.model does not exist" in said and said.endswith("give the number of pieces: vocab_size=16384\n")


def test_the_rehearsal_sums_gradients_where_a_step_does() -> None:
    trainer = compose(["trainer.global_batch=16", "trainer.micro_batch=4"]).trainer
    assert (passes(trainer, 4), passes(trainer, 2)) == ([True], [False, True])


def test_a_step_that_does_not_fit_in_memory_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(Trainer, "train_step", full)
    assert train.main(["experiment=cpu_demo", "trainer.steps=2", "eval.at_end=false", f"run_dir={tmp_path}/run"]) == 1
    said = capsys.readouterr().err
    assert "does not fit this GPU; lower trainer.micro_batch" in said and "Traceback" not in said


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_the_rehearsal_takes_the_memory_that_the_plan_gives_the_optimizer(optim: str) -> None:
    cfg, model = small_config("sw_gdn", f"optim={optim}"), small_model("sw_gdn")
    taken = sum(4 * p.numel() * count for p, count in moments_of(build_optimizer(model, cfg)))
    assert taken == optimizer_bytes(cfg, model)
