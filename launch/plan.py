"""What a training run would take on a cluster: memory, time, communication, storage. Starts nothing, needs no GPU.

    python -m launch.plan experiment=pg19_480m gpus=64 gpu=h100
    python -m launch.plan experiment=pg19_480m trainer.context=65536 trainer.global_batch=64 gpus=8 gpu=h200 mfu=0.3

Everything is computed from the settings. Memory is counted as in `ovq.memory`. Time is that of the model's matrix
products at `mfu` of the card's peak (an assumption: measure one step and pass its MFU). Communication is that of FSDP
and of context parallelism at the bandwidths of the data sheets, as if none of it overlapped with computation. All
assumptions are printed with the plan.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from data.build import build_tokenizer
from ovq.cli import command
from ovq.compose import compose
from ovq.config import Config, TrainerConfig
from ovq.errors import ConfigError
from ovq.lengths import phases
from ovq.machine import PEAK_TFLOPS
from ovq.memory import LONGEST, MemoryPlan, checkpoint_bytes, measure_blocks, memory_of
from ovq.model import Transformer, build_model, count_parameters, divides_heads, flops_per_token, undivided
from ovq.plan import format_bytes, indivisible
from ovq.schema import setting

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """An accelerator by its data sheet.

    Args:
        memory: GiB that its runtime reports.
        tflops: dense bf16, in 10^12 FLOP/s.
        link, network: GB/s in one direction, to the other cards of its node and over its share of the node's network.
    """

    memory: float
    tflops: float
    link: float
    network: float


CARDS = {
    "a100": Card(memory=79.3, tflops=PEAK_TFLOPS["A100"], link=300, network=25),
    "h100": Card(memory=79.1, tflops=PEAK_TFLOPS["H100"], link=450, network=50),
    "h200": Card(memory=139.8, tflops=PEAK_TFLOPS["H200"], link=450, network=50),
    "b200": Card(memory=178.0, tflops=PEAK_TFLOPS["B200"], link=900, network=50),
    "mi300x": Card(memory=192.0, tflops=PEAK_TFLOPS["MI300X"], link=448, network=50),
}
SIZES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)  # GPUs in the table of communication
HEADROOM = 0.92  # usable fraction of the memory: the rest goes to the runtime, collectives and fragmentation


@dataclass
class Options:
    gpus: int = setting(8, "GPUs in all", at_least=1)
    gpus_per_node: int = setting(8, "GPUs in a node, joined by its fast links", at_least=1)
    gpu: str = setting("h100", "card to plan for", choices=tuple(CARDS))
    mfu: float = setting(0.35, "share of the card's peak that training reaches (an assumption)", above=0, at_most=1)
    vocab_size: int | None = setting(None, "pieces of the tokenizer; null: those of the config's", at_least=2)
    disk_gb_per_s: float = setting(2.0, "GB/s that a node writes to the storage of checkpoints", above=0)


@command(Options, overrides=True)
def main(options: Options, overrides: list[str]) -> int:
    """The command line in the module's docstring."""
    cfg = compose(overrides)
    vocab_size = options.vocab_size or cfg.tokenizer.vocab_size or own_vocab_size(cfg)
    with torch.device("meta"):
        network = build_model(cfg.model, vocab_size)
    print("\n".join(report(cfg, network, options)))
    return 0


def own_vocab_size(cfg: Config) -> int:
    """Pieces of the tokenizer that the config names.

    Raises:
        ConfigError: it cannot be opened here.
    """
    try:
        return build_tokenizer(cfg).vocab_size
    except ConfigError as error:
        raise ConfigError(f"{error}; or give the number of pieces: vocab_size=16384") from None


def report(cfg: Config, network: Transformer, options: Options) -> Iterator[str]:
    """The lines of the plan."""
    trainer, card = cfg.trainer, CARDS[options.gpu]
    share = trainer.global_batch * trainer.context_parallel / options.gpus
    tokens = trainer.global_batch * trainer.context
    parameters = count_parameters(network)[0]
    flops = mean_flops_per_token(network, trainer) * tokens
    yield f"{cfg.name}: {cfg.model.name}, {parameters:,} parameters, {options.gpus} x {options.gpu}"
    yield f"a step: {tokens:,} tokens ({trainer.global_batch} x {trainer.context:,}), {flops:.3g} FLOPs"
    yield from ["", *memory_lines(cfg, network, options)]
    seconds = flops / (options.gpus * options.mfu * card.tflops * 1e12)
    yield from ["", "time"]
    yield f"  a step          {seconds:.3g} s at an MFU of {options.mfu:g}: {tokens / seconds:,.0f} tokens/s"
    hours = seconds * trainer.steps / 3600
    used, read = hours * options.gpus, tokens * trainer.steps
    yield f"  {trainer.steps:,} steps     {days(hours)}, {used:,.0f} GPU-hours, {read:,} tokens"
    if share < 1:
        yield (
            f"  trainer.global_batch={trainer.global_batch} has no sequence, or part of one, for each of "
            f"{options.gpus} GPUs: what is shown would need a larger batch or trainer.context_parallel"
        )
    elif problem := indivisible(cfg, options.gpus) or undivided(
        network, trainer.context_parallel, cfg.data.isolate_documents
    ):
        yield f"  training would refuse {options.gpus} GPUs: {problem}"
    yield from ["", *communication_lines(cfg, network, options)]
    size = checkpoint_bytes(cfg, network)
    nodes = -(-options.gpus // options.gpus_per_node)
    yield from ["", "storage"]
    yield f"  a checkpoint    {format_bytes(size)} (float32 weights and optimizer state); {trainer.keep_last} are kept"
    written = size / (nodes * options.disk_gb_per_s * 1e9)
    yield f"  to write one    {written:.2g} s with {nodes} nodes at {options.disk_gb_per_s:g} GB/s each"
    width = 2 if network.vocab_size <= 1 << 16 else 4  # bytes of a prepared token
    yield f"  data            {tokens / seconds:,.0f} tokens/s; prepared, {format_bytes(width * tokens / seconds)}/s"
    yield from ["", "assumed", *(f"  {line}" for line in assumptions(options))]


def mean_flops_per_token(network: Transformer, trainer: TrainerConfig) -> float:
    """Training FLOPs per token, averaged over the steps, which may differ in length (`trainer.lengths`)."""
    return sum(steps * flops_per_token(network, length) for steps, length in phases(trainer)) / trainer.steps


def memory_lines(cfg: Config, network: Transformer, options: Options) -> Iterator[str]:
    room = HEADROOM * CARDS[options.gpu].memory * GIB
    plan = memory_of(cfg, network, options.gpus)
    yield f"memory of a GPU, at trainer.micro_batch={cfg.trainer.micro_batch} and {cfg.trainer.context:,} tokens"
    for name in ("weights", "gradients", "optimizer", "gathered", "activations", "working"):
        yield f"  {name:<15} {format_bytes(getattr(plan, name))}"
    fits = "fits" if plan.total <= room else "DOES NOT FIT"
    yield f"  {'together':<15} {format_bytes(plan.total)} of {room / GIB:.1f} GiB: {fits}"
    here, far = (measure_blocks(cfg, context) for context in (cfg.trainer.context, LONGEST))
    trainer = cfg.trainer  # whether it accumulates is not varied, so that the memory grows with the rows
    several = trainer.global_batch * trainer.context_parallel > trainer.micro_batch * options.gpus
    rows = largest(
        lambda n: memory_of(cfg, network, options.gpus, rows=n, accumulated=several, blocks=here), room, 1 << 16
    )
    yield f"  largest trainer.micro_batch at {cfg.trainer.context:,} tokens: {rows or 'none'}"
    context = largest(
        lambda n: memory_of(cfg, network, options.gpus, rows=1, context=1024 * n, blocks=far), room, 1 << 14
    )
    yield f"  longest trainer.context at micro_batch=1: {f'{1024 * context:,}' if context else 'none'}"


def largest(plan_of: Callable[[int], MemoryPlan], room: float, limit: int) -> int:
    """The largest number up to `limit` whose plan fits; 0 if 1 does not fit. Memory must grow with the number."""
    low, high = 0, 1
    while high <= limit and plan_of(high).total <= room:
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if plan_of(middle).total <= room else (low, middle)
    return low


def communication_lines(cfg: Config, network: Transformer, options: Options) -> Iterator[str]:
    """Seconds of communication and of computation in a step, with the same global batch on increasingly many GPUs."""
    trainer, card = cfg.trainer, CARDS[options.gpu]
    flops = mean_flops_per_token(network, trainer) * trainer.global_batch * trainer.context
    yield f"communication of a step, trainer.shard={trainer.shard}, the same global batch on all"
    yield f"  {'GPUs':>6}  {'micro-batches':>13}  {'computation':>12}  {'communication':>13}  ratio"
    for gpus in sorted({*SIZES, options.gpus}):
        parts = trainer.global_batch * trainer.context_parallel
        rounds = max(1.0, parts / (trainer.micro_batch * gpus))
        computation = flops / (min(gpus, parts) * options.mfu * card.tflops * 1e12)
        moved = communication(cfg, network, gpus, options.gpus_per_node, card, rounds)
        bound = "  bound by communication" if moved > computation else ""
        ratio = f"{moved / computation:.2f}"
        yield f"  {gpus:>6,}  {rounds:>13,.0f}  {computation:>10.3g} s  {moved:>11.3g} s  {ratio:>5}{bound}"
    ranks = trainer.context_parallel
    if handed := sorted({type(m).__name__ for m in network.mixers() if ranks > 1 and not divides_heads(m, ranks)}):
        yield (
            f"  not so where trainer.context_parallel={ranks} does not divide the heads ({', '.join(handed)}): these "
            "layers hand their state over, so that ranks mix one after another, which takes longer"
        )


def communication(cfg: Config, network: Transformer, gpus: int, node: int, card: Card, rounds: float) -> float:
    """Seconds that the collectives of a step take if none of them overlaps with computation.

    Sharded over S processes, every micro-batch gathers the parameters twice (forward and backward) and the last one of
    a step reduces the gradients in float32, each moving (S - 1) / S of them through a process's link; R replicas then
    all-reduce a shard's gradients, moving 2 (R - 1) / R of them. Ranks that share sequences exchange the queries, keys,
    values and outputs of every layer in the forward pass, in the backward pass and, if activations are recomputed, once
    more.
    """
    trainer = cfg.trainer
    parameters = count_parameters(network)[0]
    size = 4 if trainer.precision == "fp32" else 2
    replicas = {"full": 1, "hybrid": trainer.replicas, "none": gpus}[trainer.shard]
    shards = max(1, gpus // replicas)
    speed = 1e9 * (card.link if shards <= node else card.network)
    moved = (shards - 1) / shards * parameters * (2 * size * rounds + 4) / speed
    between = 1e9 * (card.network if gpus > node else card.link)
    ranks = trainer.context_parallel
    passes = 3 if trainer.activation_checkpointing == "full" else 2
    tokens = trainer.micro_batch * trainer.context / ranks
    exchanged = 4 * passes * cfg.model.num_layers * tokens * cfg.model.dim * size * (ranks - 1) / ranks * rounds
    moved += exchanged / (1e9 * (card.link if ranks <= node else card.network))
    return moved + 2 * (replicas - 1) / replicas * 4 * parameters / shards / between


def days(hours: float) -> str:
    return f"{hours / 24:.3g} days" if hours >= 48 else f"{hours:.3g} hours"


def assumptions(options: Options) -> Iterator[str]:
    card = CARDS[options.gpu]
    yield (
        f"{options.gpu} by its data sheet: {card.memory:g} GiB, {card.tflops:g} TFLOP/s dense bf16, {card.link:g} GB/s "
        f"to the others of its node, {card.network:g} GB/s over the network; nothing was measured on one"
    )
    yield f"{HEADROOM:.0%} of the memory is usable: the rest goes to the runtime, collectives and fragmentation"
    yield "the MFU counts matrix products and mixing, forward and twice that backward; recomputation comes on top of it"
    torch_only = (
        ", which do not run on a b200: there it runs in torch, and more slowly" if options.gpu == "b200" else ""
    )
    yield f"attention keeps what FlashAttention does, OVQ-attention what this project's Triton kernels do{torch_only}"


if __name__ == "__main__":
    sys.exit(main())
