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
    """`run` each piece, on as many threads as torch may use; without gradients. An error of any is raised."""
    threads = torch.get_num_threads()
    if threads == 1 or len(pieces) == 1:
        for piece in pieces:
            run(piece)
        return
    inference = torch.is_inference_mode_enabled()  # like no_grad, this is a thread's own

    def guarded(piece: Piece) -> None:
        with torch.inference_mode() if inference else torch.no_grad():
            run(piece)

    list(_pool(threads, os.getpid()).map(guarded, pieces))


@functools.lru_cache(maxsize=1)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads that each use one core. They live as long as the process (a fork has to make its own)."""
    del process
    everyone = threading.Barrier(threads)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="ovq", initializer=_use_one_core)
    list(pool.map(lambda _: everyone.wait(), range(threads)))
    torch.set_num_threads(threads)  # what a thread sets holds for itself, and for threads that torch meets later
    return pool


def _use_one_core() -> None:
    torch.get_num_threads()  # at its first call in a thread, torch sets its default, which would undo the next line
    torch.set_num_threads(1)
