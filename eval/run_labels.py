"""How runs are labelled in pictures and reports: by the settings in which they differ."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ovq import config
from ovq.config import Config
from ovq.identity import FREE_AT_RESUME, identity

# Setting -> the settings that it implies. If it differs, so do they, and a label need only name it.
IMPLIED = {
    "model.name": ("model.pattern", "model.mixers"),
    "model.size": tuple(
        f"model.{part}" for part in ("num_layers", "dim", "num_heads", "num_kv_heads", "head_dim", "ffn_dim")
    ),
    "data.name": ("data",),
    "tokenizer.name": ("tokenizer",),
}


def labels(configs: list[Config], names: list[str]) -> list[str]:
    """A short label for each run: its model and the settings that differ, plus its name if two labels would be equal.

    Settings that only affect how a run is computed or monitored are left out, as are those implied by one that differs.
    """
    flat = [config.flatten(cfg) for cfg in configs]
    differ = [key for key in sorted({key for values in flat for key in values}) if _differ(flat, key)]
    unnamed = [*FREE_AT_RESUME]
    for cause, implied in IMPLIED.items():
        unnamed += implied if cause in differ else ()
    parts = [[values["model.name"]] for values in flat]
    for key in differ:
        hidden = any(key == other or key.startswith(other + ".") for other in unnamed) and key not in IMPLIED
        if key == "model.name" or hidden:
            continue
        for values, part in zip(flat, parts):
            part += [f"{key.removesuffix('.name').rpartition('.')[2]}={values[key]}"] if key in values else []
    made = [", ".join(part) for part in parts]
    if len(set(made)) == len(made):
        return made
    return [f"{label} ({name})" for label, name in zip(made, names)]


def _differ(flat: list[dict[str, Any]], key: str) -> bool:
    return len({repr(values.get(key)) for values in flat}) > 1


def by_seeds(configs: list[Config], labels: list[str]) -> list[tuple[str, list[int]]]:
    """Groups of runs that differ only in the seed: a label without it, and the numbers of the runs. Two runs with the
    same seed are not in one group."""
    groups: list[tuple[dict[str, Any], str, list[int]]] = []
    for index, (cfg, label) in enumerate(zip(configs, labels)):
        settings = without_seed(cfg)
        for known, _, members in groups:
            if known == settings and cfg.seed not in [configs[member].seed for member in members]:
                members.append(index)
                break
        else:
            short = of_all_seeds(label)
            groups.append((settings, label if short in [other for _, other, _ in groups] else short, [index]))
    return [(label, members) for _, label, members in groups]


def without_seed(cfg: Config) -> dict[str, Any]:
    """What identifies a run and its length, except its seed, which also occurs in the name of the run whose weights it
    began with."""
    known = {key: value for key, value in identity(cfg).items() if key != "seed"} | {"trainer.steps": cfg.trainer.steps}
    if began := known.get("init_from.path"):
        path = Path(began)
        run, checkpoint = (path.parent.parent, path.name) if path.parent.name == "checkpoints" else (path, "")
        known["init_from.path"] = re.sub(r"seed=\d+|-[0-9a-f]{8}$", "", run.name), checkpoint
    return known


def of_all_seeds(label: str) -> str:
    """A run's label without its seed."""
    return re.sub(r", seed=\d+", "", label)
