"""Opens a run folder for evaluation: its config, its tokenizer, and the model with the weights of a checkpoint.

    run = load_run("runs/cpu_demo")
    run.model, run.tokenizer, run.cfg, run.world, run.step

Nothing in the folder is changed, so a run can be evaluated while it trains. Works alone and under torchrun, on the
device of `trainer.device`; the model is sharded over the processes there are.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from data.build import build_tokenizer
from data.tokenizer import Tokenizer
from ovq import config, processes
from ovq.config import Config
from ovq.errors import ConfigError, one_line
from ovq.model import Transformer, build_model
from ovq.processes import World
from ovq.schema import REQUIRED, setting
from ovq.train import checkpoint
from ovq.train.parallelize import parallelize

# How the run was computed does not matter here: as many processes as there are, nothing kept for a backward pass.
COMPUTED = {
    "trainer.compile": False,
    "trainer.activation_checkpointing": "none",
    "trainer.shard": "full",
    "trainer.replicas": 1,
}
# What an evaluation may change of a run's settings; the rest is what was trained.
CHANGEABLE = ("eval", "data", "trainer", "logger", "model.mixers")


@dataclass
class RunOptions:
    """Options of every tool that evaluates a run. Options that are None stay as the run has them."""

    run: str = setting(REQUIRED, "the run folder")
    checkpoint: str | None = setting(None, "a checkpoint's folder, name or step; null: the newest good one")

    def open(self, overrides: Sequence[str] = ()) -> Run:
        """The run, with the tool's other options and `overrides` (full names) in place of its own settings.

        Raises:
            ConfigError, CheckpointError: as `load_run`.
        """
        names = [item.name for item in fields(self)]
        for text in overrides:
            if "." not in (key := text.partition("=")[0]):
                raise ConfigError(f"there is no option '{key}'; legal: {', '.join(names)}, and settings by full name")
        own = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in ("run", "checkpoint")}
        short = [f"eval.{name}={value}" for name, value in own.items() if value is not None]
        at = int(self.checkpoint) if self.checkpoint and self.checkpoint.isdigit() else self.checkpoint
        return load_run(Path(self.run), [*short, *overrides], checkpoint_at=at)


@dataclass
class Run:
    """`step` is that of the weights; `model` is in evaluation mode, on `world.device`, sharded if there are several."""

    run_dir: Path
    cfg: Config
    tokenizer: Tokenizer
    model: Transformer
    world: World
    step: int
    checkpoint: Path


def load_run(run_dir: Path | str, overrides: Sequence[str] = (), *, checkpoint_at: str | int | None = None) -> Run:
    """Open a run with the weights of its newest good checkpoint. Collective: joins the other processes of torchrun.

    Args:
        overrides: key=value settings for the evaluation, for instance eval.context=65536.
        checkpoint_at: a checkpoint's folder, its name, or its step; None: the newest that is good.

    Raises:
        ConfigError: no such run or setting, another tokenizer than the run's, or an unusable device.
        CheckpointError: no checkpoint, or a damaged one was asked for.
    """
    run_dir = Path(run_dir)
    cfg = override(config.load(run_dir), [*(f"{key}={value}" for key, value in COMPUTED.items()), *overrides])
    world = processes.init(cfg.trainer)
    chosen = processes.on_main(lambda: choose(run_dir, checkpoint_at))
    tokenizer = build_tokenizer(cfg, run_dir)
    model = parallelize(build_model(cfg.model, tokenizer.vocab_size), cfg.trainer, world)
    step = int(checkpoint.load(chosen, model)["step"])
    return Run(run_dir, cfg, tokenizer, model.eval(), world, step, chosen)


def choose(run_dir: Path, at: str | int | None) -> Path:
    """The checkpoint to evaluate, verified: the newest good one of the run folder, or the one named.

    Unlike `checkpoint.choose` this leaves the run folder alone: a damaged one is named on stderr and passed over.
    """
    if at is not None:
        folder = run_dir / "checkpoints"
        named = folder / checkpoint.name_of(at) if isinstance(at, int) else Path(at)
        path = named if named.is_dir() or (folder / named).parent != folder else folder / named
        checkpoint.verify(path)
        return path
    for path in reversed(checkpoint.find(run_dir)):
        try:
            checkpoint.verify(path)
            return path
        except checkpoint.CheckpointError as error:
            print(f"{error}; the one before it is used", file=sys.stderr, flush=True)
    raise checkpoint.CheckpointError(f"{run_dir} holds no good checkpoint; train it first, or name one: checkpoint=DIR")


def override(cfg: Config, overrides: Sequence[str]) -> Config:
    """The config with key=value settings of `CHANGEABLE` replaced, checked as a whole.

    Raises:
        ConfigError: an unknown key, one that is part of what was trained, or an illegal value.
    """
    known, node = config.flatten(cfg), cast(DictConfig, cfg)
    for text in overrides:
        try:
            parsed = OverridesParser.create().parse_override(text)
        except HydraException:
            raise ConfigError(f"'{text}' cannot be read; an override is key=value, lists are [a,b]") from None
        key = parsed.get_key_element()
        if key not in known:
            close = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
            hint = f"did you mean {close[0]}? " if close else ""
            raise ConfigError(f"the run has no setting '{key}'; {hint}legal: those below {', '.join(CHANGEABLE)}")
        if not any(key.startswith(part + ".") for part in CHANGEABLE):
            raise ConfigError(f"{key} is part of what was trained; an evaluation may change {', '.join(CHANGEABLE)}")
        try:
            with open_dict(node):
                OmegaConf.update(node, key, parsed.value(), merge=False)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{text}: {one_line(error).split(' full_key')[0]}") from None
    config.check(cfg)
    return cfg
