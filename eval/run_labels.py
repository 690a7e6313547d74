"""How runs are labelled in pictures and reports: by the settings in which they differ."""

from __future__ import annotations

from typing import Any

from ovq import config
from ovq.config import Config
from ovq.identity import FREE_AT_RESUME

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
