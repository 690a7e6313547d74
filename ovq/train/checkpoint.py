"""Checkpoints: complete and verified, or not there.

    run_dir/checkpoints/step_00000050/    *.distcp and .metadata of torch.distributed.checkpoint, extra.pt,
                                          manifest.json (size and SHA-256 of every file, and of itself), written last
    run_dir/checkpoints/latest            a link to the newest complete one
    run_dir/checkpoints/saving_...        being written; left by a killed process, removed at the next start
    run_dir/checkpoints/aside_...         damaged, or newer than what a run was told to go on from; for you to remove

- A checkpoint is written to `saving_`, flushed to the disk, hashed, and only then renamed; `latest` moves after that
  and older ones go last, so there is no moment at which the newest good one is missing or half written.
- `save` copies tensors to CPU memory and returns; a thread writes, over a process group of its own, so that no rank
  waits in the training step while another writes. What goes wrong there is raised on every rank by the next `save`
  or `wait`.
- Parameters and moments are stored by name and global position: another number of processes, or another way of
  sharding, loads them.

    python -m ovq.train.checkpoint verify DIR    a checkpoint, or all of a run folder; exit status 1 if one is damaged
    python -m ovq.train.checkpoint list RUN      the checkpoints of a run folder
"""

from __future__ import annotations

import concurrent.futures
import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from ovq import processes
from ovq.cli import NoOptions, command
from ovq.errors import ConfigError, Failure
from ovq.files import sync

FORMAT = 1  # of the folder; another number is refused
MANIFEST, EXTRA, LATEST = "manifest.json", "extra.pt", "latest"
FAILED = (Exception, dcp.CheckpointException)  # the latter is no Exception
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# A lone process has no process group, which is as it should be.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


class CheckpointError(Failure, RuntimeError):
    """A checkpoint cannot be written or used; the message is one line that names it and says what is intact."""


class Checkpointer:
    """Saves a run's checkpoints. Every rank holds one and calls it at the same steps.

    Args:
        run_dir: the run folder, on a file system that all ranks share.
        keep_last: complete checkpoints left on the disk.
        asynchronous: write in a thread; False: `save` returns when the checkpoint is complete.
    """

    def __init__(self, run_dir: Path | str, *, keep_last: int = 2, asynchronous: bool = True) -> None:
        self.root = Path(run_dir) / "checkpoints"
        self.keep_last, self.asynchronous = keep_last, asynchronous
        self.last: Path | None = None  # the newest complete one that this process has saved or resumed from
        self._group = processes.background_group()
        self._writing: concurrent.futures.Future[Path] | None = None

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, extra: dict[str, Any]) -> None:
        """Save the state after `step`, with `extra` (plain values) and every rank's random-number generators.

        Raises:
            CheckpointError: this one, or the one before it in the background, could not be written.
        """
        self.wait()
        scratch, trouble = self.root / f"saving_{name_of(step)}", ""
        if processes.rank() == 0:
            try:
                shutil.rmtree(scratch, ignore_errors=True)
                scratch.mkdir(parents=True)
            except OSError as error:
                trouble = reason(error)
        # Also the point before which no rank writes into the folder.
        ranks = processes.gather_objects((trouble, processes.rng_state()))
        if ranks[0][0]:
            raise self._failure(step, ranks[0][0])
        extra = {**extra, "rng": [rng for _, rng in ranks]}
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        writer = dcp.FileSystemWriter(scratch, sync_files=True)
        if self.asynchronous:
            state = writer.stage(state)
        self._writing = processes.in_background(self._write, step, writer, state, extra)
        if not self.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written on any rank. Raises what went wrong with it, once. A collective."""
        writing, self._writing = self._writing, None
        if writing is not None:
            while not processes.done_everywhere(writing):
                pass
            self.last = writing.result()

    # --- in the thread -----------------------------------------------------------------------------------------------

    def _write(self, step: int, writer: dcp.FileSystemWriter, state: dict[str, Any], extra: dict[str, Any]) -> Path:
        scratch, trouble, files = Path(writer.path), "", {}
        try:
            dcp.save(state, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
            files = fingerprints(scratch, f"__{processes.rank()}_*")
        except FAILED as error:
            trouble = reason(error)
        ranks = processes.gather_objects((trouble, files), self._group)
        trouble = next((trouble for trouble, _ in ranks if trouble), "")
        if processes.rank() == 0:
            try:
                if not trouble:
                    self._complete(step, extra, {name: entry for _, part in ranks for name, entry in part.items()})
            except Exception as error:
                trouble = reason(error)
            if trouble:
                shutil.rmtree(scratch, ignore_errors=True)
        trouble = processes.broadcast_object(trouble, self._group)
        if trouble:
            raise self._failure(step, trouble)
        return self.root / name_of(step)

    def _complete(self, step: int, extra: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
        """Rank 0: what belongs to all ranks, the manifest, the rename, `latest`, and last the removal of old ones."""
        scratch, final = self.root / f"saving_{name_of(step)}", self.root / name_of(step)
        torch.save(extra, scratch / EXTRA)
        files |= fingerprints(scratch, EXTRA) | fingerprints(scratch, ".metadata")
        for name in files:
            if not (scratch / name).is_file():
                raise FileNotFoundError(
                    errno.ENOENT, "run_dir must be on a file system that all nodes share; missing", name
                )
        sync(scratch / EXTRA)
        write_manifest(scratch, step, files)
        sync(scratch)
        if final.exists():
            set_aside(final)
        os.replace(scratch, final)
        sync(self.root)
        link = self.root / f"saving_{LATEST}"
        link.unlink(missing_ok=True)
        link.symlink_to(final.name)
        os.replace(link, self.root / LATEST)
        sync(self.root)
        for old in complete(self.root)[: -self.keep_last]:
            remove(old)

    def _failure(self, step: int, trouble: str) -> CheckpointError:
        kept = complete(self.root)
        intact = f"{kept[-1]} is intact" if kept else "there is no earlier one"
        return CheckpointError(
            f"the checkpoint of step {step} could not be written to {self.root} ({trouble}); its partial files were "
            f"removed and {intact}: mend that and start the same command again"
        )


# --- choosing and loading --------------------------------------------------------------------------------------------


def choose(run_dir: Path | str, resume: str = "auto") -> Path | None:
    """The checkpoint to go on from, chosen by rank 0 for every rank; None: start afresh.

    "auto": the newest complete one of the run folder whose files match its manifest; a damaged one is named in a
    warning, set aside, and the one before it used. "never": none. Otherwise a checkpoint's folder. Newer ones of the
    run folder are set aside then, for the run goes another way. Also removes what killed saves have left, and holds
    the run folder for this process.

    Raises:
        CheckpointError: the given one is damaged, all of them are, or another process trains in this run folder.
    """
    return processes.on_main(lambda: _choose(Path(run_dir) / "checkpoints", resume))


def _choose(root: Path, resume: str) -> Path | None:
    hold(root)
    for leftover in [*root.glob("saving_*"), *root.glob("removing_*")]:
        remove(leftover)
    if resume == "never":
        return None
    found = complete(root)
    if resume != "auto":
        chosen = Path(resume).resolve()
        step = int(verify(chosen)["step"])
        for path in found:
            if step_of(path) > step:
                print(f"going on from step {step}: {path} is set aside as {set_aside(path)}", file=sys.stderr)
        return chosen
    for path in reversed(found):
        try:
            verify(path)
            return path
        except CheckpointError as error:
            print(f"{error}; not used, set aside as {set_aside(path)}", file=sys.stderr, flush=True)
    if found:
        raise CheckpointError(f"every checkpoint in {root} is damaged; start again with another run_dir")
    return None


def load(path: Path | str, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Load a verified checkpoint into the model and the optimizer, however sharded; returns `extra` of its save.

    Without an optimizer (evaluation), only the weights are read. `extra` has two more entries: "rng", the generators'
    states of each rank that saved, and "checkpoint", the path.

    Raises:
        CheckpointError: it is of another model.
    """
    path = Path(path)
    optimizers = () if optimizer is None else (optimizer,)
    model_state, optimizer_state = get_state_dict(model, optimizers)
    state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
    reader = dcp.FileSystemReader(path)
    stored = {key for key in reader.read_metadata().state_dict_metadata if key.startswith("model.")}
    surplus = sorted(stored - {f"model.{name}" for name in model_state})
    if surplus:
        raise CheckpointError(f"{path} does not fit this model, which has no {surplus[0].removeprefix('model.')}")
    try:
        dcp.load(state, storage_reader=reader, no_dist=not processes.distributed())
    except FAILED as error:
        raise CheckpointError(f"{path} does not fit this model ({reason(error)})") from error
    set_state_dict(model, optimizers, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return read_extra(path) | {"checkpoint": str(path)}


def read_extra(path: Path | str) -> dict[str, Any]:
    """Step, data position, config and generators of a checkpoint, without its tensors."""
    return torch.load(Path(path) / EXTRA, weights_only=True)


def hold(root: Path) -> None:
    """Keep the run folder for this process until it ends, however it ends."""
    root.mkdir(parents=True, exist_ok=True)
    lock = root.resolve() / ".lock"
    if lock in _HELD:
        return
    file = lock.open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise CheckpointError(f"{root.parent} is in use by another process ({file.read().strip()})") from None
    except OSError as error:
        print(f"{root} is on a file system without locks ({error}); see that one run uses it", file=sys.stderr)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
    file.flush()
    _HELD[lock] = file


_HELD: dict[Path, Any] = {}  # closing a locked file would free it

# --- on the disk -----------------------------------------------------------------------------------------------------


def name_of(step: int) -> str:
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def complete(root: Path) -> list[Path]:
    """The complete checkpoints in `run_dir/checkpoints`, oldest first; whether they are damaged is not looked at."""
    return sorted(path for path in root.glob("step_" + "[0-9]" * 8) if (path / MANIFEST).is_file())


def fingerprints(folder: Path, pattern: str) -> dict[str, dict[str, Any]]:
    """File name -> {"bytes", "sha256"} of the files that match."""
    out = {}
    for path in sorted(folder.glob(pattern)):
        with path.open("rb") as file:
            out[path.name] = {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    return out


def write_manifest(folder: Path, step: int, files: dict[str, dict[str, Any]]) -> None:
    content = {
        "format": FORMAT,
        "step": step,
        "processes": processes.world_size(),
        "torch": torch.__version__,
        "saved": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "files": dict(sorted(files.items())),
    }
    path = folder / MANIFEST
    path.write_text(manifest_text(content))
    sync(path)


def manifest_text(content: dict[str, Any]) -> str:
    """The one way to write this content, with a hash of the rest at the end: any other byte in the file is damage."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(rest).encode()).hexdigest()
    return json.dumps({**rest, "sha256": digest}, indent=1) + "\n"


def verify(path: Path | str) -> dict[str, Any]:
    """The manifest of a checkpoint whose every file is as it was written.

    Raises:
        CheckpointError: naming the first file that is missing, of another size, or of other content.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint {path}")
    if not (path / MANIFEST).is_file():
        raise CheckpointError(f"{path} is not a complete checkpoint: it has no {MANIFEST}")
    text = (path / MANIFEST).read_bytes()
    try:
        content = json.loads(text)
        intact = manifest_text(content).encode() == text
    except (ValueError, AttributeError):
        intact = False
    if not intact:
        raise CheckpointError(f"{path / MANIFEST} is damaged")
    if content["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {content['format']}, this version reads {FORMAT}")
    for name, want in content["files"].items():
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name} is missing")
        size = (path / name).stat().st_size
        if size != want["bytes"]:
            raise CheckpointError(f"{path / name} is damaged: {size} bytes, {want['bytes']} were written")
        if fingerprints(path, name)[name] != want:
            raise CheckpointError(f"{path / name} is damaged: its SHA-256 is not that of the manifest")
    return content


def set_aside(path: Path) -> str:
    """Rename a checkpoint so that nothing uses it; returns the new name."""
    number = 0
    while (target := path.with_name(f"aside_{path.name}" + (f".{number}" if number else ""))).exists():
        number += 1
    os.replace(path, target)
    return target.name


def remove(path: Path) -> None:
    """Remove a checkpoint or a leftover; one that is half removed never looks like a checkpoint."""
    if path.is_symlink() or path.is_file():
        path.unlink()
        return
    doomed = path if path.name.startswith(("saving_", "removing_")) else path.with_name(f"removing_{path.name}")
    if doomed != path:
        os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def reason(error: BaseException) -> str:
    """The cause of a failed save or load, on one line; a full disk is called so."""
    failures = getattr(error, "failures", None)  # DCP: rank -> (error, traceback)
    if failures:
        error = next(iter(failures.values()))[0]
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in FULL:
            return f"the disk is full: {os.strerror(seen.errno)}"
        seen = seen.__cause__ or seen.__context__
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


# --- command line ----------------------------------------------------------------------------------------------------


def find(folder: Path) -> list[Path]:
    """The checkpoint `folder` is, or those of the run folder or checkpoints folder it is, oldest first."""
    if folder.name.startswith(("step_", "aside_")) or (folder / MANIFEST).exists():
        return [folder]
    return complete(folder / "checkpoints") or complete(folder)


@command(words=True)
def main(_: NoOptions, words: list[str]) -> int:
    """The command line in the module's docstring. Exit status 1 if there is no checkpoint, or one is damaged."""
    if len(words) != 2 or words[0] not in ("verify", "list"):
        raise ConfigError("give one of: verify DIR, list RUN")
    paths = find(Path(words[1]))
    if not paths:
        raise CheckpointError(f"there is no complete checkpoint in {words[1]}")
    status = 0
    for path in paths:
        try:
            content = json.loads((path / MANIFEST).read_bytes()) if words[0] == "list" else verify(path)
        except (CheckpointError, OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            status = 1
            continue
        size = sum(entry["bytes"] for entry in content["files"].values()) / 2**20
        facts = f"step {content['step']}, {content['processes']} process(es), {size:.1f} MiB, saved {content['saved']}"
        print(f"{path}: {'good, ' if words[0] == 'verify' else ''}{facts}")
    return status


if __name__ == "__main__":
    sys.exit(main())
