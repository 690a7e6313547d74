"""The kernels under random schedules, in the interpreter of `interleave.py`: no race, no access out of bounds, and the
same bits however many programs share a head. The race detector itself is tested too.

`tests/test_races.py` runs this file in separate processes, because the interpreter must be selected before Triton is
imported (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from ovq.ops import ovq_attention
from ovq.ops.ovq_attention.kernels import shipped
from tests.exact_products import exact_products as exact_products
from tests.interleave import Report, Violation, interleaved

SEEDS = range(8)
ROOM = "ovq.ops.ovq_attention.kernels"
assign, configs, plans = (importlib.import_module(f"{ROOM}.{name}") for name in ("assign", "configs", "plan"))


def launch(kernel, grid: tuple[int, ...], *args, seed: int = 0, **kwargs) -> Report:
    with interleaved(seed) as report:
        kernel[grid](*args, **kwargs)
    return report


def integers(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


@triton.jit
def count_kernel(x_ptr, ATOMIC: tl.constexpr):
    """Every program adds 1."""
    if ATOMIC:
        tl.atomic_add(x_ptr, 1, sem="relaxed")
    else:
        tl.store(x_ptr, tl.load(x_ptr) + 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_detector_finds_a_plain_counter_and_passes_an_atomic_one(seed: int) -> None:
    report = launch(count_kernel, (4,), integers(1), False, seed=seed)
    lines = {(race.first[:4], race.second[:4]) for race in report.races}
    assert {("load", "stor"), ("stor", "load"), ("stor", "stor")} & lines
    assert "race in count_kernel on x_ptr: " in report.text and "races_cases.py:" in report.text
    total = integers(1)
    assert not launch(count_kernel, (4,), total, True, seed=seed).races and total.item() == 4


def test_detector_loses_updates_of_a_plain_counter_in_some_schedule() -> None:
    totals = [integers(1) for _ in SEEDS]
    for seed, total in zip(SEEDS, totals):
        launch(count_kernel, (4,), total, False, seed=seed)
    assert any(total.item() < 4 for total in totals)


@triton.jit
def exchange_kernel(x_ptr, y_ptr, arrived_ptr, awaited, RELEASE: tl.constexpr, ACQUIRE: tl.constexpr):
    """Every program writes its number, waits for the others and reads its neighbour's."""
    p = tl.program_id(0)
    tl.store(x_ptr + p, p)
    tl.atomic_add(arrived_ptr, 1, sem=RELEASE)
    while tl.atomic_add(arrived_ptr, 0, sem=ACQUIRE) < awaited:
        pass
    tl.store(y_ptr + p, tl.load(x_ptr + (p + 1) % tl.num_programs(0)))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("release, acquire", [("release", "acquire"), ("acq_rel", "acq_rel")])
def test_detector_passes_an_exchange_through_a_barrier(release: str, acquire: str, seed: int) -> None:
    x, y = integers(5), integers(5)
    report = launch(exchange_kernel, (5,), x, y, integers(1), 5, release, acquire, seed=seed)
    assert not report.races, report.text
    assert y.tolist() == [1, 2, 3, 4, 0]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("release, acquire", [("relaxed", "acquire"), ("release", "relaxed")])
def test_detector_finds_a_barrier_of_relaxed_atomics(release: str, acquire: str, seed: int) -> None:
    """Even though the interpreter's memory is sequentially consistent, so that the result is right."""
    y = integers(5)
    report = launch(exchange_kernel, (5,), integers(5), y, integers(1), 5, release, acquire, seed=seed)
    assert {race.tensor for race in report.races} == {"x_ptr"} and y.tolist() == [1, 2, 3, 4, 0]


def test_detector_finds_a_barrier_that_is_one_short() -> None:
    """In some schedules only: in others the last program arrives before any other leaves."""
    tensors = integers(5), integers(5), integers(1)
    reports = [launch(exchange_kernel, (5,), *tensors, 4, "release", "acquire", seed=seed) for seed in SEEDS]
    assert any(report.races for report in reports)


def test_detector_finds_a_deadlock() -> None:
    with pytest.raises(Violation, match="deadlock in exchange_kernel: 5 programs"):
        launch(exchange_kernel, (5,), integers(5), integers(5), integers(1), 6, "release", "acquire")


@triton.jit
def relay_kernel(x_ptr, turn_ptr, SEM: tl.constexpr):
    """Program p waits for p - 1 and adds to what it wrote; only the hand-over from p - 1 orders p after program 0."""
    p = tl.program_id(0)
    while tl.atomic_cas(turn_ptr, p, p, sem=SEM) != p:
        pass
    tl.store(x_ptr, tl.load(x_ptr) + p)
    tl.atomic_xchg(turn_ptr, p + 1, sem=SEM)


@pytest.mark.parametrize("seed", SEEDS)
def test_detector_passes_a_relay_and_finds_a_relaxed_one(seed: int) -> None:
    x = integers(1)
    assert not launch(relay_kernel, (5,), x, integers(1), "acq_rel", seed=seed).races and x.item() == 10
    assert launch(relay_kernel, (5,), integers(1), integers(1), "relaxed", seed=seed).races


@triton.jit
def shift_kernel(x_ptr, y_ptr, n, shift, BLOCK: tl.constexpr):
    """y[i] = x[i + shift] + 1 for i < n."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i + shift, mask=i < n) + 1, mask=i < n)


def test_detector_ends_a_launch_at_an_address_outside_every_tensor() -> None:
    x, y = integers(30), integers(30)
    assert not launch(shift_kernel, (4,), x, y, 30, 0, 8).races
    for shift, element in ((1, 30), (-1, -1), (7, "3[0-6]")):
        with pytest.raises(Violation, match=rf"shift_kernel: load at races_cases.py:\d+ .* is x_ptr, .* {element}$"):
            launch(shift_kernel, (4,), x, y, 30, shift, 8)
    with pytest.raises(Violation, match=r"store at .* is y_ptr, where it would be element 3\d$"):
        launch(shift_kernel, (4,), integers(40), y, 33, 0, 8)


@pytest.mark.parametrize("shift", [0, 1, 8])
def test_detector_sees_through_tensors_that_share_memory(shift: int) -> None:
    """In place, a program touches only its own elements, unless the shift makes it read those of another."""
    x = integers(48)
    report = launch(shift_kernel, (4,), x[8:], x[8:], 32, shift, 8)
    assert {race.tensor for race in report.races} == ({"x_ptr"} if shift else set())
    assert not launch(shift_kernel, (2,), x, x[32:], 16, 0, 8).races
    assert launch(shift_kernel, (2,), x, x[8:], 16, 0, 8).races
    halves = x.view(torch.int16)  # program 1 reads halves of the numbers that program 0 writes
    assert launch(shift_kernel, (2,), halves, x, 16, 0, 8).races
    assert not launch(shift_kernel, (2,), halves[32:], x, 16, 0, 8).races


def test_detector_orders_launches() -> None:
    x, y = integers(32), integers(32)
    with interleaved(1) as report:
        shift_kernel[(4,)](x, y, 32, 0, 8)
        shift_kernel[(3,)](y, x, 24, 5, 8)
    assert not report.races and report.kernels == {"shift_kernel"}
    assert x.tolist() == [2] * 24 + [0] * 8


@triton.jit
def lanes_kernel(x_ptr, SAME: tl.constexpr):
    i = tl.arange(0, 8)
    tl.store(x_ptr + i // 2, i * 0 if SAME else i)


def test_detector_finds_lanes_that_write_different_values_to_one_address() -> None:
    assert not launch(lanes_kernel, (1,), integers(4), True).races
    report = launch(lanes_kernel, (1,), integers(4), False)
    assert [race.first for race in report.races] == ["another lane of the same store"]


@triton.jit
def order_kernel(next_ptr, order_ptr):
    tl.store(order_ptr + tl.atomic_add(next_ptr, 1), tl.program_id(0))


def test_schedules_differ_by_seed_and_repeat() -> None:
    def order(seed: int) -> tuple[int, ...]:
        launch(order_kernel, (6,), integers(1), found := integers(6), seed=seed)
        return tuple(found.tolist())

    orders = [order(seed) for seed in SEEDS]
    assert orders == [order(seed) for seed in SEEDS] and len(set(orders)) > 5


@dataclass(frozen=True)
class Case:
    """One call of the operator, or several that carry its state; a piece of a single token is a decoding step."""

    settings: dict[str, Any] = field(default_factory=dict)
    pieces: tuple[int, ...] = (0, 68)
    documents: tuple[int, ...] = ()
    small_tables: bool = False


CASES = {
    "plain": Case(),
    "packed": Case(documents=(0, 3, 35, 67, 67, 84), pieces=(0, 84)),
    "carried": Case(pieces=(0, 37, 68, 69)),
    "nearest": Case({"first_chunk": "nearest"}),
    "rate": Case({"step": 0.3}),
    "tiles": Case({"chunk_size": 32, "assign_on": "key_value", "first_chunk": "nearest"}, pieces=(0, 100)),
    "small tables": Case({"seeding": "random"}, small_tables=True),
}
RUNS = [(name, 4, seed) for seed, name in enumerate(CASES)]  # case, programs per head, seed of the schedule
RUNS += [("plain", 2, 0), ("carried", 2, 1), ("nearest", 3, 2), ("rate", 3, 3), ("packed", 16, 4), ("plain", 16, 5)]
KERNELS = {kernel.__name__ for kernel in shipped.KERNELS.values()}
DECODE = {"decode_kernel", "combine_kernel"}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give small shapes many blocks: 36 centroids are 9 blocks, so 9 of 16 programs own one, and a chunk of the case
    "tiles" is two tiles."""
    tile_of = lambda stage, *_: configs.Tile(16, 4 if stage == "assign" else 16, 4, 1, 16)  # noqa: E731
    monkeypatch.setattr(configs, "tile_of", tile_of)


def outputs(case: Case, programs: int, backward: bool) -> dict[str, Tensor]:
    """All results of a case: outputs, state and, if `backward`, gradients."""
    random = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    T, results = case.pieces[-1], {}
    q, k, v, beta = random(1, T, 2, 16), random(1, T, 1, 16), random(1, T, 1, 16), 1 + random(2).abs()
    tensors = [x.requires_grad_(backward) for x in (q, k, v, beta)]
    settings: dict[str, Any] = {"num_centroids": 36, "chunk_size": 16, "growth": "linear", "growth_tokens": 48}
    settings |= {"backend": "triton"} | case.settings
    if case.documents:
        settings["cu_seqlens"] = torch.tensor(case.documents, dtype=torch.int32)
    state, loss = None, torch.zeros(())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assign, "splits", lambda walks, device, blocks: programs)
        patch.setattr(assign, "CONCURRENT", programs > 1)
        if case.small_tables:
            patch.setattr(plans, "TABLE_SHARE", 1e-3)
            patch.setattr(plans, "MIN_CHUNKS", 0)
        for start, end in zip(case.pieces, case.pieces[1:]):
            piece = [x[:, start:end] for x in tensors[:3]] + [beta]
            piece = [x.detach() for x in piece] if end - start == 1 else piece  # decoding has no gradient
            o, state = ovq_attention(*piece, state=state, return_state=not case.documents, **settings)
            results[f"o from {start}"], loss = o.detach(), loss + o.square().sum()
        if backward:
            results |= zip(("dq", "dk", "dv", "dbeta"), torch.autograd.grad(loss, tensors))
    if state is not None:
        results |= {name: getattr(state, name) for name in ("key_sum", "value_sum", "count")}
    return results


@functools.cache
def alone(name: str) -> dict[str, Tensor]:
    """The results with one program per head, in Triton's own interpreter."""
    return outputs(CASES[name], 1, backward=True)


@pytest.mark.parametrize("name, programs, seed", RUNS)
def test_kernels_have_no_race_and_no_schedule_changes_a_bit(name: str, programs: int, seed: int) -> None:
    backward = programs == 4
    with interleaved(seed) as report:
        got = outputs(CASES[name], programs, backward)
    assert not report.races, report.text
    assert all(torch.equal(x, alone(name)[key]) for key, x in got.items())
    assert report.accesses["assign_kernel", "atomic"] >= 3 * programs  # the barrier itself, not its substitute
    unused = {kernel for kernel in KERNELS if "_grad_" in kernel} if not backward else set()
    assert report.kernels == KERNELS - unused - (set() if name == "carried" else DECODE)


@dataclass(frozen=True)
class Mutant:
    """A defect put into the kernels: replacements in a module's source, what must then be found, and in which case."""

    module: str
    changes: dict[str, str]
    found: str
    case: str = "plain"
    programs: int = 4


MUTANTS = {
    "proposals are not double-buffered": Mutant(
        "assign", {"((i % 2) * walks + walk)": "walk"}, "race in assign_kernel on (best|arg)_ptr"
    ),
    "arrivals do not release": Mutant(
        "assign", {'sem="release"': 'sem="relaxed"'}, "race in assign_kernel on (best|arg)_ptr"
    ),
    "the barrier does not acquire": Mutant(
        "assign", {'sem="acquire"': 'sem="relaxed"'}, "race in assign_kernel on (best|arg)_ptr"
    ),
    "the barrier is one short": Mutant(
        "assign", {"< awaited:": "< awaited - 1:"}, "race in assign_kernel on (best|arg)_ptr"
    ),
    "the barrier waits for one more": Mutant("assign", {"< awaited:": "<= awaited:"}, "deadlock in assign_kernel"),
    "every program commits every centroid": Mutant(
        "assign", {"((place // BLOCK_N) % splits == split)": "(split >= 0)"}, "race in assign_kernel on key_sum_ptr"
    ),
    "every program writes every version row": Mutant(
        "assign", {"writes = owned & ": "writes = (l < L) & "}, "race in assign_kernel on row_key_ptr"
    ),
    "programs share their private places": Mutant(
        "assign", {"place_ptr + tl.program_id(0) * 2 * L": "place_ptr + walk * 2 * L"},
        "race in assign_kernel on place_ptr", "tiles",
    ),
    "scatter stores in place of its maximum": Mutant(
        "tabulate", {"tl.atomic_max(": "tl.store(", ', sem="relaxed"': ""},
        "race in scatter_kernel on table_ptr: store at .* at tabulate.py", "small tables",
    ),
    "predict stores past the queries of its tile": Mutant(
        "predict", {"top + tl.log2(total), mask=live)": "top + tl.log2(total))"}, "(in predict_kernel.*lse_ptr)"
    ),
    "dictionary_grad forgets the initial rows": Mutant(
        "backward", {"token = row - initial - start": "token = row - start"}, "in dictionary_grad_kernel.*d[kv]_ptr",
        "carried",
    ),
    "parts of decode share a place": Mutant(
        "decode", {"(first * (SPLITS + 1) + split)": "(first * (SPLITS + 1))"}, "race in decode_kernel on part_ptr",
        "carried",
    ),
    "combine reads past the parts": Mutant(
        "decode", {"head * (SPLITS + 1) *": "head * (SPLITS + 2) *"}, "out of bounds in combine_kernel: .* part_ptr",
        "carried",
    ),
}  # fmt: skip


def mutated(mutant: Mutant, folder: Path) -> ModuleType:
    """The mutant's module, loaded from a changed copy of its source."""
    original = importlib.import_module(f"{ROOM}.{mutant.module}")
    source = Path(original.__file__).read_text()
    for old, new in mutant.changes.items():
        assert source.count(old) == 1, f"{mutant.module}.py has {source.count(old)} times: {old}"
        source = source.replace(old, new)
    file = folder / f"{mutant.module}.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(f"mutant_{mutant.module}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = MUTANTS[name]
    original = importlib.import_module(f"{ROOM}.{mutant.module}")
    for attribute, value in vars(mutated(mutant, tmp_path)).items():
        if isinstance(value, InterpretedFunction):
            monkeypatch.setattr(original, attribute, value)
    found = ""
    for seed in SEEDS:
        with interleaved(seed) as report:
            try:
                outputs(CASES[mutant.case], mutant.programs, backward=mutant.module == "backward")
            except Violation as violation:
                found += f"seed {seed}: {violation}\n"
        found += "".join(f"seed {seed}: {line}\n" for line in report.text.splitlines())
        if re.search(mutant.found, found):
            break
    else:
        pytest.fail(f"not found in {len(SEEDS)} schedules, only: {found or 'nothing'}")
    print(found)
