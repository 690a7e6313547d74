"""The modelling file of an exported folder, which lets it be opened in an environment without this package."""

from __future__ import annotations

import contextlib
import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovq.errors import ConfigError
from ovq.export.flatten import flatten
from ovq.files import write_whole
from ovq.instantiate import is_ours

if TYPE_CHECKING:
    from ovq.export.modeling import OVQConfig

FILE = "modeling_ovq.py"
HEADER = '''"""{name}: the model of this folder in plain PyTorch, for `from_pretrained(..., trust_remote_code=True)`.

Made by ovq{version} from its own source, for the mixers of this model only ({mixers}). Do not edit: change ovq, and
export again. Licence: Apache-2.0. Shapes are given by the suffixes of names: q_BTHK is [B, T, H, K].
"""
'''


def targets(mixers: dict[str, dict[str, Any]], pattern: list[str]) -> list[str]:
    """The class paths of the mixers that a pattern uses.

    Raises:
        ConfigError: one of them is not part of this project, so the export cannot include its source.
    """
    found = sorted({mixers[name]["_target_"] for name in pattern})
    for target in found:
        if not (target.startswith("ovq.mixers.") and is_ours(target, Path("/nonexistent"))):
            raise ConfigError(
                f"the mixer {target} is not part of ovq, so it cannot be put into the modelling file of an export; "
                "move it to ovq/mixers/, or share the run folder"
            )
    return found


def write_code(config: OVQConfig, folder: Path | str) -> Path:
    """Write the modelling file of a model, and refer to it in the config.

    Raises:
        ConfigError: a mixer is not part of this project.
    """
    paths = targets(config.mixers or {}, config.pattern or [])
    classes = [(module, name) for module, _, name in (path.rpartition(".") for path in paths)]
    roots = [
        ("ovq.export.modeling", "OVQConfig"),
        ("ovq.export.modeling", "OVQForCausalLM"),
        ("ovq.export.substitutes", "MIXERS"),
        *classes,
    ]
    version = ""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # run from a clone
        version = f" {importlib.metadata.version('ovq')}"
    header = HEADER.format(name=FILE, version=version, mixers=", ".join(name for _, name in classes))
    filled = "".join(f'MIXERS["{path}"] = {name}\n' for path, (_, name) in zip(paths, classes))
    path = Path(folder) / FILE
    write_whole(path, f"{flatten(roots, header)}\n\n{filled}")
    module = path.stem
    config.auto_map = {"AutoConfig": f"{module}.OVQConfig", "AutoModelForCausalLM": f"{module}.OVQForCausalLM"}
    return path
