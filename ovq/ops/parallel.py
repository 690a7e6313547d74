"""Run independent pieces of work in parallel on the cores of a CPU.

An operator that is a long chain of small tensor operations gains little from threads within each operation: they
synchronise after every one, and on a machine busy with other work each synchronisation costs a scheduler time slice.
Independent pieces (some heads, some rows of a batch), each on one core from start to finish, synchronise once.
"""

from __future__ import annotations

import functools
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import torch

Piece = TypeVar("Piece")
Function = TypeVar("Function", bound=Callable[..., Any])


def unlocked(function: Function) -> Function:
    """Have TorchScript compile `function` at its first call, so that it runs without Python's global lock (the GIL).

    Otherwise, the loops on two cores spend up to a quarter of their time waiting for the lock. TorchScript is
    deprecated, but every successor needs a compiler at run time. With PYTORCH_JIT=0, for debugging,
    the function runs as plain Python, with the same results.
    """

    @functools.lru_cache(maxsize=1)
    def compiled() -> Callable[..., Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.jit.script(function)

    @functools.wraps(function)
    def run(*arguments: Any, **named: Any) -> Any:
        with _compiling:
            call = compiled()
        with torch.jit.optimized_execution(False):  # no profiling of shapes, and no recompilation for new ones
            return call(*arguments, **named)

    return cast(Function, run)


_compiling = threading.Lock()


def run_pieces(run: Callable[[Piece], None], pieces: Sequence[Piece]) -> None:
    """Call `run` on each piece, on as many cores as torch may use, without gradients; any piece's exception is raised.

    If there are fewer pieces than cores, each piece gets several cores.
    """
    threads = torch.get_num_threads()
    workers = min(threads, len(pieces))
    if workers == 1:
        for piece in pieces:
            run(piece)
        return
    inference = torch.is_inference_mode_enabled()  # like no_grad, this mode is thread-local

    def guarded(piece: Piece) -> None:
        with torch.inference_mode() if inference else torch.no_grad():
            run(piece)

    list(_pool(workers, threads // workers, os.getpid()).map(guarded, pieces))


@functools.lru_cache(maxsize=4)
def _pool(workers: int, cores: int, process: int) -> ThreadPoolExecutor:
    """Worker threads with `cores` cores each. They live as long as the process (a forked child creates its own)."""
    del process
    before, everyone = torch.get_num_threads(), threading.Barrier(workers)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="ovq", initializer=_use_cores, initargs=(cores,))
    list(pool.map(lambda _: everyone.wait(), range(workers)))
    torch.set_num_threads(before)  # a worker's setting also becomes the default for threads new to torch
    return pool


def _use_cores(cores: int) -> None:
    torch.get_num_threads()  # the first call in a thread applies torch's default, which would undo the next line
    torch.set_num_threads(cores)
