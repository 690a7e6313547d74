"""Turn a command line into a config: Hydra composes configs/*.yaml, and error messages name the legal values.

A wrong name or type fails here, before torch is imported.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from ovq.config import RENAMED, Config, check
from ovq.config_data import DataConfig, MixtureSource
from ovq.environment import plain
from ovq.errors import ConfigError, omegaconf_message
from ovq.identity import FREE_AT_RESUME, within
from ovq.schema import describe

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"

# Overrides left out of a run folder's name: they say where and how the run executes, not what it computes.
NAMELESS = tuple(key for key in FREE_AT_RESUME if key not in ("trainer.steps", "name")) + ("experiment",)

# Settings that are dictionaries of names this project does not know: entries are added without Hydra's "+".
DICTIONARIES = (
    *("optim.custom", "optim.custom_schedule", "optim.groups"),
    *("trainer.lengths", "data.mixture", "data.data_files"),
)


def compose(overrides: list[str]) -> Config:
    """The config that a list of overrides in Hydra's syntax describes, checked against the schema.

    Raises:
        ConfigError: an unknown group, option, key or value; the one-line message lists the legal ones.
    """
    overrides = [_in_full(text) for text in overrides]
    _check_overrides(overrides)
    composed = _hydra(overrides)
    cfg: Config = composed  # a DictConfig that behaves as a Config
    if cfg.data.kind == "mixture":
        with open_dict(composed):
            cfg.data.mixture = {name: _source(name, values) for name, values in plain(cfg.data)["mixture"].items()}
    check(cfg)
    # An experiment may configure mixers that the chosen model does not use; a run's config keeps only those it builds.
    with open_dict(composed):
        cfg.model.mixers = {name: cfg.model.mixers[name] for name in dict.fromkeys(cfg.model.pattern)}
    return cfg


def _in_full(override: str) -> str:
    """An override as Hydra wants it: init_from=DIR names a path, and settings that are dictionaries get entries."""
    if override.startswith("init_from="):
        return f"init_from.path={override.partition('=')[2]}"
    return f"++{override}" if within(override.partition("=")[0], DICTIONARIES) else override


def _hydra(overrides: list[str]) -> Any:
    _register_schema()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            return hydra_compose("config", overrides=overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_message(error, overrides)) from None


def _source(name: str, given: Any) -> dict[str, Any]:
    """All settings of a data set of a mixture: those of the option of configs/data that it names, by its own name or as
    `data`, then those given; a number is its weight."""
    where = f"data.mixture.{name}"
    values = dict(given) if isinstance(given, dict) else {"weight": given}
    option = str(values.pop("data", name))
    if option not in options("data"):
        raise ConfigError(
            f"{where}: there is no data set '{option}'; legal: {', '.join(options('data'))}; for one of your own, "
            f"{where}={{data: parquet, train: [FILES], weight: 0.5}}"
        )
    legal = [item.name for item in dataclasses.fields(MixtureSource)]
    for key in values:
        if key not in legal:
            shared = key in [item.name for item in dataclasses.fields(DataConfig)]
            hint = f"data.{key} holds for the whole mixture" if shared else f"legal: data, {', '.join(legal)}"
            raise ConfigError(f"there is no setting '{where}.{key}'; {hint}")
    return {key: value for key, value in _option(option).items() if key in legal} | values


@lru_cache
def _option(name: str) -> dict[str, Any]:
    """The settings of an option of configs/data."""
    return plain(_hydra([f"data={name}"]).data)


def _register_schema() -> None:
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=Config)


def groups() -> list[str]:
    """The config groups: the folders in configs/ that hold options."""
    return sorted({str(p.parent.relative_to(CONFIG_DIR)) for p in CONFIG_DIR.rglob("*/*.yaml")})


def options(group: str) -> list[str]:
    """The options of one config group."""
    return sorted(p.stem for p in (CONFIG_DIR / group).glob("*.yaml"))


def run_dir_of(cfg: Config, overrides: list[str]) -> Path:
    """The run folder of a command line: `run_dir` if set, else runs_root/<experiment>[,key=value...].

    A pure function of the command line, with no clock and no counter, so every rank and a requeued job find the same
    folder.
    """
    if cfg.run_dir:
        return Path(cfg.run_dir)
    parser = OverridesParser.create()
    parts = []
    for override in parser.parse_overrides([o for o in overrides if o]):
        key = override.get_key_element().lstrip("+~").split("@")[0]
        if not within(key, NAMELESS):
            parts.append(f"{key.replace('/', '.').rpartition('.')[2]}={override.get_value_element_as_str()}")
    full = ",".join([cfg.name, *sorted(parts)])
    slug = "".join(c if c.isalnum() or c in "=,._-" else "_" for c in full)
    if slug != full or len(slug) > 100:
        slug = f"{slug[:90]}-{hashlib.sha256(full.encode()).hexdigest()[:8]}"
    return Path(cfg.runs_root) / slug


# --- messages --------------------------------------------------------------------------------------------------------


def _check_overrides(overrides: list[str]) -> None:
    """Reject unknown groups, options and keys and list the legal ones, which Hydra's own messages omit."""
    for override in overrides:
        try:
            parsed = OverridesParser.create().parse_override(override)
        except HydraException:
            raise ConfigError(f"'{override}' cannot be read; an override is key=value, lists are [a,b]") from None
        key = parsed.key_or_group.partition("@")[0]
        value = parsed.value()
        if key in groups():
            if value is not None and str(value) not in options(key):
                raise ConfigError(f"{key}={value} does not exist; legal: {', '.join(options(key))}")
            continue
        _check_key(key)


def _check_key(key: str) -> None:
    schema: Any = Config
    parts = key.split(".")
    for depth, part in enumerate(parts):
        fields = {item.name: item for item in dataclasses.fields(schema)}
        if part not in fields:
            legal = list(dict.fromkeys([*fields, *(groups() if depth == 0 else [])]))
            close = difflib.get_close_matches(part, legal, n=1)
            hint = f"did you mean {'.'.join([*parts[:depth], close[0]])}? " if close else ""
            raise ConfigError(f"there is no setting '{key}'; {hint}legal: {', '.join(legal)}")
        schema = fields[part].default_factory
        if not dataclasses.is_dataclass(schema):
            if depth + 1 < len(parts) and "dict" not in str(fields[part].type):
                raise ConfigError(f"there is no setting '{key}'; '{'.'.join(parts[: depth + 1])}' is a single value")
            if parts[:2] == ["model", "mixers"] and len(parts) > 3 and parts[2] in options("model/mixer"):
                _check_mixer_key(parts[2], parts[3])
            return  # the keys of other dictionaries are checked by the code that reads them


def _check_mixer_key(mixer: str, name: str) -> None:
    settings: Any = OmegaConf.load(CONFIG_DIR / "model" / "mixer" / f"{mixer}.yaml")
    if name in settings:
        return
    if renamed := RENAMED.get(settings["_target_"], {}).get(name):
        raise ConfigError(f"model.mixers.{mixer}.{name} is now called model.mixers.{mixer}.{renamed}")
    legal = ", ".join(map(str, settings))
    raise ConfigError(f"there is no setting 'model.mixers.{mixer}.{name}'; legal: {legal}")


def _message(error: Exception, overrides: list[str]) -> str:
    """Hydra's or OmegaConf's message reduced to one line, prefixed with the override it concerns."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    key = getattr(cause, "full_key", None)
    about = [o for o in overrides if key and o.lstrip("+~").startswith(f"{key}=")] or [
        o for o in overrides if o in str(error) or o.lstrip("+~").partition("=")[0] in str(error)
    ]
    shown, _, message = omegaconf_message(cause).partition(": ")
    if "is not in struct" in message and key:
        where = "configs/data/task/<name>.yaml" if key.startswith("data.task.") else "python train.py --help"
        return f"there is no setting '{key}'; the legal ones are in {where}"
    if "is not a ListConfig" in message and key:
        return f"{about[0] if about else shown}: a list is expected, as in {key}=[a,b]"
    return f"{about[0] if about else shown}: {message}"


def help_text() -> str:
    """The text of `python train.py --help`: groups with their options, then every setting with its default."""
    lines = [
        "Pretrain a language model at long context.",
        "",
        "  python train.py [experiment=NAME] [group=OPTION ...] [key=value ...]",
        "  torchrun --nproc_per_node 8 train.py experiment=pg19_150m    one process per GPU, sharded with FSDP",
        "  python train.py experiment=pg19_150m dry_run=true            only report parameters, state, FLOPs, memory",
        "",
        "Repeating a command resumes its run (resume=auto).",
        "",
        "Groups (group=OPTION):",
    ]
    lines += [f"  {group:<14} {' '.join(options(group))}" for group in groups() if options(group)]
    lines += ["", "Settings (key=value) and their defaults before a group or an experiment changes them:"]
    lines += describe(Config)
    lines += [
        "",
        "Each mixer's own settings are listed in configs/model/mixer/<name>.yaml; set them as in "
        "model.mixers.ovq.num_centroids=4096.",
    ]
    return "\n".join(lines)
