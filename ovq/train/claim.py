"""A run and its folder: which folder is refused, and when a run claims one.

`check_same_run` comes first, before anything is built; `claim` comes last before the first step, once the model fits,
the data match the checkpoint and all files are found. A start that fails between them leaves the folder unchanged.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from ovq import config, identity
from ovq.config import Config
from ovq.errors import ConfigError
from ovq.processes import World, on_main, rank
from ovq.report import typed
from ovq.train.checkpoint import read_extra
from ovq.train.checkpoint_choice import ORIGIN, check_branch, has_branched, history
from ovq.train.checkpoint_files import CheckpointError, hold
from ovq.train.metrics import read_rows
from ovq.train.schedule import check_extension
from ovq.train.summary import FILE

OPTIMIZER = ("optim.name", "optim.custom._target_")
BEGAN = "init_from.path"


def check_same_run(run_dir: Path, cfg: Config) -> bool:
    """`same_run`, after locking the folder for this process. Collective.

    Raises:
        CheckpointError: another process trains in it.
    """
    return on_main(lambda: _hold_and_check(run_dir, cfg))


def _hold_and_check(run_dir: Path, cfg: Config) -> bool:
    if problem := unwritable(run_dir):
        raise ConfigError(problem)
    hold(run_dir / "checkpoints")  # before any file of a run in progress is touched
    if not (run_dir / "config.yaml").exists():  # a branch that never began must not affect the next start
        (run_dir / "checkpoints" / ORIGIN).unlink(missing_ok=True)
    return same_run(run_dir, cfg)


def same_run(run_dir: Path, cfg: Config) -> bool:
    """Whether the folder holds steps of this run. Writes nothing.

    Raises:
        ConfigError: it holds steps of a run with other settings or, with resume=never, checkpoints.
    """
    saved = saved_in(run_dir)
    if cfg.resume == "never":
        if saved:
            raise ConfigError(f"resume=never, but {run_dir} holds checkpoints; use another run_dir or remove them")
        return False
    if not (saved or read_rows(run_dir / "metrics.jsonl")) or not (run_dir / "config.yaml").exists():
        return False
    # If there is a checkpoint, the data are compared by content, not by settings, when the loader resumes.
    changed = identity.changed(config.load(run_dir), cfg, contents=not saved)
    if changed:
        raise ConfigError(f"{run_dir} was made with other settings ({'; '.join(changed)}); use another run_dir")
    return True


def check_continues(stored: dict[str, Any], cfg: Config) -> None:
    """Raise ConfigError if a checkpoint made with the `stored` settings would continue as another run: a branch may
    change only `identity.BRANCHED`. The data are compared by content, when the loader resumes."""
    before, after = (config.flatten(each) for each in (stored, cfg))
    optimizers = ({key: each[key] for key in OPTIMIZER if key in each} for each in (before, after))
    if kinds := identity.differences(*optimizers):
        raise ConfigError(
            f"resume={cfg.resume} holds the state of another optimizer ({'; '.join(kinds)}), which a branch cannot "
            "change; init_from starts a new run with its weights"
        )
    if (began := after[BEGAN]) and identity.meant(BEGAN, began) != identity.meant(BEGAN, before.get(BEGAN)):
        raise ConfigError(
            f"init_from={began} would have no effect, because resume={cfg.resume} continues from that checkpoint's "
            "weights; leave one of them out"
        )
    before, after = (
        {key: value for key, value in each.items() if not identity.within(key, identity.BRANCHED)}
        for each in (before, after)
    )
    if changed := identity.differences(before, after, contents=False):
        raise ConfigError(
            f"resume={cfg.resume} was made with other settings ({'; '.join(changed)}), which a branch cannot change; "
            "init_from starts a new run with its weights"
        )


def check_resume(run_dir: Path, cfg: Config) -> None:
    """Raise what a start would raise about the checkpoint that it continues from. Checkpoints are not verified, and the
    folder is not locked; one that cannot be read is left to the start, which takes the one before it.

    Raises:
        ConfigError: the checkpoint is of another run, or of a later step, or the learning rate would jump.
        CheckpointError: resume= names no checkpoint.
    """
    root = run_dir / "checkpoints"
    if cfg.resume == "never":
        return
    goes_on = cfg.resume == "auto" or has_branched(root, cfg.resume)
    for path in reversed(history(root)) if goes_on else [check_branch(cfg.resume)]:
        with contextlib.suppress(CheckpointError):
            extra = read_extra(path)
            break
    else:
        return
    check_continues(extra["config"], cfg)
    check_extension(cfg, extra["config"], extra["step"])


def other_precision(extra: dict[str, Any] | None, cfg: Config, world: World) -> str:
    """A line if trainer.precision=auto means another precision here than where the checkpoint was made; else empty.

    Args:
        extra: what the checkpoint holds besides tensors; None: there is none.
    """
    before = (extra or {}).get("precision", world.precision)
    if cfg.trainer.precision != "auto" or before == world.precision:
        return ""
    return (
        f"trainer.precision=auto is {world.precision} here, and the run has computed in {before} so far; its losses "
        "will not be those of an uninterrupted run"
    )


def saved_in(run_dir: Path) -> list[Path]:
    """Checkpoints of a run folder, including those set aside."""
    return [*(run_dir / "checkpoints").glob("step_*"), *(run_dir / "checkpoints").glob("aside_step_*")]


def claim(run_dir: Path, cfg: Config, tokenizer: Any) -> None:
    """Claim the folder for this run: store its config and its tokenizer there. Collective."""

    def store() -> None:
        (run_dir / FILE).unlink(missing_ok=True)  # or a process waiting for it would read that of an earlier run
        tokenizer.save(run_dir / "tokenizer")
        config.save(cfg, run_dir)

    on_main(store)


def unwritable(run_dir: Path) -> str:
    """Why nothing can be written to a run folder, as one line; empty if no reason is known."""
    place = run_dir / "checkpoints"
    while not place.exists() and place.parent != place:
        place = place.parent
    if not place.is_dir():
        reason = f"{place} is a file"
    elif not os.access(place, os.W_OK | os.X_OK):
        reason = f"no permission to write in {place.absolute()}"
    else:
        return ""
    return f"{run_dir} cannot be the run folder: {reason}; choose another with run_dir= or runs_root="


def elsewhere(run_dir: Path, cfg: Config) -> str:
    """A line for rank 0 if the folder is new and named after the command line, but another folder holds this run."""
    if rank() or cfg.run_dir or cfg.resume != "auto" or saved_in(run_dir):
        return ""
    for folder, step in identity.twins(cfg, run_dir):
        return (
            f"{run_dir} is a new run folder, and {folder} holds the same run at step {step}; to continue that one: "
            f"{typed('run_dir', folder)}"
        )
    return ""
