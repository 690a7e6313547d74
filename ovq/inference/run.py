"""Opens a run folder for evaluation: its config, its tokenizer, and the model with the weights of a checkpoint.

    run = load_run("runs/cpu_demo")
    run.model, run.tokenizer, run.cfg, run.world, run.step

Nothing in the folder is changed, so a run can be evaluated while it trains: the checkpoint being read is locked against
the trainer's removal of old ones. The folder is read as untrusted data: classes outside this project are imported
only if the caller trusts them by name. Works in a single process and under torchrun, on the device that
`trainer.device` selects; the model is sharded over all processes.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from data.build import build_tokenizer, pin_commits
from data.tokenizer import Tokenizer
from ovq import config, identity, processes
from ovq.config import Config, EvalConfig
from ovq.config_data import check_used
from ovq.errors import ConfigError, one_line
from ovq.export.stored import Folder, is_export, load_into
from ovq.files import check_writable
from ovq.mixers.base import other_capacity
from ovq.model import Transformer, build_model
from ovq.overrides import literal, parse
from ovq.processes import World
from ovq.schema import REQUIRED, setting
from ovq.train import checkpoint
from ovq.train.checkpoint_choice import newest_good_leased, verify_leased
from ovq.train.parallelize import parallelize

# How the run was computed does not matter here: there may be any number of processes, and there is no backward pass.
COMPUTED = {
    "trainer.compile": False,
    "trainer.threads": None,
    "trainer.activation_checkpointing": "none",
    "trainer.shard": "full",
    "trainer.replicas": 1,
    "trainer.context_parallel": 1,
}
# The settings of a run that an evaluation may change; the others define what was trained.
CHANGEABLE = ("eval", "data", "trainer", "logger", "model.mixers")


@dataclass
class RunOptions:
    """Options of every tool that evaluates a run. An option that has the name of a setting below `eval` replaces the
    run's value of it; None keeps that value."""

    run: str = setting(REQUIRED, "the run folder", paths=True)
    checkpoint: str | None = setting(None, "a checkpoint's folder, name or step; null: the newest good one", paths=True)
    num_centroids: int | None = setting(None, "dictionary capacity; null: eval.num_centroids of the run", at_least=1)
    trust: list[str] = setting(
        [], "what the run's config may use: classes outside this project, whose code then runs, and oc.env:NAME"
    )

    def open(
        self,
        overrides: Sequence[str] = (),
        *,
        writes: bool = True,
        out: Path | str | None = None,
        shares: bool = False,
        reads: Collection[str] = (),
        own: Collection[str] = (),
    ) -> Run:
        """Open the run; the options that are settings, and `overrides` (by full name), replace its own settings.

        Args:
            writes: whether the tool writes any results.
            out: the existing folder that they go to instead of the run folder.
            shares: whether the tool lets trainer.context_parallel ranks share every document.
            reads: settings below `eval` that the tool reads, besides eval.weights and those that are options.
            own: options that have the name of a setting below `eval` but are read only as options.

        Raises:
            ConfigError, CheckpointError: as in `load_run`; an override that the tool does not read; or the results go
                to a folder which is not writable.
        """
        names = [item.name for item in fields(self)]
        settings = [item.name for item in fields(EvalConfig)]
        read = [name for name in settings if name in ("weights", *reads) or (name in names and name not in own)]
        for text in overrides:
            if "." not in (key := text.partition("=")[0]):
                raise ConfigError(f"there is no option '{key}'; legal: {', '.join(names)}, and settings by full name")
            group, _, name = key.lstrip("+").partition(".")
            if group == "eval" and name in settings and name not in read:
                legal = f"use {name}=" if name in names else "legal: " + ", ".join(f"eval.{each}" for each in read)
                raise ConfigError(f"{text}: this tool does not read eval.{name}; {legal}")
        given = {item.name: getattr(self, item.name) for item in fields(self) if item.name in settings}
        short = [f"eval.{name}={value}" for name, value in given.items() if value is not None]
        if not is_export(self.run):
            config.load(self.run)  # raises if this is not a run, before anything is written to it
        try:
            if writes:
                check_writable(out or self.run)  # fail before an hour's work, not after it
        except OSError as error:
            mend = "name another out=" if out else "evaluate a copy of the run folder"
            raise ConfigError(
                f"the results would go to {out or self.run}, which cannot be written to ({one_line(error)}); nothing "
                f"was computed. Make room, or {mend}"
            ) from None
        checkpoint_at, trust = self.checkpoint, self.trust
        return load_run(Path(self.run), [*short, *overrides], checkpoint_at=checkpoint_at, trust=trust, shares=shares)


@dataclass
class Run:
    """An opened run. `step` is that of the weights, and `tokens` the labels read until then; `model` is in
    evaluation mode, on `world.device`, and sharded if there are several processes."""

    run_dir: Path
    cfg: Config
    tokenizer: Tokenizer
    model: Transformer
    world: World
    step: int
    tokens: int
    checkpoint: Path


def load_run(
    run_dir: Path | str,
    overrides: Sequence[str] = (),
    *,
    checkpoint_at: str | int | None = None,
    trust: Collection[str] = (),
    shares: bool = False,
) -> Run:
    """Open a run with the weights of one of its checkpoints, or a folder written by `ovq.inference.export`. Collective:
    joins the other processes of torchrun.

    Args:
        overrides: key=value settings for the evaluation, for instance eval.context=65536.
        checkpoint_at: a checkpoint's folder, its name, or its step; None: the newest good one.
        trust: class paths outside this project that the run's config may name, and environment variables, as
            oc.env:NAME, that it may read.
        shares: whether the caller lets trainer.context_parallel ranks share every document.

    Raises:
        ConfigError: no such run or setting, a class that is not trusted, a tokenizer other than the run's, or an
            unusable device.
        CheckpointError: no checkpoint, a damaged one was named, or one that holds more than data.
    """
    run_dir = Path(run_dir)
    no_imports_from(run_dir)
    folder = Folder(run_dir) if is_export(run_dir) else None
    stored = folder.config(trust) if folder else config.load(run_dir, trust)
    cfg = override(copy.deepcopy(stored), [*(f"{key}={_typed(value)}" for key, value in COMPUTED.items()), *overrides])
    if not any(text.startswith("logger.") for text in overrides):
        cfg.logger.mode = "offline"  # the project that a stored config names may not be this user's
    if cfg.trainer.context_parallel > 1 and not shares:
        raise ConfigError(
            f"trainer.context_parallel={cfg.trainer.context_parallel}: ranks share documents in eval.per_position and "
            "eval.perplexity only; here each takes documents of its own"
        )
    world = processes.init(cfg.trainer)
    if folder:
        if checkpoint_at is not None:
            raise ConfigError(f"checkpoint={checkpoint_at}: {run_dir} is an exported model, which has no checkpoints")
        if cfg.eval.weights != stored.eval.weights:
            raise ConfigError(
                f"eval.weights={cfg.eval.weights}: {run_dir} is an exported model, which holds one set of weights "
                f"(eval.weights={stored.eval.weights}); open the run folder for others"
            )
        tokenizer = build_tokenizer(cfg)
        if folder.fingerprint not in (None, tokenizer.fingerprint):
            raise ConfigError(f"the tokenizer in {run_dir} is not the one that the model was trained with")
        model = parallelize(build_model(cfg.model, folder.vocab_size), cfg.trainer, world)
        load_into(model, folder)
        return Run(run_dir, cfg, tokenizer, model.eval(), world, folder.step, folder.tokens, run_dir)
    with contextlib.ExitStack() as lease:
        chosen = processes.on_main(lambda: choose(run_dir, checkpoint_at, lease))
        tokenizer = build_tokenizer(cfg, run_dir, own=True)
        model = parallelize(build_model(cfg.model, tokenizer.vocab_size), cfg.trainer, world)
        extra = checkpoint.load(chosen, model, weights=cfg.eval.weights)
        if checkpoint_at is not None:
            check_of_run(chosen, extra, stored, run_dir)
        if "data" in extra:
            pin_commits(stored, extra["data"]["fingerprint"])
        processes.gather_objects(None)  # rank 0 holds the lease until every rank has read its part
    return Run(run_dir, cfg, tokenizer, model.eval(), world, int(extra["step"]), int(extra["tokens"]), chosen)


def check_of_run(path: Path, extra: dict[str, Any], cfg: Config, run_dir: Path) -> None:
    """Raise ConfigError if a checkpoint was saved by a run with other settings than `cfg`, those of `run_dir`."""
    if "config" not in extra:
        return
    if changed := identity.differences(config.flatten(extra["config"]), config.flatten(cfg), contents=False):
        raise ConfigError(f"checkpoint={path} is not of {run_dir}; these settings differ: {'; '.join(changed)}")


def no_imports_from(folder: Path) -> None:
    """Remove a folder, and all in it, from the import path: Python puts the current folder there, which may be it."""
    root = folder.resolve()
    sys.path[:] = [entry for entry in sys.path if not Path(entry or ".").resolve().is_relative_to(root)]


def choose(run_dir: Path, at: str | int | None, lease: contextlib.ExitStack) -> Path:
    """The checkpoint to evaluate, verified: the newest good one of the run folder, or the one named.

    Unlike `checkpoint.choose`, this does not change the run folder: a damaged checkpoint is reported on stderr and
    skipped. Until `lease` is closed, a trainer does not remove the chosen one.

    Raises:
        CheckpointError: the one named is missing or damaged, or there is no good one.
    """
    if at is not None:
        folder = run_dir / "checkpoints"
        named = folder / checkpoint.name_of(int(at)) if str(at).isdigit() else Path(str(at))
        path = named if named.is_dir() or (folder / named).parent != folder else folder / named
        verify_leased(path, lease)
        return path
    good, damaged = newest_good_leased(run_dir, lease)
    for problem in damaged.values():
        print(f"{problem}; not used", file=sys.stderr, flush=True)
    if good is None:
        raise checkpoint.CheckpointError(
            f"{run_dir} holds no good checkpoint; train it first, or name one: checkpoint=DIR"
        )
    return good


@contextlib.contextmanager
def at_capacity(model: Transformer, cfg: Config) -> Iterator[None]:
    """Within the `with` block, the dictionaries have the capacity eval.num_centroids; null leaves them as trained.

    Raises:
        ConfigError: on entry, if no layer has a dictionary, or one cannot have that capacity.
    """
    with contextlib.ExitStack() as changed:
        try:
            changed.enter_context(other_capacity(model.mixers(), cfg.eval.num_centroids))
        except ValueError as error:
            raise ConfigError(f"eval.num_centroids={cfg.eval.num_centroids}: {error}") from None
        yield


def check_capacity(model: Transformer, cfg: Config) -> None:
    """Raise the errors of `at_capacity`."""
    with at_capacity(model, cfg):
        pass


def _typed(value: Any) -> str:
    """A value as typed on the command line."""
    return "null" if value is None else str(value)


def override(cfg: Config, overrides: Sequence[str]) -> Config:
    """The config with key=value settings replaced, each of them below `CHANGEABLE`; the result is checked as a whole.

    Raises:
        ConfigError: an unknown key, one that defines what was trained, or an illegal value.
    """
    known, node = config.flatten(cfg), cast(DictConfig, cfg)
    typed = []
    for text in overrides:
        parsed = parse(literal(text))
        if parsed is None:
            raise ConfigError(f"'{text}' cannot be read; an override is key=value, lists are [a,b]")
        key = parsed.get_key_element().lstrip("+")  # which `literal` adds for entries of dictionaries
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
        typed.append(key)
    config.check(cfg)
    check_used(cfg.data, typed)
    return cfg
