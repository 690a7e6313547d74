"""The training loop. `Trainer.train_step` is one step from beginning to end, `Trainer.fit` a whole run.

- A step's loss is divided once, by the number of valid tokens in the step over all ranks and micro-batches.
- The host waits for the device only every `trainer.log_every` steps, yet every step has its line in metrics.jsonl.
  The device itself decides whether a step is finite, and leaves parameters and moments unchanged if it is not.
- Ranks agree on stopping: a signal to any process ends all of them after the same step, with a checkpoint, and `fit`
  returns (train.py then exits with status 0; a run is finished only once summary.json exists).
- A checkpoint is saved before its step is evaluated, so an interrupted evaluation is repeated at resume.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ovq import processes
from ovq.config import Config, to_dict
from ovq.errors import TrainingError
from ovq.lengths import length_at
from ovq.machine import code_commit, peak_flops, peak_memory_gib, share_of_peak
from ovq.model import IGNORE, Transformer
from ovq.processes import World
from ovq.report import figures, reporting
from ovq.train.batches import COUNTED, Loader, MicroBatch, loss_by_source
from ovq.train.checkpoint import Checkpointer, ways_on
from ovq.train.ema import WeightAverage, evaluated_weights
from ovq.train.metrics import Metrics, finite, read_rows
from ovq.train.optim import LearnedBuffers, clip_gradients, step_unless
from ovq.train.parallelize import reshard, sync_gradients
from ovq.train.progress import Progress, shown
from ovq.train.schedule import due, lr_at
from ovq.train.slow_ranks import SlowRanks
from ovq.train.stop import StopSignal
from ovq.train.summary import recorded

GARBAGE_EVERY = 100  # steps; if left to Python, garbage collection would pause ranks at different times

Evaluate = Callable[[Transformer, int, Callable[[], bool]], "dict[str, float] | None"]


@dataclass
class StepRecord:
    """A step whose results may still be on the device: `results` is [loss, z-loss, aux loss, gradient norm, bad], then
    each data set's part of the loss, if the data are a mixture."""

    step: int
    results: Tensor
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
        loader: `data.loader.Loader`, positioned where the run continues.
        checkpointer: `ovq.train.checkpoint.Checkpointer`.
        metrics: the run's log.
        world: this process and its device.
        run_dir: the run folder.
        merge_states: `data.loader.merge_states`, which merges the data states of all ranks into one.
        evaluate: called as evaluate(model, step, should_stop); returns its metrics, or None once should_stop() is true.
            With several processes should_stop is a collective: every rank must call it equally often.
        flops_per_token: training FLOPs per token of sequences of a given length, for MFU.
        ema: the moving average of the weights, if the run keeps one.
    """

    def __init__(
        self,
        cfg: Config,
        model: Transformer,
        optimizer: torch.optim.Optimizer,
        loader: Loader,
        checkpointer: Checkpointer,
        metrics: Metrics,
        world: World,
        *,
        run_dir: Path | str,
        merge_states: Callable[[list[dict[str, Any]]], dict[str, Any]],
        evaluate: Evaluate | None = None,
        flops_per_token: Callable[[int], float] | None = None,
        ema: WeightAverage | None = None,
    ) -> None:
        self.cfg, self.model, self.optimizer, self.loader = cfg, model, optimizer, loader
        self.checkpointer, self.metrics, self.world = checkpointer, metrics, world
        self.run_dir, self.merge_states, self.evaluate = Path(run_dir), merge_states, evaluate
        self.flops_per_token, self.ema = flops_per_token, ema
        self.sources = list(cfg.data.mixture)  # names of a mixture's data sets; none for other data
        self.counted = (*COUNTED, *(f"tokens/{name}" for name in self.sources))
        self.step_tokens = cfg.trainer.global_batch * cfg.trainer.context  # over all ranks, with a label or without
        self.step = self.start = 0  # steps done; steps done when this process began
        self.tokens = 0  # labels trained on so far, over all ranks
        self.skipped_in_row, self.stopping = 0, False
        self.saved_step: int | None = None
        self.evaluated_step: int | None = None
        self.pending: list[StepRecord] = []
        self.peak = (0.0, "")
        self.progress: Progress | None = None  # until `fit`
        self.signal = StopSignal(announce=world.is_main)
        self.slow_ranks = SlowRanks(world, self.say)
        self._buffers = LearnedBuffers(model)
        self._window, self._data_wait = 0.0, 0.0

    def resume(self, extra: dict[str, Any]) -> None:
        """Restore the counters and generators of the checkpoint that `extra` came with."""
        self.step = self.start = self.saved_step = int(extra["step"])
        self.tokens, self.skipped_in_row = int(extra["tokens"]), int(extra["skipped_in_row"])
        self.checkpointer.last = Path(extra["checkpoint"])
        ranks = extra["rng"]
        processes.set_rng_state(ranks[self.world.rank if len(ranks) == self.world.size else 0])
        rows = read_rows(self.metrics.path) if self.world.is_main else []
        done = any(row["step"] == self.step and any(key.startswith("eval/") for key in row) for row in rows)
        self.evaluated_step = self.step if processes.broadcast_object(done) else None

    # --- a run -------------------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        """Train to the last step, or until a signal. Returns the summary that `summary_text` prints.

        Raises:
            TrainingError: a loss or gradient that is not finite (see trainer.nonfinite).
        """
        trainer = self.cfg.trainer
        self.progress = Progress(trainer.steps, self.start, trainer.progress and self.world.is_main)
        if self.world.is_main and self.flops_per_token:
            with reporting("the measurement of the device's peak"):
                self.peak = peak_flops(self.world.device, self.world.precision, trainer.peak_tflops)
        self.model.train()
        gc.disable()
        self.loader.should_stop = lambda: self.signal.name is not None
        try:
            with self.signal, contextlib.closing(iter(self.loader)) as batches:
                self._run(batches)
        finally:
            gc.enable()
            self.progress.close()
        return self.summary()

    def _run(self, batches: Iterator[MicroBatch]) -> None:
        trainer = self.cfg.trainer
        self._evaluate_if_due()
        if self.step < trainer.steps and (trainer.compile or self.world.device.type == "cuda"):
            self.say("compiling kernels: the first step takes a while")
        self._restart_window()
        while self.step < trainer.steps and not self.should_stop():
            self.train_step(batches)
            if self.step == self.start + 1:
                processes.lower_timeout(trainer.timeout_s)
            if due(self.step, trainer.log_every):
                self.flush()
            if due(self.step, trainer.checkpoint_every):
                self.save()
            self._evaluate_if_due()
            if self.step % GARBAGE_EVERY == 0:
                gc.collect(1)
        self.flush()
        self.saved_step = self.saved_step if self.checkpointer.wait_for_previous() else None  # try this step again
        self.save()
        self.checkpointer.wait()

    def should_stop(self) -> bool:
        """Whether any process was told to stop. A collective with the same result on every rank."""
        self.stopping = self.stopping or processes.any_flag(self.signal.name is not None)
        return self.stopping

    # --- a step ------------------------------------------------------------------------------------------------------

    def train_step(self, batches: Iterator[MicroBatch]) -> None:
        """One optimizer step on `trainer.global_batch` rows; its results stay on the device until `flush`."""
        trainer = self.cfg.trainer
        step = self.step + 1
        watched = due(step, trainer.health_every)
        self.optimizer.zero_grad()
        micro_batches = self._fetch(batches)
        agreed = self._agree_on_data(micro_batches)
        if agreed is None:  # told to stop while a rank waited for data: this step is not taken
            self.loader.rewind()
            return
        valid, token_hash, counts = agreed

        length = length_at(step, trainer)
        micro_batches = [batch.cut(length) for batch in micro_batches]
        self._buffers.snapshot()
        losses = torch.zeros(3 + len(self.sources), device=self.world.device)
        for index, batch in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            sync_gradients(self.model, last)
            losses += self._forward_backward(batch, valid, report=watched and last)

        losses = processes.sum_tensor(losses) / valid
        norm = clip_gradients(self.model, trainer.grad_clip)
        bad = ~(torch.isfinite(losses).all() & torch.isfinite(norm))
        lr = lr_at(step, self.cfg)
        step_unless(self.optimizer, bad, lr)
        self._buffers.restore_if(bad)
        if self.ema is not None:
            self.ema.update(self.model, step, bad)

        results = torch.cat([losses[:3], norm.float().view(1), bad.float().view(1), losses[3:]])
        documents = [title for batch in micro_batches for title in batch.documents]
        health = self.model.health() if watched else {}
        self.pending.append(StepRecord(step, results, lr, valid, token_hash, counts, documents, health))
        self.step = step

    def _fetch(self, batches: Iterator[MicroBatch]) -> list[MicroBatch]:
        """The micro-batches of a step, fewer if told to stop meanwhile; the time is reported as waiting for data."""
        began = time.perf_counter()
        fetched = list(itertools.islice(batches, self.loader.micro_batches_per_step))
        self._data_wait += time.perf_counter() - began
        return fetched

    def _forward_backward(self, batch: MicroBatch, valid: int, *, report: bool) -> Tensor:
        """Accumulate the gradient of a micro-batch's share of the step's loss; returns its loss, z and aux sums, then
        the loss of each data set of a mixture [3 + S]."""
        context = self.world.context
        batch = batch.shard(context.rank, context.size).to(self.world.device)
        self.model.collect_health(report)
        out = self.model(
            batch.inputs,
            targets_BT=batch.targets,
            cu_seqlens=batch.cu_seqlens,
            z_loss=self.cfg.trainer.z_loss,
            reduction="none" if self.sources else "sum",
        )
        by_source = loss_by_source(out.loss, batch.sources, self.sources)
        out.loss = out.loss.sum()
        if out.aux_loss is not None:  # a mean over all tokens, not over those with a label
            out.aux_loss = out.aux_loss * (valid / self.step_tokens)
        parts = [part for part in (out.loss, out.z_loss, out.aux_loss) if part is not None and part.requires_grad]
        (torch.stack([part.float() for part in parts]).sum() / valid).backward()
        self.model.collect_health(False)  # not earlier: activation checkpointing repeats the forward pass in backward
        zero = torch.zeros((), device=out.loss.device)
        sums = [zero if p is None else p.detach().float() for p in (out.loss, out.z_loss, out.aux_loss)]
        return torch.stack([*sums, *by_source])

    def _agree_on_data(self, micro_batches: list[MicroBatch]) -> tuple[int, str, dict[str, int]] | None:
        """Number of labels, token hash and counts of the step over all ranks; None if a rank lacks a micro-batch.

        Computed on the CPU, without synchronising with the device.
        """
        own = micro_batches if self.world.context.rank == 0 else []  # all ranks of a context axis hold the same rows
        valid = sum(int((batch.targets != IGNORE).sum()) for batch in own)
        digest = sum(batch.token_hash() for batch in own) % (1 << 64)
        counts = [sum(batch.counts.get(name, 0) for batch in own) for name in self.counted]
        missing = self.loader.micro_batches_per_step - len(micro_batches)
        *total, missing = processes.sum_integers([valid, digest >> 32, digest & 0xFFFFFFFF, *counts, missing])
        if missing:
            return None
        combined = ((total[1] << 32) + total[2]) % (1 << 64)
        return max(1, total[0]), f"{combined:016x}", dict(zip(self.counted, total[3:]))

    # --- between steps -----------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Fetch and log the results of the steps since the last flush; a non-finite one may end the run."""
        if not self.pending:
            return
        records, self.pending = self.pending, []
        processes.await_device(self.world.device)
        fetched = torch.stack([record.results for record in records]).tolist()
        tokens = len(records) * self.step_tokens
        elapsed = max(1e-9, time.perf_counter() - self._window)
        speed = {"tokens_per_s": round(tokens / elapsed, 1), "data_wait": round(self._data_wait / elapsed, 4)}
        if self.peak[0] and self.flops_per_token:
            each = (self.flops_per_token(length_at(record.step, self.cfg.trainer)) for record in records)
            flops = self.step_tokens * sum(each)
            achieved = flops / elapsed / self.world.size
            share, self.peak = share_of_peak(achieved, self.peak, self.world.device, self.world.precision)
            speed |= {} if share is None else {"mfu": round(share, 4)}
        self.slow_ranks.look(speed["data_wait"], elapsed / len(records))
        speed["memory_gib"] = round(peak_memory_gib(self.world.device), 3)
        for record, results in zip(records, fetched):
            self._log_step(record, results, speed)
        if self.progress is not None:
            self.progress.update(self.step, shown(fetched[-1][0], speed, self.peak[1]))
        self._restart_window()

    def _log_step(self, record: StepRecord, results: list[float], speed: dict[str, float]) -> None:
        loss, z, aux, norm, bad, *by_source = results
        self.tokens += record.valid
        row: dict[str, Any] = {"step": record.step, "loss": finite(loss), "grad_norm": finite(norm), "lr": record.lr}
        row |= {"tokens": self.tokens, "token_hash": record.token_hash, **speed}
        if self.cfg.trainer.lengths:
            row["length"] = length_at(record.step, self.cfg.trainer)
        row |= {f"data/{name}": count for name, count in record.counts.items() if count}
        if record.counts["bytes"] and math.isfinite(loss):
            row["bits_per_byte"] = loss * record.valid / math.log(2) / record.counts["bytes"]
        for name, part in zip(self.sources, by_source):
            if labels := record.counts[f"tokens/{name}"]:
                row[f"loss/{name}"] = finite(part * record.valid / labels)
        if self.cfg.trainer.z_loss:
            row["z_loss"] = finite(z)
        if aux:
            row["aux_loss"] = finite(aux)
        if bad:
            row["skipped"] = True
        self.metrics.log(row | record.health)
        self.skipped_in_row = self.skipped_in_row + 1 if bad else 0
        if bad and (self.cfg.trainer.nonfinite == "stop" or self.skipped_in_row > self.cfg.trainer.max_skipped_steps):
            self._refuse(record, loss, norm)

    def _refuse(self, record: StepRecord, loss: float, norm: float) -> None:
        """Raise TrainingError. All ranks call this for the same step, with the same values."""
        self.checkpointer.wait_for_previous()
        titles = dict.fromkeys(t for rank in processes.gather_objects(record.documents) for t in rank)
        shown = ", ".join(list(titles)[:8]) + (f" and {len(titles) - 8} more" if len(titles) > 8 else "")
        skipped = f" ({self.skipped_in_row} steps in a row)" if self.cfg.trainer.nonfinite == "skip" else ""
        stops = self.cfg.trainer.nonfinite == "stop"
        skipping = ". In this one, such steps can be skipped: trainer.nonfinite=skip" if stops else ""
        raise TrainingError(
            f"step {record.step}: loss {loss:g}, gradient norm {norm:g}{skipped}; documents: {shown or 'untitled'}. "
            f"The step was not made, and no checkpoint was overwritten: {ways_on(self.checkpointer.last)}{skipping}"
        )

    def save(self) -> None:
        """Save a checkpoint of this step, unless there already is one."""
        if self.saved_step == self.step:
            return
        self.flush()  # raises if a step was not finite: such a state must never be saved
        self.metrics.sync()
        states = processes.gather_objects(self.loader.state_dict())
        extra = {
            "step": self.step,
            "tokens": self.tokens,
            "precision": self.world.precision,
            "skipped_in_row": self.skipped_in_row,
            "data": self.merge_states(states[:: self.world.context.size]),  # one per set of ranks with the same rows
            "config": to_dict(self.cfg),
        }
        self.checkpointer.save(self.step, self.model, self.optimizer, extra, self.ema)
        self.saved_step = self.step
        self._restart_window()

    def _evaluate_if_due(self) -> None:
        """Evaluate after every `eval_every`-th step and, with eval.at_end, after the last; once per step."""
        trainer, step = self.cfg.trainer, self.step
        wanted = (step and due(step, trainer.eval_every)) or (self.cfg.eval.at_end and step == trainer.steps)
        if self.evaluate is None or not wanted or self.evaluated_step == step or self.stopping:
            return
        self.flush()
        self.save()
        rng = processes.rng_state()
        self.model.eval()
        try:
            with torch.no_grad(), evaluated_weights(self.model, self.ema, self.cfg.eval.weights):
                results = self.evaluate(self.model, step, self.should_stop)
        finally:
            self.model.train()
            reshard(self.model)
            processes.set_rng_state(rng)
        if results is not None:
            self.evaluated_step = step
            self.metrics.log({"step": step, **{f"eval/{key}": finite(value) for key, value in results.items()}})
            self.say(f"evaluation at step {step}: {figures(results)}")
        self._restart_window()

    # --- reporting ---------------------------------------------------------------------------------------------------

    def _restart_window(self) -> None:
        self._window, self._data_wait = time.perf_counter(), 0.0

    def say(self, text: str) -> None:
        """Write one line to the stderr of the main process."""
        if not self.world.is_main:
            return
        if self.progress is not None:
            self.progress.say(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def summary(self) -> dict[str, Any]:
        """The outcome of the run, including the steps of earlier processes."""
        before = recorded(read_rows(self.metrics.path) if self.world.is_main else [])
        return {
            "step": self.step,
            "stopped_by": (self.signal.name or "a signal to another process") if self.stopping else None,
            **before,
            "tokens": self.tokens,
            "memory_gib": max(before["memory_gib"], peak_memory_gib(self.world.device)),
            "checkpoint": str(self.checkpointer.last),
            "commit": code_commit(),
        }
