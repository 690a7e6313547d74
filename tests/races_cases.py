"""The kernels under random schedules, in the interpreter of `interleave.py`: no race, no address outside a tensor, and
the same bits however many programs share a head; and that the detector sees what it should.

`tests/test_races.py` runs this file in separate processes, because the interpreter must be selected before Triton is
imported (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from tests.interleave import Report, Violation, interleaved

SEEDS = range(8)


def launch(kernel, grid: tuple[int, ...], *args, seed: int = 0, **kwargs) -> Report:
    with interleaved(seed) as report:
        kernel[grid](*args, **kwargs)
    return report


def integers(*shape: int) -> torch.Tensor:
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
    """Although the interpreter's memory is sequentially consistent, so that the result is right."""
    y = integers(5)
    report = launch(exchange_kernel, (5,), integers(5), y, integers(1), 5, release, acquire, seed=seed)
    assert {race.tensor for race in report.races} == {"x_ptr"} and y.tolist() == [1, 2, 3, 4, 0]


def test_detector_finds_a_barrier_that_is_one_short() -> None:
    """In some schedule: in others the last program arrives before any other leaves."""
    tensors = integers(5), integers(5), integers(1)
    reports = [launch(exchange_kernel, (5,), *tensors, 4, "release", "acquire", seed=seed) for seed in SEEDS]
    assert any(report.races for report in reports)


def test_detector_finds_a_deadlock() -> None:
    with pytest.raises(Violation, match="deadlock in exchange_kernel: 5 programs"):
        launch(exchange_kernel, (5,), integers(5), integers(5), integers(1), 6, "release", "acquire")


@triton.jit
def relay_kernel(x_ptr, turn_ptr, SEM: tl.constexpr):
    """Program p waits for p - 1 and adds to what that one wrote: only the last hand-over orders p after program 0."""
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
    """y[i] = x[i] + 1, with the elements read `shift` further."""
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
    """In place, a program only meets what it wrote itself, unless it reads the elements of another."""
    x = integers(48)
    report = launch(shift_kernel, (4,), x[8:], x[8:], 32, shift, 8)
    assert {race.tensor for race in report.races} == ({"x_ptr"} if shift else set())
    assert not launch(shift_kernel, (2,), x, x[32:], 16, 0, 8).races
    assert launch(shift_kernel, (2,), x, x[8:], 16, 0, 8).races


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
