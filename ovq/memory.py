"""Estimate the memory that training takes on a device, without one: blocks run on torch's meta device, where tensors
have a size but no values, and the bytes that they keep for the backward pass are counted.

    plan = memory_of(cfg, build_model(cfg.model, vocab_size), world_size=64)
    plan.total, plan.activations

What is linear in the number of tokens is measured at two lengths and extrapolated. Two operators have no meta
implementation, or one unlike that on a GPU: softmax attention counts as FlashAttention, which keeps its inputs, outputs
and the log-sum-exp, and OVQ-attention as this project's Triton kernels.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ovq.config import Config, ModelConfig
from ovq.mixers import ovq as ovq_mixer
from ovq.model import Block, Transformer, build_mixer
from ovq.ops.ovq_attention.spec import OVQSpec
from ovq.train.parallelize import recomputed

LONGEST = 8192  # most tokens of a run on the meta device: enough to fill every mixer's memory in the configs


class Meter(TorchDispatchMode):
    """Counts the bytes of all tensors that operators made within the `with` block and that are still alive.

    Attributes:
        live, peak: bytes alive now, and the most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


# --- operators as they are on a GPU -----------------------------------------------------------------------------------


class _Flash(torch.autograd.Function):
    """What FlashAttention allocates, [B, H, T, D]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = q.new_empty(*q.shape[:3], v.shape[3])
        ctx.save_for_backward(q, k, v, o, q.new_empty(q.shape[:3], dtype=torch.float32))
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


class _OVQ(torch.autograd.Function):
    """What the Triton kernels allocate: see `ovq.ops.ovq_attention.kernels`; a test compares the shapes."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, spec: OVQSpec) -> Tensor:
        (B, T, H, K), (S, G, V) = q.shape, v.shape[1:]
        o, f32 = q.new_empty(B, T, H, V), torch.float32
        rows = (q.new_empty(B, G, S, K), q.new_empty(B, G, S, V), q.new_empty(B, G, S, dtype=f32))
        counts = q.new_empty(B, G, 0 if spec.rate is None else S, dtype=f32)
        placed, lse = q.new_empty(B, G, S, dtype=torch.int32), q.new_empty(B, H, T, dtype=f32)
        ctx.save_for_backward(q, k, v, beta, o, placed, lse, *rows, counts)
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, beta, _, _, lse = ctx.saved_tensors[:7]
        _delta = torch.empty_like(lse)
        return (*(torch.empty_like(x) for x in (q, k, v, beta)), None)


def _flash(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    return _Flash.apply(q, k, v)


def _attend(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, spec: OVQSpec, **_: Any) -> tuple[Tensor, None]:
    return _OVQ.apply(q, k, v, beta, spec), None


@contextlib.contextmanager
def as_on_gpu() -> Iterator[None]:
    """Within the `with` block, attention allocates what it would on a GPU, and computes nothing."""
    flash = mock.patch.object(F, "scaled_dot_product_attention", _flash)
    with flash, mock.patch.object(ovq_mixer, "attend", _attend):
        yield


# --- a block, and the whole -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockMemory:
    """Bytes of one block. `token`, `sequence`: kept for the backward pass, per token and per sequence (below 0 if a
    memory has to fill up first). `transient`: on top of that at the peak of the backward pass, per token. `gradients`:
    of its parameters, in the compute precision."""

    token: float
    sequence: float
    transient: float
    gradients: int

    def kept(self, rows: int, tokens: int) -> float:
        return rows * max(0.0, self.sequence + tokens * self.token)

    def worst(self, rows: int, tokens: int) -> float:
        return rows * tokens * self.transient + self.gradients


def block_memory(cfg: ModelConfig, index: int, dtype: torch.dtype, checkpointing: str, context: int) -> BlockMemory:
    """Measure layer `index` of a model that computes in `dtype`, with `trainer.activation_checkpointing` as in
    `checkpointing`, at `context` tokens (or `LONGEST`, if that is less) and at half as many."""
    longer = max(2, min(context, LONGEST))
    lengths = (longer // 2, longer)
    with torch.device("meta"):
        block = Block(cfg, build_mixer(cfg, index)).to(dtype)
    if checkpointing == "selective":
        block.mlp.forward = recomputed(block.mlp.forward)  # type: ignore[method-assign]
    gradients = sum(p.numel() * p.element_size() for p in block.parameters())
    found = []
    for tokens in lengths:
        x = torch.empty(1, tokens, cfg.dim, dtype=dtype, device="meta", requires_grad=True)
        with as_on_gpu(), Meter() as meter:
            y, _ = block(x)
            kept = meter.live
            meter.peak = kept
            y.backward(torch.empty_like(y))
        found.append((kept, meter.peak - kept - gradients))
        block.zero_grad()
    (kept, worst), (kept_2, worst_2) = found
    token = (kept_2 - kept) / (lengths[1] - lengths[0])
    transient = max(worst / lengths[0], worst_2 / lengths[1], 0.0)
    own = BlockMemory(token, kept - lengths[0] * token, transient, gradients)
    if checkpointing != "full":
        return own
    return BlockMemory(cfg.dim * dtype.itemsize, 0.0, kept_2 / lengths[1] + transient, gradients)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device at the worst moment of a training step.

    `gathered`: parameters of the blocks being computed and their gradients before reduction, in the compute precision
    (FSDP). `gradients`: a process's shard of them, or all of them where a step has several micro-batches: FSDP sums
    these in float32 and reduces them once a step. `optimizer`: moments, and the average of `optim.ema`. `working`: what
    the backward pass needs beyond what the forward pass kept, or what the loss needs with a chunk of logits, whichever
    is larger.
    """

    weights: float
    optimizer: float
    gradients: float
    gathered: float
    activations: float
    working: float

    @property
    def total(self) -> float:
        return self.weights + self.optimizer + self.gradients + self.gathered + self.activations + self.working


def measure_blocks(cfg: Config, context: int) -> dict[str, BlockMemory]:
    """Mixer name -> the memory of a block with it, measured near `context` tokens."""
    pattern, dtype, how = cfg.model.pattern, compute_dtype(cfg), cfg.trainer.activation_checkpointing
    return {name: block_memory(cfg.model, pattern.index(name), dtype, how, context) for name in dict.fromkeys(pattern)}


def compute_dtype(cfg: Config) -> torch.dtype:
    return torch.float32 if cfg.trainer.precision == "fp32" else torch.bfloat16


def optimizer_bytes(cfg: Config, network: Transformer) -> float:
    """Bytes of the optimizer's moments and of the average of `optim.ema`, over all processes, in float32."""
    total = sum(p.numel() for p in network.parameters())
    # Two moments per parameter, but one per matrix with Muon. A custom optimizer is assumed to be like AdamW.
    matrices = [m.weight.numel() for m in network.layers.modules() if isinstance(m, nn.Linear)]
    moments = 2 * total - (sum(matrices) if cfg.optim.name == "muon" else 0)
    return 4.0 * (moments + (total if cfg.optim.ema else 0))


def checkpoint_bytes(cfg: Config, network: Transformer) -> float:
    """Bytes of one checkpoint: float32 weights, tied ones under each of their names, and what the optimizer holds."""
    return 4.0 * sum(value.numel() for value in network.state_dict().values()) + optimizer_bytes(cfg, network)


def memory_of(
    cfg: Config,
    network: Transformer,
    world_size: int,
    *,
    rows: int | None = None,
    context: int | None = None,
    accumulated: bool | None = None,
    blocks: dict[str, BlockMemory] | None = None,
) -> MemoryPlan:
    """The memory of a training step.

    Args:
        network: the model, perhaps on the meta device.
        world_size: number of processes, one per device.
        rows, context: sequences of a micro-batch and their tokens, if not those of `trainer`.
        accumulated: whether a step has several micro-batches; None: as `rows` and trainer.global_batch have it.
        blocks: what `measure_blocks` found; None: it is called.
    """
    trainer, model, dtype = cfg.trainer, cfg.model, compute_dtype(cfg)
    rows, context = rows or trainer.micro_batch, context or trainer.context
    kinds = measure_blocks(cfg, context) if blocks is None else blocks
    layers = [kinds[model.pattern[index % len(model.pattern)]] for index in range(model.num_layers)]
    total = sum(p.numel() for p in network.parameters())
    outside = total - sum(p.numel() for block in network.blocks() for p in block.parameters())
    shards = {"full": world_size, "hybrid": max(1, world_size // trainer.replicas), "none": 1}[trainer.shard]
    ranks = trainer.context_parallel  # a process holds 1/ranks of the tokens or, within a mixer, of the heads
    tokens, size = rows * context // ranks, dtype.itemsize
    stream, chunk = tokens * model.dim * size, min(trainer.loss_chunk_tokens, tokens)
    table = network.head.weight.numel()
    # The loss holds its input, the gradients of its input and of the head, and for one chunk the logits, probabilities
    # in float32 and, in a lower precision, the logits' gradients and the chunk's share of the head's gradient.
    cast = size if size < 4 else 0
    loss = 2 * stream + 4 * table + chunk * network.vocab_size * (size + 4 + cast) + table * cast
    backward = max(layer.worst(rows, context) for layer in layers) / ranks
    sharded = dtype != torch.float32 or world_size > 1
    if accumulated is None:
        accumulated = trainer.global_batch * ranks > rows * world_size
    largest = max(layer.gradients for layer in layers)
    return MemoryPlan(
        weights=4 * total / shards,
        optimizer=optimizer_bytes(cfg, network) / shards,
        gradients=4 * total / (1 if accumulated else shards),
        # Two blocks (one is prefetched), what is outside the blocks, and one block's gradients in float32.
        gathered=2 * largest + outside * size + largest * 4 / size if sharded else 0,
        activations=sum(layer.kept(rows, context) for layer in layers) / ranks + stream,
        working=max(backward, loss),
    )
