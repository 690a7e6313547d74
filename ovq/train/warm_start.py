"""Start a new run from the weights of another: `init_from=RUN`. Optimizer, data and step are fresh.

Weights fit if their name and shape are the same, so the context, the data, the learning rate or the capacity of a
dictionary may differ, and a mixer may take another's place: what the two have in common is taken.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from ovq import processes
from ovq.config import InitConfig
from ovq.errors import ConfigError, one_line
from ovq.train.checkpoint import FAILED, CheckpointError
from ovq.train.checkpoint_files import MANIFEST, SafePlanner, SafeReader, reading, verify
from ovq.train.checkpoint_files import find as checkpoints_of

SHOWN = 4  # names in a message


def start_from(wanted: InitConfig, model: nn.Module, fingerprint: str) -> str:
    """Load the weights that fit; returns a line that says what was taken. Collective.

    Args:
        fingerprint: of this run's tokenizer: an id must stand for the same text in both.

    Raises:
        ConfigError: there is no such run, its tokenizer is another, or, with `init_from.strict`, a weight does not fit.
        CheckpointError: there is no good checkpoint, or one that holds more than data.
    """
    assert wanted.path is not None
    path = processes.on_main(lambda: find(Path(wanted.path or "")))
    with reading(path):
        processes.on_main(lambda: check_tokenizer(path, fingerprint))
        reader = SafeReader(path)
        stored = {
            key.removeprefix("model."): tuple(getattr(entry, "size", ()))
            for key, entry in reader.read_metadata().state_dict_metadata.items()
            if key.startswith("model.")
        }
        own: dict[str, Any] = get_model_state_dict(model)
        fitting = {name: value for name, value in own.items() if stored.get(name) == tuple(value.shape)}
        fresh = [name for name in own if name not in fitting]
        unused = [name for name in stored if name not in own]
        if wanted.strict and (fresh or unused):
            raise ConfigError(
                f"the weights of {path} do not fit this model ({what(own, stored, fresh, unused)}); to take what fits "
                "and leave the rest as initialised, set init_from.strict=false"
            )
        state = {"model": fitting}
        try:
            dcp.load(state, storage_reader=reader, planner=SafePlanner(path), no_dist=not processes.distributed())
        except FAILED as error:
            raise CheckpointError(f"{path} cannot be read ({one_line(error)})") from error
    set_model_state_dict(model, state["model"], options=StateDictOptions(strict=False))
    rest = f"; {what(own, stored, fresh, unused)}" if fresh or unused else ""
    return f"began with {len(fitting)} of {len(own)} weights of {path}{rest}"


def what(own: dict[str, Any], stored: dict[str, tuple[int, ...]], fresh: list[str], unused: list[str]) -> str:
    """In words, which weights have no counterpart, and which one of another shape."""
    other = [f"{name} is {stored[name]} there and {tuple(own[name].shape)} here" for name in fresh if name in stored]
    parts = [some(other, "")] if other else []
    if missing := [name for name in fresh if name not in stored]:
        parts.append(some(missing, "not there: "))
    if unused:
        parts.append(some(unused, "not here: "))
    return "; ".join(parts)


def some(words: list[str], before: str) -> str:
    """The first of many."""
    more = f" and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
    return f"{before}{', '.join(words[:SHOWN])}{more}"


def find(path: Path) -> Path:
    """The newest good checkpoint of a run folder, or the checkpoint itself; verified.

    Raises:
        ConfigError: it is neither.
        CheckpointError: it is damaged, or no checkpoint of the run is good.
    """
    if (path / MANIFEST).is_file():
        verify(path)
        return path
    if not (path / "config.yaml").is_file():
        raise ConfigError(f"init_from={path} is neither a run folder nor a checkpoint")
    problem = ""
    for candidate in reversed(checkpoints_of(path)):
        try:
            verify(candidate)
            return candidate
        except CheckpointError as error:
            problem = f" ({one_line(error)})"
    raise CheckpointError(f"init_from={path} holds no good checkpoint{problem}")


def check_tokenizer(path: Path, fingerprint: str) -> None:
    """Refuse weights that were trained with other ids."""
    card = path.parent.parent / "tokenizer" / "tokenizer.json"
    try:
        stored = json.loads(card.read_bytes())["fingerprint"]
    except (OSError, ValueError, KeyError):
        return  # a checkpoint on its own: the shape of the embedding is all that can be compared
    if stored != fingerprint:
        raise ConfigError(
            f"init_from: {path} was trained with another tokenizer ({stored[:30]}, here {fingerprint[:30]}), so its "
            f"embeddings stand for other text; use that one: tokenizer.model_path={card.parent / 'tokenizer.model'}"
        )
