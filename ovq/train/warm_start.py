"""Start a new run from the weights of another, or of an exported model: `init_from=RUN`. All else is fresh.

A weight fits if its name and shape are the same, so the context, the data, the learning rate or the capacity of a
dictionary may differ, and one mixer may replace another: the weights that the two have in common are loaded.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from ovq import processes
from ovq.config import Config, to_dict
from ovq.errors import ConfigError, one_line
from ovq.export.stored import TOKENIZERS, Folder, is_export
from ovq.model import Transformer
from ovq.train.checkpoint import FAILED, CheckpointError, read_extra
from ovq.train.checkpoint_choice import check_branch, newest_good_leased, verify_leased
from ovq.train.checkpoint_files import MANIFEST, SafePlanner, SafeReader
from ovq.train.ema import local
from ovq.train.optim import check_optimizer

SHOWN = 4  # names in a message
TIED = ("embed.weight", "head.weight")  # one tensor with model.tie_embeddings


def start_from(cfg: Config, model: nn.Module, fingerprint: str) -> str:
    """Load the weights of cfg.init_from that fit; returns a line that says what was loaded. Collective.

    Args:
        fingerprint: that of this run's tokenizer: an id must stand for the same text in both models.

    Raises:
        ConfigError: there is no such run, its tokenizer differs, or, with `init_from.strict`, a weight does not fit.
        CheckpointError: there is no good checkpoint, or it holds something other than data.
    """
    wanted = cfg.init_from
    assert wanted.path is not None
    with contextlib.ExitStack() as lease:
        path = processes.on_main(lambda: find(Path(wanted.path or ""), lease))
        folder = Folder(path) if is_export(path) else None
        processes.on_main(lambda: check_tokenizer(path, stored_fingerprint(path, folder), fingerprint))
        stored = folder.shapes() if folder else checkpoint_shapes(path)
        before = config_of(path, folder)
        own: dict[str, Any] = get_model_state_dict(model)
        fitting = {name: value for name, value in own.items() if stored.get(name) == tuple(value.shape)}
        fresh = [name for name in own if name not in fitting]
        unused = [name for name in stored if name not in own]
        if set(TIED) <= fitting.keys() and _shared(own) and not _equal(own, path, folder):
            if wanted.strict:
                raise ConfigError(
                    f"{path} has a head other than its embedding, and model.tie_embeddings=true keeps one for both; "
                    "set it to false, or take the embedding with init_from.strict=false"
                )
            unused.append(TIED[1])
            del fitting[TIED[1]]
        if wanted.strict and (fresh or unused):
            raise ConfigError(
                f"the weights of {path} do not fit this model ({what(own, stored, fresh, unused)}); to take what fits "
                "and leave the rest as initialised, set init_from.strict=false"
            )
        if folder:
            fitting = {name: value.to(own[name].dtype) for name, value in folder.weights(fitting).items()}
        else:
            fill(fitting, path)
        processes.gather_objects(None)  # rank 0 holds the lease until every rank has read its part
    set_model_state_dict(model, fitting, options=StateDictOptions(strict=False, full_state_dict=folder is not None))
    notes = [what(own, stored, fresh, unused)] if fresh or unused else []
    return "; ".join(
        [f"began with {len(fitting)} of {len(own)} weights of {path}", *notes, *(others(before, cfg) if before else [])]
    )


def config_of(path: Path, folder: Folder | None) -> dict[str, Any] | None:
    """The config of the run that the weights come from, as `ovq.config.to_dict` has it; None if it cannot be used."""
    try:
        return to_dict(folder.config()) if folder else read_extra(path)["config"]
    except (ConfigError, CheckpointError, OSError, KeyError):
        return None


def others(before: dict[str, Any], cfg: Config) -> list[str]:
    """In what the run `before`, whose weights may fit, differs from this one: mixers, and the seed."""

    def mixers(of: dict[str, Any]) -> list[str]:
        pattern = [of["mixers"][name]["_target_"].rpartition(".")[2] for name in of["pattern"]]
        return [pattern[index % len(pattern)] for index in range(of["num_layers"])]

    there, here = mixers(before["model"]), mixers(to_dict(cfg)["model"])
    notes = [f"they were trained with {' and '.join(sorted({*there} - {*here}))}"] if {*there} - {*here} else []
    if not notes and there != here:
        notes = ["they were trained with the mixers in another order"]
    if before["seed"] != cfg.seed:
        notes.append(f"the seed of their run was {before['seed']}")
    return notes


def _shared(own: dict[str, Any]) -> bool:
    """Whether the head's weights are those of the embedding. Collective: a rank's empty shards share an address."""
    return not processes.any_flag(len({local(own[name]).data_ptr() for name in TIED}) > 1)


def _equal(own: dict[str, Any], path: Path, folder: Folder | None) -> bool:
    """Whether the stored head and embedding are equal. Collective."""
    pair: dict[str, Any] = {name: torch.empty_like(own[name]) for name in TIED}
    if folder:
        pair = dict(folder.weights(pair))
    else:
        fill(pair, path)
    return not processes.any_flag(not torch.equal(*(local(pair[name]) for name in TIED)))


def check_weights(cfg: Config, model: Transformer, begun: bool) -> None:
    """Check what the settings say about weights and their optimizer, before any are loaded; checkpoints in
    init_from.path are verified.

    Args:
        begun: whether the run folder holds steps of this run, which then has its own weights.

    Raises:
        ConfigError: the optimizer or the schedule cannot be used, or init_from.path is no run.
        CheckpointError: there is no good checkpoint in init_from.path, or none where resume= says.
    """
    check_optimizer(model, cfg)
    if begun:
        return
    if cfg.resume not in ("auto", "never"):
        check_branch(cfg.resume)
    elif cfg.init_from.path:
        with contextlib.ExitStack() as lease:
            find(Path(cfg.init_from.path), lease)


def what(own: dict[str, Any], stored: dict[str, tuple[int, ...]], fresh: list[str], unused: list[str]) -> str:
    """In words, which weights have no counterpart, or one of a different shape."""
    other = [f"{name} is {stored[name]} there and {tuple(own[name].shape)} here" for name in fresh if name in stored]
    parts = [some(other, "")] if other else []
    if missing := [name for name in fresh if name not in stored]:
        parts.append(some(missing, "not there: "))
    if unused:
        parts.append(some(unused, "not here: "))
    return "; ".join(parts)


def some(words: list[str], before: str) -> str:
    """The first SHOWN of many words, and how many more there are."""
    more = f" and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
    return f"{before}{', '.join(words[:SHOWN])}{more}"


def checkpoint_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every weight of a checkpoint."""
    return {
        key.removeprefix("model."): tuple(getattr(entry, "size", ()))
        for key, entry in SafeReader(path).read_metadata().state_dict_metadata.items()
        if key.startswith("model.")
    }


def fill(weights: dict[str, Any], path: Path) -> None:
    """Read these weights from a checkpoint, in place."""
    alone = not processes.distributed()
    try:
        dcp.load({"model": weights}, storage_reader=SafeReader(path), planner=SafePlanner(path), no_dist=alone)
    except FAILED as error:
        raise CheckpointError(f"{path} cannot be read ({one_line(error)})") from error


def find(path: Path, lease: contextlib.ExitStack) -> Path:
    """The newest good checkpoint of a run folder, verified; or `path` itself if it is a checkpoint or an exported
    folder. Newer checkpoints that are damaged are named on stderr and skipped. Until `lease` is closed, a trainer does
    not remove the checkpoint.

    Raises:
        ConfigError: it is none of these.
        CheckpointError: it is damaged, or no checkpoint of the run is good.
    """
    if (path / MANIFEST).is_file():
        verify_leased(path, lease)
        return path
    if is_export(path):
        return path
    if not (path / "config.yaml").is_file():
        raise ConfigError(f"init_from={path} is neither a run folder nor a checkpoint, nor an exported model")
    good, damaged = newest_good_leased(path, lease)
    if good is None:
        why = f" ({next(iter(damaged.values()))})" if damaged else ""
        raise CheckpointError(f"init_from={path} holds no good checkpoint{why}")
    for problem in damaged.values():
        print(f"{problem}; not used", file=sys.stderr, flush=True)
    return good


def stored_fingerprint(path: Path, folder: Folder | None) -> str | None:
    """The fingerprint of the tokenizer that the weights were trained with; None if it is not known."""
    if folder:
        return folder.fingerprint
    try:
        return json.loads((path.parent.parent / "tokenizer" / "tokenizer.json").read_bytes())["fingerprint"]
    except (OSError, ValueError, KeyError):
        return None  # a checkpoint on its own: the shape of the embedding is all that can be compared


def check_tokenizer(path: Path, stored: str | None, fingerprint: str) -> None:
    """Refuse weights that were trained with a different tokenizer."""
    if stored is not None and stored != fingerprint:
        kind = stored.partition(":")[0]
        own = path.parent.parent / "tokenizer" / "tokenizer.model"
        model = path / TOKENIZERS.get(kind, "") if is_export(path) else own
        raise ConfigError(
            f"init_from: {path} was trained with another tokenizer ({stored[:30]}, here {fingerprint[:30]}), so its "
            f"embeddings belong to other tokens; use that tokenizer: tokenizer.model_path={model}"
        )
