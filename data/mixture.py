"""Rows from several data sets: the one that a row comes from is a pure function of the seed and the row's number.

Row g of step n has the number r = n G + g (G rows in the global batch). It comes from the data set into whose share of
[0, 1) the fractional part of r / phi + c falls, where phi is the golden ratio and c depends on the seed. This is a
Kronecker sequence, whose points lie evenly: among the first N rows, and among those of every step, each data set has
its share to within a few rows (a test requires 5 of 20,000), where random draws would be off by about the root of N.

A row comes entirely from one data set. Within each data set, a lane reads what the lane of the same number would read
if that data set were used alone: see `data.lanes`. A lane's state therefore consists of its number of rows and its
state in every data set.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

from data.lanes import LaneReader, LaneState, Row, first_state
from data.order import mix

_ONE = 1 << 64
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / phi


class MixtureReader:
    """Makes the rows of a mixture's lanes, which may be asked for in any order.

    Args:
        readers: the reader of each data set.
        weights: each data set's share of the rows, relative to the sum of all weights.
        global_batch: rows in a step.
        seed: seed of the order of the data sets.
    """

    def __init__(
        self, readers: dict[str, LaneReader], weights: dict[str, float], *, global_batch: int, seed: int
    ) -> None:
        self.readers, self.global_batch = readers, global_batch
        self._names = list(readers)
        total = sum(weights.values())
        # Integers, so that the bounds are the same on every machine.
        self._bounds = [round(share / total * _ONE) for share in accumulate(weights[name] for name in self._names)]
        self._offset = mix(len(self._names), seed, 0)

    def source_of(self, number: int) -> str:
        """The data set that a row comes from, by the row's number."""
        point = (number * _GOLDEN + self._offset) % _ONE
        return self._names[min(bisect_right(self._bounds, point), len(self._names) - 1)]

    def describe(self, lane: int, state: LaneState) -> str:
        """Where the lane's next row starts reading."""
        name = self.source_of(state["rows"] * self.global_batch + lane)
        return f"{name}: {self.readers[name].describe(lane, _inner(name, lane, state))}"

    def row(self, lane: int, state: LaneState) -> Row:
        """The lane's next row, with the lane's state after it.

        Raises:
            DataError: as `LaneReader.row`.
        """
        name = self.source_of(state["rows"] * self.global_batch + lane)
        row = self.readers[name].row(lane, _inner(name, lane, state))
        others = {key: value for key, value in state.items() if "." in key}
        row.state = others | {f"{name}.{key}": value for key, value in row.state.items()} | {"rows": state["rows"] + 1}
        row.source = name
        row.counts[f"tokens/{name}"] = row.counts["tokens"]
        return row


def _inner(name: str, lane: int, state: LaneState) -> LaneState:
    """The state of a lane in one data set; the initial one if the lane has read no row from it yet."""
    return {key: state.get(f"{name}.{key}", value) for key, value in first_state(lane).items()}
