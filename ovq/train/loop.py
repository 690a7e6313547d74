"""The training loop. `Trainer.train_step` tells the whole story of a step, `Trainer.fit` that of a run.

- A step's loss is divided once, by the number of valid tokens in the step over all ranks and micro-batches.
- The host waits for the device every `trainer.log_every` steps only, yet every step has its line in metrics.jsonl.
  Whether a step is finite is decided on the device, which then leaves parameters and moments as they are.
- Stopping is agreed: a signal to any process ends all of them after the same step, with a checkpoint, and `fit`
  returns (train.py then exits with status 0; the run is finished only once summary.json is there).
- A checkpoint is taken before the evaluation of its step, so an evaluation that was cut short is made again at resume.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from ovq.config import to_dict
from ovq.train import distributed as parallel
from ovq.train import metrics as report
from ovq.train.optim import clip_gradients, lr_at, step_unless

# What of a batch's counts is summed over ranks and logged: how much text, and everything that was not as it should be.
COUNTED = (
    "bytes",
    "documents",
    "words",
    "short_documents",
    "empty_documents",
    "bad_utf8",
    "unreadable_documents",
    "untitled_documents",
    "padding",
    "truncated",
)
GARBAGE_EVERY = 100  # steps; Python's own timing would stop ranks at different moments
SAME_SIGNAL_S = 2.0  # a launcher passes on what the terminal also sent

Evaluate = Callable[[nn.Module, int, Callable[[], bool]], "dict[str, float] | None"]


class TrainingError(RuntimeError):
    """Training cannot go on; the message is one line that says where it stands and what was not done."""


class StopSignal:
    """SIGTERM and SIGINT raise a flag that the loop polls; a second one ends the process at once.

    A context manager: the handlers before it are put back at the end. `announce`: say so on stderr. A torchrun that
    gets the signal passes it on, waits 30 s for its processes, and itself ends with status 1 though theirs is 0.
    """

    def __init__(self, announce: bool = False) -> None:
        self.name: str | None = None
        self.announce = announce
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.name is not None:
            if time.monotonic() - self._since > SAME_SIGNAL_S:
                os._exit(128 + number)
            return
        self.name, self._since = signal.Signals(number).name, time.monotonic()
        if self.announce:  # print() may be what was interrupted, and must not be entered twice
            os.write(2, f"\n{self.name}: saving after this step (a second signal quits at once)\n".encode())


@dataclass
class StepRecord:
    """A step whose numbers may still be on the device: `numbers` is [loss, z-loss, aux loss, gradient norm, bad]."""

    step: int
    numbers: Tensor
    lr: float
    valid: int  # labels, over all ranks
    token_hash: str
    counts: dict[str, int]
    documents: list[str]  # of this rank
    health: dict[str, float]


class Trainer:
    """Trains `model` to `cfg.trainer.steps` steps and leaves a checkpoint, metrics and an evaluation in the run folder.

    Args:
        cfg: the run's config.
        model: after `parallelize`.
        optimizer: over the model's parameters.
        loader: `data.Loader`, already where the run goes on.
        checkpointer: `ovq.train.checkpoint.Checkpointer`.
        metrics: the run's log.
        world: this process and its device.
        run_dir: the run folder.
        merge_states: `data.merge_states`, which makes one data state of all ranks'.
        evaluate: called as evaluate(model, step, should_stop); returns its numbers, or None if should_stop() said so.
            With several processes should_stop is a collective: every rank has to ask it equally often.
        flops_per_token: training FLOPs a token, for MFU.
    """

    def __init__(
        self,
        cfg: Any,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loader: Any,
        checkpointer: Any,
        metrics: report.Metrics,
        world: parallel.World,
        *,
        run_dir: Path | str,
        merge_states: Callable[[list[dict[str, Any]]], dict[str, Any]],
        evaluate: Evaluate | None = None,
        flops_per_token: float = 0.0,
    ) -> None:
        self.cfg, self.model, self.optimizer, self.loader = cfg, model, optimizer, loader
        self.checkpointer, self.metrics, self.world = checkpointer, metrics, world
        self.run_dir, self.merge_states, self.evaluate = Path(run_dir), merge_states, evaluate
        self.flops_per_token = flops_per_token
        self.step = self.start = 0  # steps done; steps done when this process began
        self.tokens = 0  # labels trained on so far, over all ranks
        self.skipped_in_row = 0
        self.saved_step: int | None = None
        self.evaluated_step: int | None = None
        self.stopping = False
        self.pending: list[StepRecord] = []
        self.tokens_per_s: list[float] = []
        self.peak = (0.0, "")
        self.progress: report.Progress | None = None
        self.signal = StopSignal(announce=world.is_main)
        self._buffers = parallel.persistent_buffers(model)
        self._rng: dict[str, Any] | None = None  # of the checkpoint, until the first step
        self._window, self._data_wait = 0.0, 0.0

    def resume(self, extra: dict[str, Any]) -> None:
        """Take up the counters of the checkpoint that `extra` came with."""
        self.step = self.start = self.saved_step = int(extra["step"])
        self.tokens, self.skipped_in_row = int(extra["tokens"]), int(extra["skipped_in_row"])
        self.checkpointer.last = Path(extra["checkpoint"])
        ranks = extra["rng"]
        self._rng = ranks[self.world.rank if len(ranks) == self.world.size else 0]
        rows = report.read_rows(self.metrics.path) if self.world.is_main else []
        done = any(row["step"] == self.step and any(key.startswith("eval/") for key in row) for row in rows)
        self.evaluated_step = self.step if parallel.broadcast_object(done) else None

    # --- a run -------------------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        """Train to the last step, or until a signal. Returns the summary that `summary_text` prints.

        Raises:
            TrainingError: a loss or gradient that is not finite (see trainer.nonfinite).
        """
        trainer = self.cfg.trainer
        self.progress = report.Progress(trainer.steps, self.start, trainer.progress and self.world.is_main)
        if self.world.is_main and self.flops_per_token:
            self.peak = report.peak_flops(self.world.device, self.world.precision, trainer.peak_tflops)
        self.model.train()
        gc.disable()
        try:
            with self.signal, contextlib.closing(iter(self.loader)) as batches:
                self._run(batches)
        finally:
            gc.enable()
            gc.collect()  # the loader's workers end with their iterator; at exit, Python would wait for them for ever
            self.progress.close()
        return self.summary()

    def _run(self, batches: Iterator[Any]) -> None:
        trainer = self.cfg.trainer
        self._evaluate_if_due()
        if self.step < trainer.steps and (trainer.compile or self.world.device.type == "cuda"):
            self.say("compiling kernels: the first step takes a while")
        self._restart_window()
        while self.step < trainer.steps and not self.should_stop():
            self.train_step(batches)
            if self.step == self.start + 1:
                parallel.lower_timeout(trainer.timeout_s)
            if self.step % trainer.log_every == 0:
                self.flush()
            if self.step % trainer.checkpoint_every == 0:
                self.save()
            self._evaluate_if_due()
            if self.step % GARBAGE_EVERY == 0:
                gc.collect(1)
        self.flush()
        self.save()
        self.checkpointer.wait()

    def should_stop(self) -> bool:
        """Whether any process was told to stop. A collective: every rank gets the same answer."""
        self.stopping = self.stopping or parallel.any_flag(self.signal.name is not None)
        return self.stopping

    # --- a step ------------------------------------------------------------------------------------------------------

    def train_step(self, batches: Iterator[Any]) -> None:
        """One optimizer step on `trainer.global_batch` rows; its numbers stay on the device until `flush`."""
        trainer, device = self.cfg.trainer, self.world.device
        step = self.step + 1
        watched = trainer.health_every > 0 and step % trainer.health_every == 0
        self.optimizer.zero_grad()

        began = time.perf_counter()
        micro_batches = [next(batches) for _ in range(self.loader.micro_batches_per_step)]
        self._data_wait += time.perf_counter() - began
        if self._rng is not None:  # only now: starting the loader has drawn numbers too
            parallel.set_rng_state(self._rng)
            self._rng = None
        valid, token_hash, counts = self._agree_on_data(micro_batches)
        buffers = [buffer.clone() for buffer in self._buffers]

        losses = torch.zeros(3, device=device)
        for index, batch in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            parallel.sync_gradients(self.model, last)
            report.set_health(self.model, watched and last)
            losses += self._forward_backward(batch.to(device), valid)
        health = report.read_health(self.model) if watched else {}
        report.set_health(self.model, False)

        losses = parallel.sum_tensor(losses) / valid
        norm = clip_gradients(self.model, trainer.grad_clip)
        bad = ~(torch.isfinite(losses).all() & torch.isfinite(norm))
        lr = lr_at(step, self.cfg)
        step_unless(self.optimizer, bad, lr)
        for buffer, before in zip(self._buffers, buffers):  # what a codebook learned from such a batch goes too
            buffer.copy_(torch.where(bad, before, buffer))

        numbers = torch.cat([losses, norm.float().view(1), bad.float().view(1)])
        documents = [title for batch in micro_batches for title in batch.documents]
        self.pending.append(StepRecord(step, numbers, lr, valid, token_hash, counts, documents, health))
        self.step = step

    def _forward_backward(self, batch: Any, valid: int) -> Tensor:
        """Add the gradient of a micro-batch's share of the step's loss; returns its [loss, z, aux] sums [3]."""
        out = self.model(
            batch.inputs,
            targets_BT=batch.targets,
            cu_seqlens=batch.cu_seqlens,
            loss_chunk_tokens=self.cfg.trainer.loss_chunk_tokens,
            z_loss=self.cfg.trainer.z_loss,
        )
        parts = [part for part in (out.loss, out.z_loss, out.aux_loss) if part is not None and part.requires_grad]
        (torch.stack([part.float() for part in parts]).sum() / valid).backward()
        zero = torch.zeros((), device=out.loss.device)
        return torch.stack([zero if p is None else p.detach().float() for p in (out.loss, out.z_loss, out.aux_loss)])

    def _agree_on_data(self, micro_batches: list[Any]) -> tuple[int, str, dict[str, int]]:
        """Labels, hash of the tokens and counts of the step over all ranks. On the CPU: the device is not asked."""
        valid = sum(int((batch.targets != -100).sum()) for batch in micro_batches)
        digest = sum(
            report.token_hash(list(batch.lanes), batch.inputs.numpy(), batch.targets.numpy()) for batch in micro_batches
        ) % (1 << 64)
        counts = [sum(batch.counts.get(name, 0) for batch in micro_batches) for name in COUNTED]
        total = parallel.sum_integers([valid, digest >> 32, digest & 0xFFFFFFFF, *counts])
        combined = ((total[1] << 32) + total[2]) % (1 << 64)
        return max(1, total[0]), f"{combined:016x}", dict(zip(COUNTED, total[3:]))

    # --- what happens beside the steps -------------------------------------------------------------------------------

    def flush(self) -> None:
        """Fetch the numbers of the steps since the last flush, log them, and stop or go on at a non-finite one."""
        if not self.pending:
            return
        records, self.pending = self.pending, []
        fetched = torch.stack([record.numbers for record in records]).tolist()  # the host waits for the device here
        tokens = len(records) * self.cfg.trainer.global_batch * self.cfg.trainer.context
        elapsed = max(1e-9, time.perf_counter() - self._window)
        speed = {"tokens_per_s": round(tokens / elapsed, 1), "data_wait": round(self._data_wait / elapsed, 4)}
        if self.peak[0]:
            achieved = self.flops_per_token * tokens / elapsed
            speed["mfu"] = round(achieved / (self.peak[0] * self.world.size), 4)
        speed["memory_gib"] = round(report.peak_memory_gib(self.world.device), 3)
        self.tokens_per_s.append(speed["tokens_per_s"])
        for record, numbers in zip(records, fetched):
            self._log_step(record, numbers, speed)
        self._show(records[-1], fetched[-1], speed)
        self._restart_window()

    def _log_step(self, record: StepRecord, numbers: list[float], speed: dict[str, float]) -> None:
        loss, z, aux, norm, bad = numbers
        self.tokens += record.valid
        row: dict[str, Any] = {"step": record.step, "loss": _finite(loss), "grad_norm": _finite(norm), "lr": record.lr}
        row |= {"tokens": self.tokens, "token_hash": record.token_hash, **speed}
        row |= {f"data/{name}": count for name, count in record.counts.items() if count}
        if record.counts["bytes"] and math.isfinite(loss):
            row["bits_per_byte"] = loss * record.valid / math.log(2) / record.counts["bytes"]
        if self.cfg.trainer.z_loss:
            row["z_loss"] = _finite(z)
        if aux:
            row["aux_loss"] = _finite(aux)
        if bad:
            row["skipped"] = True
        self.metrics.log(row | record.health)
        self.skipped_in_row = self.skipped_in_row + 1 if bad else 0
        if bad and (self.cfg.trainer.nonfinite == "stop" or self.skipped_in_row > self.cfg.trainer.max_skipped_steps):
            self._refuse(record, loss, norm)

    def _refuse(self, record: StepRecord, loss: float, norm: float) -> None:
        """Every rank comes here with the same numbers."""
        self.checkpointer.wait()
        titles = dict.fromkeys(t for rank in parallel.gather_objects(record.documents) for t in rank)
        shown = ", ".join(list(titles)[:8]) + (f" and {len(titles) - 8} more" if len(titles) > 8 else "")
        skipped = f" ({self.skipped_in_row} steps in a row)" if self.cfg.trainer.nonfinite == "skip" else ""
        last = self.checkpointer.last
        kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
        raise TrainingError(
            f"step {record.step}: loss {loss:g}, gradient norm {norm:g}{skipped}; documents: {shown or 'untitled'}. "
            f"The optimizer step was not made and nothing was saved over: {kept}. "
            "Lower optim.lr or trainer.grad_clip, or set trainer.nonfinite=skip"
        )

    def save(self) -> None:
        """A checkpoint of this step, unless there is one."""
        if self.saved_step == self.step:
            return
        self.flush()  # what is not finite must never be saved
        self.metrics.sync()
        data = self.merge_states(parallel.gather_objects(self.loader.state_dict()))
        extra = {
            "step": self.step,
            "tokens": self.tokens,
            "skipped_in_row": self.skipped_in_row,
            "data": data,
            "config": to_dict(self.cfg),
        }
        self.checkpointer.save(self.step, self.model, self.optimizer, extra)
        self.saved_step = self.step
        self._restart_window()

    def _evaluate_if_due(self) -> None:
        """Evaluate after every `eval_every`-th step and, with eval.at_end, the last; once for each step."""
        trainer, step = self.cfg.trainer, self.step
        due = (trainer.eval_every and step and step % trainer.eval_every == 0) or (
            self.cfg.eval.at_end and step == trainer.steps
        )
        if self.evaluate is None or not due or self.evaluated_step == step or self.stopping:
            return
        self.flush()
        self.save()
        rng = parallel.rng_state()
        self.model.eval()
        try:
            with torch.no_grad():
                results = self.evaluate(self.model, step, self.should_stop)
        finally:
            self.model.train()
            parallel.reshard(self.model)
            parallel.set_rng_state(rng)
        if results is not None:
            self.evaluated_step = step
            self.metrics.log({"step": step, **{f"eval/{key}": _finite(value) for key, value in results.items()}})
            self.say(f"evaluation at step {step}: " + "  ".join(f"{key} {v:.5g}" for key, v in results.items()))
        self._restart_window()

    # --- telling -----------------------------------------------------------------------------------------------------

    def _restart_window(self) -> None:
        self._window, self._data_wait = time.perf_counter(), 0.0

    def _show(self, record: StepRecord, numbers: list[float], speed: dict[str, float]) -> None:
        facts = {"loss": f"{numbers[0]:.4f}", "tok/s": f"{speed['tokens_per_s']:,.0f}"}
        if "mfu" in speed:
            facts["MFU" if "sheet" in self.peak[1] else "of peak"] = f"{100 * speed['mfu']:.1f}%"
        facts["mem"] = f"{speed['memory_gib']:.2f}G"
        if self.progress is not None:
            self.progress.update(record.step, facts)

    def say(self, text: str) -> None:
        """One line on the main process's stderr."""
        if not self.world.is_main:
            return
        if self.progress is not None and self.progress.enabled:
            self.progress.say(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def summary(self) -> dict[str, Any]:
        """What a run came to; losses are those of the whole run, also of the processes before this one."""
        rows = report.read_rows(self.metrics.path) if self.world.is_main else []
        losses = [row["loss"] for row in rows if row.get("loss") is not None]
        evaluations = [row for row in rows if any(key.startswith("eval/") for key in row)]
        return {
            "step": self.step,
            "stopped_by": (self.signal.name or "a signal to another process") if self.stopping else None,
            "first_loss": losses[0] if losses else None,
            "last_loss": losses[-1] if losses else None,
            "tokens": self.tokens,
            "tokens_per_s": sorted(self.tokens_per_s)[len(self.tokens_per_s) // 2] if self.tokens_per_s else None,
            "memory_gib": report.peak_memory_gib(self.world.device),
            "evaluation": evaluations[-1] if evaluations else {},
            "checkpoint": str(self.checkpointer.last),
        }


def _finite(value: float) -> float | None:
    """JSON has no NaN: null stands for what is not finite."""
    return value if math.isfinite(value) else None


def summary_text(summary: dict[str, Any], cfg: Any, run_dir: Path) -> str:
    """One screen: what happened, where everything lies, what to run next."""
    step = summary["step"]
    if summary["stopped_by"]:
        lines = [
            f"stopped by {summary['stopped_by']} at step {step} of {cfg.trainer.steps}; checkpoint "
            f"{summary['checkpoint']}; resume with the same command"
        ]
    else:
        lines = [f"finished: {step} steps, {summary['tokens']:,} tokens"]
    if summary["first_loss"] is not None:
        lines.append(f"  loss          {summary['first_loss']:.4f} -> {summary['last_loss']:.4f} nats a token")
    if summary["tokens_per_s"]:
        lines.append(f"  speed         {summary['tokens_per_s']:,.0f} tokens/s (median)")
    lines.append(f"  peak memory   {summary['memory_gib']:.2f} GiB a process")
    for key, value in summary["evaluation"].items():
        if key.startswith("eval/") and value is not None:
            lines.append(f"  {key[5:]:<13} {value:.5g} (evaluation at step {summary['evaluation']['step']})")
    names = ["config.yaml", "metrics.jsonl", "checkpoints/latest", "per_position_loss.parquet", "plots"]
    lines += [f"  {'in ' + str(run_dir)}: {', '.join(name for name in names if (run_dir / name).exists())}"]
    lines += [f"    {path}" for path in sorted((run_dir / "plots").glob("*.png"))]
    if not summary["stopped_by"]:
        lines.append("next:")
        if cfg.data.kind != "recall":  # whose sequences have no loss by position
            longer = f"run={run_dir} context={4 * cfg.eval.context}"
            lines.append(f"  python -m eval.per_position {longer}     loss at longer positions")
        lines.append(f"  python -m eval.plot runs=[{run_dir}]     overlay several runs")
    return "\n".join(lines)


def rehearse(model: nn.Module, cfg: Any, vocab_size: int, world: parallel.World) -> None:
    """One forward and backward pass on made-up tokens, on a GPU: out of memory is met here, before data is opened.

    Raises:
        TrainingError: it does not fit, with the settings that would help.
    """
    if world.device.type != "cuda":
        return
    trainer = cfg.trainer
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (trainer.micro_batch, trainer.context), generator=generator).to(world.device)
    buffers = [(buffer, buffer.clone()) for buffer in parallel.persistent_buffers(model)]
    try:
        moments = [torch.empty_like(p) for p in model.parameters() for _ in range(2)]  # AdamW will hold as much
        parallel.sync_gradients(model, True)
        model(tokens, targets_BT=tokens, loss_chunk_tokens=trainer.loss_chunk_tokens).loss.backward()
    except torch.cuda.OutOfMemoryError:
        raise TrainingError(
            f"trainer.micro_batch={trainer.micro_batch} x trainer.context={trainer.context} does not fit this GPU; "
            "lower trainer.micro_batch, or set trainer.activation_checkpointing=full or a smaller "
            "trainer.loss_chunk_tokens"
        ) from None
    del moments
    model.zero_grad()
    for buffer, before in buffers:  # a codebook must not learn from made-up tokens
        buffer.copy_(before)
