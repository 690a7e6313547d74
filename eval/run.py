"""Opens a run folder for evaluation: its config, its tokenizer, and the model with the weights of a checkpoint.

    run = load_run("runs/cpu_demo")
    run.model, run.tokenizer, run.cfg, run.world, run.step

Nothing in the folder is changed, so a run can be evaluated while it trains. Works alone and under torchrun, on the
device of `trainer.device`; the model is sharded over the processes there are.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from data import build_tokenizer
from ovq import config
from ovq.config import ConfigError
from ovq.model import build_model
from ovq.train import checkpoint
from ovq.train import distributed as parallel

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
class Run:
    """`step` is that of the weights; `model` is in evaluation mode, on `world.device`, sharded if there are several."""

    run_dir: Path
    cfg: Any
    tokenizer: Any
    model: nn.Module
    world: parallel.World
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
    world = parallel.init(cfg.trainer)
    chosen = parallel.on_main(lambda: choose(run_dir, checkpoint_at))
    tokenizer = build_tokenizer(cfg, run_dir)
    model = parallel.parallelize(build_model(cfg.model, tokenizer.vocab_size), cfg.trainer, world)
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


def tool_arguments(argv: list[str], options: Sequence[str]) -> tuple[Path, str | int | None, list[str]]:
    """Run folder, checkpoint and overrides of a command line `run=DIR [checkpoint=C] [option=value] [full.name=value]`.

    Args:
        options: settings of the eval group that go by their short names.

    Raises:
        ConfigError: no run, or an unknown option.
    """
    paths = {"run": "", "checkpoint": ""}  # read as they are: Hydra's syntax has a meaning for their commas
    short: list[str] = []
    full: list[str] = []
    for arg in argv:
        key, _, value = arg.partition("=")
        if key in paths:
            paths[key] = value.strip("'\"")
        else:
            (full if "." in key else short).append(arg)
    config.parse_tool_args(short, dict.fromkeys([*paths, *options]))
    if not paths["run"]:
        raise ConfigError("run=DIR is required: the run folder")
    at = paths["checkpoint"]
    return Path(paths["run"]), int(at) if at.isdigit() else at or None, [*(f"eval.{arg}" for arg in short), *full]


def fail(error: Exception) -> int:
    """Print the error as one line, once for all processes; returns the exit status, 2 for a wrong setting."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return 2 if isinstance(error, ConfigError) else 1


def folders(text: str) -> list[Path]:
    """The run folders of 'a' or '[a,b]'.

    Names of run folders hold commas of their own (runs/pg19_150m,model=sw), so the longest one that exists is taken.
    """
    pieces = [piece.strip().strip("'\"") for piece in text.strip().removeprefix("[").removesuffix("]").split(",")]
    found = []
    while pieces:
        length = next((n for n in range(len(pieces), 0, -1) if Path(",".join(pieces[:n])).is_dir()), 1)
        found.append(Path(",".join(pieces[:length])))
        pieces = pieces[length:]
    return found


def override(cfg: Any, overrides: Sequence[str]) -> Any:
    """The config with key=value settings of `CHANGEABLE` replaced, checked as a whole.

    Raises:
        ConfigError: an unknown key, one that is part of what was trained, or an illegal value.
    """
    known = config.flatten(cfg)
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
            with open_dict(cfg):
                OmegaConf.update(cfg, key, parsed.value(), merge=False)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{text}: {' '.join(str(error).split('full_key')[0].split())}") from None
    config.check(cfg)
    return cfg
