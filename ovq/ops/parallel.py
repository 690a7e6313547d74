"""Whole pieces of work side by side on the cores of a CPU.

An operator that is a long chain of small tensor operations gains little from threads inside each: they meet at the end
of every operation, and where the machine is busy with anything else, a meeting costs a slice of the scheduler's time.
Independent pieces (some heads, some rows of a batch), each on one core from beginning to end, meet once.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Piece = TypeVar("Piece")


def run_pieces(run: Callable[[Piece], None], pieces: Sequence[Piece]) -> None:
    """`run` each piece, on as many cores as torch may use; without gradients. An error of any is raised.

    Where there are fewer pieces than cores, each piece has several.
    """
    threads = torch.get_num_threads()
    workers = min(threads, len(pieces))
    if workers == 1:
        for piece in pieces:
            run(piece)
        return
    inference = torch.is_inference_mode_enabled()  # like no_grad, this is a thread's own

    def guarded(piece: Piece) -> None:
        with torch.inference_mode() if inference else torch.no_grad():
            run(piece)

    list(_pool(workers, threads // workers, os.getpid()).map(guarded, pieces))


@functools.lru_cache(maxsize=4)
def _pool(workers: int, cores: int, process: int) -> ThreadPoolExecutor:
    """Threads with so many cores each. They live as long as the process (a fork has to make its own)."""
    del process
    before, everyone = torch.get_num_threads(), threading.Barrier(workers)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="ovq", initializer=_use_cores, initargs=(cores,))
    list(pool.map(lambda _: everyone.wait(), range(workers)))
    torch.set_num_threads(before)  # what a thread sets holds for itself, and for threads that torch meets later
    return pool


def _use_cores(cores: int) -> None:
    torch.get_num_threads()  # at its first call in a thread, torch sets its default, which would undo the next line
    torch.set_num_threads(cores)
