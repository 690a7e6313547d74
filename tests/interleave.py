"""Triton's interpreter with the programs of a launch interleaved, and a detector of data races.

Triton's own interpreter runs the programs of a launch one after another, so it can neither pass a barrier between them
nor show what depends on their order. Here every program is a thread. Exactly one runs at a time, and before each load,
store and atomic a seeded random choice decides which one continues:

    with interleaved(seed=3) as report:
        kernel[grid](...)
    assert not report.races, report.text

Two accesses by different programs to the same bytes are a race if at least one writes, at least one is not atomic, and
neither happens before the other. Happens-before is tracked with vector clocks: clock[p, q] is the last access by
program q that program p knows of. A releasing atomic merges its program's clock into the one kept at its address, and
an acquiring atomic merges that one into its program's; relaxed atomics, and those with the scope of one program, do
neither. A launch happens after the launch before it. So a race is found even if this schedule does not trigger it. Two
lanes of one store that write different values to one address are a race too.

A launch runs on copies of its tensors that lie far apart. An access outside all of them ends it with a `Violation`, and
so does a deadlock, in which every program polls an atomic that none of them changes.

Not modelled: stale reads (memory is sequentially consistent; what weaker memory could do shows as a race), the threads
within a program (`tl.debug_barrier` does nothing), and other programs' accesses between the atomics of one instruction.
"""

from __future__ import annotations

import contextlib
import inspect
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton._C.libtriton import ir
from triton.runtime import interpreter

LOAD, STORE, ATOMIC = "load", "store", "atomic"
CONFLICTS = {LOAD: (STORE, ATOMIC), STORE: (LOAD, STORE, ATOMIC), ATOMIC: (LOAD, STORE)}
ACQUIRING = (ir.MEM_SEMANTIC.ACQUIRE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE)
RELEASING = (ir.MEM_SEMANTIC.RELEASE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE)
GUARD, ALIGNMENT = 1 << 16, 256  # in bytes: gap between the copies of tensors, and their alignment
PATIENCE = 3  # rounds of all programs polling in vain before it counts as a deadlock
STAY = (0.0, 0.5, 0.9, 0.98)  # probability that a program continues at a switch point; one is drawn per launch
TRITON, HERE = str(Path(triton.__file__).parent), __file__

Site = tuple[tuple[str, int], ...]  # file and line of the access and of the calls that led to it, innermost first


class Violation(Exception):
    """An access outside all tensors of the launch, or a deadlock."""


class _Stop(BaseException):
    """Ends a program's thread after an error; not an Exception, which Triton would wrap."""


@dataclass(frozen=True)
class Race:
    """A pair of places in the code whose accesses to a tensor race."""

    kernel: str
    tensor: str
    first: str
    second: str


@dataclass
class Report:
    """What ran and what was found: accesses by kernel and kind; for each race, how many elements and an example."""

    accesses: Counter[tuple[str, str]] = field(default_factory=Counter)
    races: Counter[Race] = field(default_factory=Counter)
    examples: dict[Race, str] = field(default_factory=dict)

    @property
    def kernels(self) -> set[str]:
        return {kernel for kernel, _ in self.accesses}

    @property
    def text(self) -> str:
        return "\n".join(
            f"race in {x.kernel} on {x.tensor}: {x.first}; {x.second} ({count} elements, {self.examples[x]})"
            for x, count in self.races.items()
        )


@contextlib.contextmanager
def interleaved(seed: int) -> Iterator[Report]:
    """Context in which every launch of an interpreted kernel is interleaved and checked; yields the report it fills."""
    report, rng = Report(), random.Random(seed)

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        named = {name: value for name, value in kwargs.items() if name in self.arg_names}
        arguments = inspect.getcallargs(self.fn, *args, **named)
        grid = self.grid(arguments) if callable(self.grid) else self.grid
        grid = (*grid, 1, 1, 1)[:3]
        memory = Memory({name: x for name, x in arguments.items() if isinstance(x, Tensor)})
        arguments |= memory.copies
        arguments = {n: x if n in self.constexprs else interpreter._implicit_cvt(x) for n, x in arguments.items()}
        Launch(self.fn, arguments, grid, memory, rng, report).run()
        memory.copy_back()

    with contextlib.ExitStack() as stack:
        scope = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        stack.callback(scope.restore)
        # (Each call of a device function would patch the language again, which takes most of the interpreter's time.)
        stack.enter_context(patch.object(interpreter, "_patch_lang", lambda fn: None))
        stack.enter_context(patch.object(interpreter.GridExecutor, "__call__", run))
        for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas"):
            original = getattr(interpreter.InterpreterBuilder, name)
            stack.enter_context(patch.object(interpreter.InterpreterBuilder, name, _watched(name, original)))
        yield report


def _watched(name: str, original: Callable) -> Callable:
    """Wrap a memory operation of the interpreter's builder: it first lets other programs run, and is recorded."""

    def load(self: Any, ptr: Any, mask: Any, *rest: Any) -> Any:
        Launch.current.access(LOAD, ptr, mask.data)
        return original(self, ptr, mask, *rest)

    def store(self: Any, ptr: Any, value: Any, mask: Any, *rest: Any) -> Any:
        Launch.current.access(STORE, ptr, mask.data, value.data)
        return original(self, ptr, value, mask, *rest)

    def rmw(self: Any, op: Any, ptr: Any, value: Any, mask: Any, *order: Any) -> Any:
        return Launch.current.atomic(partial(original, self, op, ptr, value, mask, *order), ptr, mask.data, *order)

    def cas(self: Any, ptr: Any, expected: Any, value: Any, *order: Any) -> Any:
        operate, everywhere = partial(original, self, ptr, expected, value, *order), np.ones(ptr.data.shape, bool)
        return Launch.current.atomic(operate, ptr, everywhere, *order, expected=expected.data)

    return {"load": load, "store": store, "rmw": rmw, "cas": cas}[name.rpartition("_")[2]]


@dataclass
class Block:
    """The copy of one storage, and when each program last accessed each of its units (of the size of the smallest
    element of its tensors): clocks[kind][unit, program]."""

    tensors: list[tuple[int, str, int]]  # (address, name, element size) of each
    start: int
    end: int
    unit: int
    clocks: dict[str, np.ndarray] = field(default_factory=dict)

    def units(self, addresses: np.ndarray, size: int) -> np.ndarray:
        first = (addresses - self.start) // self.unit
        return first if size <= self.unit else (first[:, None] + np.arange(size // self.unit)).ravel()

    def place(self, address: int) -> tuple[str, int]:
        """The tensor and element index at an address; if tensors overlap, those of the one that starts last."""
        first, name, size = max(self.tensors, key=lambda tensor: (tensor[0] <= address, tensor[0]))
        return name, (address - first) // size


class Memory:
    """Copies of a launch's tensors that lie far apart, so that an address slightly out of bounds never hits another
    tensor. Tensors that share a storage share its copy."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.copies: dict[str, Tensor] = {}
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.blocks: list[Block] = []
        storages = {name: x.untyped_storage() for name, x in tensors.items()}
        bases = {x.data_ptr(): x.nbytes() for x in storages.values()}
        whole = torch.empty(sum(size + 2 * GUARD for size in bases.values()) + GUARD, dtype=torch.uint8)
        offset = GUARD
        for base, size in bases.items():
            shared = {name: tensors[name] for name, x in storages.items() if x.data_ptr() == base}
            original = torch.empty(0, dtype=torch.uint8).set_(storages[next(iter(shared))])
            self.pairs.append((original, whole[offset : offset + size].copy_(original)))
            placed, end = [], 0
            for name, x in shared.items():
                first, item = offset + x.storage_offset() * x.element_size(), x.element_size()
                extent = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride())) if x.numel() else 0
                self.copies[name] = whole[first : first + extent * item].view(x.dtype)
                placed.append((whole.data_ptr() + first, name, item))
                end = max(end, whole.data_ptr() + first + extent * item)
            self.blocks.append(Block(placed, min(placed)[0], end, min(item for _, _, item in placed)))
            offset += -(-(size + GUARD) // ALIGNMENT) * ALIGNMENT
        self.starts, self.ends = np.array([b.start for b in self.blocks]), np.array([b.end for b in self.blocks])

    def copy_back(self) -> None:
        for original, copy in self.pairs:
            original.copy_(copy)

    def find(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """The index of the block of each address; -1 if an element of this size is not inside one."""
        which = np.searchsorted(self.starts, addresses, side="right") - 1
        return np.where((which >= 0) & (addresses + size <= self.ends[which]), which, -1)


class Launch:
    """The programs of one launch, their clocks and their schedule."""

    current: Launch

    def __init__(
        self, fn: Callable, arguments: dict, grid: tuple[int, ...], memory: Memory, rng: random.Random, report: Report
    ) -> None:
        self.fn, self.arguments, self.grid, self.memory = fn, arguments, grid, memory
        self.rng, self.stay, self.report = rng, rng.choice(STAY), report
        self.index, programs = list(np.ndindex(*grid)), int(np.prod(grid))
        self.clock = np.zeros((programs, programs), np.int32)
        self.sites: list[list[Site]] = [[()] for _ in range(programs)]  # of each program's accesses, indexed by clock
        self.released: dict[int, np.ndarray] = {}  # address -> the clock that an acquire merges
        self.speed = [4 ** rng.uniform(-3, 3) for _ in range(programs)]  # some programs lag far behind others
        self.live = set(range(programs))
        self.last_poll: dict[int, tuple[int, bytes]] = {}  # program -> address and value, if nothing followed
        self.polling: dict[int, int] = {}  # program -> the address that it polls, until another writes there
        self.in_vain = 0
        self.turns = [threading.Semaphore(0) for _ in range(programs)]
        self.done = threading.Semaphore(0)
        self.running = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        Launch.current = self
        interpreter.interpreter_builder.set_grid_dim(*self.grid)
        threads = [threading.Thread(target=self._body, args=(p,), daemon=True) for p in range(len(self.index))]
        for thread in threads:
            thread.start()
        self._give_turn(self._next(None))
        self.done.acquire()
        for thread in threads:
            thread.join()
        if self.error:
            raise self.error

    def _body(self, p: int) -> None:
        self.turns[p].acquire()
        try:
            if not self.error:
                self.fn(**self.arguments)
        except (Exception, _Stop) as error:  # (before a _Stop, the error is set)
            self.error = self.error or error
        self.live.remove(p)
        if self.live:
            self._give_turn(self._next(None))
        else:
            self.done.release()

    def _give_turn(self, p: int) -> None:
        self.running = p
        interpreter.interpreter_builder.set_grid_idx(*self.index[p])
        self.turns[p].release()

    def _next(self, current: int | None) -> int:
        """The program whose turn is next. `current` is None at the start and when the running program has ended."""
        ready = sorted(self.live - self.polling.keys())
        if not ready:
            self.in_vain += 1
            self.polling.clear()  # some may not have been polling, but doing something else that changed nothing
            ready = sorted(self.live)
            if self.in_vain > PATIENCE and not self.error:
                self.error = Violation(f"deadlock in {self.fn.__name__}: {len(ready)} programs wait for each other")
        if self.error and current is not None:
            return current
        return self.rng.choices(ready, [self.speed[p] for p in ready])[0]

    def _switch(self) -> None:
        p = self.running
        if p not in self.polling and self.rng.random() < self.stay:
            return
        after = self._next(p)
        if after != p:
            self._give_turn(after)
            self.turns[p].acquire()
        if self.error:
            raise _Stop

    def access(self, kind: str, ptr: Any, mask: np.ndarray, value: np.ndarray | None = None) -> None:
        """Let others run first; then check and record an access."""
        self._switch()
        addresses = ptr.data[mask].astype(np.int64)
        self._record(kind, addresses, _size(ptr))
        self._progress(addresses if kind == STORE else addresses[:0])
        if value is not None:
            self._check_lanes(addresses, value[mask])

    def atomic(
        self, operate: Callable, ptr: Any, mask: np.ndarray, sem: Any, scope: Any, expected: np.ndarray | None = None
    ) -> Any:
        """Let others run first; then perform an atomic operation, pass clocks on as `sem` says, and record it."""
        self._switch()
        p, addresses = self.running, ptr.data[mask].astype(np.int64)
        ordered = addresses.tolist() if scope != ir.MEM_SYNC_SCOPE.CTA else []
        for address in ordered if sem in ACQUIRING else ():
            self.clock[p] = np.maximum(self.clock[p], self.released.get(address, 0))
        self._record(ATOMIC, addresses, _size(ptr))
        before = _read(ptr, mask)
        result = operate()
        changed = not np.array_equal(before, _read(ptr, mask))
        swapped = expected is None or np.array_equal(result.data, expected)  # else it wrote nothing
        for address in ordered if sem in RELEASING and swapped else ():
            self.released[address] = np.maximum(self.clock[p], self.released.get(address, 0))
        if changed or len(addresses) != 1:
            self._progress(addresses)
        else:
            poll = (int(addresses[0]), before.tobytes())
            if poll == self.last_poll.get(p):  # polled in vain twice: not the poll that ends its wait
                self.polling[p] = poll[0]
            self.last_poll[p] = poll
        return result

    def _progress(self, written: np.ndarray) -> None:
        """This program did something other than poll in vain; its writes wake the programs that poll there."""
        self.in_vain = 0
        self.last_poll.pop(self.running, None)
        self.polling = {p: address for p, address in self.polling.items() if address not in written}

    def _record(self, kind: str, addresses: np.ndarray, size: int) -> None:
        """Check bounds and races; note that this program accessed these addresses now."""
        p, blocks = self.running, self.memory.find(addresses, size)
        self.clock[p, p] += 1
        self.report.accesses[self.fn.__name__, kind] += 1
        self.sites[p].append(_site())
        if (blocks < 0).any():
            self._fail_outside(kind, int(addresses[blocks < 0][0]))
        mine = self.clock[p]
        for b in np.unique(blocks):
            block = self.memory.blocks[b]
            units = block.units(addresses[blocks == b], size)
            for other in CONFLICTS[kind]:
                if other in block.clocks:
                    unordered = block.clocks[other][units] > mine
                    if unordered.any():
                        self._report(kind, other, block, units, unordered)
            if kind not in block.clocks:
                block.clocks[kind] = np.zeros(((block.end - block.start) // block.unit, len(self.index)), np.int32)
            block.clocks[kind][units, p] = mine[p]

    def _report(self, kind: str, other: str, block: Block, units: np.ndarray, unordered: np.ndarray) -> None:
        rows, others = np.nonzero(unordered)
        unit, q = int(units[rows[0]]), int(others[0])
        first = f"{other} at {_lines(self.sites[q][block.clocks[other][unit, q]])}"
        self._add(first, kind, block, block.start + unit * block.unit, len(np.unique(rows)), q)

    def _check_lanes(self, addresses: np.ndarray, values: np.ndarray) -> None:
        order = np.argsort(addresses, kind="stable")
        address, bits = addresses[order], values[order].view(f"u{values.itemsize}")
        differ = (address[1:] == address[:-1]) & (bits[1:] != bits[:-1])
        if differ.any():
            example = address[1:][differ][:1]
            block = self.memory.blocks[self.memory.find(example, 1)[0]]
            self._add("another lane of the same store", STORE, block, int(example[0]), int(differ.sum()), self.running)

    def _add(self, first: str, kind: str, block: Block, address: int, count: int, q: int) -> None:
        p, (tensor, offset) = self.running, block.place(address)
        race = Race(self.fn.__name__, tensor, first, f"{kind} at {_lines(self.sites[p][-1])}")
        self.report.races[race] += count
        example = f"first {tensor}[{offset}], by programs {self.index[q]} and {self.index[p]}"
        self.report.examples.setdefault(race, example)

    def _fail_outside(self, kind: str, address: int) -> None:
        block = min(self.memory.blocks, key=lambda b: max(b.start - address, address - b.end))
        tensor, offset = block.place(address)
        self.error = Violation(
            f"out of bounds in {self.fn.__name__}: {kind} at {_lines(self.sites[self.running][-1])} by program "
            f"{self.index[self.running]}; the nearest tensor is {tensor}, where it would be element {offset}"
        )
        raise _Stop


def _size(ptr: Any) -> int:
    return interpreter._get_np_dtype(ptr.get_element_ty()).itemsize


def _read(ptr: Any, mask: np.ndarray) -> np.ndarray:
    dtype = np.dtype(f"u{_size(ptr)}")
    return interpreter._interpreter.load(ptr.data, mask, np.zeros(ptr.data.shape, dtype), dtype)


def _site() -> Site:
    """Where in the kernel's source this access is."""
    lines: list[tuple[str, int]] = []
    frame = sys._getframe(1)
    while frame.f_code is not Launch._body.__code__:
        if frame.f_code.co_filename != HERE and not frame.f_code.co_filename.startswith(TRITON):
            lines.append((frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back  # type: ignore[assignment]
    return tuple(lines)


def _lines(site: Site) -> str:
    return " < ".join(f"{Path(file).name}:{line}" for file, line in site)
