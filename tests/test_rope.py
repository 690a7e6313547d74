"""Claims about rotary positions: what each way of scaling them to a longer context does to the frequencies."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ovq.compose import compose
from ovq.errors import ConfigError
from ovq.inference.export import rope
from ovq.mixers.rope import RopeScaling, rotate
from ovq.model import build_model
from tests.helpers import TINY, relative_error, small_model

K, BASE, ORIGINAL, FACTOR = 64, 10000.0, 2048, 8.0
CPU = torch.device("cpu")


def frequencies(**settings: Any) -> torch.Tensor:
    scaling = RopeScaling.of({"factor": FACTOR, "original_max_position_embeddings": ORIGINAL, **settings})
    assert scaling is not None
    return scaling.frequencies(K, BASE, CPU)


def plain() -> torch.Tensor:
    return torch.tensor([BASE ** (-2 * i / K) for i in range(K // 2)], dtype=torch.float64)


def test_linear_scaling_gives_position_t_times_factor_the_angle_of_t() -> None:
    x = torch.randn(1, 5, 2, K, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scaling = RopeScaling("linear", FACTOR)
    for t in range(5):
        assert torch.allclose(rotate(x[:, t : t + 1], 8 * t, BASE, scaling), rotate(x[:, t : t + 1], t, BASE))


def test_ntk_leaves_the_highest_frequency_and_divides_the_lowest_by_the_factor() -> None:
    got = frequencies(rope_type="ntk") / plain()
    assert float(got[0]) == 1 and float(got[-1]) == pytest.approx(1 / FACTOR)
    assert (got.diff() < 0).all()


def test_yarn_divides_slow_frequencies_and_leaves_fast_ones() -> None:
    """Frequency i = K ln(ORIGINAL / (2 pi turns)) / (2 ln BASE) makes `turns` turns over the original context."""
    got = frequencies(rope_type="yarn") / plain()
    turns = ORIGINAL * plain() / (2 * math.pi)
    low, high = (K * math.log(ORIGINAL / (2 * math.pi * t)) / (2 * math.log(BASE)) for t in (32, 1))
    low, high = math.floor(low), math.ceil(high)
    assert (low, high) == (8, 21)
    for i in range(K // 2):
        slow = min(1, max(0, (i - low) / (high - low)))
        assert float(got[i]) == pytest.approx(slow / FACTOR + 1 - slow), i
    assert torch.equal(got[turns > 40], torch.ones(int((turns > 40).sum()), dtype=torch.float64))
    assert torch.allclose(got[turns < 0.9], torch.tensor(1 / FACTOR, dtype=torch.float64))


def test_yarn_scales_attention_by_the_square_of_its_amplitude() -> None:
    x = torch.randn(1, 3, 2, K, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for given, want in ((None, 0.1 * math.log(FACTOR) + 1), (0.7, 0.7)):
        scaling = RopeScaling("yarn", FACTOR, ORIGINAL, attention_factor=given)
        norms = rotate(x, 100, BASE, scaling).norm(dim=-1) / x.norm(dim=-1)
        assert torch.allclose(norms, torch.full_like(norms, want))


def test_a_factor_of_one_changes_nothing() -> None:
    for kind in ("linear", "ntk", "yarn"):
        assert torch.allclose(frequencies(rope_type=kind, factor=1.0), plain(), rtol=1e-14), kind


@pytest.mark.parametrize("mixer", ["sliding_window", "full_attention"])
def test_the_setting_reaches_the_mixer_and_leaves_weights_and_streaming_alone(mixer: str) -> None:
    name = {"sliding_window": "sw", "full_attention": "std_att"}[mixer]
    setting = f"model.mixers.{mixer}.rope_scaling={{rope_type: yarn, factor: 4, original_max_position_embeddings: 16}}"
    before, after = small_model(name), small_model(name, setting)
    assert all(torch.equal(a, b) for a, b in zip(before.state_dict().values(), after.state_dict().values()))
    tokens = torch.randint(61, (1, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        whole = after(tokens).logits
        assert relative_error(before(tokens).logits, whole) > 1e-4
        first = after(tokens[:, :23], return_state=True)
        rest = after(tokens[:, 23:], state=first.state).logits
    assert relative_error(torch.cat([first.logits, rest], dim=1), whole) < 1e-5


@pytest.mark.parametrize(
    ("scaling", "says"),
    [
        ("{rope_type: yarn, factor: 8}", "rope_scaling.original_max_position_embeddings=None must be the context"),
        ("{rope_type: long, factor: 8}", "rope_type=long is not a legal value; legal: linear, ntk, yarn"),
        ("{rope_type: linear, factor: 0.5}", "rope_scaling.factor=0.5 must be at least 1"),
        ("{rope_type: linear}", "must be {rope_type: yarn, factor: 8}"),
        ("{type: linear, factor: 2}", "legal: rope_type, factor, original_max_position_embeddings"),
        ("yarn", "rope_scaling=yarn must be"),
    ],
)
def test_a_wrong_scaling_is_one_line(scaling: str, says: str) -> None:
    cfg = compose(["model=sw", *TINY, f"model.mixers.sliding_window.rope_scaling={scaling}"])
    with pytest.raises(ConfigError) as error:
        build_model(cfg.model, 8)
    assert (
        says in str(error.value) and "\n" not in str(error.value) and "model.mixers.sliding_window" in str(error.value)
    )


def test_other_tools_are_told_of_the_rotary_embedding_that_layers_have() -> None:
    yarn = {"rope_type": "yarn", "factor": 8, "original_max_position_embeddings": 64}
    window, full = {"window": 4, "rope_base": 500.0}, {"position": "rope", "rope_base": 10000.0}
    assert rope({"a": full | {"position": "none"}, "b": window}) == {
        "rope_theta": 500.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    }
    assert rope({"a": full | {"rope_scaling": yarn}})["rope_parameters"] == {"rope_theta": 10000.0, **yarn}
    assert rope({"a": full | {"position": "none"}}) == {}
