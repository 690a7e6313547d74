"""Claims about every named model as a whole: it is causal, streams, decodes, and has the right loss and counts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ovq.compose import compose
from ovq.errors import ConfigError
from ovq.model import build_model, count_parameters, flops_per_token, state_size
from tests.helpers import MODELS, TINY, Largest, relative_error, small_config, small_model

VOCAB = 61


def tokens(seed: int, batch: int = 2, length: int = 40) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", MODELS)
def test_logits_before_t_ignore_token_t(name: str) -> None:
    model, x = small_model(name).double().eval(), tokens(0)
    before = model(x).logits
    for t in (1, 8, 23):
        changed = x.clone()
        changed[:, t] = (changed[:, t] + 1) % VOCAB
        assert torch.equal(model(changed).logits[:, :t], before[:, :t])


@pytest.mark.parametrize("name", MODELS)
def test_prefill_then_decode_equals_one_pass(name: str) -> None:
    model, x = small_model(name).double().eval(), tokens(1)
    with torch.no_grad():
        whole = model(x).logits
        out = model(x[:, :21], return_state=True)
        logits = [out.logits]
        for t in range(21, x.shape[1]):
            out = model(x[:, t : t + 1], state=out.state, return_state=True)
            logits.append(out.logits)
    assert relative_error(torch.cat(logits, dim=1), whole) < 1e-9


def test_loss_is_the_sum_of_nats_over_valid_targets() -> None:
    model, x, y = small_model("sw_ovq").double(), tokens(2), tokens(3)
    y[0, 5:9] = -100
    logits = model(x).logits
    want = F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-100, reduction="sum")
    each = F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-100, reduction="none")
    model.loss_chunk_tokens = 7
    assert abs(float(model(x, targets_BT=y).loss - want)) < 1e-4
    assert relative_error(model(x, targets_BT=y, reduction="none").loss.flatten(), each) < 1e-5


@pytest.mark.parametrize("model", ["std_att", "gdn", "sw_ovq"])
def test_packed_documents_leave_no_state_to_continue_from(model: str) -> None:
    x, bounds = torch.zeros(1, 8, dtype=torch.long), torch.tensor([0, 3, 8], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens excludes state and return_state"):
        small_model(model)(x, cu_seqlens=bounds, return_state=True)


def test_packed_documents_give_the_loss_of_each_alone() -> None:
    model, x, y = small_model("sw_ovq").double(), tokens(4), tokens(5)
    bounds = torch.tensor([0, 13, 40, 47, 80], dtype=torch.int32)
    packed = model(x, targets_BT=y, cu_seqlens=bounds, reduction="none").loss.flatten()
    flat_x, flat_y = x.flatten(), y.flatten()
    alone = [
        model(flat_x[a:b][None], targets_BT=flat_y[a:b][None], reduction="none").loss.flatten()
        for a, b in zip(bounds.tolist(), bounds.tolist()[1:])
    ]
    assert relative_error(packed, torch.cat(alone)) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_initialisation_is_a_function_of_the_seed(name: str) -> None:
    one, same, other = (small_model(name, seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)
    assert all(torch.isfinite(value).all() for value in one.values() if value.is_floating_point())


def test_initial_loss_equals_that_of_a_uniform_guess() -> None:
    model, x, y = small_model("sw_ovq"), tokens(6), tokens(7)
    mean = float(model(x, targets_BT=y).loss.detach()) / y.numel()
    assert abs(mean - torch.tensor(float(VOCAB)).log()) < 0.15


def test_tied_embeddings_are_one_matrix_and_count_once() -> None:
    tied, free = small_model("sw", "model.tie_embeddings=true"), small_model("sw")
    assert count_parameters(free)[0] - count_parameters(tied)[0] == VOCAB * 32
    assert count_parameters(free)[1] == count_parameters(tied)[1]


@pytest.mark.parametrize("size,millions", [("70m", 70), ("150m", 150), ("480m", 480)])
def test_sizes_have_the_parameter_count_in_their_name(size: str, millions: int) -> None:
    cfg = compose(["model=sw_ovq", f"model/size={size}"])
    with torch.device("meta"):
        total, _ = count_parameters(build_model(cfg.model, 16384))
    assert abs(total / 1e6 / millions - 1) < 0.05


def test_ovq_state_stops_growing_and_full_attention_does_not() -> None:
    with torch.device("meta"):
        ovq, full = (build_model(compose([f"model={m}"]).model, 256) for m in ("sw_ovq", "std_att"))
    assert state_size(ovq, 65536) == state_size(ovq, 8192)
    assert state_size(full, 65536) == 8 * state_size(full, 8192)


def test_flops_per_token_are_six_per_weight_plus_mixing() -> None:
    model = small_model("sw", "model.mixers.sliding_window.window=1")
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
    mixing = 3 * 2 * 4 * 32  # three passes, two layers, four FLOPs for each of 32 columns and the one key seen
    assert flops_per_token(model, 100) == 6 * weights + mixing


def test_unknown_mixer_argument_and_class_are_config_errors() -> None:
    cfg = small_config("sw_ovq")
    cfg.model.mixers.ovq = {"_target_": "ovq.mixers.ovq.OVQ", "num_centroids": 4, "colour": 3}
    with pytest.raises(ConfigError, match="model.mixers.ovq.colour.*num_centroids"):
        build_model(cfg.model, 8)
    cfg.model.mixers.ovq = {"_target_": "ovq.mixers.ovq.Nope"}
    with pytest.raises(ConfigError, match="model.mixers.ovq._target_"):
        build_model(cfg.model, 8)
    with pytest.raises(ConfigError, match="num_centroids"):
        build_model(compose(["model=sw_ovq", *TINY, "model.mixers.ovq.num_centroids=-1"]).model, 8)


def test_health_reports_the_dictionary() -> None:
    model = small_model("sw_ovq")
    for mixer in model.mixers():
        mixer.collect_health = True
    model(tokens(8, length=64), targets_BT=tokens(9, length=64))
    health = model.mixers()[1].health
    assert set(health) == {"fill", "used_once", "mean_count", "beta"}
    size = float(health["fill"]) * 12
    assert abs(float(health["mean_count"]) - 64 / size) < 1e-4 and float(health["beta"]) == 1.0


@pytest.mark.parametrize("keep", [1, 3, 99])
def test_logits_of_the_last_positions_are_those_of_all(keep: int) -> None:
    model = small_model("sw_ovq").eval()
    tokens = torch.randint(61, (2, 20), generator=torch.Generator().manual_seed(0))
    whole, last = model(tokens).logits, model(tokens, logits_to_keep=keep).logits
    assert last.shape == (2, min(keep, 20), 61) and relative_error(last, whole[:, -keep:]) < 1e-6
    with Largest() as seen:
        model(torch.zeros(1, 8192, dtype=torch.int64), logits_to_keep=1)
    assert seen.elements < 8192 * 61, "logits of all positions were made"


def test_capped_logits_are_those_of_the_loss_of_generation_and_of_evaluation() -> None:
    capped, plain = small_model("sw", "model.logit_softcap=0.3").eval(), small_model("sw").eval()
    for model in (capped, plain):
        model.head.weight.data *= 30
    x, y = tokens(3), tokens(4)
    with torch.no_grad():
        logits = capped(x).logits
        want = 0.3 * torch.tanh(plain(x).logits / 0.3)
        assert logits.abs().max() <= 0.3 < plain(x).logits.abs().max() and relative_error(logits, want) < 1e-6
        first = capped(x[:, :5], return_state=True)
        assert relative_error(capped(x[:, 5:6], state=first.state, logits_to_keep=1).logits, logits[:, 5:6]) < 1e-4
        losses = capped(x, targets_BT=y, reduction="none").loss
    assert (
        relative_error(
            losses.flatten(), torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none")
        )
        < 1e-5
    )
