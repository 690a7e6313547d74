"""Choose the checkpoint that a run resumes from (`choose`) and, once the start is not refused any more, make the folder
fit that choice (`settle`)."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from ovq import processes
from ovq.files import remove_leftovers, sync, write_whole
from ovq.train.checkpoint_files import (
    LATEST,
    CheckpointError,
    complete,
    find,
    hold,
    named,
    prune,
    reading,
    reason,
    remove,
    set_aside,
    step_of,
    verify,
)

ORIGIN = "origin.json"


@dataclass
class Origin:
    """The checkpoint that a run branched from: the path that resume= gave, the folder it led to, and its step.

    Paths are absolute, but a checkpoint next to the record is stored by name, so that a run folder can be moved.
    """

    given: str
    checkpoint: str
    step: int


@dataclass(frozen=True)
class Choice:
    """What a run starts from.

    Args:
        path: the checkpoint; None: step 0.
        aside: checkpoints of the run folder that are no longer part of its history, and why.
        origin: the record of a branch that is to be written.
        keeps_folder: whether nothing else in the folder changes (resume=never).
    """

    path: Path | None
    aside: tuple[tuple[Path, str], ...] = ()
    origin: Origin | None = None
    keeps_folder: bool = False


def choose(run_dir: Path | str, resume: str = "auto") -> Choice:
    """The checkpoint to resume from, chosen by rank 0 for every rank. No checkpoint of the folder is changed yet.

    - "auto": the newest one in the run folder whose files match its manifest. Damaged newer ones are to be set aside. A
      run that branched from a checkpoint elsewhere and has none of its own yet starts from that.
    - a checkpoint's folder, or a run's, whose newest is used: the run branches from it. Other checkpoints of this run
      folder are to be set aside, unless the one named is among them and they are older.
      The branch is to be recorded: the same command started again then resumes from the newest checkpoint made since.
    - "never": none.

    Also locks the run folder for this process, and removes the partial saves and temporary files that a kill has left.

    Raises:
        CheckpointError: the named checkpoint is damaged; all in the folder are damaged, or were set aside; or another
            process trains in this run folder.
    """
    return processes.on_main(lambda: _choose(Path(run_dir) / "checkpoints", resume))


def _choose(root: Path, resume: str) -> Choice:
    hold(root)
    for leftover in [*root.glob("saving_*"), *root.glob("removing_*")]:
        remove(leftover)
    remove_leftovers(root.parent)
    if resume == "never":
        return Choice(None, keeps_folder=True)
    return _to_resume_from(root) if resume == "auto" else _branch(root, resume)


def settle(run_dir: Path | str, choice: Choice, keep_last: int | None = None, keep_at: int | None = None) -> None:
    """Make the folder fit a choice: set checkpoints aside with a message, record a branch, mend `latest`, and remove
    checkpoints as `prune` does (keep_last=None: all stay). Collective."""
    processes.on_main(lambda: _settle(Path(run_dir) / "checkpoints", choice, keep_last, keep_at))


def _settle(root: Path, choice: Choice, keep_last: int | None, keep_at: int | None) -> None:
    if choice.keeps_folder:
        (root / ORIGIN).unlink(missing_ok=True)
        return
    for path, why in choice.aside:
        print(f"{why}, set aside as {set_aside(path)}", file=sys.stderr, flush=True)
    if choice.origin:  # last, so that after a kill before this line, the same command branches again
        write_whole(root / ORIGIN, json.dumps(asdict(choice.origin), indent=1) + "\n")
    if keep_last is not None:
        prune(root, keep_last, keep_at)
    point_latest(root)


def newest_good(candidates: list[Path]) -> tuple[Path | None, dict[Path, CheckpointError]]:
    """The last of these checkpoints (oldest first) that is good, and what is wrong with each newer one, newest first.
    None if none is good."""
    damaged: dict[Path, CheckpointError] = {}
    for path in reversed(candidates):
        try:
            verify(path)
        except CheckpointError as error:
            damaged[path] = error
        else:
            return path, damaged
    return None, damaged


def newest_good_leased(run_dir: Path, lease: contextlib.ExitStack) -> tuple[Path | None, dict[Path, CheckpointError]]:
    """As `newest_good`, for the checkpoints of a folder that a trainer may be writing to: until `lease` is closed, it
    does not remove the one returned."""
    damaged: dict[Path, CheckpointError] = {}
    while candidates := [path for path in find(run_dir) if path not in damaged]:
        path = candidates[-1]
        try:
            verify_leased(path, lease)
        except CheckpointError as error:
            if path.is_dir():  # otherwise the trainer has removed it in the meantime, after writing a newer one
                damaged[path] = error
        else:
            return path, damaged
    return None, damaged


def verify_leased(path: Path, lease: contextlib.ExitStack) -> None:
    """Verify a checkpoint and, if it is good, keep it locked until the lease is closed.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    with contextlib.ExitStack() as attempt:
        attempt.enter_context(reading(path))
        verify(path)
        lease.push(attempt.pop_all())


def history(root: Path) -> list[Path]:
    """The checkpoints that the run of a folder may continue from, oldest first, perhaps damaged; with the one elsewhere
    that it branched from."""
    own, origin = named(root), read_origin(root)
    if origin is None or root / origin.checkpoint in own:
        return own
    # Checkpoints in the folder that are not newer than the origin belong to another history.
    return [root / origin.checkpoint, *(path for path in own if step_of(path) > origin.step)]


def has_branched(root: Path, resume: str) -> bool:
    """Whether the run of a folder has branched from what resume= names, and saved since."""
    origin = read_origin(root)
    if origin is None or not any(step_of(own) > origin.step for own in named(root)):
        return False
    return origin.given == os.path.abspath(resume) or origin.checkpoint == _stored(root, resume)


def _stored(root: Path, resume: str) -> str:
    """The checkpoint that resume= names, as an origin records it: by name, if it is in this folder."""
    path = _checkpoint_at(Path(resume)).resolve()
    return path.name if path.parent == root.resolve() else str(path)


def _to_resume_from(root: Path) -> Choice:
    path, damaged = newest_good(history(root))
    if path:  # if all are damaged, the folder stays as it is
        return Choice(path, tuple((bad, f"{why}; not used") for bad, why in damaged.items()))
    if damaged:
        raise CheckpointError(
            f"every checkpoint in {root} is damaged (the newest: {next(iter(damaged.values()))}). Nothing was "
            "changed; restore one, or start again with another run_dir"
        )
    if aside := sorted(path.name for path in root.glob("aside_step_*")):
        raise CheckpointError(
            f"{root} holds only checkpoints that were set aside ({', '.join(aside)}), and training does not go back to "
            "step 0 by itself; name one of them with resume=, or start again with another run_dir"
        )
    return Choice(None)


def _branch(root: Path, resume: str) -> Choice:
    if has_branched(root, resume):
        chosen = _to_resume_from(root)
        print(
            f"{root.parent} has branched from {resume} already and resumes from {chosen.path}; to branch again, use "
            f"another run_dir or remove {root / ORIGIN}",
            file=sys.stderr,
            flush=True,
        )
        return chosen
    path = check_branch(resume)
    step = int(verify(path)["step"])
    elsewhere = path.parent != root.resolve()
    aside = tuple(  # what is not part of the branch's history must not be counted, or called intact
        (own, f"resuming from step {step}: {own} is not part of that history")
        for own in named(root)
        if own.resolve() != path and (elsewhere or step_of(own) >= step)
    )
    return Choice(path, aside, Origin(os.path.abspath(resume), _stored(root, resume), step))


def check_branch(resume: str) -> Path:
    """The checkpoint that resume= names, to branch from.

    Raises:
        CheckpointError: there is none.
    """
    if not (path := _checkpoint_at(Path(resume)).resolve()).is_dir():
        raise CheckpointError(f"resume={resume}: there is no checkpoint {path}; name one, or a run folder with some")
    return path


def _checkpoint_at(path: Path) -> Path:
    """`path` itself or, if it is a run folder, its newest complete checkpoint."""
    own = complete(path / "checkpoints") if (path / "config.yaml").is_file() else []
    return own[-1] if own else path


def read_origin(root: Path) -> Origin | None:
    """The record of the checkpoint that a run branched from; None if it began at step 0.

    Raises:
        CheckpointError: the record is damaged.
    """
    path = root / ORIGIN
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_bytes())
        return Origin(str(values["given"]), str(values["checkpoint"]), int(values["step"]))
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); remove it and name the checkpoint to go on from with resume="
        ) from None


def point_latest(root: Path) -> None:
    """Make `latest` a link to the newest complete checkpoint, atomically; remove it if there is none.

    A run never reads it, so on a file system without links there is only a warning. A folder in its place, as a copy
    that follows links makes, is set aside.
    """
    kept, latest, link = complete(root), root / LATEST, root / f"saving_{LATEST}"
    try:
        link.unlink(missing_ok=True)
        if latest.is_dir() and not latest.is_symlink():
            print(f"{latest} is a folder instead of a link, set aside as {set_aside(latest)}", file=sys.stderr)
        if not kept:
            latest.unlink(missing_ok=True)
        elif not (latest.is_symlink() and os.readlink(latest) == kept[-1].name):
            link.symlink_to(kept[-1].name)
            os.replace(link, latest)
            sync(root)
    except OSError as error:
        print(f"warning: {latest} does not lead to the newest checkpoint ({reason(error)})", file=sys.stderr)
