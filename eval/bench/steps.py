"""Training steps on the CPU, timed in turns: the named models against a plain GPT, and bfloat16 against float32.

Our step is that of `ovq.train.loop.Trainer` on random tokens: forward, backward, clip, AdamW, and the loop's own checks
and logging. The peer's is that of `eval.bench.plain_gpt`, with the widths of `std_att`. Models have the settings of
`experiment=cpu_demo`; memories other than OVQ get the capacity of its dictionary.
"""

from __future__ import annotations

import contextlib
import gc
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from data.build import build_tokenizer
from eval import style
from eval.bench import plain_gpt
from eval.bench.models import build_trainer
from eval.bench.stopwatch import Marked, Stopwatch, Timing, ratio_in_turns, shown
from ovq import cpu, processes
from ovq.compose import compose
from ovq.config import Config, TrainerConfig
from ovq.model import count_parameters, flops_per_token
from ovq.processes import World

PEER, PEERS_WIDTHS = "plain_gpt", "std_att"
PRECISE, PRECISIONS = "sw_ovq", ("fp32", "bf16")  # the model whose precisions are compared
LEAST = 3  # repeats that a context gets whatever its time budget
# The demo's `num_centroids`, for the memories that it does not configure; ++ because most models have none of them.
CAPACITY = [f"++model.mixers.{name}.capacity=512" for name in ("fifo", "kvm", "learned_compression", "reservoir")]
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How steps are timed: `tokens` a step (at least one row of the context), at most `repeats` of each model, and
    beyond LEAST only until `seconds` have passed at a context."""

    size: str
    tokens: int
    repeats: int
    seconds: float
    overrides: tuple[str, ...] = ()


def config_of(name: str, context: int, plan: Plan, *last: str) -> Config:
    """The demo's config with another model and context, on the CPU; `last` overrides the user's overrides.

    Raises:
        ConfigError: an override is wrong.
    """
    batch = max(1, plan.tokens // context)
    return compose(
        [
            "experiment=cpu_demo",
            f"model={name}",
            f"model/size={plan.size}",
            *CAPACITY,
            "trainer.device=cpu",
            "trainer.precision=fp32",
            f"trainer.context={context}",
            f"trainer.global_batch={batch}",
            f"trainer.micro_batch={batch}",
            *plan.overrides,
            *last,
        ]
    )


@contextlib.contextmanager
def worlds(*trainers: TrainerConfig) -> Iterator[list[World]]:
    """The `World` of this process under each of these settings; process groups are destroyed on exit."""
    try:
        yield [processes.init(trainer) for trainer in trainers]
    finally:
        processes.shutdown()


@dataclass
class Step:
    """A training step to time, with its tokens, parameters and FLOPs per token (None: not counted)."""

    call: Marked
    tokens: int
    parameters: int
    flops_per_token: float | None = None


def our_step(cfg: Config, world: World, folder: str) -> Step:
    """The step of our trainer, with its results fetched and checked; `folder` holds its empty log."""
    processes.seed_everything(cfg.seed)
    trainer = build_trainer(cfg, build_tokenizer(cfg).vocab_size, world, folder)
    batches = iter(trainer.loader)

    def call(mark: Any) -> None:
        cpu.choose_precision(world.precision)  # a process-wide setting, which steps of both precisions share
        trainer.train_step(batches)
        trainer.flush()

    tokens = cfg.trainer.global_batch * cfg.trainer.context
    flops = flops_per_token(trainer.model, cfg.trainer.context)
    return Step(call, tokens, count_parameters(trainer.model)[0], flops)


def plain_step(cfg: Config) -> Step:
    """The step of a plain GPT with the widths, rows and optimizer settings of `cfg`."""
    torch.manual_seed(cfg.seed)
    m, optim, vocab_size = cfg.model, cfg.optim, build_tokenizer(cfg).vocab_size
    model = plain_gpt.PlainGPT(vocab_size, m.num_layers, m.dim, m.num_heads, m.head_dim, m.ffn_dim)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=optim.lr,
        betas=(optim.betas[0], optim.betas[1]),
        weight_decay=optim.weight_decay,
        fused=True,
    )
    shape = cfg.trainer.global_batch, cfg.trainer.context

    def call(mark: Any) -> None:
        tokens_BT = torch.randint(vocab_size, shape)
        plain_gpt.train_step(model, optimizer, tokens_BT, cfg.trainer.grad_clip)

    return Step(call, shape[0] * shape[1], sum(p.numel() for p in model.parameters()))


def compared(
    steps: dict[str, Step], plan: Plan, peak: float | None, *, peer: str, what: str, context: int
) -> Iterator[Row | str]:
    """Time the steps in turns; yields a note if the budget cut the repeats, then a row for each, named under `what`."""
    stopwatch, least = Stopwatch(torch.device("cpu")), min(LEAST, plan.repeats)
    calls = {name: step.call for name, step in steps.items()}
    timings = stopwatch.turns(calls, seconds=plan.seconds, least=least, most=plan.repeats)
    repeats = max(len(timing.whole_ms) for timing in timings.values())
    if repeats < plan.repeats and any(timing.error is None for timing in timings.values()):
        yield f"context {style.short(context)}: {repeats} repeats instead of {plan.repeats} (seconds={plan.seconds:g})"
    for name, step in steps.items():
        yield {what: name, "context": context} | _measured(step, timings[name], timings[peer], peak)


def _measured(step: Step, timing: Timing, peer: Timing, peak: float | None) -> Row:
    if timing.error is not None:
        return {"error": timing.error}
    rate = step.tokens / timing.whole * 1e3
    flops = None if step.flops_per_token is None else step.flops_per_token * rate
    return {
        "tokens": step.tokens,
        "parameters": step.parameters,
        "step_ms": timing.whole_ms,
        "step_median_ms": timing.whole,
        "tokens_per_s": rate,
        "gflops": flops and flops / 1e9,
        "of_peak": flops and peak and flops / peak,
        "speedup": ratio_in_turns(peer.whole_ms, timing.whole_ms),
    }


def rows(names: list[str], contexts: list[int], plan: Plan, peak: float | None) -> Iterator[Row | str]:
    """A row per context and model, the plain GPT first; `speedup` is relative to it.

    Args:
        peak: FLOP/s of a large product, or None if it is unknown.
    """
    for context in contexts:
        yield from _at(context, names, plan, peak)
        gc.collect()  # a trainer contains reference cycles


def _at(context: int, names: list[str], plan: Plan, peak: float | None) -> Iterator[Row | str]:
    configs = {name: config_of(name, context, plan) for name in names}
    with worlds(configs[names[0]].trainer) as (world,), tempfile.TemporaryDirectory() as folder:
        steps = {PEER: plain_step(config_of(PEERS_WIDTHS, context, plan))}
        steps |= {name: our_step(cfg, world, f"{folder}/{name}") for name, cfg in configs.items()}
        yield from compared(steps, plan, peak, peer=PEER, what="model", context=context)


def precision_rows(contexts: list[int], plan: Plan) -> Iterator[Row | str]:
    """A row per context and precision of one model; `speedup` is relative to float32."""
    for context in contexts:
        yield from _precisions_at(context, plan)
        gc.collect()


def _precisions_at(context: int, plan: Plan) -> Iterator[Row | str]:
    configs = {name: config_of(PRECISE, context, plan, f"trainer.precision={name}") for name in PRECISIONS}
    with worlds(*(cfg.trainer for cfg in configs.values())) as found, tempfile.TemporaryDirectory() as folder:
        steps = {name: our_step(cfg, world, f"{folder}/{name}") for (name, cfg), world in zip(configs.items(), found)}
        yield from compared(steps, plan, None, peer=PRECISIONS[0], what="precision", context=context)


def head(what: str, peer: str) -> str:
    """The table's head."""
    return (
        f"{what:<16} {'context':>7} {'tokens/s':>10} {'step ms':>10} {f'vs {peer}':>13} {'GFLOP/s':>8} {'of peak':>8} "
        f"{'parameters':>11} {'repeats':>8}"
    )


def line(row: Row, what: str) -> str:
    """A row of the table."""
    start = f"{row[what]:<16} {style.short(row['context']):>7}"
    if "error" in row:
        return f"{start} {row['error']}"
    return (
        f"{start} {row['tokens_per_s']:>10,.0f} {row['step_median_ms']:>10,.1f} "
        f"{shown(row['speedup'], '.2f', 'x'):>13} {shown(row['gflops'], '.1f'):>8} {shown(row['of_peak'], '.0%'):>8} "
        f"{row['parameters']:>11,} {len(row['step_ms']):>8}"
    )
