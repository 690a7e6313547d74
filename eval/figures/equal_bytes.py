"""Which capacity of another memory takes the bytes of OVQ's. Capacities and bytes are those of a long sequence."""

from __future__ import annotations

import functools

import torch

from eval.figures.declare import LONGEST, SCALES, Subject
from ovq.compose import compose
from ovq.config import Config
from ovq.mixers.base import other_capacity
from ovq.model import Transformer, build_model, state_bytes


def capacities_of_ovq(subject: Subject, scale: str, chosen: list[int] | None) -> list[int]:
    """sw_ovq's own capacity at a scale, and those of the tests (None: the scale's)."""
    own = next(mixer.capacity for mixer in sw_ovq(subject, scale).mixers() if mixer.capacity)
    return sorted({own, *(SCALES[scale].num_centroids if chosen is None else chosen)})


def equal_capacities(subject: Subject, scale: str, chosen: list[int] | None, cfg: Config, own: int) -> dict[int, int]:
    """OVQ's capacity -> the largest capacity of the model of `cfg` whose state takes at most the same bytes.

    Args:
        own: a capacity that the model can have.
    """
    network, ovq = on_meta(cfg), sw_ovq(subject, scale)
    one, two = bytes_of(network, own), bytes_of(network, own + 1)  # bytes are linear in the capacity
    of_ovq = {capacity: bytes_of(ovq, capacity) for capacity in capacities_of_ovq(subject, scale, chosen)}
    return {capacity: own + (held - one) // (two - one) for capacity, held in of_ovq.items()}


def label(capacity: int) -> str:
    """What a test at equal bytes is called."""
    return f"bytes of N = {capacity:,}"


def sw_ovq(subject: Subject, scale: str) -> Transformer:
    """sw_ovq at a scale, on the meta device."""
    settings = {"experiment": subject.experiment}
    settings |= {text.partition("=")[0]: text.partition("=")[2] for text in subject.at.get(scale, ())}
    return _sw_ovq(tuple(f"{key}={value}" for key, value in settings.items()))


@functools.cache
def _sw_ovq(settings: tuple[str, ...]) -> Transformer:
    return on_meta(compose([*settings, "tokenizer=byte", "model=sw_ovq"]))  # the tokenizer is no part of the state


def on_meta(cfg: Config) -> Transformer:
    vocab_size = 2  # embeddings are no state
    with torch.device("meta"):
        return build_model(cfg.model, vocab_size)


def bytes_of(network: Transformer, capacity: int) -> int:
    with other_capacity(network.mixers(), capacity):
        return state_bytes(network, LONGEST)
