"""The configuration schema: every setting of a run, its type and its default, in one place.

`configs/*.yaml` choose values, this file says what exists. `compose` merges both with Hydra's command-line syntax, so
that a wrong name or type fails before torch is imported. Nothing here knows about devices or ranks: the same command
gives the same config, and the same run folder, on every machine and at every restart.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"


class ConfigError(ValueError):
    """A setting that cannot be used. The message is one line: the key, what is wrong with it, and the legal values."""


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
    # builtin | parquet | jsonl | text | memmap | recall
    kind: str = MISSING
    # Paths, globs, hf://datasets/... or s3://... patterns of the training and held-out files.
    train: list[str] = field(default_factory=list)
    validation: list[str] = field(default_factory=list)
    test: list[str] = field(default_factory=list)
    text_field: str = "text"
    title_field: str | None = None
    revision: str | None = None
    # "packed": documents follow each other in a lane; "document": one document (or the head of one) a sequence.
    packing: str = "packed"
    isolate_documents: bool = False
    shuffle: bool = True
    num_workers: int = 0
    prefetch: int = 4
    # "error": a missing or corrupt shard stops the run; "skip": it is left out, counted and logged.
    on_bad_shard: str = "error"
    # Words in the train/validation/test splits, for word-level perplexity (PG19's published counts); counted if null.
    words: dict[str, int] = field(default_factory=dict)
    # Arguments of a generated task (data=recall); null for text.
    task: dict[str, Any] | None = None


@dataclass
class TokenizerConfig:
    name: str = MISSING
    kind: str = MISSING  # byte | sentencepiece
    model_path: str | None = None


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
    schedule: str = "cosine"
    warmup_steps: int = 100
    min_lr_ratio: float = 0.1
    decay_share: float = 0.2


@dataclass
class TrainerConfig:
    steps: int = 1000
    context: int = 2048
    global_batch: int = 8  # sequences a step, over all ranks and accumulation steps
    micro_batch: int = 8  # sequences a forward pass on one device
    device: str = "auto"  # auto | cpu | cuda
    precision: str = "auto"  # auto | fp32 | bf16: dtype of compute; parameters and optimizer stay float32
    shard: str = "full"  # full (FSDP) | hybrid (HSDP) | none
    replicas: int = 1  # HSDP: number of replica groups
    activation_checkpointing: str = "none"  # none | selective | full
    compile: bool = False
    grad_clip: float = 1.0
    z_loss: float = 0.0
    loss_chunk_tokens: int = 2048  # tokens whose logits are held at once
    nonfinite: str = "stop"  # stop | skip
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
    name: str = "none"  # none | wandb (metrics.jsonl is always written)
    project: str = "ovq"
    entity: str | None = None
    mode: str = "offline"  # wandb: online | offline
    tags: list[str] = field(default_factory=list)


@dataclass
class EvalConfig:
    split: str = "validation"
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
