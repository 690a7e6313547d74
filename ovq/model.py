"""The decoder-only language model: embedding, pre-norm blocks of a sequence mixer and a SwiGLU MLP, norm, head.

Notable features:
- a pattern of mixer names in the config sets each layer's mixer, so a hybrid takes one override;
- the loss is computed inside `forward` from one chunk of logits at a time (64k tokens x 32k pieces fit in memory);
- the state of all layers can be carried from piece to piece, for evaluation at any length and for decoding;
- nothing here knows about devices, ranks or parallelism: `ovq.train.parallelize` is applied from outside.

Shapes: B batch, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovq.config import ModelConfig
from ovq.instantiate import instantiate
from ovq.mixers.base import MixerShape, SequenceMixer
from ovq.ops import chunked_cross_entropy, soft_cap
from ovq.ops.cross_entropy.reference import IGNORE as IGNORE


@dataclass
class ModelOutput:
    """Results of a forward pass; fields that do not apply are None.

    loss: nats, summed over valid targets (scalar) or per token [B, T]. z_loss and aux_loss: already weighted, summed
    likewise. logits: [B, T, V], or of the last positions only; returned only without targets. state: one entry per
    layer, only if requested.
    """

    loss: Tensor | None = None
    z_loss: Tensor | None = None
    aux_loss: Tensor | None = None
    logits: Tensor | None = None
    state: list[Any] | None = None


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, ffn_dim, bias=False)
        self.up_proj = nn.Linear(dim, ffn_dim, bias=False)
        self.out_proj = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, cfg: ModelConfig, mixer: SequenceMixer) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(cfg.dim, eps=cfg.norm_eps)
        self.mixer = mixer
        self.norm2 = nn.RMSNorm(cfg.dim, eps=cfg.norm_eps)
        self.mlp = MLP(cfg.dim, cfg.ffn_dim)

    def forward(
        self, x_BTD: Tensor, cu_seqlens: Tensor | None = None, state: Any = None, return_state: bool = False
    ) -> tuple[Tensor, Any]:
        mixed, state = self.mixer(self.norm1(x_BTD), cu_seqlens=cu_seqlens, state=state, return_state=return_state)
        x_BTD = x_BTD + mixed
        return x_BTD + self.mlp(self.norm2(x_BTD)), state


class Transformer(nn.Module):
    """A stack of `cfg.num_layers` blocks whose mixers follow `cfg.pattern`, repeated as often as needed.

    Attributes:
        loss_chunk_tokens: number of tokens whose logits are in memory at once when the loss is computed.
    """

    loss_chunk_tokens: int = 2048

    def __init__(self, cfg: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.init_std, self.logit_softcap = cfg.init_std, cfg.logit_softcap
        self.embed = nn.Embedding(vocab_size, cfg.dim)
        self.layers = nn.ModuleList(Block(cfg, build_mixer(cfg, index)) for index in range(cfg.num_layers))
        self.norm = nn.RMSNorm(cfg.dim, eps=cfg.norm_eps)
        self.head = nn.Linear(cfg.dim, vocab_size, bias=False)
        if cfg.tie_embeddings:
            self.head.weight = self.embed.weight

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        targets_BT: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: list[Any] | None = None,
        return_state: bool = False,
        reduction: str = "sum",
        z_loss: float = 0.0,
        logits_to_keep: int | None = None,
    ) -> ModelOutput:
        """One pass over T tokens, from the start of a sequence or from a carried state.

        Args:
            tokens_BT: int64 [B, T].
            targets_BT: int64 [B, T], -100 where there is no label. With targets the loss is returned, otherwise the
                logits.
            cu_seqlens: int32, document boundaries in the flattened B x T tokens; no information crosses them. Excludes
                `state` and `return_state`.
            state: `state` from the output of an earlier call; the new tokens follow that call's last token.
            return_state: return the state after the last token.
            reduction: "sum" over valid targets, or "none" for the loss of each token [B, T] (0 where ignored).
            z_loss: weight of the squared log-partition (PaLM, arXiv 2204.02311), summed like the loss.
            logits_to_keep: without targets, return the logits of only this many final positions; None: of all. At 64k
                tokens and 16k pieces the full logits take 4 GiB in float32, and generation needs only the last.
        """
        B, T = tokens_BT.shape
        x = self.embed(tokens_BT)
        if cu_seqlens is not None:
            if state is not None or return_state:
                raise ValueError("cu_seqlens excludes state and return_state: a carried state belongs to one document")
            x = x.flatten(0, 1)[None]
        states: list[Any] = []
        for index, layer in enumerate(self.layers):
            x, layer_state = layer(x, cu_seqlens, state[index] if state is not None else None, return_state)
            states.append(layer_state)
        x = self.norm(x).view(B, T, -1)
        out = ModelOutput(aux_loss=self._auxiliary_loss(B * T), state=states if return_state else None)
        if targets_BT is None:
            logits = self.head(x if logits_to_keep is None else x[:, max(0, T - logits_to_keep) :])
            out.logits = soft_cap(logits, self.logit_softcap).to(logits.dtype)
            return out
        loss, z = chunked_cross_entropy(
            x.flatten(0, 1),
            self.head.weight.to(x.dtype),
            targets_BT.flatten(),
            chunk=self.loss_chunk_tokens,
            z_loss=z_loss,
            reduction=reduction,
            softcap=self.logit_softcap,
        )
        out.loss, out.z_loss = loss.view(B, T) if reduction == "none" else loss, z
        return out

    def _auxiliary_loss(self, tokens: int) -> Tensor | None:
        terms = [term for mixer in self.mixers() if (term := mixer.auxiliary_loss()) is not None]
        return tokens * torch.stack(terms).sum() if terms else None

    def blocks(self) -> list[Block]:
        """The layers, in order."""
        return [layer for layer in self.layers if isinstance(layer, Block)]

    def mixers(self) -> list[SequenceMixer]:
        """The sequence mixers, in layer order."""
        return [module for module in self.modules() if isinstance(module, SequenceMixer)]

    def collect_health(self, on: bool) -> None:
        """Turn every mixer's health report on or off, from the next forward pass."""
        for mixer in self.mixers():
            mixer.collect_health = on

    def health(self) -> dict[str, float]:
        """{"health/layer_03/fill": ...} from the last forward pass, for the layers that report."""
        return {
            f"health/layer_{index:02d}/{name}": float(value)
            for index, mixer in enumerate(self.mixers())
            for name, value in mixer.health.items()
        }

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """GPT-2's initialisation: normal with `init_std`, output projections divided by sqrt(2 layers), norms at 1.

        On the CPU it is a pure function of the seed and the architecture, so every rank and every world size starts
        from the same weights.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            nn.init.normal_(self.embed.weight, std=self.init_std)
            if self.head.weight is not self.embed.weight:
                nn.init.normal_(self.head.weight, std=self.init_std)
            for layer in self.blocks():
                layer.mixer.init_weights(self.init_std)
                for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
                    nn.init.normal_(projection.weight, std=self.init_std)
                nn.init.normal_(layer.mlp.out_proj.weight, std=self.init_std / (2 * len(self.layers)) ** 0.5)
            for module in self.modules():
                if isinstance(module, nn.RMSNorm):
                    nn.init.ones_(module.weight)


def build_mixer(cfg: ModelConfig, index: int) -> SequenceMixer:
    """The mixer of layer `index`: an instance of the class named by `_target_`, with the other keys as arguments.

    Raises:
        ConfigError: the class cannot be used, or an argument is unknown or has an illegal value.
    """
    name = cfg.pattern[index % len(cfg.pattern)]
    shape = MixerShape(cfg.dim, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, index, cfg.num_layers, cfg.norm_eps)
    return instantiate(dict(cfg.mixers[name]), SequenceMixer, f"model.mixers.{name}", shape)


def check_mixers(cfg: ModelConfig) -> None:
    """Build each mixer of the pattern once, without allocating memory for its weights.

    Raises:
        ConfigError: as `build_mixer`.
    """
    with torch.device("meta"):
        for index in range(min(len(cfg.pattern), cfg.num_layers)):
            build_mixer(cfg, index)


def build_model(cfg: ModelConfig, vocab_size: int) -> Transformer:
    """The model a config describes, on the current default device and not yet initialised (see `init_weights`)."""
    return Transformer(cfg, vocab_size)


def count_parameters(model: Transformer) -> tuple[int, int]:
    """(total parameters, parameters outside the embedding and the head); a tied matrix counts once."""
    total = sum(p.numel() for p in model.parameters())
    tables = {id(p): p.numel() for m in (model.embed, model.head) for p in m.parameters()}
    return total, total - sum(tables.values())


def undivided(model: Transformer, ranks: int, isolated: bool = False) -> str:
    """Why the model cannot be trained with trainer.context_parallel=`ranks`, as one line; empty if it can.

    Args:
        isolated: data.isolate_documents, with which no layer can hand its state from rank to rank.
    """
    for mixer in model.mixers() if ranks > 1 else ():
        heads = mixer.head_counts()
        if divides_heads(mixer, ranks) or (mixer.differentiable_state and not isolated):
            continue
        if heads is None:
            return f"trainer.context_parallel={ranks} is not possible: {type(mixer).__name__} needs whole sequences"
        name, number = next((name, number) for name, number in heads.items() if number % ranks)
        common = math.gcd(ranks, *heads.values())
        packed = ", as data.isolate_documents=true does not let it hand its state over" if isolated else ""
        return (
            f"trainer.context_parallel={ranks} must divide {name}, which is {number}, since ranks share out the heads "
            f"of {type(mixer).__name__}{packed}; use trainer.context_parallel={common} or other heads"
        )
    return ""


def divides_heads(mixer: SequenceMixer, ranks: int) -> bool:
    """Whether `ranks` processes can share out the mixer's heads."""
    heads = mixer.head_counts()
    return heads is not None and not any(number % ranks for number in heads.values())


def flops_per_token(model: Transformer, context: int, *, training: bool = True) -> float:
    """Matmul FLOPs per token, averaged over a sequence of `context` tokens.

    Forward: 2 for each weight of every matrix that multiplies activations (the embedding is a look-up), plus each
    mixer's own mixing. The backward pass does two products for each one of the forward pass, except where the mixer's
    `backward_flops` says otherwise. Recomputation under activation checkpointing is not counted, as in PaLM's MFU
    (arXiv 2204.02311, appendix B).
    """
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    flops = 2 * weights + sum(mixer.mixing_flops(context) for mixer in model.mixers())
    if training:
        flops += 4 * weights + sum(mixer.backward_flops(context) for mixer in model.mixers())
    return flops


def state_size(model: Transformer, context: int) -> int:
    """Number of elements of the state the model holds for one sequence after `context` tokens."""
    return sum(mixer.state_size(context) for mixer in model.mixers())


def own_capacity(model: Transformer) -> int | None:
    """The dictionary capacity of the first layer that has one; None without one."""
    return next((mixer.capacity for mixer in model.mixers() if mixer.capacity is not None), None)


def widest_window(cfg: ModelConfig) -> int | None:
    """The widest window of the model's layers, in tokens; None without one."""
    windows = [cfg.mixers[name].get("window") for name in cfg.pattern]
    return max((window for window in windows if window), default=None)


def state_bytes(model: Transformer, context: int, itemsize: int = 2) -> int:
    """Size of that state in bytes: activations take `itemsize` bytes (2: bf16), sums and recurrences are float32."""
    float32 = sum(mixer.float32_state(context) for mixer in model.mixers())
    return itemsize * state_size(model, context) + (4 - itemsize) * float32
