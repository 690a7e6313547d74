"""The configuration schema: every setting of a run, its type and its default, in one place.

`configs/*.yaml` choose values, this file says what exists. `compose` merges both with Hydra's command-line syntax, so
that a wrong name or type fails before torch is imported. Nothing here knows about devices or ranks: the same command
gives the same config, and the same run folder, on every machine and at every restart.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import MISSING, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from ovq.files import write_whole

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"


class ConfigError(ValueError):
    """A setting that cannot be used. The message is one line: the key, what is wrong with it, and the legal values."""


def one_of(*options: str) -> Any:
    """A string setting with a closed list of legal values; the first is the default."""
    return field(default=options[0], metadata={"choices": options})


@dataclass
class ModelConfig:
    name: str = MISSING
    # One mixer name per layer, repeated until num_layers are filled: [sliding_window, ovq] alternates the two.
    pattern: list[str] = MISSING
    # name -> {_target_: class path, **arguments of that class}
    mixers: dict[str, dict[str, Any]] = field(default_factory=dict)
    size: str = MISSING
    num_layers: int = MISSING
    dim: int = MISSING
    num_heads: int = MISSING
    num_kv_heads: int = MISSING
    head_dim: int = MISSING
    ffn_dim: int = MISSING
    tie_embeddings: bool = False
    norm_eps: float = 1e-5
    init_std: float = 0.02


@dataclass
class DataConfig:
    name: str = MISSING
    kind: str = field(
        default=MISSING, metadata={"choices": ("builtin", "parquet", "jsonl", "text", "memmap", "recall")}
    )
    # Paths, globs, hf://datasets/... or s3://... patterns of the training and held-out files.
    train: list[str] = field(default_factory=list)
    validation: list[str] = field(default_factory=list)
    test: list[str] = field(default_factory=list)
    text_field: str = "text"
    title_field: str | None = None
    revision: str | None = None
    # "packed": documents follow each other in a lane; "document": one document (or the head of one) a sequence.
    packing: str = one_of("packed", "document")
    isolate_documents: bool = False
    shuffle: bool = True
    num_workers: int = 0
    prefetch: int = 4
    # "error": a missing or corrupt shard stops the run; "skip": it is left out, counted and logged.
    on_bad_shard: str = one_of("error", "skip")
    # Words in the train/validation/test splits, for word-level perplexity (PG19's published counts); counted if null.
    words: dict[str, int] = field(default_factory=dict)
    # Arguments of a generated task (data=recall); null for text.
    task: dict[str, Any] | None = None


@dataclass
class TokenizerConfig:
    name: str = MISSING
    kind: str = field(default=MISSING, metadata={"choices": ("byte", "sentencepiece")})
    model_path: str | None = None
    vocab_size: int | None = None  # pieces the model is to have; a dry run then needs no model


@dataclass
class OptimConfig:
    name: str = "adamw"
    lr: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1
    fused: bool = True
    # Learning rate over time: linear warm-up, then "cosine" to min_lr_ratio, "wsd" (constant, then linear over the last
    # decay_share of the steps), "linear" or "constant".
    schedule: str = one_of("cosine", "wsd", "linear", "constant")
    warmup_steps: int = 100
    min_lr_ratio: float = 0.1
    decay_share: float = 0.2


@dataclass
class TrainerConfig:
    steps: int = 1000
    context: int = 2048
    global_batch: int = 8  # sequences a step, over all ranks and accumulation steps
    micro_batch: int = 8  # sequences a forward pass on one device
    device: str = one_of("auto", "cpu", "cuda")
    precision: str = one_of("auto", "fp32", "bf16")  # of compute; parameters and optimizer stay float32
    shard: str = one_of("full", "hybrid", "none")  # FSDP, HSDP, plain replicas
    replicas: int = 1  # HSDP: number of replica groups
    activation_checkpointing: str = one_of("none", "selective", "full")
    compile: bool = False
    grad_clip: float = 1.0
    z_loss: float = 0.0
    loss_chunk_tokens: int = 2048  # tokens whose logits are held at once
    nonfinite: str = one_of("stop", "skip")
    max_skipped_steps: int = 10
    log_every: int = 1
    health_every: int = 50
    eval_every: int = 0  # 0: only at the end
    checkpoint_every: int = 500
    keep_last: int = 2
    async_checkpoint: bool = True
    timeout_s: int = 600  # of a collective, after the first step
    peak_tflops: float | None = None  # for MFU; null: known GPUs from a table, else measured once
    progress: bool = True
    deterministic: bool = False


@dataclass
class LoggerConfig:
    name: str = one_of("none", "wandb")  # metrics.jsonl is always written
    project: str = "ovq"
    entity: str | None = None
    mode: str = one_of("offline", "online")  # of wandb
    tags: list[str] = field(default_factory=list)


@dataclass
class EvalConfig:
    split: str = one_of("validation", "test")
    context: int = 8192
    documents: int = 8  # held-out documents used at most
    piece: int = 2048  # tokens a forward pass; state is carried from piece to piece
    batch: int = 1
    num_centroids: int | None = None  # dictionary capacity at evaluation, if not that of training
    at_end: bool = True


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    name: str = "default"  # name of the experiment, first part of the run folder's name
    seed: int = 0
    runs_root: str = "runs"
    run_dir: str | None = None
    resume: str = "auto"  # auto | never | a checkpoint folder
    dry_run: bool = False


# Settings a resumed run may change: they alter how the run is computed or watched, not what it computes.
FREE_AT_RESUME = (
    "trainer.steps",
    "trainer.micro_batch",
    "trainer.device",
    "trainer.shard",
    "trainer.replicas",
    "trainer.compile",
    "trainer.activation_checkpointing",
    "trainer.loss_chunk_tokens",
    "trainer.log_every",
    "trainer.health_every",
    "trainer.eval_every",
    "trainer.checkpoint_every",
    "trainer.keep_last",
    "trainer.async_checkpoint",
    "trainer.timeout_s",
    "trainer.peak_tflops",
    "trainer.progress",
    "trainer.nonfinite",
    "trainer.max_skipped_steps",
    "trainer.deterministic",
    "data.num_workers",
    "data.prefetch",
    "data.words",
    "logger",
    "eval",
    "name",
    "runs_root",
    "run_dir",
    "resume",
    "dry_run",
)
# Overrides that never name a run folder: they say where and how it runs, not what it is.
NAMELESS = tuple(key for key in FREE_AT_RESUME if key not in ("trainer.steps", "name")) + ("experiment",)


def compose(overrides: list[str]) -> Config:
    """The config of a command line in Hydra's syntax, checked against the schema.

    Raises:
        ConfigError: an unknown group, option, key or value, in one line with the legal ones.
    """
    _check_overrides(overrides)
    _register_schema()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            cfg = hydra_compose("config", overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_one_line(error, overrides)) from None
    check(cfg)
    # An experiment may set up mixers that another model does not use: the config of a run names only those it builds.
    with open_dict(cfg):
        cfg.model.mixers = {name: cfg.model.mixers[name] for name in dict.fromkeys(cfg.model.pattern)}
    return cfg  # type: ignore[return-value]  # a DictConfig that behaves as a Config


def _register_schema() -> None:
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=Config)


def check(cfg: Any) -> None:
    """Raise ConfigError unless every choice is legal and the settings can hold together."""
    _check_choices(Config, cfg, "")
    _check_filled(cfg)
    for name in cfg.model.pattern:
        if name not in cfg.model.mixers or "_target_" not in cfg.model.mixers[name]:
            raise ConfigError(
                f"model.pattern names the mixer '{name}', which model.mixers does not define; "
                f"add it with +model/mixer@model.mixers.{name}={name}, or use one of: {', '.join(cfg.model.mixers)}"
            )
    trainer = cfg.trainer
    for key in ("steps", "context", "global_batch", "micro_batch", "loss_chunk_tokens", "keep_last", "replicas"):
        if trainer[key] < 1:
            raise ConfigError(f"trainer.{key}={trainer[key]} must be at least 1")
    if trainer.global_batch % trainer.micro_batch:
        raise ConfigError(
            f"trainer.global_batch={trainer.global_batch} must be a multiple of "
            f"trainer.micro_batch={trainer.micro_batch}"
        )
    for key in ("context", "documents", "piece", "batch"):
        if cfg.eval[key] < 1:
            raise ConfigError(f"eval.{key}={cfg.eval[key]} must be at least 1")
    if cfg.model.num_heads % cfg.model.num_kv_heads:
        raise ConfigError(
            f"model.num_heads={cfg.model.num_heads} must be a multiple of model.num_kv_heads={cfg.model.num_kv_heads}"
        )
    if cfg.optim.lr < 0 or not 0 <= cfg.optim.min_lr_ratio <= 1 or not 0 <= cfg.optim.decay_share <= 1:
        raise ConfigError("optim.lr must be at least 0, optim.min_lr_ratio and optim.decay_share in 0..1")
    if cfg.tokenizer.kind == "sentencepiece" and not cfg.tokenizer.model_path:
        raise ConfigError(
            "tokenizer.model_path is required with tokenizer.kind=sentencepiece; "
            "train a model with: python -m data.tokenizer train data=... out=PATH"
        )


def _check_choices(schema: type, cfg: Any, prefix: str) -> None:
    for item in dataclasses.fields(schema):
        value = None if OmegaConf.is_missing(cfg, item.name) else cfg[item.name]
        choices = item.metadata.get("choices")
        if choices and value is not None and value not in choices:
            raise ConfigError(f"{prefix}{item.name}={value} is not a legal value; legal: {', '.join(choices)}")
        if isinstance(item.default_factory, type) and dataclasses.is_dataclass(item.default_factory):
            _check_choices(item.default_factory, value, f"{prefix}{item.name}.")


def _check_filled(cfg: Any) -> None:
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ConfigError(f"these settings have no value: {', '.join(missing)}")


def _check_overrides(overrides: list[str]) -> None:
    """Refuse unknown groups, options and keys with the legal ones, which Hydra's own messages leave out."""
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
            return  # other dictionaries' keys are checked by what reads them


def _check_mixer_key(mixer: str, name: str) -> None:
    legal = [str(key) for key in OmegaConf.load(CONFIG_DIR / "model" / "mixer" / f"{mixer}.yaml")]
    if name not in legal:
        raise ConfigError(f"there is no setting 'model.mixers.{mixer}.{name}'; legal: {', '.join(legal)}")


def _one_line(error: Exception, overrides: list[str]) -> str:
    """OmegaConf's message cut to one line, with the override it is about in front."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    message = " ".join(str(cause).split("full_key:")[0].split())
    key = getattr(cause, "full_key", None)
    about = [o for o in overrides if key and o.lstrip("+~").startswith(f"{key}=")] or [
        o for o in overrides if o in str(error) or o.lstrip("+~").partition("=")[0] in str(error)
    ]
    return f"{about[0] if about else key or 'config'}: {message}"


def groups() -> list[str]:
    """The config groups: folders of configs/ that hold options."""
    return sorted({str(p.parent.relative_to(CONFIG_DIR)) for p in CONFIG_DIR.rglob("*/*.yaml")})


def options(group: str) -> list[str]:
    """The choices of one config group."""
    return sorted(p.stem for p in (CONFIG_DIR / group).glob("*.yaml"))


def to_dict(cfg: Any) -> dict[str, Any]:
    """The config as plain dictionaries, lists and scalars."""
    return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]


def from_dict(values: dict[str, Any]) -> Config:
    """The inverse of `to_dict`, checked against the schema."""
    try:
        cfg = OmegaConf.merge(OmegaConf.structured(Config), values)
    except OmegaConfBaseException as error:
        raise ConfigError(_one_line(error, [])) from None
    check(cfg)
    return cfg  # type: ignore[return-value]


def save(cfg: Any, run_dir: Path | str) -> Path:
    """Write run_dir/config.yaml, whole or not at all. Called by rank 0 only."""
    path = Path(run_dir) / "config.yaml"
    write_whole(path, OmegaConf.to_yaml(cfg, resolve=True))
    return path


def load(run_dir: Path | str) -> Config:
    """The config a run folder was made with."""
    path = Path(run_dir) / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run_dir} is not a run folder: it has no config.yaml")
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    return from_dict(values)  # type: ignore[arg-type]


def flatten(cfg: Any) -> dict[str, Any]:
    """Dotted key -> value, for comparing two configs."""

    def walk(node: Any, prefix: str) -> dict[str, Any]:
        if isinstance(node, dict):
            parts = [walk(value, f"{prefix}{key}.") for key, value in node.items()]
            return {key: value for part in parts for key, value in part.items()}
        return {prefix[:-1]: node}

    return walk(to_dict(cfg), "")


def changed_identity(old: Any, new: Any) -> list[str]:
    """Settings in which two configs differ and a resumed run may not, as 'key: old -> new'."""
    before, after = flatten(old), flatten(new)
    keys = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in keys if not _within(key, FREE_AT_RESUME)]


def _within(key: str, prefixes: tuple[str, ...] | list[str]) -> bool:
    return any(key == prefix or key.startswith(prefix + ".") for prefix in prefixes)


def run_dir_of(cfg: Any, overrides: list[str]) -> Path:
    """The run folder of a command line: `run_dir`, or runs_root/<experiment>[,key=value...].

    A pure function of the command line: no clock and no counter, so every rank and a requeued job find the same one.
    """
    if cfg.run_dir:
        return Path(cfg.run_dir)
    parser = OverridesParser.create()
    parts = []
    for override in parser.parse_overrides([o for o in overrides if o]):
        key = override.get_key_element().lstrip("+~").split("@")[0]
        if not _within(key, NAMELESS):
            parts.append(f"{key.replace('/', '.').rpartition('.')[2]}={override.get_value_element_as_str()}")
    full = ",".join([cfg.name, *sorted(parts)])
    slug = "".join(c if c.isalnum() or c in "=,._-" else "_" for c in full)
    if slug != full or len(slug) > 100:
        slug = f"{slug[:90]}-{hashlib.sha256(full.encode()).hexdigest()[:8]}"
    return Path(cfg.runs_root) / slug


def digest(cfg: Any) -> str:
    """Short hash of the settings that decide what a run computes."""
    kept = {key: value for key, value in flatten(cfg).items() if not _within(key, FREE_AT_RESUME)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:12]


def parse_tool_args(argv: list[str], defaults: dict[str, Any]) -> dict[str, Any]:
    """key=value arguments of a command-line tool, in Hydra's syntax for values; only keys of `defaults` are legal."""
    values = dict(defaults)
    try:
        parsed = OverridesParser.create().parse_overrides(argv)
    except HydraException as error:
        raise ConfigError(" ".join(str(error).split("\n")[0].split())) from None
    for override in parsed:
        key = override.get_key_element()
        if key not in defaults:
            raise ConfigError(f"there is no option '{key}'; legal: {', '.join(defaults)}")
        values[key] = override.value()
    return values


def help_text() -> str:
    """What `python train.py --help` prints: groups with their options, then every setting with its default."""
    lines = [
        "Pretrain a language model at long context.",
        "",
        "  python train.py [experiment=NAME] [group=OPTION ...] [key=value ...]",
        "  torchrun --nproc_per_node 8 train.py experiment=pg19_150m      one process per GPU, sharded with FSDP",
        "  python train.py experiment=pg19_150m dry_run=true             parameters, state, FLOPs, memory; no training",
        "",
        "The same command finds its run folder again and continues it (resume=auto).",
        "",
        "Groups (group=OPTION):",
    ]
    lines += [f"  {group:<14} {' '.join(options(group))}" for group in groups() if options(group)]
    lines += ["", "Settings (key=value) and their defaults before a group or an experiment changes them:"]
    lines += _settings(Config, "")
    lines += [
        "",
        "Mixers' own settings are those of configs/model/mixer/<name>.yaml, for instance "
        "model.mixers.ovq.num_centroids=4096.",
    ]
    return "\n".join(lines)


def _settings(schema: type, prefix: str) -> list[str]:
    lines = []
    for item in dataclasses.fields(schema):
        if dataclasses.is_dataclass(item.default_factory):
            lines += _settings(item.default_factory, f"{prefix}{item.name}.")  # type: ignore[arg-type]
            continue
        default = item.default if item.default is not dataclasses.MISSING else item.default_factory()  # type: ignore
        shown = "(set by the group)" if default == MISSING else json.dumps(default)
        choices = item.metadata.get("choices")
        lines.append(f"  {prefix}{item.name}={shown}" + (f"   one of: {', '.join(choices)}" if choices else ""))
    return lines
