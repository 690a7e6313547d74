"""The identity of a run: what it is trained from, however that is spelled, and what may change when it is resumed.

`RULES` is the only table of this. It covers every setting of the schema, docs/promises.md shows it (`table`), and run
folders, sweeps, figures and plots all compare runs by it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from ovq.config import Config, flatten

MIXERS = Path(__file__).resolve().parent.parent / "configs" / "model" / "mixer"
TASKS = Path(__file__).resolve().parent.parent / "configs" / "data" / "task"


@dataclass(frozen=True)
class Rule:
    """How settings, or groups of them, bear on a run's identity, and what happens if they change at a resume.

    `part`: "yes": their values are part of the identity; "by content": what they refer to is; "no": they may change.
    """

    settings: tuple[str, ...]
    part: str
    happens: str


VALUE, CONTENT, FREE = "yes", "by content", "no"
RULES = (
    Rule(
        (
            *("seed", "model", "data.task", "data.mixture", "data.packing", "data.isolate_documents", "data.shuffle"),
            *("trainer.context", "trainer.lengths", "trainer.global_batch", "init_from"),
        ),
        VALUE,
        "Refused with a line that says what differs, also in a branch (except `init_from`); use another `run_dir`. A "
        "mixer setting that did not exist when the run was made counts as its default.",
    ),
    Rule(
        ("optim", "trainer.grad_clip", "trainer.z_loss", "trainer.precision"),
        VALUE,
        "Refused in the run's own folder. A branch (`resume=CHECKPOINT run_dir=NEW`) may change them, but not the "
        "optimizer itself; a new learning rate applies from the branch's first step.",
    ),
    Rule(
        (
            *("data.name", "data.kind", "data.train", "data.path", "data.config_name", "data.data_files"),
            *("data.text_field", "data.revision", "tokenizer"),
        ),
        CONTENT,
        "Continues if the fingerprint is the same: a relative path, an absolute one, a copy elsewhere, a folder that "
        "was prepared from the same files. Other documents or other pieces are refused.",
    ),
    Rule(
        ("trainer.steps",),
        FREE,
        "The schedule becomes that of the new number. More steps are refused where the rate would jump up (cosine and "
        "linear, wsd in its decay), unless `trainer.allow_rate_jump=true`.",
    ),
    Rule(
        ("eval", "data.validation", "data.test", "data.words", "trainer.eval_every"),
        FREE,
        "They apply from the next evaluation on, even if the split changes; earlier results stay as they are.",
    ),
    Rule(
        ("data.on_bad_shard", "trainer.nonfinite", "trainer.max_skipped_steps"),
        FREE,
        "From then on, unreadable documents count as empty and non-finite steps are skipped. Leaving out a whole shard "
        "would change the data and is refused.",
    ),
    Rule(
        (
            *("trainer.micro_batch", "trainer.device", "trainer.threads", "trainer.shard", "trainer.replicas"),
            *("trainer.compile", "trainer.context_parallel"),
            *("trainer.activation_checkpointing", "trainer.loss_chunk_tokens", "trainer.deterministic"),
        ),
        FREE,
        "The same steps on the same tokens, equal up to the rounding of sums; not so with VQ, whose codebook is "
        "updated after each micro-batch, nor where `trainer.precision=auto` means another precision, which a line "
        "says.",
    ),
    Rule(
        (
            *("data.num_workers", "data.prefetch", "data.title_field", "trainer.log_every", "trainer.health_every"),
            *("trainer.checkpoint_every", "trainer.keep_last", "trainer.async_checkpoint", "trainer.timeout_s"),
            *("trainer.kernel_test_s", "trainer.peak_tflops", "trainer.progress", "trainer.allow_rate_jump", "logger"),
        ),
        FREE,
        "The same steps.",
    ),
    Rule(
        ("name", "runs_root", "run_dir", "resume", "dry_run"),
        FREE,
        "They determine where a run is stored and how it starts; another folder is another run.",
    ),
)
BRANCHED = (*RULES[1].settings, "init_from")  # settings of a run's identity that a branch may change
FREE_AT_RESUME = tuple(name for rule in RULES if rule.part == FREE for name in rule.settings)
ORDERED = ("data.mixture", "optim.groups")  # the rows, or the parameters, of an entry depend on the entries before it
PATHS = ("data.train", "tokenizer.model_path", "init_from.path")


def within(key: str, prefixes: tuple[str, ...] | list[str]) -> bool:
    """Whether a dotted key is one of `prefixes` or is nested under one."""
    return any(key == prefix or key.startswith(prefix + ".") for prefix in prefixes)


@functools.cache
def part_of(key: str) -> str:
    """`Rule.part` of a setting; one that no rule names is part of the identity."""
    return next((rule.part for rule in RULES if within(key, rule.settings)), VALUE)


def identity(cfg: Config) -> dict[str, Any]:
    """The settings that determine what a run computes: dotted key -> value."""
    values = flatten(cfg)
    return {key: value for key, value in values.items() if part_of(key) != FREE} | orders(values)


def digest(cfg: Config) -> str:
    """A short hash of the settings that determine what a run computes."""
    return hashlib.sha256(json.dumps(identity(cfg), sort_keys=True, default=str).encode()).hexdigest()[:12]


def changed(old: Config, new: Config, *, contents: bool = True) -> list[str]:
    """Settings that differ between two configs although a resumed run may not change them, as 'key: old -> new'.

    Args:
        contents: also compare the settings that count by content, by their paths. False if the content itself is
            compared: a checkpoint holds the fingerprint of its data.
    """
    return differences(flatten(old), flatten(new), contents=contents)


def differences(before: dict[str, Any], after: dict[str, Any], *, contents: bool = True) -> list[str]:
    """`changed` for flattened configs. A setting that one lacks, because it was added later, counts as its default."""
    skipped = (FREE,) if contents else (FREE, CONTENT)
    found = []
    before, after = before | orders(before), after | orders(after)
    for key in sorted(before.keys() | after.keys()):
        if part_of(key) in skipped:
            continue
        old, new = ((values[key] if key in values else default_of(key, values)) for values in (before, after))
        if meant(key, old) != meant(key, new):
            found.append(f"{key}: {old} -> {new}")
    return found


def orders(values: dict[str, Any]) -> dict[str, list[str]]:
    """The order of the entries of `ORDERED` settings, where it matters: with several of them."""
    found = {}
    for setting in ORDERED:
        inside = [key.removeprefix(f"{setting}.") for key in values if key.startswith(f"{setting}.")]
        # NAME.setting... of a mixture; PATTERN.setting of groups, where the pattern may contain dots
        parts = [key.split(".")[0] if setting == "data.mixture" else key.rpartition(".")[0] for key in inside]
        names = list(dict.fromkeys(parts))
        if len(names) > 1:
            found[f"{setting} (order)"] = names
    return found


def meant(key: str, value: Any) -> Any:
    """A value without mere differences of spelling: local paths become absolute."""
    if key not in PATHS or value is None:
        return value
    return [meant(key, each) for each in value] if isinstance(value, list) else absolute(str(value))


def absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def default_of(key: str, values: dict[str, Any]) -> Any:
    """The default of a setting by its dotted name; None if it has none.

    Args:
        values: a flattened config, which names the class that a setting of a mixer or of data.task belongs to.
    """
    parts = key.split(".")
    if parts[:2] == ["model", "mixers"] and len(parts) == 4:
        return _settings(MIXERS, values.get(f"model.mixers.{parts[2]}._target_")).get(parts[3])
    if parts[:2] == ["data", "task"] and len(parts) == 3:
        return _settings(TASKS, values.get("data.task._target_")).get(parts[2])
    return _schema().get(key)


@functools.cache
def _schema() -> dict[str, Any]:
    return flatten(OmegaConf.structured(Config))


@functools.cache
def _settings(folder: Path, target: str | None) -> dict[str, Any]:
    """The defaults of one of this project's classes, from the config file that names it."""
    configs = [yaml.safe_load(path.read_text()) for path in sorted(folder.glob("*.yaml"))] if target else []
    return next((found for found in configs if found.get("_target_") == target), {})


# --- the same run in another folder ----------------------------------------------------------------------------------

LOOKED_AT = 300  # run folders that are read at most, newest first: a start must not wait for thousands


def twins(cfg: Config, run_dir: Path) -> list[tuple[Path, int]]:
    """Other run folders beside this one with checkpoints of the same run, and the step of the newest; most steps first.

    Their settings differ only where they may, as in the number of steps, or in spelling.
    """
    wanted, found = flatten(cfg), []
    folders = [path.parent.parent for path in run_dir.parent.glob("*/checkpoints/latest")]
    for folder in sorted(folders, key=lambda path: -path.stat().st_mtime)[:LOOKED_AT]:
        if folder.absolute() != run_dir.absolute() and (stored := _flat_config(folder)):
            same = stored.get("seed") == wanted["seed"] and not differences(stored, wanted)
            step = os.path.basename(os.path.realpath(folder / "checkpoints" / "latest")).removeprefix("step_")
            if same and step.isdecimal():
                found.append((folder, int(step)))
    return sorted(found, key=lambda each: -each[1])


def _flat_config(run_dir: Path) -> dict[str, Any] | None:
    """A stored config as it is written, flattened but not checked; None if it cannot be read."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return flatten(yaml.load((run_dir / "config.yaml").read_text(), loader))
    except (OSError, ValueError, AttributeError, TypeError, yaml.YAMLError):
        return None


# --- the table in the documents --------------------------------------------------------------------------------------


def table() -> str:
    """`RULES` in Markdown, as docs/promises.md has it."""
    rows = ["| setting | part of the identity | may change at a resume | what happens |", "| --- | --- | --- | --- |"]
    may = {VALUE: "no", CONTENT: "yes, to the same content", FREE: "yes"}
    for rule in RULES:
        names = ", ".join(f"`{name}`" for name in rule.settings)
        rows.append(f"| {names} | {rule.part} | {may[rule.part]} | {rule.happens} |")
    return "\n".join(rows)
