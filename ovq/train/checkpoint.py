"""Checkpoints: complete and verified, or not there.

    run_dir/checkpoints/step_00000050/    *.distcp and .metadata of torch.distributed.checkpoint, extra.pt, and
                                          manifest.json (size and SHA-256 of every file, and of itself), written last
    run_dir/checkpoints/latest            a link to the newest complete one
    run_dir/checkpoints/origin.json       the checkpoint that the run branched from, if resume= named one
    run_dir/checkpoints/saving_...        being written; left by a killed process, removed at the next start
    run_dir/checkpoints/aside_...         damaged, or outside the history of the one that resume= named

- A checkpoint is written to `saving_`, flushed to the disk, hashed, and only then renamed. `latest` moves after that
  and older checkpoints are removed last, so the newest good one is never missing or half written. What a kill in
  between leaves undone is done at the next start.
- `save` copies tensors to CPU memory and returns; a background thread writes, with its own process group, so that no
  rank waits in the training step while another writes. `wait` raises its errors on every rank. The next `save` only
  reports them, as there may be room again; it returns when its own checkpoint is complete.
- Weights or moments that are not finite are never saved.
- Parameters, moments and averaged weights (`optim.ema`) are stored by name and global position: any number of
  processes, sharded in any way, can load them.
- Loading never runs code that a file names (`checkpoint_files`).

    python -m ovq.train.checkpoint verify DIR    a checkpoint, or all of a run folder; exit status 1 if one is damaged
    python -m ovq.train.checkpoint list RUN      the checkpoints of a run folder
"""

from __future__ import annotations

import concurrent.futures
import errno
import json
import os
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from ovq import processes
from ovq.cli import NoOptions, command
from ovq.errors import ConfigError, TrainingError
from ovq.files import sync
from ovq.report import typed
from ovq.train.checkpoint_choice import choose as choose
from ovq.train.checkpoint_choice import point_latest
from ovq.train.checkpoint_choice import settle as settle
from ovq.train.checkpoint_files import (
    EXTRA,
    MANIFEST,
    METADATA,
    CheckpointError,
    SafePlanner,
    SafeReader,
    Writer,
    complete,
    find,
    fingerprints,
    load_plain,
    name_of,
    prune,
    reason,
    refusal_in,
    set_aside,
    verify,
    write_manifest,
)
from ovq.train.ema import WeightAverage, local

ADVICE = ". Remove the cause and start the same command again"
FAILED = (Exception, dcp.CheckpointException)  # the latter is not a subclass of Exception

# A single process has no process group, and needs none.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


class Checkpointer:
    """Saves a run's checkpoints. Every rank holds one and calls it at the same steps.

    Args:
        run_dir: the run folder, on a file system that all ranks share.
        keep_last: number of complete checkpoints to keep on disk.
        keep_at: also keep the newest of at most this many steps.
        asynchronous: write in a thread; False: `save` returns when the checkpoint is complete.
    """

    def __init__(
        self, run_dir: Path | str, *, keep_last: int = 2, keep_at: int | None = None, asynchronous: bool = True
    ) -> None:
        self.root = Path(run_dir) / "checkpoints"
        self.keep_last, self.keep_at, self.asynchronous = keep_last, keep_at, asynchronous
        self.last: Path | None = None  # the newest complete one that this process has saved or resumed from
        self._group = processes.background_group()
        self._writing: concurrent.futures.Future[Path] | None = None
        self._began = 0.0  # when the save that is being written began

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        extra: dict[str, Any],
        ema: WeightAverage | None = None,
    ) -> None:
        """Save the state after `step`, with `extra` (plain values) and every rank's random-number generators.

        Raises:
            CheckpointError: this checkpoint could not be written. If it is written in the background, `wait` raises it.
            TrainingError: a weight or a moment is not finite; nothing was written.
        """
        failed = not self.wait_for_previous()
        self._began = time.monotonic()
        fresh = not optimizer.state
        model_state, optimizer_state = get_state_dict(model, optimizer)
        if fresh:  # torch has made a step of zeros, which must not count as the first one
            optimizer_state["state"] = {}
            optimizer.state.clear()
        self._refuse_nonfinite(step, model_state, optimizer_state)
        scratch, trouble = self.root / f"saving_{name_of(step)}", ""
        if processes.rank() == 0:
            try:
                shutil.rmtree(scratch, ignore_errors=True)
                scratch.mkdir(parents=True)
            except OSError as error:
                trouble = reason(error)
        # Also a barrier: before it, no rank writes into the folder.
        ranks = processes.gather_objects((trouble, processes.rng_state()))
        if ranks[0][0]:
            raise self._failure(step, ranks[0][0])
        extra = {**extra, "rng": [rng for _, rng in ranks]}
        state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
        if ema is not None:
            state["ema"] = dict(ema.weights)
        writer = Writer(scratch, sync_files=True)
        if self.asynchronous:
            state = writer.stage(state)
        self._writing = processes.in_background(self._write, step, writer, state, extra)
        if failed or not self.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Wait until no rank is writing any more. Raises the error of the last save, if any, once. A collective."""
        writing, self._writing = self._writing, None
        if writing is not None:
            while not processes.done_everywhere(writing):
                pass
            self.last = writing.result()

    def wait_for_previous(self) -> bool:
        """As `wait`, but an error is only reported, as what follows matters more. Returns whether there was none."""
        try:
            self.wait()
        except CheckpointError as error:
            if processes.rank() == 0:
                print(f"warning: {str(error).removesuffix(ADVICE)}", file=sys.stderr, flush=True)
            return False
        return True

    def _refuse_nonfinite(self, step: int, model_state: dict[str, Any], optimizer_state: dict[str, Any]) -> None:
        found = next(
            (names for names in processes.gather_objects(nonfinite(model_state, optimizer_state)) if names), []
        )
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise TrainingError(
                f"after step {step}, {found[0]}{more} is not finite. This state was not saved, and no checkpoint was "
                f"overwritten: {ways_on(self.last)}"
            )

    # --- in the thread -----------------------------------------------------------------------------------------------

    def _write(self, step: int, writer: Writer, state: dict[str, Any], extra: dict[str, Any]) -> Path:
        scratch, trouble, files = Path(writer.path), "", {}
        try:
            dcp.save(state, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
            files = fingerprints(scratch, f"__{processes.rank()}_*")
        except FAILED as error:
            trouble = reason(error)
            if processes.world_size() > 1 and not hasattr(error, "failures"):  # torch's own errors name their ranks
                trouble = f"rank {processes.rank()}: {trouble}"
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
        """On rank 0: write what all ranks share and the manifest, rename, move `latest`, and last remove old ones."""
        scratch, final = self.root / f"saving_{name_of(step)}", self.root / name_of(step)
        torch.save(extra, scratch / EXTRA)
        files |= fingerprints(scratch, EXTRA) | fingerprints(scratch, METADATA)
        for name in files:
            if not (scratch / name).is_file():
                raise FileNotFoundError(
                    errno.ENOENT, "run_dir must be on a file system that all nodes share; missing", name
                )
        sync(scratch / EXTRA)
        write_manifest(scratch, step, files, time.monotonic() - self._began)
        sync(scratch)
        if final.exists():
            set_aside(final)
        rename(scratch, final)
        point_latest(self.root)
        prune(self.root, self.keep_last, self.keep_at)

    def _failure(self, step: int, trouble: str) -> CheckpointError:
        kept = complete(self.root)
        intact = f"{kept[-1]} is intact" if kept else "there is no earlier one"
        return CheckpointError(
            f"the checkpoint of step {step} could not be written to {self.root} ({trouble}); its partial files were "
            f"removed and {intact}{ADVICE}"
        )


def rename(scratch: Path, final: Path) -> None:
    """Give a finished checkpoint its final name, and sync the rename to disk."""
    os.replace(scratch, final)
    sync(final.parent)


def nonfinite(model_state: dict[str, Any], optimizer_state: dict[str, Any]) -> list[str]:
    """Names of this rank's weights, learned buffers and moments that hold a NaN or an infinity."""
    candidates = list(model_state.items())
    for name, moments in optimizer_state.get("state", {}).items():
        candidates += [(f"{key} of {name}", value) for key, value in moments.items()]
    names, finite = [], []
    for name, value in candidates:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            shard = local(value)
            if shard.numel():
                names.append(name)
                # Both extremes are NaN if any element is. Unlike isfinite, this needs no temporary of the full size.
                finite.append(torch.isfinite(torch.stack(shard.aminmax())).all())
    if not names:
        return []
    good = torch.stack([flag.to(finite[0].device) for flag in finite]).tolist()  # the host waits once
    return [name for name, fine in zip(names, good) if not fine]


def ways_on(last: Path | None) -> str:
    """What to do after training diverged, for messages. A run folder keeps its settings; new ones need a new folder."""
    change = "with a lower optim.lr or another trainer.grad_clip"
    if last is None:
        return f"there is no checkpoint yet. Start again {change} and another run_dir"
    return (
        f"the last good checkpoint is {last}. Resume from it {change} in another run_dir: {typed('resume', last)} "
        "run_dir=NEW"
    )


# --- loading ---------------------------------------------------------------------------------------------------------


def load(
    path: Path | str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    ema: WeightAverage | None = None,
    *,
    weights: str = "trained",
) -> dict[str, Any]:
    """Load a verified checkpoint into the model, the optimizer and the averaged weights, however sharded; returns the
    `extra` that was saved with it.

    Without an optimizer (evaluation), only the weights are read. The optimizer keeps the settings that it was built
    with. `extra` has two more entries: "rng", the random-number generator states of each rank that saved, and
    "checkpoint", the path.

    Args:
        ema: restarted with the model's weights if the checkpoint has no average.
        weights: "trained", or "ema": the model gets the averaged weights.

    Raises:
        CheckpointError: it belongs to a different model or optimizer, has no averaged weights, or holds something other
            than data.
    """
    path = Path(path)
    optimizers = () if optimizer is None else (optimizer,)
    model_state, optimizer_state = get_state_dict(model, optimizers)
    reader = SafeReader(path)
    stored = set(reader.read_metadata().state_dict_metadata)
    surplus = sorted(key for key in stored - {f"model.{name}" for name in model_state} if key.startswith("model."))
    if surplus:
        raise CheckpointError(f"{path} does not fit this model, which has no {surplus[0].removeprefix('model.')}")
    keeps_average = any(key.startswith("ema.") for key in stored)
    state: dict[str, Any] = {"model": model_state, "optimizer": _asked_of(optimizer, optimizer_state, stored)}
    if weights == "ema":
        if not keeps_average:
            raise CheckpointError(f"{path} holds no averaged weights, as optim.ema was 0; use eval.weights=trained")
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        state["model"] = {name: value for name, value in model_state.items() if name not in names}
        state["ema"] = {name: model_state[name] for name, _ in model.named_parameters()}
    elif ema is not None and keeps_average:
        state["ema"] = dict(ema.weights)
    try:
        dcp.load(state, storage_reader=reader, planner=SafePlanner(path), no_dist=not processes.distributed())
    except FAILED as error:
        if not path.is_dir():
            raise CheckpointError(f"{path} was removed while it was read (see trainer.keep_last); try again") from error
        fits = "this model" if optimizer is None else "this model or optimizer"
        raise refusal_in(error) or CheckpointError(f"{path} does not fit {fits} ({reason(error)})") from error
    if optimizer is not None:
        groups: list[dict[str, Any]] = cast(Any, optimizer_state["param_groups"])
        names = [name for group in groups for name in group["params"]]
        optimizer_state["state"] = dict.fromkeys(names, {}) | state["optimizer"]["state"]  # SGD keeps none
        for group, loaded in zip(groups, state["optimizer"]["param_groups"]):
            group |= loaded
    set_state_dict(model, optimizers, model_state_dict=model_state, optim_state_dict=optimizer_state)
    if optimizer is not None and _before_the_first_step(optimizer_state["param_groups"], stored):
        optimizer.state.clear()
    if ema is not None and not keeps_average:
        ema.restart(model)
    return read_extra(path) | {"checkpoint": str(path)}


def _asked_of(optimizer: torch.optim.Optimizer | None, own: dict[str, Any], stored: set[str]) -> dict[str, Any]:
    """The part of an optimizer's state to read from a checkpoint: all but the settings that the config determines.

    Those are all entries of its groups, unless the optimizer lists them in `configured`: a user's own optimizer may
    keep state in its groups, too.
    """
    if optimizer is None:
        return {}
    groups: list[dict[str, Any]] = []
    for index, group in enumerate(own["param_groups"]):
        configured = getattr(optimizer, "configured", set(group)) | {"params", "lr"}
        asked = {key: value for key, value in group.items() if key not in configured}
        groups.append({key: v for key, v in asked.items() if f"optimizer.param_groups.{index}.{key}" in stored})
    fresh = _before_the_first_step(own["param_groups"], stored)
    return {"state": {} if fresh else own["state"], "param_groups": groups}


def _before_the_first_step(groups: Any, stored: set[str]) -> bool:
    """Whether a checkpoint holds no state of its optimizer, which has groups like these (another optimizer may have
    none at any step)."""
    keys = {f"optimizer.param_groups.{i}.{key}" for i, group in enumerate(groups) for key in group if key != "params"}
    return keys <= stored and not any(key.startswith("optimizer.state.") for key in stored)


def read_extra(path: Path | str) -> dict[str, Any]:
    """Step, data position, config and generators of a checkpoint, without its tensors.

    Raises:
        CheckpointError: the file holds something other than plain values and tensors.
    """
    return load_plain(Path(path) / EXTRA, Path(path) / EXTRA)


# --- command line ----------------------------------------------------------------------------------------------------


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
