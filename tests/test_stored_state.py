"""Claims about dictionaries stored in fewer bytes: how much the formats round, and how a run is tested with them."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from eval import accuracy, stored_state
from eval.stored_state import FORMATS, Stochastic, in_format, nearest
from ovq.inference.run import load_run
from ovq.ops.ovq_attention import OVQState
from tests.test_per_position import run_folder


def test_stochastic_rounding_takes_a_neighbour_and_keeps_the_mean() -> None:
    x = torch.tensor([1.001, -3.007, 0.0, 2.0, 1e-30])
    rounded = torch.stack([y for y in Stochastic(0)(x.expand(20000, 5))])
    spacing = nearest(x).abs() / 128
    assert ((rounded - x).abs() <= spacing).all()
    assert torch.equal(rounded[:, 2:4], x[2:4].expand(20000, 2)), "what bf16 holds stays as it is"
    error = (rounded.double().mean(0) - x.double()).abs()
    assert (error <= 5 * spacing / 20000**0.5).all()
    assert torch.equal(rounded.bfloat16().float(), rounded)


@pytest.mark.parametrize(("name", "bound"), [("sums_float32", 0.0), ("sums_bf16", 2**-8), ("means_bf16", 2**-8)])
def test_relative_errors_of_formats(name: str, bound: float) -> None:
    sums, count = torch.randn(2, 3, 50, 8) * 100, torch.randint(0, 9, (2, 3, 50)).float()
    sums[count == 0] = 0
    got = read_back(name, sums, count)
    assert ((got - sums).abs() <= bound * sums.abs() * 1.001).all() and torch.equal(got[count == 0], sums[count == 0])


def test_integers_err_by_half_a_step_of_the_largest() -> None:
    sums, count = torch.randn(2, 3, 50, 8) * 100, torch.randint(1, 9, (2, 3, 50)).float()
    got = read_back("means_int8", sums, count)
    step = (sums / count[..., None]).abs().amax(-1, keepdim=True) / 127
    assert ((got - sums).abs() <= 0.501 * step * count[..., None]).all()
    assert FORMATS["means_int8"].bytes_of(64) == 68


def test_a_test_does_not_depend_on_those_before_it() -> None:
    sums, count = torch.randn(2, 3, 50, 8), torch.ones(2, 3, 50)
    for name in FORMATS:
        assert torch.equal(read_back(name, sums, count), read_back(name, sums, count))


def read_back(name: str, sums: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Sums [B, G, N, D] and counts [B, G, N] in a dictionary, after it was stored: the new sums."""
    empty = torch.empty(*sums.shape[:2], 0, sums.shape[3])
    (state,) = in_format(name)([OVQState(sums, sums, count, empty, empty, sums.shape[2], 0)])
    return state.key_sum


def test_only_dictionaries_are_changed() -> None:
    dictionary = OVQState(
        *(torch.randn(1, 2, 4, 3) for _ in range(2)), torch.ones(1, 2, 4), *[torch.randn(1, 1, 2, 3)] * 2, 4, 9
    )
    other = object()
    changed = in_format("sums_bf16")([other, dictionary])
    assert changed[0] is other and torch.equal(changed[1].key_sum, nearest(dictionary.key_sum))
    assert changed[1].count is dictionary.count and changed[1].pending_key is dictionary.pending_key
    assert changed[1].position == 9


def test_the_command_tests_every_format(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_folder(tmp_path, "sw_ovq", ["data=recall", "data.task.key_vocab=244", "data.task.value_vocab=12"])
    assert stored_state.main([f"run={run}", "lengths=[24,60]", "answers=40", "num_centroids=5"]) == 0
    rows = list(csv.DictReader((run / "stored_state.csv").open()))
    assert [(row["format"], row["length"]) for row in rows] == [(f, n) for n in ("24", "60") for f in FORMATS]
    plain = accuracy.Options(run=str(run), lengths=[60], answers=40)
    opened = load_run(run, ["eval.num_centroids=5"])
    want = accuracy.measure(opened, accuracy.build_task(opened.cfg), plain)[0]["accuracy"]
    got = next(row for row in rows if (row["format"], row["length"]) == ("sums_float32", "60"))
    assert float(got["accuracy"]) == pytest.approx(want, abs=1e-6), "in pieces of a chunk, stored as it is"
    assert int(got["dictionary_bytes"]) == 5 * 2 * int(got["bytes_of_a_centroid"])  # two key/value heads, one layer
    assert stored_state.main([f"run={run}", "lengths=[60]", "answers=40", "formats=[means_int8]"]) == 0
    more = list(csv.DictReader((run / "stored_state.csv").open()))
    assert more[:-1] == rows and more[-1]["num_centroids"] != "5", "what was measured before is kept"
    line = [f"run={run}", "lengths=[60]", "answers=40", "formats=[means_int8]", "model.mixers.ovq.seeding=random"]
    assert stored_state.main(line) == 0
    changed = list(csv.DictReader((run / "stored_state.csv").open()))
    assert changed[:-1] == more and changed[-1]["changes"] == "model.mixers.ovq.seeding=random"
    assert {row["step"] for row in changed} == {"3"}
    assert stored_state.main([*line[:-1], "data.task.queried=0.5"]) == 0
    other_task = list(csv.DictReader((run / "stored_state.csv").open()))
    assert other_task[:-1] == changed and other_task[-1]["changes"] == "data.task.queried=0.5"
    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(stored_state, "test", lambda *_, **__: pytest.fail("measured before looking at out"))
        assert stored_state.main([f"run={run}", "out=/proc/nope"]) == 2
        assert (
            "would go to /proc/nope, which cannot be written to" in (said := capsys.readouterr().err)
            and said.count("\n") == 1
        )
    other = run_folder(tmp_path / "other", "sw", ["data=recall", "data.task.key_vocab=244", "data.task.value_vocab=12"])
    assert stored_state.main([f"run={other}"]) == 2
    assert "must be a run with OVQ layers" in capsys.readouterr().err
