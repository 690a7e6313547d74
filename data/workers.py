"""Worker processes that prepare rows ahead of the trainer, and what happens when one dies, fails or hangs.

- Workers die with the trainer, however it ends: none is left to hold memory, or to keep open the sockets whose closing
  tells other ranks that the trainer has died.
- They ignore the signals that ask a job to stop. A scheduler sends those to every process of the job, and the trainer
  still needs its workers to finish the step before it saves.
- The trainer never blocks on a worker: it wakes up every second to check whether it should stop, whether all workers
  are alive, and whether `trainer.timeout_s` has passed.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils.data import IterableDataset

from data.lanes import Row
from data.sources import DataError
from ovq.errors import Failure, one_line
from ovq.signals import SIGNALS

POLL_S = 1.0
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def die_with_parent() -> None:
    """Called in a `multiprocessing` child: have it killed as soon as its parent dies.

    On Linux the kernel does this, even if the child is blocked; the parent is then the *thread* that started the child.
    Elsewhere a thread of the child watches the parent.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    by_kernel = sys.platform == "linux" and not ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if not by_kernel:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    elif os.getppid() != parent.pid:  # it died before the kernel was asked
        os.kill(os.getpid(), signal.SIGKILL)


def _watch(parent: BaseProcess) -> None:
    # A sibling may have inherited the pipe that `join` waits for and keep it open, so the parent's id is checked too.
    while os.getppid() == parent.pid and parent.is_alive():
        parent.join(POLL_S)
    os.kill(os.getpid(), signal.SIGKILL)


class RowWorkers:
    """Rows of a data set, prepared ahead by worker processes; row n comes from worker n modulo `count`.

    A thread receives the rows, because receiving may block forever: a worker stopped in the middle of sending leaves
    half a row in the pipe. `take` waits for the thread only. The thread also forks the workers: if the main thread did,
    torch would install its SIGCHLD handler, which raises at whatever point the main thread has reached.

    Args:
        data: endless iterable over rows; each worker iterates over its own copy.
        count: number of processes, at least 1.
        ahead: rows that each worker prepares ahead.
        rank: rank of this process, for messages.
    """

    def __init__(self, data: Iterable[Row], count: int, ahead: int, rank: int) -> None:
        from torchdata.stateful_dataloader import StatefulDataLoader

        self.count, self.rank, self.taken = count, rank, 0
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torchdata 0.11 with torch 2.13
            loader = StatefulDataLoader(
                _Guarded(data),
                batch_size=None,
                num_workers=count,
                # Its own generator: seeding workers would draw from the global one, and a resumed run would differ.
                generator=torch.Generator(),
                # Each row carries the state of its lane. A snapshot of all lanes with every row would cost more than
                # the row itself (512 lanes: 160 thousand tokens/s instead of 4 million).
                snapshot_every_n_steps=1 << 30,
                prefetch_factor=ahead,
                worker_init_fn=_begin_worker,
            )
        self._others = set(multiprocessing.active_children())
        self._ready: queue.Queue[Any] = queue.Queue(2)
        self._closed = False
        self._workers: list[BaseProcess] = []  # in the order of their numbers, once all have started
        self._exitcodes: list[int | None] | None = None  # of the workers when reading failed
        atexit.register(self.close)  # otherwise Python would wait at exit for processes that ignore its SIGTERM
        threading.Thread(target=self._receive, args=(loader,), name="loader", daemon=True).start()

    def _receive(self, loader: Any) -> None:
        try:
            rows = iter(loader)
            # A SIGCHLD handler installed by another data loader would raise at some arbitrary point of the main thread.
            torch.utils.data._utils.signal_handling._remove_worker_pids(id(rows))
            rows._worker_pids_set = False
            self._workers = list(rows._workers)
            while not self._closed:
                self._ready.put(next(rows))
        except BaseException as error:  # raised by `take`
            # Recorded before this thread ends, because the kernel then kills the healthy workers too.
            self._exitcodes = [worker.exitcode for worker in self._workers]
            self._ready.put(error)

    def take(self, timeout_s: float, should_stop: Callable[[], bool], doing: Callable[[], str]) -> Row | None:
        """The next row; None if should_stop() became true while waiting for it.

        Args:
            timeout_s: seconds to wait.
            should_stop: polled about once a second while waiting.
            doing: what the worker is expected to be doing, for messages.

        Raises:
            DataError: a worker died, failed, or delivered nothing for `timeout_s` seconds.
        """
        end = time.monotonic() + timeout_s
        while True:
            try:
                row = self._ready.get(timeout=max(0.0, min(POLL_S, end - time.monotonic())))
                break
            except queue.Empty:
                if should_stop():
                    return None
                self._check_alive(doing)
                if time.monotonic() >= end:
                    raise DataError(self._late(timeout_s, doing())) from None
            except RuntimeError as error:  # torch's SIGCHLD handler, if a worker dies before `_receive` removes it
                row = error
                break
        if isinstance(row, _Failed):
            raise DataError(self._failed(row, doing()))
        if isinstance(row, BaseException):
            self._check_alive(doing)
            raise DataError(f"loader workers on rank {self.rank} cannot be read: {one_line(row)}") from row
        self.taken += 1
        return row

    def close(self) -> None:
        """Kill the workers at once; the rows they have prepared ahead are prepared again in the next run."""
        if self._closed:  # by atexit; an iterator garbage-collected after that finds its modules gone
            return
        self._closed = True
        # If the start was interrupted, `_workers` is not known yet; other loaders have workers of their own.
        workers = set(self._workers) or set(multiprocessing.active_children()) - self._others
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join(POLL_S)
        with contextlib.suppress(queue.Empty):  # the thread may be waiting for room
            while True:
                self._ready.get_nowait()
        atexit.unregister(self.close)

    # --- messages ----------------------------------------------------------------------------------------------------

    def _check_alive(self, doing: Callable[[], str]) -> None:
        codes = self._exitcodes or [worker.exitcode for worker in self._workers]
        for number, code in enumerate(codes):
            if code is None:
                continue
            how = f"ended with status {code}"
            if code < 0:
                how = f"was killed by {signal.Signals(-code).name}"
                how += ", as happens when memory runs out" if -code == signal.SIGKILL else ""
            task = f" while {doing()}" if number == self.taken % self.count else ""
            raise DataError(
                f"{self._name(number)} {how}{task}; the same command resumes from the last checkpoint (if memory is "
                "short, lower data.num_workers or data.prefetch)"
            )

    def _late(self, timeout_s: float, doing: str) -> str:
        number = self.taken % self.count
        return (
            f"{self._name(number)}{self._status(number)} has delivered nothing for {timeout_s:g} s "
            f"(trainer.timeout_s) while {doing}; the same command resumes from the last checkpoint (raise "
            "trainer.timeout_s if the storage is that slow)"
        )

    def _failed(self, failed: _Failed, doing: str) -> str:
        where = self._name(self.taken % self.count)
        if failed.expected:
            return f"{failed.message} ({where})"
        return f"{where} failed while {doing}: {failed.message} (data.num_workers=0 shows the whole traceback)"

    def _name(self, number: int) -> str:
        process = f", process {self._workers[number].pid}" if self._workers else ""
        return f"loader worker {number} of {self.count} on rank {self.rank}{process}"

    def _status(self, number: int) -> str:
        """A worker's state according to the operating system, for instance " (stopped)" or " (disk-sleep)"."""
        if not self._workers:
            return " (not started)"
        with contextlib.suppress(psutil.Error):
            return f" ({psutil.Process(self._workers[number].pid).status()})"
        return ""


@dataclass
class _Failed:
    """An exception in a worker; `expected` if its message is meant for users."""

    message: str
    expected: bool


class _Guarded(IterableDataset):
    """A data set that yields its exceptions: re-raised across processes they would be 60 lines of traceback."""

    def __init__(self, data: Iterable[Row]) -> None:
        super().__init__()
        self.data = data

    def __iter__(self) -> Iterator[Row | _Failed]:
        try:
            yield from self.data
        except Exception as error:
            expected = isinstance(error, Failure | OSError)
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(last.filename).name}:{last.lineno}"
            message = one_line(error) if expected else f"{type(error).__name__}: {one_line(error)} at {place}"
            yield _Failed(message, expected)


def _begin_worker(number: int) -> None:
    die_with_parent()
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
