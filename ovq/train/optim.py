"""The optimizer: the rule, learning rate and weight decay of each parameter; clipping; a step that may be skipped."""

from __future__ import annotations

import contextlib
import fnmatch
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ovq.config import Config, to_dict
from ovq.errors import ConfigError
from ovq.instantiate import get_class, instantiate
from ovq.model import Transformer
from ovq.train.muon import Muon
from ovq.train.schedule import lr_at

# Weight decay is not applied to parameters of these modules, nor to vectors (norms, biases, temperatures): it is meant
# for weights that multiply activations, and the rows of a look-up table multiply nothing.
UNDECAYED = ("embed.",)


def build_optimizer(model: Transformer, cfg: Config) -> torch.optim.Optimizer:
    """The optimizer of `optim.name` over the groups of `parameter_groups`. Call after sharding.

    "adamw": AdamW (arXiv 1711.05101). "muon": `Muon`. "custom": the subclass of torch.optim.Optimizer in
    `optim.custom`, called as cls(groups, lr=optim.lr, **settings).

    Raises:
        ConfigError: a custom optimizer or schedule cannot be used, the optimizer has no weight decay, or a pattern
            matches no parameter.
    """
    optim, groups = cfg.optim, _groups(model, cfg)
    betas = (optim.betas[0], optim.betas[-1])
    if optim.name == "custom":
        return _custom(groups, cfg)
    if optim.name == "muon":
        return Muon(
            groups,
            lr=optim.lr,
            betas=betas,
            eps=optim.eps,
            fused=optim.fused,
            momentum=optim.momentum,
            ns_steps=optim.ns_steps,
            adjust_lr=optim.adjust_lr,
        )
    return torch.optim.AdamW(groups, lr=optim.lr, betas=betas, eps=optim.eps, fused=optim.fused)


def check_optimizer(model: Transformer, cfg: Config) -> None:
    """Raise the errors of `build_optimizer` as far as a model on the "meta" device allows."""
    groups = _groups(model, cfg)
    if cfg.optim.name == "custom":
        with contextlib.suppress(RuntimeError):  # of a constructor that reads the weights, which have no values here
            _custom(groups, cfg)


def _groups(model: Transformer, cfg: Config) -> list[dict[str, Any]]:
    lr_at(cfg.trainer.steps, cfg)  # a schedule that cannot be used is refused now, not after the warm-up
    return parameter_groups(model, cfg)


def _custom(groups: list[dict[str, Any]], cfg: Config) -> torch.optim.Optimizer:
    settings: dict[str, Any] = to_dict(cfg)["optim"]["custom"]
    target = settings["_target_"]
    for name in ("lr", "weight_decay"):
        if name in settings:
            raise ConfigError(f"optim.custom.{name}={settings[name]}: set optim.{name} instead")
    known = inspect.signature(get_class(target, torch.optim.Optimizer, "optim.custom")).parameters
    if "weight_decay" not in known and any(group["weight_decay"] for group in groups):
        raise ConfigError(f"optim.custom: {target} has no weight decay; set optim.weight_decay=0")
    if "lr" in known:
        settings["lr"] = cfg.optim.lr
    optimizer = instantiate(settings, torch.optim.Optimizer, "optim.custom", groups)  # type: ignore[type-abstract]
    if any("lr" not in group for group in optimizer.param_groups):
        raise ConfigError(f"optim.custom: {target} has no learning rate 'lr' that a schedule could set")
    # The other entries of a group may be state (a step count, an estimate), which a checkpoint restores.
    optimizer.configured = {*known, "weight_decay", "lr_scale"}  # type: ignore[attr-defined]
    return optimizer


def parameter_groups(model: Transformer, cfg: Config) -> list[dict[str, Any]]:
    """The trained parameters, grouped by "weight_decay", "lr_scale" (a factor on the learning rate) and, with Muon, by
    whether Muon updates them ("muon"): the weights of the linear layers in the blocks.

    `optim.weight_decay` applies to matrices, not to vectors or `UNDECAYED`. "lr_scale" is `rate_factor`. The first
    pattern of `optim.groups` that matches a parameter's name (fnmatch: layers.*.mlp.*) replaces its weight decay and
    multiplies its "lr_scale". Weight decay is divided by `rate_factor`, so that a step still decays by lr *
    weight_decay (arXiv 2405.13698).

    Raises:
        ConfigError: a pattern that matches no parameter.
    """
    optim = cfg.optim
    linear = {id(m.weight): name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    unused = list(optim.groups)
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        decayed = p.ndim >= 2 and not name.startswith(UNDECAYED)
        matrix = id(p) in linear and name.startswith("layers.")
        factor = rate_factor(name, matrix, cfg)
        decay, scale = (optim.weight_decay / factor if decayed else 0.0), factor
        pattern = next((pattern for pattern in optim.groups if fnmatch.fnmatchcase(name, pattern)), None)
        if pattern is not None:
            unused = [other for other in unused if other != pattern]
            own = optim.groups[pattern]
            decay, scale = own.get("weight_decay", decay * factor) / factor, scale * own.get("lr", 1.0)
        groups.setdefault((matrix and optim.name == "muon", decay, scale), []).append(p)
    if unused:
        raise ConfigError(f"optim.groups.{unused[0]} matches no parameter, or an earlier pattern matches them all")
    order = sorted(groups, key=lambda key: (not key[0], -key[1], key[2]))
    return [
        {"params": groups[key], "weight_decay": key[1], "lr_scale": key[2]}
        | ({"muon": key[0]} if optim.name == "muon" else {})
        for key in order
    ]


def rate_factor(name: str, matrix: bool, cfg: Config) -> float:
    """The factor on a parameter's learning rate due to `optim.base_dim` and `optim.base_layers`; 1 without them.

    With w = model.dim / base_dim and d = model.num_layers / base_layers:

    ===================================  =====================  ==========
    parameters                           width                  depth
    ===================================  =====================  ==========
    embedding (tied to the head or not)  1                      1
    head                                 1/w                    1
    final norm                           1                      1
    linear layers of blocks, out_proj    1/w; Muon: 1/sqrt(w)   1/d
    other linear layers of blocks        1/w; Muon: 1/sqrt(w)   1/sqrt(d)
    all else in blocks                   1                      1/sqrt(d)
    ===================================  =====================  ==========

    Width: an update of AdamW has a fixed size per element, and its effect on activations grows with the fan-in (muP,
    arXiv 2203.03466; for the standard parameterisation, which is used here, arXiv 2407.05872). An update of Muon with
    adjust_lr=match_rms_adamw has spectral norm 0.2 sqrt(max(rows, columns)), but a constant norm is what transfers
    (arXiv 2310.17813); adjust_lr=original has one, so its factor is 1. Depth: arXiv 2310.02244, for Adam; its branch
    multiplier 1/sqrt(layers) is part of the output projections here, which are also initialised accordingly. A custom
    optimizer is assumed to be like AdamW. Only learning rates are scaled: `model.init_std` is up to the user (muP:
    proportional to 1/sqrt(w)).

    Args:
        matrix: whether it is the weight of a linear layer of a block.
    """
    optim, factor = cfg.optim, 1.0
    if optim.base_dim is not None and (matrix or name == "head.weight"):
        power = 1.0
        if matrix and optim.name == "muon":
            power = {"match_rms_adamw": 0.5, "original": 0.0}[optim.adjust_lr]
        factor *= (optim.base_dim / cfg.model.dim) ** power
    if optim.base_layers is not None and name.startswith("layers."):
        power = 1.0 if matrix and name.endswith("out_proj.weight") else 0.5
        factor *= (optim.base_layers / cfg.model.num_layers) ** power
    return factor


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale gradients to a global norm of at most `max_norm` (0: do not scale).

    Returns:
        The norm before scaling, a scalar on the device. It spans all shards, so every rank has the same value.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if hasattr(norm, "full_tensor"):
        norm = norm.full_tensor()
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def step_unless(optimizer: torch.optim.Optimizer, bad: Tensor, lr: float) -> None:
    """One optimizer step at learning rate `lr`, times a group's "lr_scale"; none if `bad` (bool scalar on the device).

    The fused kernel reads the flag on the device (the same one that gradient scalers set), so the host does not wait;
    the unfused optimizer needs its value on the host.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        optimizer.step()
    elif not bad.item():
        optimizer.step()


class LearnedBuffers:
    """The buffers that a forward pass changes (a codebook and its averages), which a skipped step must leave
    unchanged."""

    def __init__(self, model: nn.Module) -> None:
        self._buffers = persistent_buffers(model)
        self._before: list[Tensor] = []

    def snapshot(self) -> None:
        """Copy the buffers before a step."""
        self._before = [buffer.clone() for buffer in self._buffers]

    def restore_if(self, bad: Tensor) -> None:
        """Restore the copies if `bad` (bool scalar on the device) is true; the host does not wait."""
        for buffer, before in zip(self._buffers, self._before):
            buffer.copy_(torch.where(bad, before, buffer))


def persistent_buffers(model: nn.Module) -> list[Tensor]:
    """Buffers that training changes and checkpoints hold (a codebook and its averages), not precomputed tables."""
    return [
        buffer
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    ]
