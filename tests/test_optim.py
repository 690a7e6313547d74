"""Claims about optimizers, averaged weights and schedules other than plain AdamW with a cosine."""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ovq
from data.build import build_tokenizer
from ovq import compose, config
from ovq.errors import ConfigError
from ovq.identity import changed, digest
from ovq.train import checkpoint
from ovq.train.checkpoint import CheckpointError
from ovq.train.ema import WeightAverage
from ovq.train.optim import build_optimizer, parameter_groups
from ovq.train.schedule import Schedule, lr_at
from tests.helpers import chosen, extra_of, small_config, small_model
from tests.training import losses, trainer_for

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def gradients(model: nn.Module, seed: int) -> None:
    for index, p in enumerate(model.parameters()):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * seed + index))


def named_groups(model: str, *settings: str) -> dict[str, dict[str, Any]]:
    """Parameter name -> the group that the optimizer puts it in."""
    built = small_model(model, *settings)
    names = {id(p): name for name, p in built.named_parameters()}
    groups = parameter_groups(built, small_config(model, *settings))
    found = {names[id(p)]: group for group in groups for p in group["params"]}
    assert found.keys() == set(names.values())
    return found


class Lion(torch.optim.Optimizer):
    """Steps along the sign of averaged gradients; its groups hold state, which a checkpoint must restore."""

    def __init__(self, params: Any, lr: float = 1e-3, *, beta: float = 0.9, weight_decay: float = 0.0) -> None:
        if not 0 <= beta < 1:
            raise ValueError(f"beta={beta} must be in [0, 1)")
        super().__init__(params, {"lr": lr, "beta": beta, "weight_decay": weight_decay, "count": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["count"] += 1
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["beta"])
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * average.sign())


class Sawtooth(Schedule):
    def __init__(self, steps: int, warmup_steps: int, *, period: int, least: float = 0.5) -> None:
        super().__init__(steps, warmup_steps)
        self.period, self.least = period, least

    def factor(self, step: int) -> float:
        return 1 - (1 - self.least) * (step % self.period) / self.period


@pytest.fixture(autouse=True)
def outside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the two classes above importable from a module outside the package."""
    module = types.ModuleType("outside")
    module.Lion, module.Sawtooth, module.SGD = Lion, Sawtooth, torch.optim.SGD  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "outside", module)
    yield


# --- Muon ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
def test_muon_equals_torchs_muon_for_matrices_and_adamw_for_the_rest_bit_by_bit(adjust: str) -> None:
    cfg = small_config("sw_gdn", "optim=muon", f"optim.adjust_lr={adjust}", "optim.fused=false")
    model = small_model("sw_gdn")
    other = copy.deepcopy(model)
    ours = build_optimizer(model, cfg)
    linear = {id(m.weight) for m in other.layers.modules() if isinstance(m, nn.Linear)}
    matrices = [p for p in other.parameters() if id(p) in linear]
    rest = [p for p in other.parameters() if id(p) not in linear]
    decayed = [p for p in rest if p.ndim >= 2 and p is not other.embed.weight]
    plain = [p for p in rest if not any(p is q for q in decayed)]
    assert matrices and len(decayed) > 1 and any(p.ndim < 2 for p in plain)
    theirs = [
        torch.optim.Muon(matrices, lr=1e-2, adjust_lr_fn=adjust),
        torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0}],
            lr=1e-2,
            betas=(0.9, 0.95),
        ),
    ]
    for group in ours.param_groups:
        group["lr"] = 1e-2
    for seed in range(3):
        for each in (model, other):
            gradients(each, seed)
        for optimizer in (ours, *theirs):
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))


def test_muon_takes_the_linear_layers_of_the_blocks_and_nothing_else() -> None:
    groups = named_groups("sw_gdn", "optim=muon")
    muon = {name for name, group in groups.items() if group["muon"]}
    assert {"layers.0.mixer.q_proj.weight", "layers.1.mlp.out_proj.weight"} <= muon
    assert all(name.startswith("layers.") and name.endswith(".weight") for name in muon)
    assert not {name for name in muon if ".conv." in name or "norm" in name}
    assert {"embed.weight", "head.weight", "norm.weight", "layers.1.mixer.conv.weight"} <= groups.keys() - muon


def test_muon_learns_and_resumes_bit_exact(tmp_path: Path) -> None:
    how = ("optim=muon", "optim.ema=0.9")
    whole = trainer_for(tmp_path / "whole", *how)
    whole.fit()
    assert losses(tmp_path / "whole")[-1] < losses(tmp_path / "whole")[0] - 0.2
    trainer_for(tmp_path / "parts", *how, "trainer.steps=6", "trainer.checkpoint_every=3").fit()
    last = trainer_for(tmp_path / "parts", *how, resume=str(tmp_path / "parts" / "checkpoints" / "step_00000003"))
    assert last.step == 3
    last.fit()
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert all(torch.equal(p, q) for p, q in zip(last.model.parameters(), whole.model.parameters()))
    assert last.ema is not None and whole.ema is not None
    assert all(torch.equal(last.ema.weights[name], value) for name, value in whole.ema.weights.items())


# --- averaged weights ------------------------------------------------------------------------------------------------


def test_the_average_is_that_of_its_formula_and_skips_bad_steps() -> None:
    model, good = nn.Linear(3, 2), torch.tensor(False)
    average, want = WeightAverage(model, 0.6), torch.zeros(2, 3)
    for step in range(1, 30):
        with torch.no_grad():
            model.weight.copy_(torch.randn(2, 3, generator=torch.Generator().manual_seed(step)))
        decay = min(0.6, (step - 1) / (step + 9))
        want = decay * want + (1 - decay) * model.weight.detach()
        average.update(model, step, good)
        if step == 1:
            assert torch.equal(average.weights["weight"], model.weight)
        before = average.weights["weight"].clone()
        average.update(model, step, ~good)
        assert torch.equal(average.weights["weight"], before)
    assert torch.allclose(average.weights["weight"], want, atol=1e-6)


def test_evaluation_sees_the_averaged_weights_if_asked_and_training_its_own(tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []

    def evaluate(model: Any, step: int, should_stop: Any) -> dict[str, float]:
        seen.append(model.head.weight.detach().clone())
        return {"loss": 1.0}

    plain = trainer_for(tmp_path / "plain")
    plain.fit()
    runs = {}
    for weights in ("trained", "ema"):
        settings = ("optim.ema=0.9", f"eval.weights={weights}", "trainer.eval_every=3")
        runs[weights] = trainer_for(tmp_path / weights, *settings, evaluate=evaluate)
        runs[weights].fit()
        assert losses(tmp_path / weights) == losses(tmp_path / "plain"), "an average changes no step"
        assert all(torch.equal(p, q) for p, q in zip(runs[weights].model.parameters(), plain.model.parameters()))
    ema = runs["ema"].ema
    assert ema is not None and len(seen) == 4
    assert torch.equal(seen[1], plain.model.head.weight) and torch.equal(seen[3], ema.weights["head.weight"])
    assert not torch.equal(seen[1], seen[3])


@pytest.mark.parametrize("tied", ["false", "true"])
def test_a_checkpoint_gives_either_weights(tmp_path: Path, tied: str) -> None:
    tie = f"model.tie_embeddings={tied}"
    trainer = trainer_for(tmp_path, "optim.ema=0.9", "trainer.steps=3", tie, model="sw_vq")
    trainer.fit()
    path, ema = chosen(tmp_path), trainer.ema
    assert path is not None and ema is not None
    for weights in ("trained", "ema"):
        model = small_model("sw_vq", tie, vocab_size=31, seed=5)
        checkpoint.load(path, model, weights=weights)
        want = ema.weights if weights == "ema" else dict(trainer.model.named_parameters())
        assert all(torch.equal(p, want[name]) for name, p in model.named_parameters())
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), trainer.model.buffers()))


def test_averaged_weights_that_are_not_there_are_one_line(tmp_path: Path) -> None:
    trainer_for(tmp_path, "trainer.steps=1").fit()
    path = chosen(tmp_path)
    assert path is not None
    with pytest.raises(
        CheckpointError, match="holds no averaged weights, as optim.ema was 0; use eval.weights=trained"
    ):
        checkpoint.load(path, small_model("sw_ovq", vocab_size=31), weights="ema")
    again = trainer_for(tmp_path, "optim.ema=0.9", resume=str(path))  # averaging may begin later
    assert again.ema is not None
    assert torch.equal(again.ema.weights["head.weight"], again.model.head.weight)


# --- from outside the package ----------------------------------------------------------------------------------------


def test_an_optimizer_from_outside_is_trained_with_and_resumes_with_its_state(tmp_path: Path) -> None:
    how = (
        "optim=custom",
        "optim.custom={_target_: outside.Lion, beta: 0.8}",
        "optim.lr=3e-3",
        "optim.weight_decay=0.2",
    )
    whole = trainer_for(tmp_path / "whole", *how)
    assert isinstance(whole.optimizer, Lion)
    whole.fit()
    assert losses(tmp_path / "whole")[-1] < losses(tmp_path / "whole")[0] - 0.1
    trainer_for(tmp_path / "parts", *how, "trainer.checkpoint_every=4").fit()
    last = trainer_for(tmp_path / "parts", *how, resume=str(tmp_path / "parts" / "checkpoints" / "step_00000004"))
    assert {group["count"] for group in last.optimizer.param_groups} == {4}
    last.fit()
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert all(torch.equal(p, q) for p, q in zip(last.model.parameters(), whole.model.parameters()))
    assert {group["weight_decay"] for group in last.optimizer.param_groups} == {0.0, 0.2}
    assert {(group["beta"], group["count"]) for group in last.optimizer.param_groups} == {(0.8, 6)}


def test_an_optimizer_without_state_resumes_and_another_ones_state_is_refused(tmp_path: Path) -> None:
    sgd = ("optim=custom", "optim.custom={_target_: torch.optim.SGD}", "trainer.steps=2")
    whole = trainer_for(tmp_path / "whole", *sgd, "trainer.checkpoint_every=1")
    whole.fit()
    again = trainer_for(tmp_path / "whole", *sgd, resume=str(tmp_path / "whole" / "checkpoints" / "step_00000001"))
    again.fit()
    assert all(torch.equal(p, q) for p, q in zip(again.model.parameters(), whole.model.parameters()))
    with pytest.raises(CheckpointError, match="does not fit this model or optimizer"):
        trainer_for(tmp_path / "whole", "optim=muon")


def test_a_schedule_from_outside_sets_the_rate_after_warm_up() -> None:
    settings = ["optim.schedule=custom", "optim.custom_schedule={_target_: outside.Sawtooth, period: 10}"]
    cfg = small_config("sw", *settings, "optim.lr=2", "optim.warmup_steps=4", "trainer.steps=50")
    want = {1: 0.5, 2: 1.0, 4: 1.6, 5: 1.5, 10: 2.0, 19: 1.1, 20: 2.0}
    assert {step: lr_at(step, cfg) for step in want} == pytest.approx(want)


def test_the_inverse_square_root_falls_from_the_warm_up_whatever_the_number_of_steps() -> None:
    for steps in (100, 10_000):
        cfg = small_config("sw", "optim.schedule=inverse_sqrt", "optim.warmup_steps=16", f"trainer.steps={steps}")
        want = {8: 0.5, 16: 1.0, 64: 0.5, 100: 0.4, 10**6: 0.1}
        assert {step: lr_at(step, cfg) / cfg.optim.lr for step in want} == pytest.approx(want)


def test_an_evaluation_imports_no_optimizer_or_schedule(tmp_path: Path) -> None:
    foreign = ("optim.custom={_target_: trap.Trap}", "optim.custom_schedule={_target_: trap.Trap}")
    cfg = small_config("sw", "optim=custom", "optim.schedule=custom", *foreign)
    config.save(cfg, tmp_path / "run")
    build_tokenizer(cfg).save(tmp_path / "run" / "tokenizer")
    model = small_model("sw", vocab_size=build_tokenizer(cfg).vocab_size)
    saver = checkpoint.Checkpointer(tmp_path / "run", asynchronous=False)
    saver.save(1, model, torch.optim.SGD(model.parameters()), extra_of(1))
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')\n")
    loaded = ovq.load(tmp_path / "run", device="cpu")
    assert torch.equal(loaded.module.head.weight, model.head.weight) and "trap" not in sys.modules


def test_a_loaded_model_has_the_averaged_weights_if_asked(tmp_path: Path) -> None:
    cfg = small_config("sw", "optim.ema=0.9")
    config.save(cfg, tmp_path / "run")
    build_tokenizer(cfg).save(tmp_path / "run" / "tokenizer")
    model, other = (small_model("sw", vocab_size=build_tokenizer(cfg).vocab_size, seed=seed) for seed in (0, 1))
    saver = checkpoint.Checkpointer(tmp_path / "run", asynchronous=False)
    saver.save(1, model, torch.optim.SGD(model.parameters()), extra_of(1), WeightAverage(other, 0.9))
    for weights, want in (("trained", model), ("ema", other)):
        loaded = ovq.load(tmp_path / "run", device="cpu", weights=weights)
        assert torch.equal(loaded.module.head.weight, want.head.weight), weights
    with pytest.raises(ConfigError, match="eval.weights=avg is not a legal value; legal: trained, ema"):
        ovq.load(tmp_path / "run", device="cpu", weights="avg")


CUSTOM = ("optim=custom", "optim.weight_decay=0")
REFUSED = {
    ("optim.momentum=0.9",): "optim.momentum is a setting of optim.name=muon, and optim.name=adamw would ignore it",
    ("optim=muon", "optim.custom={_target_: outside.Lion}"): "optim.custom is a setting of optim.name=custom",
    ("optim=custom", "optim.custom={_target_: outside.Lion}", "optim.betas=[0.8,0.9]"): "optim.betas is a setting of",
    ("optim=custom",): "optim.name=custom needs a class: optim.custom={_target_: ",
    ("optim.name=lion",): "optim.name=lion is not a legal value; legal: adamw, muon, custom",
    ("optim.schedule=custom",): "optim.schedule=custom needs a class: optim.custom_schedule={_target_: ",
    ("optim.custom_schedule={_target_: outside.Sawtooth}",): "optim.schedule=cosine would ignore it",
    ("optim.betas=[0.9]",): "optim.betas=[0.9] must have 2 entries",
    ("optim.ema=1",): "optim.ema=1 would never update the average",
    ("eval.weights=ema",): "eval.weights=ema needs averaged weights",
    ("optim.groups={head.*: {rate: 2}}",): "must be {lr: factor, weight_decay: value}",
    ("optim.groups={haed.*: {lr: 2}}",): "optim.groups.haed.* matches no parameter",
    (*CUSTOM, "optim.custom={_target_: outside.Lion, gamma: 1}"): "no setting 'optim.custom.gamma'; legal: lr, beta",
    (*CUSTOM, "optim.custom={_target_: outside.Lion, beta: 1}"): "optim.custom: beta=1.0 must be in [0, 1)",
    (*CUSTOM, "optim.custom={_target_: outside.Lion, lr: 1}"): "optim.custom.lr=1: set optim.lr instead",
    (*CUSTOM, "optim.custom={_target_: outside.Tiger}"): "optim.custom._target_=outside.Tiger cannot be imported",
    (*CUSTOM, "optim.custom={_target_: outside.Sawtooth}"): "is not a subclass of torch.optim.optimizer.Optimizer",
    ("optim=custom", "optim.custom={_target_: torch.optim.Rprop}"): "torch.optim.Rprop has no weight decay",
}


@pytest.mark.parametrize("settings", REFUSED, ids=" ".join)
def test_a_setting_that_would_be_ignored_or_is_wrong_is_refused_in_one_line(settings: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        cfg = compose.compose(["model=sw", *settings])
        build_optimizer(small_model("sw"), cfg)
    assert REFUSED[settings] in str(error.value) and "\n" not in str(error.value)


def test_a_custom_schedule_gets_its_settings_as_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pieces(Schedule):
        def __init__(self, steps: int, warmup_steps: int, *, points: dict[int, float], more: list[Any]) -> None:
            super().__init__(steps, warmup_steps)
            self.points, self.more = points, more

        def factor(self, step: int) -> float:
            assert self.more == [{"at": 3, "to": 0.5}]
            return max((at, share) for at, share in self.points.items() if at <= step)[1]

    monkeypatch.setattr(sys.modules["outside"], "Pieces", Pieces, raising=False)

    def rates(points: str) -> list[float]:
        custom = f"optim.custom_schedule={{_target_: outside.Pieces, points: {points}, more: [{{at: 3, to: 0.5}}]}}"
        cfg = small_config("sw", "optim.schedule=custom", "optim.lr=1", "optim.warmup_steps=0", custom)
        return [lr_at(step, cfg) for step in (0, 4, 5)]

    assert rates("{0: 1.0, 5: 0.25}") == [1.0, 1.0, 0.25]
    assert rates("{0: 1.0, 5: 0.75}") == [1.0, 1.0, 0.75]


def test_a_schedule_that_gives_no_rate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = small_config("sw", "optim.schedule=custom", "optim.custom_schedule={_target_: outside.Sawtooth, period: 7}")
    monkeypatch.setattr(Sawtooth, "factor", lambda self, step: float("nan"))
    with pytest.raises(ConfigError, match="outside.Sawtooth gave nan at step 1000"):
        build_optimizer(small_model("sw"), cfg)  # before the first step


def test_a_checkpoint_resumed_with_other_settings_trains_with_those(tmp_path: Path) -> None:
    trainer_for(tmp_path, "trainer.steps=1").fit()
    other = trainer_for(tmp_path, "optim.weight_decay=0.3", "optim.betas=[0.5,0.6]")
    assert other.step == 1 and len(other.optimizer.state) > 0
    assert {group["weight_decay"] for group in other.optimizer.param_groups} == {0.3, 0.0}
    assert {tuple(group["betas"]) for group in other.optimizer.param_groups} == {(0.5, 0.6)}
    custom = "{_target_: torch.optim.AdamW"
    trainer_for(
        tmp_path / "custom", "trainer.steps=1", "optim=custom", f"optim.custom={custom}, betas: [0.5,0.6], eps: 1e-3}}"
    ).fit()
    other = trainer_for(tmp_path / "custom", "optim=custom", f"optim.custom={custom}}}")
    assert other.step == 1
    assert {(tuple(group["betas"]), group["eps"]) for group in other.optimizer.param_groups} == {((0.9, 0.999), 1e-8)}


# --- rates and decays of groups --------------------------------------------------------------------------------------


def test_rates_scale_with_width_and_depth_as_documented() -> None:
    scaled = ("optim.base_dim=8", "optim.base_layers=1")  # for models of width 32 with two layers: w = 4, d = 2
    for how, width in (
        ("optim=adamw", 1 / 4),
        ("optim=muon", 1 / 2),
        ("optim=muon optim.adjust_lr=original", 1.0),
    ):
        groups = named_groups("sw_gdn", *scaled, *how.split())
        want = {
            "embed.weight": 1.0,
            "head.weight": 1 / 4,
            "norm.weight": 1.0,
            "layers.0.norm1.weight": 2**-0.5,
            "layers.1.mixer.conv.weight": 2**-0.5,
            "layers.0.mixer.q_proj.weight": width * 2**-0.5,
            "layers.1.mlp.up_proj.weight": width * 2**-0.5,
            "layers.0.mixer.out_proj.weight": width / 2,
            "layers.1.mlp.out_proj.weight": width / 2,
        }
        assert {name: groups[name]["lr_scale"] for name in want} == pytest.approx(want)
        for name in ("head.weight", "layers.0.mixer.out_proj.weight"):  # the decay per step is unchanged
            assert groups[name]["lr_scale"] * groups[name]["weight_decay"] == pytest.approx(0.1)


def test_without_scaling_every_rate_is_the_schedules() -> None:
    for optim in ("adamw", "muon"):
        for scaled in ((), ("optim.base_dim=32", "optim.base_layers=2")):
            groups = named_groups("sw_gdn", f"optim={optim}", *scaled)
            assert {group["lr_scale"] for group in groups.values()} == {1.0}
            assert {group["weight_decay"] for group in groups.values()} == {0.1, 0.0}


def test_groups_change_the_rate_and_the_decay_of_what_they_name() -> None:
    patterns = "optim.groups={embed.*: {lr: 3, weight_decay: 0.5}, layers.1.*: {lr: 0}, layers.*.mlp.*: {lr: 2}}"
    groups = named_groups("sw", patterns)
    found = {name: (group["lr_scale"], group["weight_decay"]) for name, group in groups.items()}
    assert found["embed.weight"] == (3, 0.5)
    assert found["layers.1.mlp.up_proj.weight"] == (0, 0.1), "the first match counts"
    assert found["layers.0.mlp.up_proj.weight"] == (2, 0.1) and found["head.weight"] == (1, 0.1)


def test_the_order_of_groups_is_part_of_a_run() -> None:
    patterns = ("layers.1.*: {lr: 0.1}", "layers.*.mlp.*: {lr: 2.0}")
    one, other = (
        compose.compose([f"optim.groups={{{first}, {second}}}"]) for first, second in (patterns, reversed(patterns))
    )
    assert changed(one, other) == [
        "optim.groups (order): ['layers.1.*', 'layers.*.mlp.*'] -> ['layers.*.mlp.*', 'layers.1.*']"
    ]
    assert digest(one) != digest(other)


def test_a_group_of_rate_zero_stays_as_it_was(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, "optim.groups={layers.1.*: {lr: 0}}", "trainer.steps=2")
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.fit()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("layers.1."), name
