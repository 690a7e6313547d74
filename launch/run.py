"""Train on several GPUs: check everything first, then start one process per GPU, and exit as the ranks do.

    python -m launch run --gpus 8 -- experiment=pg19_150m
    python -m launch run --gpus 8 --dry-run -- experiment=pg19_150m
    python -m launch run --cpu-ranks 2 -- experiment=cpu_demo trainer.micro_batch=2
    python -m launch run --gpus 8 --nodes 4 --rendezvous node0:29400 -- experiment=pg19_480m     # on each of 4 machines

This process is torchrun (torch.distributed.run), with these differences. Problems with the settings, the shards, the
tokenizer, the run folder or the memory are reported before a GPU is taken. A signal is passed on to the ranks, which
save and end with status 0, however long that takes; only a third signal kills them. A failure is shown once: the first
rank that failed, with its error or its traceback, and the exit status is that rank's. On one machine the system picks a
free port, so two launches never clash; on several, --rendezvous names the port.

Exit status: 0 finished, or stopped by a signal after saving; the first failing rank's, or 128 + the number of the
signal that ended it; 2 refused before the start.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from launch import options as arguments
from launch.options import positive
from ovq.cli import guarded
from ovq.cpu import cores
from ovq.errors import ConfigError, Failure, Stopped, one_line
from ovq.signals import SIGNALS, handled

ROOT = Path(__file__).resolve().parent.parent
JOIN_S = 600  # seconds that a node waits for the others
SHUTDOWN_S = 600  # seconds that torchrun waits for its ranks, if it can be told; needed only if torchrun itself fails


class RankFailed(Failure):
    """A rank failed; the message is one line that names it. `status` is its exit status."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launch run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [options] -- key=value ...",
    )
    parser.add_argument("--gpus", type=positive, help="GPUs of this machine to use, one rank each (default: all)")
    parser.add_argument("--cpu-ranks", type=positive, help="use no GPU; run this many ranks, on shared cores")
    parser.add_argument("--nodes", type=positive, default=1, help="machines; start this on each (default: 1)")
    parser.add_argument("--rendezvous", metavar="HOST:PORT", help="with --nodes: one of them, and a free port there")
    parser.add_argument("--id", default="ovq", help="with --nodes: a name for this start, the same on each machine")
    parser.add_argument("--dry-run", action="store_true", help="check, show what would run, and end")
    parser.add_argument("--no-check", action="store_true", help="leave the checks to the ranks (SLURM and sweeps do)")
    return guarded(lambda: run(arguments.read(parser, argv)))


def run(options: argparse.Namespace) -> None:
    """Check the run, show it, and train.

    Raises:
        ConfigError: refused before the start.
        RankFailed: a rank failed.
        Stopped: a signal came before the ranks were ready to save.
    """
    if options.nodes > 1 and not options.rendezvous:
        raise ConfigError(
            f"--nodes {options.nodes} needs --rendezvous HOST:PORT, the same on each: one of them and a free port"
        )
    overrides, ranks, gpu_bytes = place(options)
    if not options.no_check:
        from launch.check import check  # imports torch: not before the options are known to be legal

        checked = check(overrides, ranks * options.nodes, gpu_bytes)
        print(checked.report)
        for warning in checked.warnings:
            print(f"warning: {warning}", file=sys.stderr)
    words = [*torchrun_words(options, ranks), str(ROOT / "train.py"), *overrides]
    if options.dry_run or not options.no_check:
        print(f"\n{options.nodes} node(s), {ranks} rank(s) on each: torchrun {shlex.join(words)}", flush=True)
    if not options.dry_run:
        launch(words, ranks, on_cpu=bool(options.cpu_ranks))


def place(options: argparse.Namespace) -> tuple[list[str], int, int | None]:
    """(settings, ranks on this machine, bytes of its smallest GPU) of a run.

    Raises:
        ConfigError: this machine has too few GPUs, or both kinds of ranks are asked for.
    """
    if options.cpu_ranks:
        if options.gpus:
            raise ConfigError("give --gpus or --cpu-ranks, not both")
        given = [text for text in options.overrides if not text.startswith("trainer.device=")]
        return [*given, "trainer.device=cpu"], options.cpu_ranks, None
    from launch.check import gpus_here

    found = gpus_here()
    ranks = options.gpus or len(found)
    if not found or ranks > len(found):
        asked = f"--gpus {options.gpus}, but " if options.gpus else ""
        raise ConfigError(f"{asked}this machine shows {len(found)} GPU(s); --cpu-ranks N trains on its CPU")
    return options.overrides, ranks, min(found[:ranks])


def torchrun_words(options: argparse.Namespace, ranks: int) -> list[str]:
    """torchrun's options. On one machine the port is 0: the system chooses a free one."""
    words = [f"--nnodes={options.nodes}", f"--nproc-per-node={ranks}"]
    if options.nodes == 1:
        words += ["--standalone"]
    else:
        words += ["--rdzv-backend=c10d", f"--rdzv-endpoint={options.rendezvous}", f"--rdzv-id={options.id}"]
        words += [f"--rdzv-conf=read_timeout={JOIN_S}"]  # otherwise the first node must be there within 60 s
    words += ["--signals-to-handle=SIGXCPU"]  # it must be given one; `passing_on` handles the real ones
    if has_shutdown_timeout():
        words += [f"--shutdown-timeout={SHUTDOWN_S}"]
    return words


def has_shutdown_timeout() -> bool:
    """Whether this torchrun can be told how long to wait for its ranks; otherwise it waits 30 s."""
    from torch.distributed.run import get_args_parser

    return "--shutdown-timeout" in get_args_parser().format_help()


def launch(words: list[str], ranks: int, *, on_cpu: bool) -> None:
    """Run torchrun with these arguments in this process, until all ranks have ended.

    Raises:
        RankFailed, Stopped: as `run`.
        Failure: the machines did not find each other.
    """
    import torch.distributed.run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    # torchrun would set 1 for several ranks, with a warning; ranks on CPUs share the cores instead.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // ranks)) if on_cpu else "1")
    try:
        with quiet_torchrun(), passing_on() as received:
            torchrun.run(torchrun.parse_args(words))
    except ChildFailedError as error:
        raise explained(error.failures, received) from None
    except RendezvousError as error:
        raise Failure(
            f"the nodes did not find each other ({one_line(error)}); --nodes, --rendezvous and --id must be the same "
            "on each, and the port of --rendezvous free and open"
        ) from None


@contextlib.contextmanager
def quiet_torchrun() -> Iterator[None]:
    """Within the `with` block, keep torchrun from logging what `explained` reports in one line."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def passing_on() -> Iterator[list[signal.Signals]]:
    """Within the `with` block, pass signals of SIGNALS on to the ranks as SIGTERM; yields the list of those received.

    SIGQUIT is passed on unchanged, and not listed: ranks write their stacks (`ovq.stacks`) and continue.
    The ranks save and end by themselves, however long that takes. A second signal ends them at once (train.py sees to
    that), a third kills them. A rank that has also received the signal directly treats the two as one.

    Raises:
        Stopped: within the block, if no rank has been started yet.
    """
    received: list[signal.Signals] = []

    def handle(number: int, _: Any) -> None:
        ranks = psutil.Process().children()
        if number != signal.SIGQUIT:
            received.append(signal.Signals(number))
            number = signal.SIGKILL if len(received) > 2 else signal.SIGTERM
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(number)
        if received and not ranks:
            raise Stopped(received[-1], f"stopped by {received[-1].name} before a rank was started")

    with handled(handle, (*SIGNALS, signal.SIGQUIT)):
        yield received


def explained(failures: dict[int, Any], received: list[signal.Signals]) -> Failure:
    """The error of a job whose ranks failed, from torchrun's record of them; prints the traceback if there is one.

    Args:
        failures: rank -> torch.distributed.elastic's ProcessFailure.
        received: the signals that were passed on to the ranks.
    """

    def order(rank: int) -> tuple[int, int, int]:
        # Within a second of a failure, its peers report a lost rank or torchrun ends them: the cause sorts first.
        failure = failures[rank]
        ended = failure.exitcode == -signal.SIGTERM and not _told(failure)
        return 2 if ended else 1 if _lost_a_peer(failure) else 0, int(failure.timestamp), rank

    if received and all(failure.exitcode < 0 and not _told(failure) for failure in failures.values()):
        return Stopped(received[0], f"stopped by {received[0].name} before the ranks could save")
    if received and all(failure.exitcode > 128 for failure in failures.values()):
        return Stopped(received[0], f"stopped at once by a second signal, {received[-1].name}")
    first = min(failures, key=order)
    failure, told = failures[first], _told(failures[first])
    if "\n" in told.get("py_callstack", ""):
        print(f"\nrank {first} failed first:\n{told['py_callstack']}", file=sys.stderr)
    code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    how = f"exit status {code}" if failure.exitcode > 0 else f"killed by {failure.signal_name()}"
    witness = next((failures[rank] for rank in sorted(failures) if _lost_a_peer(failures[rank])), failure)
    heard = failure if _told(failure) else witness
    said = heard.message["message"] if _told(heard) else ""
    return RankFailed(f"rank {first} failed first ({how}){': ' * bool(said)}{said}", code)


def _told(failure: Any) -> dict[str, str]:
    """What the rank itself reported to torchrun (`ovq.peers.tell_launcher`); empty if it could not."""
    return failure.message.get("extraInfo", {}) if isinstance(failure.message, dict) else {}


def _lost_a_peer(failure: Any) -> bool:
    """Whether a rank ended because it had lost another."""
    return _told(failure).get("error") == "PeerLost"


if __name__ == "__main__":
    sys.exit(main())
