"""Find the rank that the others wait for: nothing fails when one is slow, but each step takes as long as the slowest.

Collectives keep the ranks in step, so the time of a step is the same on all of them and reveals nothing. Every few
seconds, each rank therefore computes matrix products by itself for a moment, and the ranks compare how many they made,
and how long each has waited for its data. A device that is throttled or shared with other work shows in the first, a
slow disk in the second; a slow network shows in neither.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ovq import processes, stacks
from ovq.processes import World

EVERY_S = 10.0
IN_A_ROW = 3  # checks at which a rank must be slow: a device may be busy for a moment
SLOWER = 1.5  # times as long as the median of the others
WAITING = 0.2  # share of its time that a rank waits for data; and at least SLOWER times that of the others
PROBE_S = 0.01


@dataclass(frozen=True)
class Pace:
    """What a rank reports at a check: its machine, its matrix products per second, and the share of its time that it
    has spent waiting for data."""

    host: str
    products: float
    data_wait: float


class SlowRanks:
    """Compares the ranks of a job while it trains; in a single process, does nothing.

    Args:
        world: this process and its device.
        say: called on every rank with a line about a slow one, only once until it is as fast as the others again.
    """

    def __init__(self, world: World, say: Callable[[str], None]) -> None:
        self.world, self.say = world, say
        self._factor: torch.Tensor | None = None
        self._next = time.monotonic() + EVERY_S
        self._in_a_row: dict[int, int] = {}

    def look(self, data_wait: float, step_s: float) -> None:
        """Compare the ranks if a check is due. A collective; the device must be otherwise idle.

        Args:
            data_wait: the share of its time that this rank has waited for data in the latest steps.
            step_s: seconds that a step takes. If a rank is slow, each writes its stacks in the middle of the next one.
        """
        if self.world.size == 1 or not processes.any_flag(self.world.is_main and time.monotonic() >= self._next):
            return
        self._next = time.monotonic() + EVERY_S
        paces = processes.gather_objects(Pace(os.uname().nodename, self._probe(), data_wait))
        found = slow(paces)
        self._in_a_row = {rank: self._in_a_row.get(rank, 0) + 1 for rank in found}
        named = [rank for rank in found if self._in_a_row[rank] == IN_A_ROW]
        folder = stacks.write_after(step_s / 2) if named else None
        found_in = f"; stacks of all ranks in the next step: {folder}" if folder else ""
        for rank in named:
            self.say(f"rank {rank} on {paces[rank].host} is slow, and the others wait for it: {found[rank]}{found_in}")

    def _probe(self) -> float:
        """Matrix products per second."""
        cuda = self.world.device.type == "cuda"
        if self._factor is None:
            self._factor = torch.ones(4096 if cuda else 256, 4096 if cuda else 256, device=self.world.device)
            self._probe()  # the first product takes longer
        began, made = time.perf_counter(), 0
        while (took := time.perf_counter() - began) < PROBE_S:
            self._factor @ self._factor
            if cuda:
                torch.cuda.synchronize(self.world.device)
            made += 1
        return made / took


def slow(paces: list[Pace]) -> dict[int, str]:
    """rank -> why it is slow, for each slow rank."""
    found = {}
    for rank, pace in enumerate(paces):
        others = paces[:rank] + paces[rank + 1 :]
        products = statistics.median(other.products for other in others)
        waits = statistics.median(other.data_wait for other in others)
        if products > SLOWER * pace.products:
            found[rank] = f"a matrix product takes {products / pace.products:.1f} times as long as on the others"
        elif pace.data_wait > max(WAITING, SLOWER * waits):
            found[rank] = f"it waits for data {pace.data_wait:.0%} of the time, the others {waits:.0%}"
    return found
