"""Turn a command line into a config: Hydra composes configs/*.yaml, and error messages name the legal values.

A wrong name or type fails here, before torch is imported.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import open_dict
from omegaconf.errors import OmegaConfBaseException

from ovq.config import Config, check
from ovq.config_data import DataConfig, MixtureSource, check_tokenizer_used, check_used
from ovq.environment import plain
from ovq.errors import ConfigError, omegaconf_message, one_line
from ovq.identity import FREE_AT_RESUME, within
from ovq.overrides import CONFIG_DIR, Dirs, canonical, directories, file_of, groups, literal, options, parts_of
from ovq.schema import columns, describe

# Overrides left out of a run folder's name: they say where and how the run executes, not what it computes.
NAMELESS = tuple(key for key in FREE_AT_RESUME if key not in ("trainer.steps", "name")) + ("experiment",)
FIRST = ("model", "size", "seed")  # come first in a run folder's name; the others follow in alphabetical order
LONG_NAME, SHORT_VALUE, LONGEST_NAME = 100, 20, 200  # in characters; the last in bytes, of the usual limit of 255


def compose(overrides: list[str]) -> Config:
    """The config that a list of overrides describes (`ovq.overrides`), checked against the schema.

    Raises:
        ConfigError: an unknown group, option, key or value; the one-line message lists the legal ones.
    """
    dirs, overrides = directories(overrides)
    composed = _hydra(canonical(overrides, dirs), dirs)
    cfg: Config = composed  # a DictConfig that behaves as a Config
    if cfg.data.kind == "mixture":
        with open_dict(composed):
            cfg.data.mixture = {
                name: _source(name, values, dirs) for name, values in plain(cfg.data)["mixture"].items()
            }
    check(cfg)
    check_used(cfg.data)
    check_tokenizer_used(cfg.tokenizer, [parts_of(override)[1] for override in overrides])
    # An experiment may configure mixers that the chosen model does not use; a run's config keeps only those it builds.
    with open_dict(composed):
        cfg.model.mixers = {name: cfg.model.mixers[name] for name in dict.fromkeys(cfg.model.pattern)}
    return cfg


def _hydra(overrides: list[str], dirs: Dirs) -> Any:
    search = [f"hydra.searchpath=[{','.join(repr('file://' + str(folder.resolve())) for folder in dirs)}]"]
    _register_schema()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            return hydra_compose("config", overrides=overrides + (search if dirs else []))
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(_message(error, overrides)) from None


def _source(name: str, given: Any, dirs: Dirs) -> dict[str, Any]:
    """All settings of one data set of a mixture: those of an option of configs/data (the one that `data` names, or else
    the one with its own name), overridden by those given; a plain number is its weight."""
    where = f"data.mixture.{name}"
    values = dict(given) if isinstance(given, dict) else {"weight": given}
    option = str(values.pop("data", name))
    if option not in options("data", dirs):
        raise ConfigError(
            f"{where}: there is no data set '{option}'; legal: {', '.join(options('data', dirs))}; "
            f"for one of your own, {where}={{data: parquet, train: [FILES], weight: 0.5}}"
        )
    legal = [item.name for item in dataclasses.fields(MixtureSource)]
    for key in values:
        if key not in legal:
            shared = key in [item.name for item in dataclasses.fields(DataConfig)]
            hint = f"data.{key} holds for the whole mixture" if shared else f"legal: data, {', '.join(legal)}"
            raise ConfigError(f"there is no setting '{where}.{key}'; {hint}")
    return {key: value for key, value in _option(option, tuple(dirs)).items() if key in legal} | values


@lru_cache
def _option(name: str, dirs: tuple[Path, ...]) -> dict[str, Any]:
    """The settings of an option of configs/data."""
    return plain(_hydra([f"data={name}"], dirs).data)


@lru_cache
def _register_schema() -> None:
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=Config)


def run_dir_of(cfg: Config, overrides: list[str]) -> Path:
    """The run folder of a command line: `run_dir` if set, else runs_root/<experiment>[,key=value...].

    A pure function of the command line, with no clock and no counter, so every rank and a requeued job find the same
    folder. A name that had to be shortened or altered ends with a digest of the full name, which keeps it unique.
    """
    if cfg.run_dir:
        return Path(cfg.run_dir).expanduser()
    parser = OverridesParser.create()
    parts: list[tuple[str, str]] = []
    for override in parser.parse_overrides([literal(o) for o in directories(overrides)[1] if o]):
        key = override.get_key_element().lstrip("+~").split("@")[0]
        if not within(key, NAMELESS):
            parts.append((key.replace("/", "."), override.get_value_element_as_str()))
    last = [_end(key, cfg) for key, _ in parts]  # all that the name shows of a key that no other ends like
    parts = [(end if last.count(end) == 1 else key, value) for end, (key, value) in zip(last, parts)]
    parts.sort(key=lambda part: (FIRST.index(part[0]) if part[0] in FIRST else len(FIRST), part))
    full = ",".join([cfg.name, *(f"{key}={value}" for key, value in parts)])
    name = file_name(full)
    if len(name) > LONG_NAME:  # keep every setting, but only the end of a long value, which tells paths apart
        name = ",".join(
            [file_name(cfg.name), *(f"{key}={file_name(value).strip('_')[-SHORT_VALUE:]}" for key, value in parts)]
        )
    kept = name.encode()[:LONGEST_NAME].decode(errors="ignore")
    if kept != full:
        kept = f"{kept}-{hashlib.sha256(full.encode()).hexdigest()[:8]}"
    return Path(cfg.runs_root).expanduser() / kept


def _end(key: str, cfg: Config) -> str:
    """The last part of a key, after the mixer's name if another mixer of the model has such a setting, or the run."""
    *before, end = key.split(".")
    if before[:2] == ["model", "mixers"] and len(before) == 3:
        others = (cfg.model.mixers[name] for name in cfg.model.pattern if name != before[2])
        if end == "seed" or any(end in other for other in others):
            return f"{before[2]}.{end}"
    return end


def file_name(text: str) -> str:
    """The text with `_` for every character that a shell or a file system might misinterpret."""
    return "".join(c if c.isalnum() or c in "=,._-" else "_" for c in text)


# --- messages --------------------------------------------------------------------------------------------------------


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
    if "is not Optional" in message and key:
        return f"{about[0] if about else f'{key}=null'}: a value is needed"
    if "Could not append to config" in message and about:
        return f"{about[0]}: the setting exists already; leave the + out"
    if found := re.search(r"Could not override '(data/task)'", message):
        return f"{about[0] if about else found[1]} needs data=task, or another data set with a task"
    return f"{about[0].lstrip('+') if about else shown}: {one_line(message)}"


def help_text(dirs: Dirs = ()) -> str:
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
    lines += [f"  {group:<14} {' '.join(options(group, dirs))}" for group in groups(dirs)]
    lines += ["", "Settings (key=value) and their defaults before a group or an experiment changes them:"]
    lines += describe(Config)
    lines += ["", "Settings of the mixers that a model may use, and of the tasks (data=task data/task=NAME):"]
    for mixer in options("model/mixer", dirs):
        lines += columns(own_settings(file_of("model/mixer", mixer, dirs), f"model.mixers.{mixer}."))
    for task in options("data/task", dirs):
        lines += ["", f" data/task={task}", *columns(own_settings(file_of("data/task", task, dirs), "data.task."))]
    lines += [
        "",
        "--config-dir DIR adds options of your own: DIR/experiment/mine.yaml is experiment=mine, and so on.",
    ]
    return "\n".join(lines)


def own_settings(file: Path, prefix: str) -> list[tuple[str, str]]:
    """('prefix.name=default', help) for each setting of a class, from its config file, whose comments are the help."""
    lines = [re.fullmatch(r"(\w+): (.*?)(?:\s+# (.*))?", line) for line in file.read_text().splitlines()]
    return [(f"{prefix}{m[1]}={m[2]}", m[3] or "") for m in lines if m and m[1] != "_target_"]
