"""The contract of every mixer in configs/model/mixer/: it is causal, streams, decodes and isolates documents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map

from ovq.compose import CONFIG_DIR
from ovq.mixers import attention_layer
from ovq.mixers.base import SequenceMixer
from ovq.model import build_mixer
from tests.helpers import MIXERS, relative_error, small_config, small_model

T = 45  # odd: several chunks of 8, a partial one, several windows of 7


def make(name: str, *, kv_heads: int = 2, seed: int = 0) -> SequenceMixer:
    base = "std_att" if name != "full_attention" else "sw"  # a model that lacks this mixer
    cfg = small_config(base, f"+model/mixer@model.mixers.{name}={name}", f"model.pattern=[{name}]")
    cfg.model.num_kv_heads = kv_heads
    mixer = build_mixer(cfg.model, 0)
    torch.manual_seed(seed)
    mixer.init_weights(0.2)
    return mixer.double().eval()


def random_input(seed: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, T, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", MIXERS)
def test_every_weight_gets_a_gradient_however_short_the_sequence(name: str) -> None:
    """Otherwise ranks with short sequences disagree with the others, and checkpoints lack the optimizer's state."""
    added = [] if name == "full_attention" else [f"+model/mixer@model.mixers.{name}={name}"]
    model = small_model("std_att", *added, f"model.pattern=[{name}]")
    for length in (1, 2, 8):
        model.zero_grad()
        tokens = torch.arange(length)[None]
        model(tokens, targets_BT=tokens).loss.backward()
        assert not [key for key, weight in model.named_parameters() if weight.grad is None]


@pytest.mark.parametrize("name", MIXERS)
def test_output_before_t_ignores_token_t(name: str) -> None:
    mixer, x = make(name), random_input(1)
    before = mixer(x)[0]
    for t in (0, 1, 7, 8, 23, T - 1):
        changed = x.clone()
        changed[:, t] += torch.randn(32, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
        after = mixer(changed)[0]
        assert torch.equal(after[:, :t], before[:, :t]), f"token {t} changed an output before it"
        assert not torch.equal(after[:, t], before[:, t]), f"token {t} does not reach its own output"


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("pieces", [[T], [8, 8, 16, 13], [1, 6, 20, 18], [1] * T], ids=str)
def test_streamed_in_pieces_equals_one_pass(name: str, pieces: list[int]) -> None:
    mixer, x = make(name), random_input(2)
    with torch.no_grad():
        whole = mixer(x)[0]
        state, outputs = None, []
        for piece in x.split(pieces, dim=1):
            y, state = mixer(piece, state=state, return_state=True)
            outputs.append(y)
    assert relative_error(torch.cat(outputs, dim=1), whole) < 1e-9


@pytest.mark.parametrize("name", MIXERS)
def test_a_pass_over_nothing_is_refused(name: str) -> None:
    mixer, x = make(name), random_input(3)
    state = mixer(x[:, :5], return_state=True)[1]
    for nothing in (x[:, :0], x[:0]):
        with pytest.raises(ValueError, match="needs at least one token, got shape"):
            mixer(nothing)
    with pytest.raises(ValueError, match="needs at least one token, got shape"):
        mixer(x[:, :0], state=state, return_state=True)


@pytest.mark.parametrize("name", MIXERS)
def test_a_state_is_not_modified_by_using_it(name: str) -> None:
    mixer, x = make(name), random_input(3)
    with torch.no_grad():
        state = mixer(x[:, :19], return_state=True)[1]
        first = mixer(x[:, 19:], state=state, return_state=True)[0]
        for token in x[:, 19:35].split(1, dim=1):
            state_copy = mixer(token, state=state, return_state=True)[1]
        assert torch.equal(mixer(x[:, 19:], state=state)[0], first)
    assert state_copy is not None


def test_a_long_cache_is_continued_in_place_but_never_under_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_layer, "ROOM_FROM", 20)
    mixer, x, other = make("full_attention"), random_input(3), random_input(4)

    def decode(state: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, Any, set[int]]:
        rows, places = [], set()
        for token in tokens.split(1, dim=1):
            y, state = mixer(token, state=state, return_state=True)
            rows.append(y)
            places.add(state.key.data_ptr())
        return torch.cat(rows, dim=1), state, places

    with torch.inference_mode():
        start = mixer(x[:, :32], return_state=True)[1]
        first, state, places = decode(start, x[:, 32:36])
        assert len(places) == 1, "copied once, with room for four tokens more"
        mine, theirs = decode(state, x[:, 36:]), decode(state, other[:, 36:])
        few = decode(tree_map(lambda leaf: leaf[:1], state), x[:1, 36:])
        want = mixer(torch.cat([x[:, :36], other[:, 36:]], dim=1))[0][:, 36:]
    whole = mixer(x)[0]
    assert relative_error(torch.cat([first, mine[0]], dim=1), whole[:, 32:]) < 1e-9
    assert relative_error(theirs[0], want) < 1e-9
    assert relative_error(few[0], whole[:1, 36:]) < 1e-9
    with torch.no_grad():
        assert relative_error(decode(state, x[:, 36:])[0], whole[:, 36:]) < 1e-9, "not to be written to by now"


@pytest.mark.parametrize("name", MIXERS)
def test_packed_documents_do_not_see_each_other(name: str) -> None:
    mixer, x = make(name), random_input(4, batch=1)
    bounds = [0, 1, 9, 25, T]
    packed = mixer(x, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))[0]
    alone = [mixer(x[:, start:end])[0] for start, end in zip(bounds, bounds[1:])]
    assert relative_error(packed, torch.cat(alone, dim=1)) < 1e-9


@pytest.mark.parametrize("name", MIXERS)
def test_every_parameter_and_the_input_get_a_finite_gradient(name: str) -> None:
    mixer, x = make(name).train(), random_input(5).requires_grad_()
    y = mixer(x)[0]
    loss = (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(6), dtype=y.dtype)).sum()
    if (aux := mixer.auxiliary_loss()) is not None:
        loss = loss + aux
    loss.backward()
    for label, tensor in [("x", x), *mixer.named_parameters()]:
        assert tensor.grad is not None and torch.isfinite(tensor.grad).all(), label
        assert tensor.grad.abs().max() > 0, f"{label} gets no gradient"


@pytest.mark.parametrize("name", MIXERS)
def test_state_size_is_what_is_held(name: str) -> None:
    """Exact at every fill level of chunk, window and memory, whether the tokens come in one piece or two."""
    mixer, x = make(name), random_input(7, batch=1)
    with torch.no_grad():
        for length in (1, 5, 6, 7, 8, 9, 16, 17, 24, T):
            state = mixer(x[:, :length], return_state=True)[1]
            assert held(state) == mixer.state_size(length), f"after {length} tokens"
            if length > 5:
                state = mixer(x[:, :5], return_state=True)[1]
                state = mixer(x[:, 5:length], state=state, return_state=True)[1]
                assert held(state) == mixer.state_size(length), f"after 5 and {length - 5} tokens"
    assert mixer.mixing_flops(T) > 0


@pytest.mark.parametrize("context", [1, 5, 8, 9, 24, T])
def test_flops_count_what_each_token_sees(context: int) -> None:
    ovq, fifo = make("ovq"), make("fifo")
    query, L = 4 * ovq.shape.num_heads * ovq.shape.head_dim, 8
    key, whole = 2 * ovq.shape.num_kv_heads * ovq.shape.head_dim, context - context % L
    sizes = [ovq.spec.size_at(t - t % L) for t in range(context)]
    own = [t % L + 1 for t in range(context)]
    predict = query * (sum(sizes) + sum(own))
    assert ovq.mixing_flops(context) == pytest.approx((predict + key * sum(sizes[:whole])) / context)
    kept = [min(12, t - t % L) for t in range(context)]
    assert fifo.mixing_flops(context) == pytest.approx(query * (sum(kept) + sum(own)) / context)
    kvm, attend = make("kvm"), query * (sum(kept) + sum(own))
    assert kvm.mixing_flops(context) == pytest.approx((attend + key * sum(kept[:whole])) / context)


def test_flops_of_the_backward_pass_leave_out_what_has_no_gradient() -> None:
    for name in ("fifo", "gated_deltanet"):
        mixer = make(name)
        assert mixer.backward_flops(T) == 2 * mixer.mixing_flops(T)
    shape = make("ovq").shape
    search = 2 * shape.num_kv_heads * shape.head_dim  # FLOPs per key and entry that it is compared with
    vq, mesa = make("vq"), make("mesa_net")
    assert vq.backward_flops(T) == 2 * (vq.mixing_flops(T) - search * vq.num_codes)
    assert make("kvm").backward_flops(T) == make("fifo").backward_flops(T)  # of equal capacity
    ovq = make("ovq")
    found = sum(ovq.spec.size_at(t - t % 8) for t in range(T - T % 8)) / T
    assert ovq.backward_flops(T) == pytest.approx(2 * (ovq.mixing_flops(T) - search * found))
    solve = 2 * mesa.iterations * shape.num_heads * shape.head_dim**2
    assert mesa.backward_flops(T) == 2 * mesa.mixing_flops(T) - solve  # its gradient is one solve, not two


def held(state: Any) -> int:
    """Elements of all storages that the state keeps alive: a view of some keys keeps their whole storage alive."""
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(state) if isinstance(leaf, torch.Tensor)]
    storages = {leaf.untyped_storage()._cdata: leaf.untyped_storage().nbytes() // leaf.itemsize for leaf in leaves}
    return sum(storages.values())


@pytest.mark.parametrize("name", ["full_attention", "sliding_window", "ovq"])
def test_grouped_heads_equal_repeated_ones(name: str) -> None:
    """One key/value head for two query heads is the same as two equal key/value heads."""
    grouped, full = make(name, kv_heads=1), make(name, kv_heads=2)
    weights = dict(grouped.state_dict())
    for part in ("k_proj.weight", "v_proj.weight"):
        weights[part] = torch.cat([weights[part]] * 2)
    full.load_state_dict(weights)
    x = random_input(8)
    assert relative_error(grouped(x)[0], full(x)[0]) < 1e-9


def test_every_mixer_config_names_exactly_the_arguments_of_its_class() -> None:
    import inspect

    from hydra.utils import get_class
    from omegaconf import OmegaConf

    for name in MIXERS:
        settings = OmegaConf.load(CONFIG_DIR / "model" / "mixer" / f"{name}.yaml")
        parameters = inspect.signature(get_class(settings.pop("_target_"))).parameters.values()
        assert set(settings) == {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}, name
