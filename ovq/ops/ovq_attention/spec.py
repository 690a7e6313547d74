"""The OVQ dictionary: its settings, its size after t tokens, and the state carried from piece to piece.

Shapes: B batch, G key/value heads, N capacity in centroids, L chunk, K key width, V value width, r pending tokens.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ovq.ops.position_hash import position_hash

CHOICES = {
    "growth": ("plateau", "linear"),
    "seeding": ("spread", "random"),
    "first_chunk": ("merge", "nearest"),
    "assign_on": ("key", "key_value"),
}


@dataclass(frozen=True)
class OVQSpec:
    """The settings of a dictionary (arXiv 2602.03922, eqs. 15-19). "Similarity" is k.mu^k unless stated otherwise.

    Args:
        num_centroids: capacity N.
        chunk_size: tokens L per chunk. The dictionary changes once per chunk, after its last token.
        growth: "plateau": n(t) = t N / (t + N) centroids after t tokens; "linear": n(t) = N min(1, t / growth_tokens).
        growth_tokens: tokens after which linear growth ends; used by linear growth only.
        seeding: which keys of a chunk found new centroids. "spread": those whose best similarity is lowest; "random":
            those with the lowest hash of (seed, position). They are numbered in text order.
        seed: seed of random seeding.
        step_size: step of a centroid towards a key. "count": 1/count, so that centroids are running means; a constant
            eta in (0, 1]: the m keys of a chunk that are assigned to one centroid move it to
            (1-eta)^m mu + (1 - (1-eta)^m) mean(keys). Counts are maintained either way.
        first_chunk: how an empty dictionary starts. The first key becomes centroid 0, and similarities are taken to it.
            The keys of this chunk that do not found a centroid are assigned to centroid 0 ("merge") or to the founding
            key with the largest dot product ("nearest").
        assign_on: "key": assign to the centroid with the highest k.mu^k; "key_value": to the one with the lowest
            |k - mu^k|^2 + |v - mu^v|^2, whose negative is then also the similarity used by spread seeding.

    Raises:
        ValueError: a setting outside its legal values.
    """

    num_centroids: int
    chunk_size: int = 128
    growth: str = "plateau"
    growth_tokens: int | None = None
    seeding: str = "spread"
    seed: int = 0
    step_size: str | float = "count"
    first_chunk: str = "merge"
    assign_on: str = "key"
    # The settings as one literal, since custom operators accept no Python objects; `parse_spec` reads it.
    text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("num_centroids", "chunk_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value} must be a whole number of at least 1")
        for name, legal in CHOICES.items():
            if getattr(self, name) not in legal:
                raise ValueError(f"{name}={getattr(self, name)} is not a legal value; legal: {', '.join(legal)}")
        if self.growth_tokens is not None and (not isinstance(self.growth_tokens, int) or self.growth_tokens < 1):
            raise ValueError(f"growth_tokens={self.growth_tokens} must be a whole number of at least 1")
        if self.growth == "linear" and self.growth_tokens is None:
            raise ValueError("growth=linear needs growth_tokens (say, the training context), which is not set")
        check_step_size("step_size", self.step_size)
        values = [repr(getattr(self, name)) for name in SETTINGS]
        object.__setattr__(self, "text", f"({', '.join(values)})")

    @property
    def rate(self) -> float | None:
        """The constant step size, or None for running means."""
        return None if self.step_size == "count" else float(self.step_size)

    def size_at(self, tokens: int) -> int:
        """Centroids in use once all whole chunks of the first `tokens` tokens are committed (eq. 17).

        At least 1 and at most one per token, whatever the growth, since each new centroid is founded by a key.
        """
        t, N = tokens - tokens % self.chunk_size, self.num_centroids
        if t == 0:
            return 0
        allowed = t * N // (t + N) if self.growth == "plateau" else min(N, t * N // (self.growth_tokens or 1))
        return min(max(allowed, 1), t)

    def hash_order(self, start: int, device: torch.device) -> Tensor:
        """int64 [L]: indices into the chunk that starts at token `start`, in the order of random seeding."""
        return self.hash_order_at(torch.arange(start, start + self.chunk_size, device=device))

    def hash_order_at(self, position: Tensor) -> Tensor:
        """The same for several chunks, int64 [..., L], from the `position` of each token in its document."""
        return position_hash(self.seed, position).argsort(dim=-1, stable=True)


def check_step_size(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a legal `step_size`; the message calls it `name`."""
    constant = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1
    if value != "count" and not constant:
        raise ValueError(f"{name}={value} is not a legal value; legal: count, or a number in (0, 1]")


SETTINGS = tuple(item.name for item in fields(OVQSpec) if item.init)


@functools.lru_cache(maxsize=256)
def parse_spec(text: str) -> OVQSpec:
    """The spec with this `text`."""
    return OVQSpec(*ast.literal_eval(text))


@dataclass(frozen=True)
class Dictionary:
    """The dictionary after `position` tokens, a multiple of the chunk size: what backends take and return.

    key_sum [B, G, N, K], value_sum [B, G, N, V] and count [B, G, N] in float32 (float64 for float64 inputs); centroid n
    is key_sum / count and value_sum / count. The first `size` centroids are in use, in every head; the rest are zero.
    """

    key_sum: Tensor
    value_sum: Tensor
    count: Tensor
    size: int
    position: int

    def map(self, function: Callable[[Tensor], Tensor]) -> Dictionary:
        """A copy with `function` applied to each tensor."""
        return Dictionary(
            function(self.key_sum), function(self.value_sum), function(self.count), self.size, self.position
        )


@dataclass
class OVQState:
    """The dictionary, the keys and values [B, r, G, K or V] of the unfinished chunk, and the number of tokens so far.

    Constant in size except for the pending tokens, r = position % chunk_size. All but the counts may carry a gradient.
    """

    key_sum: Tensor
    value_sum: Tensor
    count: Tensor
    pending_key: Tensor
    pending_value: Tensor
    size: int
    position: int

    def tensors(self) -> tuple[Tensor, ...]:
        return self.key_sum, self.value_sum, self.count, self.pending_key, self.pending_value

    def map(self, function: Callable[[Tensor], Tensor]) -> OVQState:
        """A copy with `function` applied to each tensor."""
        keys, values, count, pending_key, pending_value = map(function, self.tensors())
        return OVQState(keys, values, count, pending_key, pending_value, self.size, self.position)

    def dictionary(self) -> Dictionary:
        """The dictionary alone, at the start of the unfinished chunk."""
        start = self.position - self.pending_key.shape[1]
        return Dictionary(self.key_sum, self.value_sum, self.count, self.size, start)


pytree.register_pytree_node(
    OVQState,
    lambda s: (list(s.tensors()), (s.size, s.position)),
    lambda leaves, context: OVQState(*[*leaves, *context]),
    serialized_type_name="ovq.OVQState",
)
