"""Claims about atomic writes: a file is complete or absent, whichever way it is written."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data.files import AtomicFile, sha256_of
from ovq import files
from ovq.files import replacing, write_whole

OLD, NEW = b"old\n", bytes(range(256)) * 1000


def by_replacing(path: Path, content: bytes) -> None:
    with replacing(path) as scratch:
        scratch.write_bytes(content)


def by_pieces(path: Path, content: bytes) -> None:
    with AtomicFile(path) as file:
        file.write(content[:1000])
        file.write(content[1000:])


WAYS = [write_whole, by_replacing, by_pieces]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "name.json").write_bytes(OLD)
    return tmp_path / "name.json"


def untouched(path: Path) -> bool:
    """Whether the file has its old content and no other file was left next to it."""
    return path.read_bytes() == OLD and os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("write", WAYS)
def test_new_content_replaces_the_old_and_folders_are_created(write: Callable[[Path, bytes], None], path: Path) -> None:
    for target in (path, path.parent / "a" / "b" / "c.bin"):
        write(target, NEW)
        assert target.read_bytes() == NEW and os.listdir(target.parent) == [target.name]
        target.unlink()


def test_text_is_written_as_utf8_with_line_endings_unchanged(path: Path) -> None:
    write_whole(path, "caf\u00e9\r\nend\n")
    assert path.read_bytes() == b"caf\xc3\xa9\r\nend\n"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_a_failure_midway_leaves_the_old_file_untouched(error: type[BaseException], path: Path) -> None:
    with pytest.raises(error), replacing(path) as scratch:
        scratch.write_bytes(NEW)
        assert path.read_bytes() == OLD
        raise error
    assert untouched(path)
    with pytest.raises(error), AtomicFile(path) as file:
        file.write(NEW)
        raise error
    assert untouched(path)
    with pytest.raises(FileNotFoundError), replacing(path):
        pass  # nothing was written
    assert untouched(path)


@pytest.mark.parametrize("write", WAYS)
def test_a_full_disk_raises_oserror_and_loses_nothing_saved(write: Callable[[Path, bytes], None], path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(NEW) - 1, limits[1]))  # the last byte does not fit
    try:
        with pytest.raises(OSError) as error:
            write(path, NEW)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == errno.EFBIG and untouched(path)


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("write", WAYS)
def test_a_disk_that_fails_at_the_end_leaves_the_old_file_untouched(
    write: Callable[[Path, bytes], None], call: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, call, refuse)
        with pytest.raises(OSError, match="No space left"):
            write(path, NEW)
    assert untouched(path)


@pytest.mark.parametrize("write", WAYS)
def test_the_whole_content_is_on_disk_before_the_rename(
    write: Callable[[Path, bytes], None], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, synced = os.fsync, []

    def watched(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_size, path.read_bytes()))
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", watched)
    write(path, NEW)
    assert synced == [(len(NEW), OLD)]


def write_often(path: Path, letter: bytes, times: int = 50) -> None:
    for _ in range(times):
        write_whole(path, letter * 100_000)
        assert len(set(path.read_bytes())) == 1 and path.stat().st_size == 100_000


def test_concurrent_writers_leave_one_complete_file(path: Path) -> None:
    """Two threads of this process and two other processes; every read finds a complete file of one of the writers."""
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=write_often, args=(path, letter)) for letter in (b"a", b"b")]
    for process in processes:
        process.start()
    with ThreadPoolExecutor() as threads:
        for done in [threads.submit(write_often, path, letter) for letter in (b"c", b"d")]:
            done.result()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert path.read_bytes() in [letter * 100_000 for letter in (b"a", b"b", b"c", b"d")]
    assert os.listdir(path.parent) == [path.name]


def test_pieces_are_counted_and_hashed(path: Path) -> None:
    with AtomicFile(path) as file:
        for start in range(0, len(NEW), 999):
            file.write(NEW[start : start + 999])
    assert (file.size, file.sha256) == (len(NEW), sha256_of(path))
