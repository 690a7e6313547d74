"""How a rank of a job ends after a failure: in bounded time, and naming the ranks that failed or do not answer.

A rank that is frozen or lost shows up on the others as an error of some collective, which names at best a neighbour.
So every rank that sees such an error reports to the store of the process group, and the ranks that have not reported
after a few seconds are the suspects. torchrun's own summary calls the first rank to exit the root cause, but it quotes
this explanation if it finds it in the error file that torchrun provides.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ovq import stacks
from ovq.errors import Failure, one_line
from ovq.files import write_whole

ROLL_CALL_S = 5.0  # ranks see the same failure within moments of each other
GRACE_S = 20.0  # for a checkpoint that is being written; torchrun kills after 30 s
LAST_STAGE_S = 5.0


class PeerLost(Failure, RuntimeError):
    """Another rank failed or stopped answering. The message is one line: which one, what is intact, what to do."""


def in_job() -> bool:
    """Whether this process is one rank of several; does not import torch."""
    processes = sys.modules.get("ovq.processes")
    return processes is not None and processes.distributed()


def is_communication_error(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, comes from the communication between ranks."""
    import torch.distributed as dist

    while error is not None:
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def watched(checkpoints: Path) -> Iterator[None]:
    """Turn a communication error into `PeerLost`, and report any other failure of this rank to its peers.

    Args:
        checkpoints: the run's folder of checkpoints, whose newest one the message names.

    Raises:
        PeerLost: another rank failed, was lost or does not answer.
    """
    try:
        yield
    except Exception as error:
        if not in_job():
            size = os.environ.get("WORLD_SIZE", "1")
            if size != "1" and "torch.distributed" in sys.modules and is_communication_error(error):
                raise PeerLost(
                    f"the {size} ranks of the job did not find each other ({one_line(error)}); check that all of them "
                    "started with the same MASTER_ADDR and MASTER_PORT, and start them again"
                ) from error
            raise
        outlast_signals()
        if is_communication_error(error):
            absent, failed = roll_call()
            folder, states = stacks.collect(absent, error)
            raise PeerLost(explanation(absent, failed, one_line(error), checkpoints, folder, states)) from error
        report_failure(f"{type(error).__name__}: {one_line(error)}")
        raise


def outlast_signals() -> None:
    """Ignore SIGTERM from now on: torchrun sends it once one rank has exited, and the others must still report."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def roll_call() -> tuple[list[int], dict[int, str]]:
    """Report to the store and wait up to ROLL_CALL_S for the others.

    Returns:
        The ranks that did not report, and the failures that ranks have reported, by rank. If rank 0 hosts the store
        and is lost, nothing is known of the others: it alone is returned.
    """
    from ovq import processes

    absent, failed = set(range(processes.world_size())), dict[int, str]()
    # In a thread of its own: a store on a frozen host blocks without a time limit.
    thread = threading.Thread(target=_strike_off, args=(absent, failed), daemon=True)
    thread.start()
    thread.join(2 * ROLL_CALL_S)
    if len(absent) == processes.world_size():  # not even this rank could report
        return [] if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else [0], failed
    return sorted(absent), failed


def _strike_off(absent: set[int], failed: dict[int, str]) -> None:
    from ovq import processes

    store, end = _store(), time.monotonic() + ROLL_CALL_S
    with contextlib.suppress(RuntimeError):  # rank 0 may host the store, and end before the others
        store.set(f"ovq/present/{processes.rank()}", "")
        while absent and time.monotonic() < end:
            for rank in sorted(absent):
                if store.check([f"ovq/failed/{rank}"]):
                    failed[rank] = store.get(f"ovq/failed/{rank}").decode()
                    absent.discard(rank)
                elif store.check([f"ovq/present/{rank}"]):
                    absent.discard(rank)
            if absent:
                time.sleep(0.05)


def report_failure(text: str) -> None:
    """Let the other ranks know why this one ends."""
    from ovq import processes

    def report() -> None:
        with contextlib.suppress(RuntimeError):
            _store().set(f"ovq/failed/{processes.rank()}", text)

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    thread.join(ROLL_CALL_S)


def _store() -> Any:
    import torch.distributed as dist

    return dist.distributed_c10d._get_default_store()


def explanation(
    absent: list[int], failed: dict[int, str], seen: str, checkpoints: Path, folder: Path | None, states: dict[int, str]
) -> str:
    """One line: what happened, what is intact, what to do.

    Args:
        seen: the error of this rank.
        folder: the folder of stacks, if there is one.
        states: rank -> what its process is doing, where that is known.
    """
    from ovq.train.checkpoint_files import complete

    said = [f"rank {rank} failed ({text})" for rank, text in failed.items()]
    if absent:
        ranks = f"rank {absent[0]}" if len(absent) == 1 else f"ranks {', '.join(map(str, absent))}"
        said.append(f"{ranks} did not answer (killed, stopped or frozen)")
        said += [states[rank] for rank in absent if rank in states]
    if not said:
        said = [f"communication with the other ranks failed, and none of them is known to be lost ({seen})"]
    saved = complete(checkpoints)
    kept = f"the newest checkpoint, {saved[-1]}, is intact" if saved else "there is no checkpoint yet"
    advice = "end any process that is left and start the same command again"
    found = f"; stacks: {folder}" if folder else ""
    return f"{'; '.join(said)}; {kept}; {advice}{found}"


def leave(status: int | None, error: BaseException) -> None:
    """End this rank of a job after a failure, within GRACE_S; in a single process, return.

    A checkpoint that is being written is completed if that takes no longer. A normal exit would wait for it, and for
    the process group, without such a limit: for hours, if a peer is frozen.

    Args:
        status: exit status for an error that has been printed; None: print its traceback and exit with status 1.
    """
    if not in_job():
        tell_launcher(error, status)
        return
    outlast_signals()
    if status is None:
        traceback.print_exception(error)
    tell_launcher(error, status)
    from ovq import processes

    # Without a peer, the only part of a checkpoint that can still complete is its last stage, on rank 0.
    processes.join_background(LAST_STAGE_S if isinstance(error, PeerLost) else GRACE_S)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # lasting streams: it cannot fail
    os._exit(1 if status is None else status)


def tell_launcher(error: BaseException, status: int | None) -> None:
    """Give torchrun the error for its summary, in the format of torch.distributed.elastic; no-op without torchrun.

    "py_callstack" is the traceback if the error is a bug (status None), else the message.
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        message = one_line(error)
        stack = "".join(traceback.format_exception(error)).rstrip() if status is None else message
        extra = {"py_callstack": stack, "timestamp": str(int(time.time())), "error": type(error).__name__}
        with contextlib.suppress(OSError):
            # Atomically: a half-written file would make torchrun itself end in a traceback.
            write_whole(path, json.dumps({"message": {"message": message, "extraInfo": extra}}))
