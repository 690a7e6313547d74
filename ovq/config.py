"""The configuration schema: every setting of a run with its type, default, range and meaning, in one place.

This file and `ovq.config_data` define which settings exist; `configs/*.yaml`, read by `ovq.compose`, choose their
values. Nothing here knows about devices or ranks: a command gives the same config, and the same run folder, on every
machine and at every restart.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ovq import lengths
from ovq.config_data import DataConfig, TokenizerConfig, check_data, check_tokenizer
from ovq.environment import freeze, plain
from ovq.errors import ConfigError, omegaconf_message, one_line
from ovq.files import write_whole
from ovq.instantiate import refuse_untrusted
from ovq.optim_config import OptimConfig as OptimConfig
from ovq.optim_config import check_optim
from ovq.schema import REQUIRED, one_of, problems, setting


@dataclass
class ModelConfig:
    name: str = setting(REQUIRED, "name of the architecture, an option of configs/model")
    pattern: list[str] = setting(REQUIRED, "mixer of each layer, repeated to fill num_layers")
    mixers: dict[str, dict[str, Any]] = setting({}, "name -> {_target_: class path, **its settings}")
    size: str = setting(REQUIRED, "name of the size, an option of configs/model/size; choose it with model/size=")
    num_layers: int = setting(REQUIRED, "number of blocks", at_least=1)
    dim: int = setting(REQUIRED, "width of the residual stream", at_least=1)
    num_heads: int = setting(REQUIRED, "query heads per mixer", at_least=1)
    num_kv_heads: int = setting(REQUIRED, "key/value heads per mixer; must divide num_heads", at_least=1)
    head_dim: int = setting(REQUIRED, "width of a head", at_least=1)
    ffn_dim: int = setting(REQUIRED, "hidden width of the MLP", at_least=1)
    tie_embeddings: bool = setting(False, "share one matrix between the embedding and the head")
    norm_eps: float = setting(1e-5, "epsilon of RMSNorm", above=0)
    init_std: float = setting(0.02, "standard deviation of initial weights", above=0)
    logit_softcap: float = setting(
        0.0, "cap c of the logits, which become c tanh(logits / c); 0: none (Gemma 2 has 30)", at_least=0
    )


@dataclass
class InitConfig:
    path: str | None = setting(
        None,
        "run, checkpoint or export whose weights a new run starts from (short: init_from=DIR); null: fresh weights",
        paths=True,
    )
    strict: bool = setting(True, "whether all weights must fit; false: take those that do, and name the others")


@dataclass
class TrainerConfig:
    steps: int = setting(1000, "optimizer steps", at_least=1)
    context: int = setting(2048, "tokens per sequence", at_least=1)
    lengths: dict[int, int] = setting({}, "tokens per sequence from a step on, {step: tokens}; {}: trainer.context")
    global_batch: int = setting(8, "sequences per step, over all ranks and accumulation steps", at_least=1)
    micro_batch: int = setting(8, "sequences per forward pass on one device", at_least=1)
    device: str = one_of("auto", "cpu", "cuda", help="device to train on")
    precision: str = one_of(
        "auto", "fp32", "bf16", help="compute dtype, parameters stay float32; auto: bf16 on a GPU or a CPU with AMX"
    )
    threads: int | None = setting(
        None,
        "CPU threads of a run with one process; null: as many as there are free cores when the run first starts",
        at_least=1,
    )
    shard: str = one_of("full", "hybrid", "none", help="FSDP, HSDP, or a full copy of the model on each device")
    replicas: int = setting(1, "groups of processes that each hold a copy of the model (shard=hybrid)", at_least=1)
    context_parallel: int = setting(
        1, "ranks that split each sequence; mixers split heads or pass on state", at_least=1
    )
    activation_checkpointing: str = one_of("none", "selective", "full", help="what to recompute in the backward pass")
    compile: bool = setting(False, "apply torch.compile to each block")
    grad_clip: float = setting(1.0, "maximum global gradient norm; 0: no clipping", at_least=0)
    z_loss: float = setting(0.0, "weight of the squared log-partition function", at_least=0)
    loss_chunk_tokens: int = setting(2048, "tokens whose logits are in memory at once", at_least=1)
    allow_rate_jump: bool = setting(
        False, "resume although another number of steps makes the learning rate jump up at that step"
    )
    nonfinite: str = one_of("stop", "skip", help="on a non-finite loss or gradient, stop the run or skip the step")
    max_skipped_steps: int = setting(10, "consecutive skipped steps tolerated before the run stops anyway", at_least=0)
    log_every: int = setting(
        1,
        "steps between waits for the device; every step is still logged; 0: only at checkpoints and evaluations",
        at_least=0,
    )
    health_every: int = setting(50, "steps between reports of the mixers' health; 0: none", at_least=0)
    eval_every: int = setting(0, "steps between evaluations; 0: none before the end", at_least=0)
    checkpoint_every: int = setting(
        500, "steps between checkpoints; 0: only at the end, or when a signal stops the run", at_least=0
    )
    keep_last: int = setting(
        2,
        "number of complete checkpoints to keep; with optim.schedule=wsd also the newest before the decay",
        at_least=1,
    )
    async_checkpoint: bool = setting(True, "write checkpoints in a background thread while training continues")
    timeout_s: int = setting(600, "seconds a collective or a row of data may take, after the first step", at_least=1)
    kernel_test_s: int = setting(
        240, "seconds that a test of the Triton kernels on this GPU may take before training; 0: no test", at_least=0
    )
    peak_tflops: float | None = setting(
        None, "peak TFLOP/s of one device, for MFU; null: from a table of known GPUs, else measured", above=0
    )
    progress: bool = setting(True, "show a progress bar, or print lines if stderr is not a terminal")
    deterministic: bool = setting(False, "use only deterministic algorithms")


@dataclass
class LoggerConfig:
    name: str = one_of("none", "wandb", "tensorboard", help="where to send metrics in addition to metrics.jsonl")
    project: str = setting("ovq", "wandb project")
    entity: str | None = setting(None, "wandb entity")
    mode: str = one_of("offline", "online", help="wandb mode")
    tags: list[str] = setting([], "wandb tags")


@dataclass
class EvalConfig:
    split: str = one_of("validation", "test", help="held-out split to evaluate on")
    context: int = setting(8192, "positions measured in each document", at_least=1)
    documents: int = setting(8, "maximum number of held-out documents", at_least=1)
    piece: int = setting(2048, "tokens per forward pass; state is carried from piece to piece", at_least=1)
    batch: int = setting(1, "documents per batch on each rank", at_least=1)
    num_centroids: int | None = setting(None, "dictionary capacity at evaluation; null: as trained", at_least=1)
    restart: int | None = setting(
        None,
        "let a prediction see only the tokens before it, more than this many and at most twice as many; null: all",
        at_least=1,
    )
    weights: str = one_of("trained", "ema", help="weights to evaluate; ema: their moving average, see optim.ema")
    at_end: bool = setting(True, "evaluate after the last step")


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    init_from: InitConfig = field(default_factory=InitConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    name: str = setting("default", "name of the experiment, and the first part of the run folder's name")
    seed: int = setting(0, "seed of the initialisation and the data order", at_least=0, at_most=2**32 - 1)
    runs_root: str = setting("runs", "folder that holds the run folders", paths=True)
    run_dir: str | None = setting(None, "run folder; null: named after the command line", writes="folder")
    resume: str = setting(
        "auto",
        "auto: from the run folder's newest checkpoint; never; or the folder of a checkpoint or a run to branch from",
        paths=True,
    )
    dry_run: bool = setting(False, "print parameters, state, FLOPs, memory and data without training")


def check(cfg: Config) -> None:
    """Raise ConfigError unless every value is legal and the settings are compatible."""
    try:
        for problem in problems(Config, cfg):
            raise ConfigError(problem)
    except OmegaConfBaseException as error:  # an interpolation that cannot be resolved
        raise ConfigError(omegaconf_message(error)) from None
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        raise ConfigError(f"these settings have no value: {', '.join(missing)}")
    for name in cfg.model.pattern:
        if name not in cfg.model.mixers or not cfg.model.mixers[name].get("_target_"):
            raise ConfigError(
                f"model.pattern names the mixer '{name}', which model.mixers does not define; "
                f"add it with +model/mixer@model.mixers.{name}={name}, or use one of: {', '.join(cfg.model.mixers)}"
            )
    trainer = cfg.trainer
    if trainer.global_batch % trainer.micro_batch:
        raise ConfigError(
            f"trainer.global_batch={trainer.global_batch} must be a multiple of "
            f"trainer.micro_batch={trainer.micro_batch}"
        )
    if problem := lengths.problem(trainer):
        raise ConfigError(problem)
    if trainer.lengths and cfg.data.kind == "task":
        raise ConfigError(
            "trainer.lengths would cut a generated task's questions off what they ask about; use data.task.short_steps"
        )
    check_optim(cfg.optim)
    if cfg.eval.weights == "ema" and not cfg.optim.ema:
        raise ConfigError("eval.weights=ema needs averaged weights, which this run does not keep; set optim.ema=0.999")
    if cfg.model.num_heads % cfg.model.num_kv_heads:
        raise ConfigError(
            f"model.num_heads={cfg.model.num_heads} must be a multiple of model.num_kv_heads={cfg.model.num_kv_heads}"
        )
    check_tokenizer(cfg.tokenizer)
    check_data(cfg.data)


# --- plain values and files ------------------------------------------------------------------------------------------


def to_dict(cfg: Config | dict[str, Any]) -> dict[str, Any]:
    """The config as plain dictionaries, lists and scalars, safe to store and to show: see `ovq.environment.plain`."""
    return plain(cfg)


def flatten(cfg: Config | dict[str, Any]) -> dict[str, Any]:
    """Dotted key -> value, to compare two configs."""

    def walk(node: Any, prefix: str) -> dict[str, Any]:
        if isinstance(node, dict):
            parts = [walk(value, f"{prefix}{key}.") for key, value in node.items()]
            return {key: value for part in parts for key, value in part.items()}
        return {prefix[:-1]: node}

    return walk(to_dict(cfg), "")


def from_dict(values: dict[str, Any], *, stored: bool = False, trust: Collection[str] = ()) -> Config:
    """The inverse of `to_dict`, checked against the schema. A `stored` config may read only those environment variables
    NAME for which `trust` contains "oc.env:NAME" (`ovq.environment.freeze`)."""
    try:
        cfg = OmegaConf.merge(OmegaConf.structured(Config), values)
        if stored:
            freeze(cfg, [name.removeprefix("oc.env:") for name in trust if name.startswith("oc.env:")])
    except OmegaConfBaseException as error:
        raise ConfigError(omegaconf_message(error)) from None
    config = cast(Config, cfg)  # a DictConfig that behaves as one
    check(config)
    return config


def save(cfg: Config, run_dir: Path | str) -> Path:
    """Write run_dir/config.yaml atomically. Called by rank 0 only."""
    path = Path(run_dir) / "config.yaml"
    write_whole(path, OmegaConf.to_yaml(OmegaConf.create(to_dict(cfg))))
    return path


def load(run_dir: Path | str, trust: Collection[str] | None = None) -> Config:
    """The config that a run folder was made with.

    Args:
        trust: for building objects from the config: class paths outside this project that it may name, and environment
            variables that it may read, written oc.env:NAME; None: the config is only read, and may name any class.

    Raises:
        ConfigError: no run folder, a config.yaml that cannot be read, or a class that is not trusted.
    """
    path = Path(run_dir) / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run_dir} is not a run folder: it has no config.yaml")
    try:
        values: Any = OmegaConf.to_container(OmegaConf.load(path))
        cfg = from_dict(values, stored=True, trust=trust or ())
    except Exception as error:  # damaged YAML, or anything at all in the place of a config
        raise ConfigError(
            f"{path} cannot be used: {one_line(error)}. If it is damaged, move it away: the command that trained the "
            "run writes it again"
        ) from None
    if trust is not None:
        refuse_untrusted(targets(cfg), trust, run_dir, path)
    return cfg


def targets(cfg: Config) -> list[tuple[str, str]]:
    """The classes that a config names, as (setting, class path)."""
    named = [(f"model.mixers.{name}._target_", mixer.get("_target_")) for name, mixer in cfg.model.mixers.items()]
    named.append(("data.task._target_", cfg.data.task.get("_target_")))
    return [(where, str(target)) for where, target in named if target is not None]
