"""The capacity at which another memory takes as many bytes as OVQ's, for a sequence of `LONGEST` tokens."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from eval.figures.declare import LONGEST, SCALES, Subject, replaced
from ovq.compose import compose
from ovq.config import Config
from ovq.errors import ConfigError
from ovq.mixers.base import other_capacity
from ovq.model import Transformer, build_model, own_capacity, state_bytes


def capacities_of_ovq(
    subject: Subject, scale: str, chosen: list[int] | None, overrides: Sequence[str] = ()
) -> list[int]:
    """sw_ovq's own capacity at a scale with these settings, and the `chosen` ones of the tests (None: the scale's)."""
    own = own_capacity(sw_ovq(subject, scale, overrides))
    assert own is not None, "it has a dictionary"
    return sorted({own, *(SCALES[scale].num_centroids if chosen is None else chosen)})


def equal_capacities(
    subject: Subject, scale: str, chosen: list[int] | None, cfg: Config, own: int, overrides: Sequence[str] = ()
) -> dict[int, int]:
    """OVQ's capacity -> the largest capacity at which the state of `cfg`'s model takes no more bytes.

    Args:
        own: a capacity that the model can have.
        overrides: settings that all runs of the figure get.

    Raises:
        ConfigError: even one entry takes more bytes than OVQ's state.
    """
    network, ovq = on_meta(cfg), sw_ovq(subject, scale, overrides)
    one, two = bytes_of(network, own), bytes_of(network, own + 1)  # bytes are linear in the capacity
    found = {}
    for capacity in capacities_of_ovq(subject, scale, chosen, overrides):
        found[capacity] = own + (bytes_of(ovq, capacity) - one) // (two - one)
        if found[capacity] < 1:
            raise ConfigError(
                f"num_centroids: {cfg.model.name} has no capacity whose state is as small as sw_ovq's with {capacity}; "
                "ask for more"
            )
    return found


def label(capacity: int) -> str:
    """What a test at equal bytes is called."""
    return f"bytes of N = {capacity:,}"


def sw_ovq(subject: Subject, scale: str, overrides: Sequence[str]) -> Transformer:
    """sw_ovq at a scale, with settings that all runs get, on the meta device."""
    of_model = [text for text in overrides if text.startswith("model.")]
    return _sw_ovq(tuple(replaced(subject.settings(scale), of_model)))


@functools.cache
def _sw_ovq(settings: tuple[str, ...]) -> Transformer:
    return on_meta(compose([*settings, "tokenizer=byte", "model=sw_ovq"]))  # the tokenizer does not affect the state


def on_meta(cfg: Config) -> Transformer:
    vocab_size = 2  # embeddings are not part of the state
    with torch.device("meta"):
        return build_model(cfg.model, vocab_size)


def bytes_of(network: Transformer, capacity: int) -> int:
    with other_capacity(network.mixers(), capacity):
        return state_bytes(network, LONGEST)
