"""What replaces the package's look-ups by name in an exported modelling file (`ovq.export.flatten`)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ovq.mixers.base import SequenceMixer
from ovq.ops.ovq_attention import chunked

MIXERS: dict[str, type[SequenceMixer]] = {}  # by class path; an exported file adds those that it contains


def instantiate(config: dict[str, Any], kind: type, where: str, *args: Any) -> Any:
    """The mixer that config["_target_"] names, built from `args` and the other entries as keywords.

    Raises:
        ValueError: this file was exported for a model without that mixer.
    """
    settings = dict(config)
    if (target := settings.pop("_target_")) not in MIXERS:
        raise ValueError(f"{where}: this file has no {target}, only {', '.join(MIXERS)}; export a model that uses it")
    return MIXERS[target](*args, **settings)


def choose(backend: str, *inputs: object) -> SimpleNamespace:
    """The torch backend of OVQ-attention, which runs on any device."""
    return SimpleNamespace(forward=chunked.forward)
