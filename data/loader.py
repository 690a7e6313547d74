"""Batches for one rank: how lanes are divided among ranks and workers, and the state that resumes them anywhere.

    rank r owns the lanes [r G/W, (r+1) G/W)       G rows in the global batch, W ranks
    worker w of K makes the rows of every K-th lane of its rank
    a micro-batch is m neighbouring lanes           G/(W m) micro-batches are a rank's share of a step

Every row carries its lane's state after that row, so the loader's state covers exactly the rows it has handed out, not
those that workers have prepared ahead. The state saved by W ranks is the union of their lanes. It can be resumed by any
number of ranks and workers, with any micro-batch.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch.utils.data import IterableDataset, get_worker_info

from data.lanes import LaneState, Row, first_state
from data.order import token_hash
from data.workers import RowWorkers
from ovq.errors import ConfigError
from ovq.processes import FIRST_STEP_TIMEOUT_S

Fingerprint = dict[str, Any]
COMMIT = re.compile("[0-9a-f]{40}")


@dataclass
class Batch:
    """A micro-batch of m rows of T tokens.

    `inputs`, `targets`: int64 [m, T]; -100 marks a position without label. `cu_seqlens`: int32, offsets into the m * T
    flattened tokens at which a document or a row begins, then m * T; None unless data.isolate_documents. `documents`:
    titles. `lanes`: the lane of each row, in order, and its state after this batch. `counts`: see `data.lanes.Row`.
    `sources`: for each row of a mixture, the data set that it comes from.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor | None = None
    documents: list[str] = field(default_factory=list)
    lanes: dict[int, LaneState] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)

    def token_hash(self) -> int:
        """64-bit hash of the rows' tokens. The hash of a step is the sum over its micro-batches, modulo 2^64."""
        return token_hash(list(self.lanes), self.inputs.numpy(), self.targets.numpy())

    def cut(self, length: int) -> Batch:
        """The same tokens, cut into independent sequences of at most `length`.

        Raises:
            ConfigError: the rows are longer than `length`, but not a multiple of it.
        """
        T = self.inputs.shape[1]
        if length >= T:
            return self
        if T % length:
            raise ConfigError(f"trainer.lengths has {length} tokens, which must divide the {T} tokens of every row")
        bounds = self.cu_seqlens
        if bounds is not None:
            starts = {*bounds.tolist(), *range(0, self.inputs.numel(), length)}
            bounds = torch.tensor(sorted(starts), dtype=torch.int32)
        inputs, targets = self.inputs.reshape(-1, length), self.targets.reshape(-1, length)
        sources = [source for source in self.sources for _ in range(T // length)]
        return replace(self, inputs=inputs, targets=targets, cu_seqlens=bounds, sources=sources)

    def shard(self, rank: int, ranks: int) -> Batch:
        """The share of one of `ranks` processes that hold the same rows: the rank-th part of every row.

        With `cu_seqlens`, the rows are joined end to end and the share is the rank-th part of that one long row;
        `cu_seqlens` still describes the whole, and `sources` has one entry for each of the equal stretches, none of
        which crosses a row boundary, that make up the part.

        Raises:
            ConfigError: the rows cannot be divided evenly.
        """
        if self.inputs.shape[1] % ranks:
            raise ConfigError(
                f"trainer.context_parallel={ranks} must divide the {self.inputs.shape[1]} tokens of every row"
            )
        packed = self.cu_seqlens is not None and ranks > 1
        inputs, targets, sources = self.inputs, self.targets, self.sources
        if packed:
            a_row = ranks // math.gcd(len(inputs), ranks)  # stretches
            stretches = [source for source in sources for _ in range(a_row)]
            sources = stretches[rank * len(stretches) // ranks : (rank + 1) * len(stretches) // ranks]
            inputs, targets = inputs.reshape(1, -1), targets.reshape(1, -1)
        inputs, targets = inputs.chunk(ranks, 1)[rank], targets.chunk(ranks, 1)[rank]
        return replace(self, inputs=inputs, targets=targets, sources=sources)

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device. Copies to a GPU go through pinned memory and are asynchronous."""
        device = torch.device(device)

        def move(x: torch.Tensor | None) -> torch.Tensor | None:
            if x is None or device.type != "cuda":
                return x if x is None else x.to(device)
            return x.pin_memory().to(device, non_blocking=True)

        inputs, targets = move(self.inputs), move(self.targets)
        assert inputs is not None and targets is not None
        return replace(self, inputs=inputs, targets=targets, cu_seqlens=move(self.cu_seqlens))


class RowSource(Protocol):
    """Makes rows, as a pure function of lane and state. Picklable; may hold no state but a cache."""

    def row(self, lane: int, state: LaneState) -> Row: ...

    def describe(self, lane: int, state: LaneState) -> str:
        """Where the lane's next row comes from, for messages."""
        ...


class LaneDataset(IterableDataset):
    """An endless stream of rows, one from each of the given lanes in turn. Its state is that of the lanes."""

    def __init__(self, source: RowSource, lanes: dict[int, LaneState]) -> None:
        super().__init__()
        self.source, self.lanes = source, {lane: dict(state) for lane, state in lanes.items()}
        # Index of the lane whose row is next; starts above 0 if a StatefulDataLoader restored a state within a round.
        self._next = 0

    def __iter__(self) -> Iterator[Row]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        mine = sorted(self.lanes)[worker::workers]
        while True:
            lane = mine[self._next]
            row = self.source.row(lane, self.lanes[lane])
            self.lanes[lane] = row.state
            self._next = (self._next + 1) % len(mine)
            yield row

    def state_dict(self) -> dict[str, Any]:
        return {"lanes": {lane: dict(state) for lane, state in self.lanes.items()}, "next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.lanes, self._next = {int(lane): dict(s) for lane, s in state["lanes"].items()}, state["next"]


class Loader:
    """An endless stream of one rank's micro-batches, starting from the given state.

    `state_dict()` describes the batches handed out so far; save it at the end of a step and pass the ranks' states,
    merged by `merge_states`, to `build_loader(..., state=...)`.

    Iteration ends only if `should_stop()`, polled about once a second while waiting for a worker, is true. It may end
    within a step: see `rewind`. It raises DataError if a worker dies, fails, or delivers nothing for `timeout_s`
    seconds (in the first step at least FIRST_STEP_TIMEOUT_S).
    """

    def __init__(
        self,
        source: RowSource,
        fingerprint: Fingerprint,
        *,
        context: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        num_workers: int = 0,
        prefetch: int = 4,
        isolate_documents: bool = False,
        state: dict[str, Any] | None = None,
        timeout_s: float = FIRST_STEP_TIMEOUT_S,
    ) -> None:
        if global_batch % (world_size * micro_batch):
            raise ConfigError(
                f"trainer.global_batch={global_batch} must be a multiple of trainer.micro_batch={micro_batch} times "
                f"{world_size} ranks"
            )
        self.fingerprint = fingerprint
        self.context, self.micro_batch, self.isolate_documents = context, micro_batch, isolate_documents
        owned = global_batch // world_size
        # Workers get equal shares of the lanes, so that taking one row from each in turn keeps the lanes in order.
        self.num_workers = max((k for k in range(1, num_workers + 1) if owned % k == 0), default=0)
        self.prefetch, self.timeout_s, self.rank = prefetch, timeout_s, rank
        self.should_stop: Callable[[], bool] = lambda: False
        self._source = source
        lanes = range(rank * owned, (rank + 1) * owned)
        self.micro_batches_per_step = owned // micro_batch
        self.counts: dict[str, int] = {}
        if state is None:
            self.lanes = {lane: first_state(lane) for lane in lanes}
        else:
            check_fingerprint(state["fingerprint"], fingerprint)
            saved = {int(lane): dict(s) for lane, s in state["lanes"].items()}
            self.lanes = {lane: saved[lane] for lane in lanes}
            # Counts are totals over the job, so rank 0 alone continues those of all ranks of the previous run.
            self.counts = dict(state["counts"]) if rank == 0 else {}
        self._step_began = dict(self.lanes), dict(self.counts)

    @property
    def tokens(self) -> dict[str, Any]:
        """The documents that rows are made from, by data set of a mixture; otherwise under the empty name, or none for
        a generated task."""
        readers = getattr(self._source, "readers", {"": self._source})
        return {name: reader.tokens for name, reader in readers.items() if hasattr(reader, "tokens")}

    def __iter__(self) -> Generator[Batch]:
        owned = list(self.lanes)
        lanes = LaneDataset(self._source, self.lanes)
        workers = self._start_workers(lanes) if self.num_workers else None
        in_process = iter(lanes)
        try:
            for number in itertools.count():
                step, micro = divmod(number, self.micro_batches_per_step)
                if micro == 0:
                    self._step_began = dict(self.lanes), dict(self.counts)
                # The first step may have to download files.
                timeout_s = self.timeout_s if step else max(FIRST_STEP_TIMEOUT_S, self.timeout_s)
                rows: list[Row] = []
                for lane in owned[micro * self.micro_batch :][: self.micro_batch]:
                    doing = functools.partial(self._doing, lane)
                    row = workers.take(timeout_s, self.should_stop, doing) if workers else next(in_process)
                    if row is None:
                        return
                    rows.append(row)
                batch = self._collate(rows)
                self.lanes.update(batch.lanes)
                _add(self.counts, batch.counts)
                yield batch
        finally:
            if workers:
                workers.close()

    def _start_workers(self, lanes: LaneDataset) -> RowWorkers:
        ahead = max(2, math.ceil(self.prefetch * self.micro_batch / self.num_workers))
        return RowWorkers(lanes, self.num_workers, ahead, self.rank)

    def _doing(self, lane: int) -> str:
        state = self.lanes[lane]
        return f"making row {state['rows'] + 1} of lane {lane} ({self._source.describe(lane, state)})"

    def rewind(self) -> None:
        """Restore the state before the step in progress. Batches must then be taken from a new iterator."""
        self.lanes, self.counts = self._step_began

    def state_dict(self) -> dict[str, Any]:
        """Plain dictionaries, strings and integers: fingerprint, this rank's lanes, and its counts."""
        lanes = {lane: dict(state) for lane, state in self.lanes.items()}
        return {"fingerprint": dict(self.fingerprint), "lanes": lanes, "counts": dict(self.counts)}

    def _collate(self, rows: list[Row]) -> Batch:
        inputs = torch.stack([torch.as_tensor(row.inputs) for row in rows]).long()
        targets = torch.stack([torch.as_tensor(row.targets) for row in rows]).long()
        starts = [i * self.context + start for i, row in enumerate(rows) for start in row.starts]
        bounds = sorted({*starts, *range(0, len(rows) * self.context + 1, self.context)})
        counts: dict[str, int] = {}
        for row in rows:
            _add(counts, row.counts)
        return Batch(
            inputs,
            targets,
            torch.tensor(bounds, dtype=torch.int32) if self.isolate_documents else None,
            [title for row in rows for title in row.documents],
            {row.lane: row.state for row in rows},
            counts,
            [row.source for row in rows if row.source],
        )


def merge_states(states: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge the states of all ranks, in any order: every lane once, counts added up.

    Raises:
        ConfigError: the ranks read different data, a rank is missing, or the lanes are at different steps.
    """
    for state in states[1:]:
        check_fingerprint(states[0]["fingerprint"], state["fingerprint"])
    lanes = {int(lane): dict(s) for state in states for lane, s in state["lanes"].items()}
    fingerprint = dict(states[0]["fingerprint"])
    wanted = fingerprint["global_batch"]
    if sorted(lanes) != list(range(wanted)) or sum(len(state["lanes"]) for state in states) != wanted:
        raise ConfigError(
            f"the data states of the ranks hold {len(lanes)} lanes of {wanted}: a rank's state is missing"
        )
    rows = {s["rows"] for s in lanes.values()}
    if len(rows) > 1:
        raise ConfigError(f"the data states are at different steps ({min(rows)} to {max(rows)}): saved within a step")
    counts: dict[str, int] = {}
    for state in states:
        _add(counts, state["counts"])
    return {"fingerprint": fingerprint, "lanes": dict(sorted(lanes.items())), "counts": counts}


def check_fingerprint(saved: Fingerprint, current: Fingerprint) -> None:
    """Raise ConfigError if the data of a saved state and of this run differ, naming every difference.

    Commits count only where both are known and the files' hashes do not cover their whole contents (data=datasets).
    """
    keys = [key for key in {**saved, **current} if saved.get(key) != current.get(key)]
    if not all(_of_same_files(key, saved, current) for key in keys):
        changes = "; ".join(f"{key}: {_short(saved.get(key))} -> {_short(current.get(key))}" for key in keys)
        raise ConfigError(
            f"the data differ from those of the checkpoint ({changes}), and a run keeps its data; start another run "
            "with run_dir=NEW, from the weights of this one with init_from=DIR"
        )


def _of_same_files(key: str, saved: Fingerprint, current: Fingerprint) -> bool:
    """Whether a key is that of a Hub commit whose change says nothing about the files, which are compared as well."""
    if key.rpartition(".")[2] != "commit":
        return False
    resolved = all(COMMIT.fullmatch(str(each.get(key))) for each in (saved, current))  # and no branch, tag or None
    return not (resolved and saved.get(key.removesuffix("commit") + "kind") == "datasets")


def _add(counts: dict[str, int], more: dict[str, int]) -> None:
    for name, count in more.items():
        counts[name] = counts.get(name, 0) + count


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 28 else text[:28] + "..."
