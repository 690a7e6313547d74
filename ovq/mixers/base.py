"""The interface of every sequence mixer: training, carried state (streaming) and one-token decoding.

Shapes: B batch, T tokens, D model width, H query heads, G key/value heads, K key width, V value width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ovq.processes import Axis


@dataclass(frozen=True)
class MixerShape:
    """What the model passes to every mixer; a mixer's own settings come only from its config."""

    dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layer_index: int = 0
    num_layers: int = 1
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads={self.num_heads} must be a multiple of model.num_kv_heads={self.num_kv_heads}"
            )


class SequenceMixer(nn.Module):
    """Maps x [B, T, D] to y [B, T, D]; y at position t depends on x at positions <= t only.

    `forward` is the only entry point, so that FSDP's hooks always run. A subclass takes `shape: MixerShape` first, then
    its own settings as keyword arguments, which are exactly the keys of its `configs/model/mixer/<name>.yaml`.
    """

    # Set by the training loop for one forward pass, in which a mixer that has something to report fills `health`.
    collect_health: bool = False
    # The processes that hold other rows of the batch; set when the model is parallelised. Statistics over tokens, other
    # than gradients, are summed over this axis (VQ's codebook).
    data_axis: Axis = Axis("data")
    # The processes that hold other tokens of the same rows, set likewise: see `gather_tokens`.
    context_axis: Axis = Axis("context")
    # Whether passes over pieces, with a carried state that is not detached, have the gradients of one pass over all. If
    # so, processes can share sequences even if their number does not divide the heads: each hands its state on.
    differentiable_state: bool = False
    hands_over: bool = False  # set when the model is parallelised: whether this mixer does so

    def __init__(self, shape: MixerShape) -> None:
        super().__init__()
        self.shape = shape
        self.health: dict[str, Tensor] = {}

    def forward(
        self, x_BTD: Tensor, *, cu_seqlens: Tensor | None = None, state: Any = None, return_state: bool = False
    ) -> tuple[Tensor, Any]:
        """One pass over T tokens.

        Args:
            x_BTD: float tensor [B, T, D]. T = 1 with a state is decoding.
            cu_seqlens: int32 [documents + 1], bounds of packed documents; requires B = 1, no state, and no
                `return_state`. No information may flow from one document to the next.
            state: returned by an earlier call, or None at the start of the sequence. Not modified in place.
            return_state: also return the state after the last token.

        Returns:
            y [B, T, D], and the state (None unless return_state).
        """
        raise NotImplementedError

    # --- sequences divided over the context axis: all tokens of some heads are mixed here, not some tokens of all heads

    def head_counts(self) -> dict[str, int] | None:
        """The numbers of heads that the context axis divides, by the names of the settings that they come from.

        None: this mixer does not call `gather_tokens` and `gather_heads`, and needs whole sequences.
        """
        return None

    @property
    def head_ranks(self) -> int:
        """R, the number of processes that divide the heads: those on the context axis; 1 if state is handed over."""
        return 1 if self.hands_over else self.context_axis.size

    def gather_tokens(self, *tensors_BtHC: Tensor) -> tuple[Tensor, ...]:
        """Whole sequences of this process's heads, from its tokens of all heads: call it before mixing.

        DeepSpeed-Ulysses (arXiv 2309.14509), one all-to-all for all tensors. Process r of the context axis passes the
        tokens [r T/R, (r + 1) T/R) and receives the heads [r H/R, (r + 1) H/R).

        Args:
            tensors_BtHC: [B, T/R, H, C] each, of one dtype; H, a multiple of R, and C may differ between them.

        Returns:
            Contiguous tensors [B, T, H/R, C]; with R = 1, the arguments themselves.
        """
        R = self.head_ranks
        if R == 1:
            return tensors_BtHC
        sent = [x.unflatten(2, (R, -1)).permute(2, 0, 1, 3, 4) for x in tensors_BtHC]  # [R, B, t, H/R, C]
        flat = self.context_axis.exchange(torch.cat([x.flatten(1) for x in sent], dim=1))
        received = flat.split([x[0].numel() for x in sent], dim=1)
        return tuple(y.unflatten(1, x.shape[1:]).transpose(0, 1).flatten(1, 2) for x, y in zip(sent, received))

    def gather_heads(self, o_BThC: Tensor) -> Tensor:
        """This process's tokens of all heads [B, T/R, H, C], from whole sequences of its heads [B, T, H/R, C]: the
        inverse of `gather_tokens`, to be called after mixing."""
        R = self.head_ranks
        if R == 1:
            return o_BThC
        received_RBthC = self.context_axis.exchange(o_BThC.unflatten(1, (R, -1)).transpose(0, 1))
        return received_RBthC.permute(1, 2, 0, 3, 4).flatten(2, 3)

    def own_heads(self, parameter: Tensor, dim: int = 0) -> Tensor:
        """The part of a parameter or buffer that belongs to this process's heads; `dim` runs over heads, or over
        their channels."""
        R = self.head_ranks
        return parameter if R == 1 else parameter.chunk(R, dim)[self.context_axis.rank]

    def all_heads(self, statistics_hX: Tensor) -> Tensor:
        """[H, ...] from [H/R, ...], the inverse of `own_heads`, without a gradient."""
        return statistics_hX if self.head_ranks == 1 else self.context_axis.gather(statistics_hX)

    def auxiliary_loss(self) -> Tensor | None:
        """Weighted loss term of the last training forward pass, averaged over tokens (VQ's commitment), or None."""
        return None

    def state_size(self, context: int) -> int:
        """Elements of the state of one sequence after `context` tokens (KV cache, dictionary, recurrent state)."""
        raise NotImplementedError

    def float32_state(self, context: int) -> int:
        """How many elements of `state_size` are float32 whatever the compute precision (sums, recurrences)."""
        return 0

    def mixing_flops(self, context: int) -> float:
        """Forward FLOPs per token of mixing (without projections), averaged over a sequence of `context` tokens."""
        raise NotImplementedError

    def backward_flops(self, context: int) -> float:
        """The same of the backward pass: two products for each one of the forward pass that carries a gradient."""
        return 2 * (self.mixing_flops(context) - self.assignment_flops(context))

    def assignment_flops(self, context: int) -> float:
        """The part of `mixing_flops` that chooses an entry for each key, which carries no gradient."""
        return 0.0

    @property
    def capacity(self) -> int | None:
        """Maximum number of dictionary entries if no parameter depends on it; None without such a dictionary."""
        return None

    def set_capacity(self, capacity: int) -> None:
        """Change the capacity, for sequences that start after the call.

        Raises:
            ValueError: an invalid capacity, or a mixer whose `capacity` is None.
        """
        raise ValueError(f"{type(self).__name__} has no dictionary whose capacity could be changed")

    def init_weights(self, std: float) -> None:
        """Initialise the parameters. Output projections are scaled by 1/sqrt(2 num_layers), as in GPT-2."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                scaled = std / (2 * self.shape.num_layers) ** 0.5 if name.endswith("out_proj") else std
                nn.init.normal_(module.weight, std=scaled)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def keys_in_chunk(context: int, chunk_size: int) -> float:
    """Keys of a query's own chunk up to the query itself, averaged over a sequence of `context` tokens."""
    chunks, rest = divmod(context, chunk_size)
    return (chunks * chunk_size * (chunk_size + 1) + rest * (rest + 1)) / 2 / context


@contextmanager
def other_capacity(mixers: Sequence[SequenceMixer], capacity: int | None) -> Iterator[None]:
    """Within the `with` block, set the dictionaries of all `mixers` to `capacity`; None leaves them unchanged.

    Raises:
        ValueError: none of the mixers has a dictionary, or the capacity is invalid.
    """
    if capacity is None:
        yield
        return
    held = with_dictionaries(mixers)
    try:
        for mixer in held:
            mixer.set_capacity(capacity)
        yield
    finally:
        for mixer, own in held.items():
            mixer.set_capacity(own)


def with_dictionaries(mixers: Sequence[SequenceMixer]) -> dict[SequenceMixer, int]:
    """The mixers whose capacity can be changed, each with its capacity.

    Raises:
        ValueError: there is none.
    """
    held = {mixer: own for mixer in mixers if (own := mixer.capacity) is not None}
    if not held:
        names = ", ".join(dict.fromkeys(type(mixer).__name__ for mixer in mixers))
        raise ValueError(f"no layer has a dictionary whose capacity could be changed (layers: {names})")
    return held


def detach_state(state: Any) -> Any:
    """The state detached from the graph, for truncated backpropagation and evaluation."""
    from torch.utils._pytree import tree_map

    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, torch.Tensor) else leaf, state)
