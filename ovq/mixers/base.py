"""The one interface of every sequence mixer: training, carried state (streaming) and one-token decoding.

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
    """What the model gives every mixer; a mixer's own settings come from its config and nowhere else."""

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

    `forward` is the only way in, so that FSDP's hooks always run. A subclass takes `shape: MixerShape` first and its
    own settings as keyword arguments, which are exactly the keys of its `configs/model/mixer/<name>.yaml`.
    """

    # Set for one forward pass by the training loop; a mixer that has something to report then fills `health`.
    collect_health: bool = False
    # The processes that see other tokens of the batch; set where the model is parallelised. Statistics over tokens
    # that are no gradients (VQ's codebook) are summed over it.
    data_axis: Axis = Axis("data")

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
            cu_seqlens: int32 [documents + 1], starts and end of packed documents; only with B = 1 and without a state.
                Nothing may flow from one document to the next.
            state: what an earlier call returned (None: start of the sequence). Not modified in place.
            return_state: also return the state after the last token, else None.
        """
        raise NotImplementedError

    def auxiliary_loss(self) -> Tensor | None:
        """Loss term of the last training forward pass, mean over tokens, already weighted (VQ's commitment)."""
        return None

    def state_size(self, context: int) -> int:
        """Numbers held for one sequence after `context` tokens (KV cache, dictionary, recurrent state)."""
        raise NotImplementedError

    def float32_state(self, context: int) -> int:
        """Of `state_size`, the numbers kept in float32 whatever the precision of compute (sums, recurrences)."""
        return 0

    def mixing_flops(self, context: int) -> float:
        """Forward FLOPs a token of the mixing itself (no projections), mean over a sequence of `context` tokens."""
        raise NotImplementedError

    @property
    def capacity(self) -> int | None:
        """Entries its dictionary holds at most, if no parameter depends on that number; None without such a one."""
        return None

    def set_capacity(self, capacity: int) -> None:
        """Another capacity, for sequences that begin after the call.

        Raises:
            ValueError: a capacity that cannot be, or a mixer whose `capacity` is None.
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


@contextmanager
def other_capacity(mixers: Sequence[SequenceMixer], capacity: int | None) -> Iterator[None]:
    """The dictionaries of all `mixers` at another capacity, within the `with` only. None: as they are.

    Raises:
        ValueError: none of the mixers has a dictionary, or the capacity cannot be.
    """
    if capacity is None:
        yield
        return
    held = {mixer: own for mixer in mixers if (own := mixer.capacity) is not None}
    if not held:
        names = ", ".join(dict.fromkeys(type(mixer).__name__ for mixer in mixers))
        raise ValueError(f"no layer has a dictionary whose capacity could be changed (layers: {names})")
    try:
        for mixer in held:
            mixer.set_capacity(capacity)
        yield
    finally:
        for mixer, own in held.items():
            mixer.set_capacity(own)


def detach_state(state: Any) -> Any:
    """The same state cut off from the graph, for truncated backpropagation and evaluation."""
    from torch.utils._pytree import tree_map

    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, torch.Tensor) else leaf, state)
