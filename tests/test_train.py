"""Claims about the training loop, its optimizer, its metrics and how it stops, in one process."""

from __future__ import annotations

import io
import json
import os
import random
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import train
from data.order import token_hash
from ovq import machine, processes
from ovq.errors import ConfigError
from ovq.model import Transformer
from ovq.processes import World, wrong_replicas
from ovq.signals import SIGNALS
from ovq.train import checkpoint, progress
from ovq.train import stop as stop_module
from ovq.train.loop import Trainer, TrainingError
from ovq.train.metrics import Metrics, read_rows
from ovq.train.optim import build_optimizer, clip_gradients, persistent_buffers, step_unless
from ovq.train.parallelize import mesh_shape, parallelize
from ovq.train.progress import Progress
from ovq.train.schedule import lr_at
from ovq.train.stop import StopSignal
from ovq.train.summary import summary_text
from tests.helpers import TINY, chosen, relative_error, small_config, small_model
from tests.training import losses, rows, trainer_for

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def parameters(model: nn.Module) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in [*model.parameters(), *persistent_buffers(model)]]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def evaluation_rows(run_dir: Path) -> list[dict[str, Any]]:
    return [row for row in read_rows(run_dir / "metrics.jsonl") if "loss" not in row]


# --- optimizer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "at"),
    [
        ("cosine", {1: 0.1, 5: 0.5, 10: 1.0, 55: 0.55, 100: 0.1}),
        ("linear", {1: 0.1, 10: 1.0, 55: 0.55, 100: 0.1}),
        ("wsd", {5: 0.5, 10: 1.0, 55: 1.0, 80: 1.0, 90: 0.55, 100: 0.1}),
        ("wsd optim.decay_share=0", {10: 1.0, 99: 1.0, 100: 1.0}),  # to be extended later
        ("constant", {5: 0.5, 10: 1.0, 100: 1.0}),
    ],
)
def test_the_learning_rate_follows_its_schedule(schedule: str, at: dict[int, float]) -> None:
    settings = ["trainer.steps=100", "optim.warmup_steps=10", "optim.lr=2", "optim.min_lr_ratio=0.1"]
    cfg = small_config("sw", *settings, "optim.decay_share=0.2", *f"optim.schedule={schedule}".split())
    assert {step: lr_at(step, cfg) / 2 for step in at} == pytest.approx(at)


def test_without_warm_up_the_first_step_has_the_full_rate() -> None:
    cfg = small_config("sw", "optim.warmup_steps=0", "optim.lr=2", "optim.schedule=constant")
    assert lr_at(1, cfg) == 2


def test_matrices_decay_and_vectors_and_the_embedding_do_not() -> None:
    model = small_model("sw_ovq")
    decayed, rest = build_optimizer(model, small_config("sw_ovq")).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed["weight_decay"] > 0 == rest["weight_decay"]
    assert "embed.weight" in {names[id(p)] for p in rest["params"]}
    assert all(p.ndim == 2 for p in decayed["params"])
    assert len(decayed["params"]) + len(rest["params"]) == len(names)


def test_clipping_scales_to_the_norm_and_reports_the_norm_before() -> None:
    model = small_model("sw", vocab_size=31)
    for scale, max_norm, after in ((3.0, 1.0, 1.0), (0.1, 1.0, None), (3.0, 0.0, None)):
        for seed, p in enumerate(model.parameters()):
            p.grad = scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
        want = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        norm = clip_gradients(model, max_norm if scale > 1 else 1e6)
        assert float(norm) == pytest.approx(float(want), rel=1e-5)
        got = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        assert float(got) == pytest.approx(after or float(want), rel=1e-4)


@pytest.mark.parametrize("fused", ["true", "false"])
def test_a_bad_step_leaves_no_trace_in_parameters_or_moments(fused: str) -> None:
    cfg = small_config("sw", f"optim.fused={fused}")

    def train(with_bad_step: bool) -> list[torch.Tensor]:
        model = small_model("sw", vocab_size=31)
        optimizer = build_optimizer(model, cfg)
        for seed in range(4):
            bad = seed == 2
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)) * (np.nan if bad else 1)
            if not bad or with_bad_step:
                step_unless(optimizer, torch.tensor(bad), lr=1e-2)
        return [*parameters(model), *(v for p in model.parameters() for v in optimizer.state[p].values())]

    assert same(train(with_bad_step=True), train(with_bad_step=False))


# --- a step ----------------------------------------------------------------------------------------------------------


def test_the_loss_is_divided_by_the_number_of_labels_in_the_whole_step(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, "trainer.micro_batch=1", "trainer.steps=1")
    inputs, targets = rows(trainer.cfg, 0)
    logits = trainer.model(inputs).logits.detach()
    want = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    trainer.fit()
    row = read_rows(tmp_path / "metrics.jsonl")[0]
    assert row["loss"] == pytest.approx(float(want), rel=1e-6)
    assert row["tokens"] == int((targets != -100).sum()) < targets.numel()
    assert row["bits_per_byte"] == pytest.approx(float(want) * row["tokens"] / np.log(2) / 40)


def test_accumulation_equals_one_batch(tmp_path: Path) -> None:
    runs = {}
    for micro in (4, 2, 1):
        trainer = trainer_for(tmp_path / str(micro), f"trainer.micro_batch={micro}")
        trainer.fit()
        runs[micro] = (losses(tmp_path / str(micro)), parameters(trainer.model))
    for micro in (2, 1):
        assert runs[micro][0] == pytest.approx(runs[4][0], rel=1e-5)
        assert all(relative_error(a, b) < 1e-3 for a, b in zip(runs[micro][1], runs[4][1]))
    assert runs[4][0][-1] < runs[4][0][0] - 0.2


@pytest.mark.parametrize("model", ["sw_ovq", "sw_vq"])
def test_activation_checkpointing_changes_no_bit(tmp_path: Path, model: str) -> None:
    runs = {}
    for how in ("none", "selective", "full"):
        trainer = trainer_for(tmp_path / how, f"trainer.activation_checkpointing={how}", model=model)
        trainer.fit()
        runs[how] = (losses(tmp_path / how), parameters(trainer.model))
    for how in ("selective", "full"):
        assert runs[how][0] == runs["none"][0]
        assert same(runs[how][1], runs["none"][1])


def test_z_loss_is_trained_on_and_logged_but_not_part_of_the_loss(tmp_path: Path) -> None:
    plain, pulled = trainer_for(tmp_path / "plain"), trainer_for(tmp_path / "pulled", "trainer.z_loss=1")
    inputs, targets = rows(plain.cfg, 0)
    valid = targets != -100
    want = plain.model(inputs).logits.detach().logsumexp(-1)[valid].square().mean()
    plain.fit()
    pulled.fit()
    without, with_z = (read_rows(tmp_path / name / "metrics.jsonl")[0] for name in ("plain", "pulled"))
    assert with_z["z_loss"] == pytest.approx(float(want), rel=1e-5) and "z_loss" not in without
    assert with_z["loss"] == without["loss"] and with_z["grad_norm"] > 1.01 * without["grad_norm"]


def test_the_health_of_each_layer_is_logged_only_at_its_interval(tmp_path: Path) -> None:
    trainer_for(tmp_path, "trainer.health_every=3", "trainer.micro_batch=2").fit()
    found = {row["step"]: {k for k in row if k.startswith("health/")} for row in read_rows(tmp_path / "metrics.jsonl")}
    names = ("fill", "used_once", "mean_count", "beta")
    assert found[3] == found[6] == {f"health/layer_01/{name}" for name in names}
    assert not any(found[step] for step in (1, 2, 4, 5))


def test_waiting_less_often_for_the_device_gives_the_same_metrics(tmp_path: Path) -> None:
    for every in (1, 4):
        trainer_for(tmp_path / str(every), f"trainer.log_every={every}").fit()
    a, b = (
        [
            {key: row[key] for key in ("step", "loss", "grad_norm", "lr", "tokens", "token_hash")}
            for row in read_rows(tmp_path / str(every) / "metrics.jsonl")
        ]
        for every in (1, 4)
    )
    assert a == b and len(a) == 6


# --- non-finite values -----------------------------------------------------------------------------------------------


def poisoned(trainer: Trainer, *steps: int) -> Trainer:
    """Make gradients NaN in these steps; the loss stays finite."""
    trainer.model.norm.weight.register_hook(lambda g: g * (np.nan if trainer.step + 1 in steps else 1.0))
    return trainer


def test_a_non_finite_gradient_stops_the_run_before_the_update(tmp_path: Path) -> None:
    trainer = poisoned(trainer_for(tmp_path, "trainer.checkpoint_every=2"), 5)
    after: dict[int, list[torch.Tensor]] = {}
    flush = trainer.flush
    trainer.flush = lambda: (after.update({trainer.step: parameters(trainer.model)}), flush())  # type: ignore
    with pytest.raises(TrainingError) as caught:
        trainer.fit()
    message = str(caught.value)
    assert message.startswith("step 5: ") and "gradient norm nan" in message and "\n" not in message
    assert "lesson 5.0, lesson 5.1, lesson 5.2, lesson 5.3" in message
    assert f"the last good checkpoint is {tmp_path / 'checkpoints' / 'step_00000004'}" in message
    assert same(after[5], after[4]) and not same(after[4], after[3])
    assert chosen(tmp_path) == tmp_path / "checkpoints" / "step_00000004"
    assert (
        read_rows(tmp_path / "metrics.jsonl")[-1] | {"skipped": True, "grad_norm": None}
        == read_rows(tmp_path / "metrics.jsonl")[-1]
    )


def test_a_bad_step_found_late_is_never_saved(tmp_path: Path) -> None:
    trainer = poisoned(trainer_for(tmp_path, "trainer.checkpoint_every=3", "trainer.log_every=100"), 2)
    with pytest.raises(TrainingError, match="^step 2: .* there is no checkpoint yet"):
        trainer.fit()
    assert chosen(tmp_path) is None


def test_a_skipped_step_changes_no_parameter_or_codebook_and_training_continues(tmp_path: Path) -> None:
    trainer = poisoned(trainer_for(tmp_path, "trainer.nonfinite=skip", model="sw_vq"), 3)
    before, batches = {}, iter(trainer.loader)
    for step in range(1, 6):
        trainer.train_step(batches)
        before[step] = parameters(trainer.model)
    trainer.flush()
    assert same(before[3], before[2]) and not same(before[4], before[3]) and not same(before[2], before[1])
    assert [row.get("skipped", False) for row in read_rows(tmp_path / "metrics.jsonl")] == [0, 0, 1, 0, 0]


def test_too_many_skipped_steps_in_a_row_stop_the_run(tmp_path: Path) -> None:
    settings = ("trainer.nonfinite=skip", "trainer.max_skipped_steps=1")
    poisoned(trainer_for(tmp_path / "apart", *settings), 2, 4).fit()
    with pytest.raises(TrainingError, match=r"^step 4: .*\(2 steps in a row\)"):
        poisoned(trainer_for(tmp_path / "in a row", *settings), 3, 4).fit()


# --- stopping and resuming -------------------------------------------------------------------------------------------


def noisy(model: nn.Module) -> None:
    """Add dropout, so that a wrongly restored random generator changes the losses."""
    model.layers[0].mlp.register_forward_hook(lambda m, _, out: F.dropout(out, 0.2, m.training))  # type: ignore


def drawing(model: nn.Module, step: int, should_stop: Any) -> dict[str, float]:
    """An evaluation that draws from every random generator."""
    return {"drawn": random.random() + np.random.rand() + float(torch.rand(()))}


def send_at(trainer: Trainer, step: int, number: signal.Signals) -> None:
    train_step = trainer.train_step

    def step_then_signal(batches: Any) -> None:
        train_step(batches)
        if trainer.step == step:
            os.kill(os.getpid(), number)

    trainer.train_step = step_then_signal  # type: ignore[method-assign]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_stopped_run_resumes_bit_exact(tmp_path: Path, number: signal.Signals) -> None:
    how: dict[str, Any] = {"prepare": noisy, "evaluate": drawing, "model": "sw_vq"}
    whole = trainer_for(tmp_path / "whole", "trainer.eval_every=2", **how)
    assert whole.fit()["stopped_by"] is None
    run_dir, handlers = tmp_path / "stopped", [signal.getsignal(n) for n in SIGNALS]
    for at in (3, 4):
        trainer = trainer_for(run_dir, "trainer.eval_every=2", **how)
        send_at(trainer, at, number)
        summary = trainer.fit()
        assert (summary["stopped_by"], summary["step"]) == (number.name, at)
        assert summary["checkpoint"] == str(run_dir / "checkpoints" / checkpoint.name_of(at))
        assert [signal.getsignal(n) for n in SIGNALS] == handlers
    last = trainer_for(run_dir, "trainer.eval_every=2", **how)
    assert last.fit()["stopped_by"] is None
    assert losses(run_dir) == losses(tmp_path / "whole")
    assert same(parameters(last.model), parameters(whole.model))
    assert [row["step"] for row in evaluation_rows(run_dir)] == [2, 4, 6]


def test_an_interrupted_evaluation_is_repeated_on_resume(tmp_path: Path) -> None:
    finished: list[int] = []

    def evaluate(model: nn.Module, step: int, should_stop: Any) -> dict[str, float] | None:
        assert not model.training and not torch.is_grad_enabled()
        if not finished:
            os.kill(os.getpid(), signal.SIGTERM)
        if should_stop():
            finished.append(-step)
            return None
        finished.append(step)
        return {"loss": 1.5}

    first = trainer_for(tmp_path, "trainer.eval_every=4", evaluate=evaluate)
    assert (first.fit()["step"], finished, evaluation_rows(tmp_path)) == (4, [-4], [])
    assert chosen(tmp_path) == tmp_path / "checkpoints" / "step_00000004"
    second = trainer_for(tmp_path, "trainer.eval_every=4", evaluate=evaluate)
    assert second.fit()["step"] == 6 and finished == [-4, 4, 6]
    assert evaluation_rows(tmp_path) == [{"step": 4, "eval/loss": 1.5}, {"step": 6, "eval/loss": 1.5}]
    third = trainer_for(tmp_path, "trainer.eval_every=4", evaluate=evaluate)
    assert third.fit()["step"] == 6 and finished == [-4, 4, 6]  # nothing left to do


def test_a_second_signal_ends_the_process_unless_it_is_the_first_one_forwarded(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, exits = [100.0], []
    monkeypatch.setattr(stop_module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(stop_module.os, "_exit", exits.append)
    with StopSignal() as stop:
        assert stop.name is None
        os.kill(os.getpid(), signal.SIGINT)
        clock[0] += 1
        os.kill(os.getpid(), signal.SIGTERM)  # a launcher forwards the signal that the terminal also sent
        assert (stop.name, exits) == ("SIGINT", [])
        clock[0] += 2
        os.kill(os.getpid(), signal.SIGTERM)
        assert exits == [128 + signal.SIGTERM]


def test_a_hangup_that_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.name is None
            os.kill(os.getpid(), signal.SIGUSR1)
            assert stop.name == "SIGUSR1"
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_forked_worker_does_not_act_on_the_trainers_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    with StopSignal(announce=True) as stop:
        parent = os.getpid()
        monkeypatch.setattr(stop_module.os, "getpid", lambda: parent + 1)
        os.kill(parent, signal.SIGUSR2)
        assert stop.name is None


def test_handlers_stay_until_the_outermost_block_ends() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopSignal() as stop:
        with stop:
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # passed on by a launcher after the last step
        assert stop.name == "SIGTERM"
    assert [signal.getsignal(number) for number in SIGNALS] == before


# --- the record ------------------------------------------------------------------------------------------------------


def test_resumed_metrics_drop_steps_that_will_be_repeated_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows_before = [{"step": n, "loss": 1.0 / n} for n in (1, 2, 3, 4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_before) + '{"step": 5, "lo')
    assert read_rows(path) == rows_before
    log = Metrics(tmp_path, small_config("sw"), start_step=2)
    log.log({"step": 3, "loss": 7.0})
    log.close()
    assert read_rows(path) == [*rows_before[:2], {"step": 3, "loss": 7.0}]


def test_lines_that_a_full_disk_rejects_are_written_once_there_is_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = Metrics(tmp_path, small_config("sw"))
    want = [{"step": n, "text": "x" * 1000} for n in range(1, 9)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for row in want:
        full = 3 <= row["step"] < 7
        resource.setrlimit(resource.RLIMIT_FSIZE, (2500 if full else soft, hard))  # in the middle of a line
        try:
            log.log(row)
            log.sync()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert len(read_rows(log.path)) == (2 if full else row["step"])
    log.close()
    assert read_rows(log.path) == want
    assert capsys.readouterr().err.count("cannot be written") == 1


def test_a_broken_wandb_does_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if not installed
    trainer_for(tmp_path, "logger=wandb", "trainer.steps=2").fit()
    assert len(losses(tmp_path)) == 2
    assert "logger=wandb could not start, continuing without it" in capsys.readouterr().err


def test_tensorboard_has_every_step_once_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for log in (Metrics(tmp_path, small_config("sw", "logger=tensorboard"), start_step=start) for start in (0, 2)):
        for step in range(1, 4) if not read_rows(log.path) else (3, 4):
            log.log({"step": step, "loss": step / 2, "token_hash": "ff", "eval/loss": None})
        log.close()
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in shown.Scalars("loss")] == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]
    assert shown.Tags()["scalars"] == ["step", "loss"]


def test_a_broken_tensorboard_does_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if not installed
    trainer_for(tmp_path, "logger=tensorboard", "trainer.steps=2").fit()
    assert len(losses(tmp_path)) == 2
    assert "logger=tensorboard could not start, continuing without it: it is not installed" in capsys.readouterr().err


def test_the_hash_of_a_step_does_not_depend_on_how_its_rows_are_divided() -> None:
    generator = np.random.default_rng(0)
    inputs, targets = generator.integers(0, 50_000, (6, 33)), generator.integers(-100, 50_000, (6, 33))
    whole = token_hash(list(range(6)), inputs, targets)
    pieces = [token_hash(lanes, inputs[lanes], targets[lanes]) for lanes in ([4, 2], [0], [5, 1, 3])]
    assert sum(pieces) % 2**64 == whole
    for change in ("token", "label", "lanes", "position"):
        x, y, lanes = inputs.copy(), targets.copy(), list(range(6))
        if change == "token":
            x[3, 7] += 1
        elif change == "label":
            y[3, 7] = -100
        elif change == "lanes":
            lanes[0], lanes[1] = 1, 0
        else:
            x[0, [1, 2]] = x[0, [2, 1]]
        assert token_hash(lanes, x, y) != whole, change


def test_progress_shows_loss_speed_peak_memory_and_time_left(tmp_path: Path) -> None:
    plain, terminal = io.StringIO(), io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    for stream in (plain, terminal):
        trainer = trainer_for(tmp_path / str(stream is plain))
        trainer.peak = (1e12, "measured matrix product")
        trainer.flops_per_token = lambda length: 1e6
        trainer.progress = Progress(6, 0, True, stream)
        trainer._restart_window()
        batches = iter(trainer.loader)
        for _ in range(6):
            trainer.train_step(batches)
            trainer.flush()
        trainer.progress.close()
    lines = plain.getvalue().splitlines()
    assert lines[0].startswith("step 1/6") and lines[-1].startswith("step 6/6")
    for shown in ("loss 3.", "tok/s ", "of peak ", "mem ", "ETA "):
        assert shown in lines[0], shown
    for shown in ("train:", "6/6", "loss=", "tok/s=", "of peak=", "mem="):
        assert shown in terminal.getvalue(), shown
    assert all(row["mfu"] > 0 for row in read_rows(tmp_path / "True" / "metrics.jsonl"))


def test_the_summary_reports_the_run_and_what_to_run_next(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    text = summary_text(trainer.fit(), trainer.cfg, tmp_path)
    first, last = losses(tmp_path)[0], losses(tmp_path)[-1]
    for shown in ("finished: 6 steps", f"{first:.4f} -> {last:.4f}", "tokens/s", "GiB", "checkpoints/latest", "next:"):
        assert shown in text, shown
    assert len(text.splitlines()) < 25


def test_the_peak_rate_is_the_setting_or_measured() -> None:
    device = torch.device("cpu")
    assert machine.peak_flops(device, "fp32", 2.5) == (2.5e12, "trainer.peak_tflops")
    flops, source = machine.peak_flops(device, "fp32")
    assert 1e8 < flops < 1e14 and "measured" in source
    assert [progress.duration(s) for s in (5, 95, 3700)] == ["0:05", "1:35", "1:01:40"]


def test_the_auxiliary_loss_is_a_mean_over_all_tokens_even_if_few_have_a_label(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, seen = Transformer._auxiliary_loss, []

    def spy(self: Transformer, tokens: int) -> Any:
        total = usual(self, tokens)
        seen.append(None if total is None else float(total) / tokens)
        return total

    monkeypatch.setattr(Transformer, "_auxiliary_loss", spy)
    task = ["data=task", "data/task=recall", "data.task.key_vocab=32", "data.task.value_vocab=16", "trainer.context=64"]
    line = [*TINY, *task, "model=sw_vq", "model.mixers.vq.commitment=1", "trainer.steps=1", "trainer.device=cpu"]
    line += ["trainer.precision=fp32", "trainer.global_batch=4", "trainer.micro_batch=4", "trainer.log_every=1"]
    assert train.main([*line, "eval.at_end=false", f"run_dir={tmp_path}"]) == 0
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    assert row["tokens"] < 4 * 64 and row["aux_loss"] == pytest.approx(seen[-1])


# --- parallelism, as far as one process can show it ------------------------------------------------------------------


def test_mesh_shapes_follow_the_sharding_and_must_fit_the_processes() -> None:
    assert mesh_shape("full", 1, 8) == ((8,), ("shard",))
    assert mesh_shape("hybrid", 2, 8) == ((2, 4), ("replicate", "shard"))
    assert mesh_shape("none", 1, 8) == ((8, 1), ("replicate", "shard"))
    assert wrong_replicas("hybrid", 3, 8) == "trainer.replicas=3 must divide the number of processes, 8"
    assert wrong_replicas("full", 2, 8) == "trainer.replicas=2 is only used with trainer.shard=hybrid; set both"
    cfg = small_config("sw", "trainer.shard=hybrid", "trainer.replicas=2")
    with pytest.raises(ConfigError, match="trainer.replicas=2 must divide the number of processes, 1"):
        parallelize(small_model("sw"), cfg.trainer, World())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_one_clear_line() -> None:
    with pytest.raises(ConfigError, match=r"trainer.device=cuda needs 1 GPU\(s\) here and finds 0"):
        processes.init(small_config("sw", "trainer.device=cuda").trainer)


def test_compiling_without_a_compiler_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"trainer.compile=true needs a C\+\+ compiler"):
        parallelize(small_model("sw"), small_config("sw", "trainer.compile=true").trainer, World())


def test_compiled_training_gives_the_same_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compile_(f, backend="aot_eager"))
    for name in ("false", "true"):
        settings = [f"trainer.compile={name}", "trainer.health_every=3", "trainer.activation_checkpointing=selective"]
        settings += ["model.num_layers=1", "model.pattern=[ovq]"]
        trainer_for(tmp_path / name, *settings).fit()
    assert losses(tmp_path / "true") == pytest.approx(losses(tmp_path / "false"), rel=1e-5)
    plain, compiled = (read_rows(tmp_path / name / "metrics.jsonl")[2] for name in ("false", "true"))
    assert plain.keys() == compiled.keys()
