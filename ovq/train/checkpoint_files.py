"""Checkpoints as files: names, manifests and verification, locks, and reading without running code.

Everything here treats a checkpoint as data that may come from anyone. The SHA-256 sums in a manifest detect damage;
they do not authenticate, so pickled parts are read by unpicklers that construct only a fixed set of types.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

from ovq import processes
from ovq.errors import Failure, one_line
from ovq.files import locked, sync

FORMAT = 1  # of the folder; any other value is refused
MANIFEST, EXTRA, LATEST, METADATA = "manifest.json", "extra.pt", "latest", ".metadata"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CheckpointError(Failure, RuntimeError):
    """A checkpoint cannot be written or used; the message is one line that names it and says what is intact."""


# --- names -----------------------------------------------------------------------------------------------------------


def name_of(step: int) -> str:
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def named(root: Path) -> list[Path]:
    """The folders in `run_dir/checkpoints` that have a checkpoint's name, oldest first, complete or not."""
    return sorted(path for path in root.glob("step_" + "[0-9]" * 8) if path.is_dir())


def complete(root: Path) -> list[Path]:
    """The complete checkpoints in `run_dir/checkpoints`, oldest first. They are not verified."""
    return [path for path in named(root) if (path / MANIFEST).is_file()]


def find(folder: Path) -> list[Path]:
    """`folder` itself if it is a checkpoint, else the checkpoints in this run or checkpoints folder, oldest first."""
    if folder.name.startswith(("step_", "aside_")) or (folder / MANIFEST).exists():
        return [folder]
    return complete(folder / "checkpoints") or complete(folder)


def set_aside(path: Path) -> str:
    """Rename a checkpoint so that nothing uses it; returns the new name."""
    number = 0
    while (target := path.with_name(f"aside_{path.name}" + (f".{number}" if number else ""))).exists():
        number += 1
    os.replace(path, target)
    return target.name


def remove(path: Path) -> None:
    """Remove a checkpoint or a leftover. A checkpoint is renamed first, so a half-removed one never looks complete."""
    if path.is_symlink() or path.is_file():
        path.unlink()
        return
    doomed = path if path.name.startswith(("saving_", "removing_")) else path.with_name(f"removing_{path.name}")
    if doomed != path:
        os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def prune(root: Path, keep_last: int, keep_at: int | None = None) -> None:
    """Remove all complete checkpoints but the newest `keep_last` and the newest of at most `keep_at` steps. One that is
    being read stays until the next call."""
    whole = complete(root)
    kept = [path for path in whole if keep_at is not None and step_of(path) <= keep_at][-1:]
    for old in (path for path in whole[:-keep_last] if path not in kept):
        with locked(old) as free:
            if free:
                remove(old)


# --- locks -----------------------------------------------------------------------------------------------------------

_HELD: dict[Path, Any] = {}  # closing a locked file would release it


def hold(root: Path) -> None:
    """Lock the run folder for this process until it ends, however it ends.

    Raises:
        CheckpointError: another process holds it.
    """
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
        print(
            f"{root} is on a file system without locks ({error}); make sure that only one run uses it", file=sys.stderr
        )
    file.truncate(0)
    file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
    file.flush()
    _HELD[lock] = file


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Keep `prune`, in any process, from removing a checkpoint while it is being read. Needs only read permission."""
    with locked(path, shared=True):
        yield


# --- manifests -------------------------------------------------------------------------------------------------------


def fingerprints(folder: Path, pattern: str) -> dict[str, dict[str, Any]]:
    """File name -> {"bytes", "sha256"} of the files that match."""
    out = {}
    for path in sorted(folder.glob(pattern)):
        with path.open("rb") as file:
            out[path.name] = {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    return out


def write_manifest(folder: Path, step: int, files: dict[str, dict[str, Any]], seconds: float) -> None:
    """`seconds`: how long the save took up to here; a scheduler's grace period must be longer."""
    content = {
        "format": FORMAT,
        "step": step,
        "processes": processes.world_size(),
        "torch": torch.__version__,
        "saved": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(seconds, 3),
        "files": dict(sorted(files.items())),
    }
    path = folder / MANIFEST
    path.write_text(manifest_text(content))
    sync(path)


def manifest_text(content: dict[str, Any]) -> str:
    """The canonical text of a manifest, which ends with a hash of the rest: any byte that differs is damage."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(rest).encode()).hexdigest()
    return json.dumps({**rest, "sha256": digest}, indent=1) + "\n"


def verify(path: Path | str) -> dict[str, Any]:
    """The manifest of a checkpoint, after checking every file against it.

    Raises:
        CheckpointError: names the first file that is missing, or whose size or content is not what was written.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint {path}")
    if not (path / MANIFEST).is_file():
        raise CheckpointError(f"{path} is not a complete checkpoint: it has no {MANIFEST}")
    try:
        return _verified(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {one_line(error)}") from None


def _verified(path: Path) -> dict[str, Any]:
    text = (path / MANIFEST).read_bytes()
    try:
        content = json.loads(text)
        intact = manifest_text(content).encode() == text
        found, files = content["format"], {str(name): entry for name, entry in content["files"].items()}
        intact = intact and isinstance(content["step"], int) and all(Path(name).name == name for name in files)
    except (ValueError, AttributeError, TypeError, KeyError):
        intact = False
    if not intact:
        raise CheckpointError(f"{path / MANIFEST} is damaged")
    if found != FORMAT:
        raise CheckpointError(f"{path} has format {found}; this version reads {FORMAT}")
    for name, want in files.items():
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name} is missing")
        size = (path / name).stat().st_size
        if size != want["bytes"]:
            raise CheckpointError(f"{path / name} is damaged: {size} bytes, {want['bytes']} were written")
        if fingerprints(path, name).get(name) != want:
            raise CheckpointError(f"{path / name} is damaged: its SHA-256 differs from the manifest's")
    return content


# --- reading pickled parts as data -----------------------------------------------------------------------------------

# What torch.distributed.checkpoint puts into `.metadata`. Nothing on this list has side effects when called.
_METADATA_GLOBALS = {
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "BytesStorageMetadata",
            "TensorStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # its module in Python 3.13
}


class _MetadataUnpickler(pickle.Unpickler):
    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file)
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _METADATA_GLOBALS:
            return super().find_class(module, name)
        raise _refused(self.path, f"{module}.{name}")


class SafeReader(dcp.FileSystemReader):
    """Reads tensors and metadata like torch.distributed.checkpoint's own reader, but unpickles no arbitrary types."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The content of `.metadata`.

        Raises:
            CheckpointError: the file names a type that does not belong there, or is not readable.
        """
        path = Path(self.path) / METADATA
        try:
            with path.open("rb") as file:
                metadata = _MetadataUnpickler(file, path).load()
            stored = metadata.storage_data.values()
            sound = isinstance(metadata, Metadata) and all(
                Path(i.relative_path).name == i.relative_path for i in stored
            )
        except CheckpointError:
            raise
        except Exception as error:  # malformed pickles raise almost anything
            raise CheckpointError(f"{path} cannot be read: {one_line(error)}") from None
        if not sound:
            raise CheckpointError(f"{path} is not the metadata of a checkpoint in one folder")
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


class SafePlanner(dcp.DefaultLoadPlanner):
    """Reads values that are not tensors, such as learning rates, as plain data; its base class unpickles anything."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = load_plain(value, self.path)
        value.seek(0)
        value.truncate()
        torch.save(plain, value)  # the base class, which knows where the value belongs, reads what was checked
        value.seek(0)
        super().load_bytes(read_item, value)


def load_plain(source: Path | io.BytesIO, path: Path) -> Any:
    """Tensors and plain values that `torch.save` wrote to `source`, which `path` names in messages.

    Raises:
        CheckpointError: it holds anything else, or cannot be read.
    """
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise _refused(path, found[1]) from None
        raise CheckpointError(f"{path} cannot be read: {one_line(error)[:120]}") from None
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {one_line(error)[:120]}") from None


def _refused(path: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"{path} names {name}, which a checkpoint of this program never does; loading it could run code, so nothing "
        "of it was loaded"
    )


# --- why it failed ---------------------------------------------------------------------------------------------------


class Writer(dcp.FileSystemWriter):
    """Reports a failure on this rank by its root cause.

    Exceptions lose their causes on the way to rank 0, and a full disk would arrive there as PyTorch's complaint about a
    file position.
    """

    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        try:
            written = super().write_data(*args, **kwargs)
            written.wait()
            return written
        except Exception as error:
            raise CheckpointError(reason(error)) from None

    def finish(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().finish(*args, **kwargs)
        except Exception as error:
            raise CheckpointError(reason(error)) from None


def refusal_in(error: BaseException) -> CheckpointError | None:
    """The CheckpointError that torch wrapped in its own exception, if there is one."""
    causes = [error, *(each for each, _ in getattr(error, "failures", {}).values())]
    return next((cause for cause in causes if isinstance(cause, CheckpointError)), None)


def reason(error: BaseException) -> str:
    """The cause of a failed save or load on one line, with the ranks it failed on where torch names them."""
    failures = getattr(error, "failures", None)  # DCP: rank -> (error, traceback)
    if failures:
        ranks: dict[str, list[str]] = {}
        for rank, (each, _) in sorted(failures.items()):
            ranks.setdefault(reason(each), []).append(str(rank))
        if processes.world_size() == 1:
            return next(iter(ranks))
        return "; ".join(f"rank {', '.join(which)}: {cause}" for cause, which in ranks.items())
    if isinstance(error, CheckpointError):
        return str(error)
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in FULL:
            return f"the disk is full: {os.strerror(seen.errno)}"
        seen = seen.__cause__ or seen.__context__
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
