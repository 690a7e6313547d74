"""Settings of the optimizer and of the learning rate, and which of them belong together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ovq.errors import ConfigError
from ovq.schema import one_of, setting


@dataclass
class OptimConfig:
    name: str = one_of(
        "adamw",
        "muon",
        "custom",
        help="optimizer; muon: for matrices in the blocks, with AdamW for the rest; custom: the class in optim.custom",
    )
    lr: float = setting(1e-3, "peak learning rate", at_least=0)
    betas: list[float] = setting([0.9, 0.95], "decay rates of AdamW's two moments", at_least=0, below=1, length=2)
    eps: float = setting(1e-8, "AdamW's epsilon", at_least=0)
    weight_decay: float = setting(0.1, "decoupled weight decay, applied to matrices", at_least=0)
    fused: bool = setting(True, "use the fused AdamW kernel")
    momentum: float = setting(0.95, "decay rate of Muon's momentum", at_least=0, below=1)
    ns_steps: int = setting(5, "Newton-Schulz iterations of a step of Muon", at_least=1, at_most=99)
    adjust_lr: str = one_of(
        "match_rms_adamw",
        "original",
        help="Muon's learning rate of a matrix: lr 0.2 sqrt(max(rows, columns)), made for AdamW's lr, or "
        "lr sqrt(max(1, rows / columns))",
    )
    custom: dict[str, Any] = setting({}, "optimizer of your own, {_target_: class path, **its settings}")
    groups: dict[str, Any] = setting(
        {}, "pattern of parameter names -> {lr: factor of the rate, weight_decay: value}; the first match counts"
    )
    base_dim: int | None = setting(
        None,
        "model.dim at which lr was chosen, which scales the rate of matrices with the width; null: no",
        at_least=1,
    )
    base_layers: int | None = setting(
        None, "model.num_layers at which lr was chosen, which scales the rate of blocks; null: no", at_least=1
    )
    ema: float = setting(
        0.0, "decay per step of a moving average of the weights, kept in checkpoints; 0: none", at_least=0, at_most=1
    )
    schedule: str = one_of(
        "cosine",
        "wsd",
        "linear",
        "constant",
        "inverse_sqrt",
        "custom",
        help="learning rate after warm-up; wsd: constant, then linear decay; custom: optim.custom_schedule",
    )
    custom_schedule: dict[str, Any] = setting({}, "schedule of your own, {_target_: class path, **its settings}")
    warmup_steps: int = setting(100, "steps of linear warm-up", at_least=0)
    min_lr_ratio: float = setting(0.1, "final learning rate as a fraction of the peak", at_least=0, at_most=1)
    decay_share: float = setting(0.2, "fraction of the steps over which wsd decays", at_least=0, at_most=1)


# Settings that only some optimizers or schedules have.
ADAMW = ("betas", "eps", "fused")
MUON = ("momentum", "ns_steps", "adjust_lr")
OWN = {
    "name": {"adamw": ADAMW, "muon": (*ADAMW, *MUON), "custom": ("custom",)},
    "schedule": {
        "cosine": ("min_lr_ratio",),
        "linear": ("min_lr_ratio",),
        "inverse_sqrt": ("min_lr_ratio",),
        "wsd": ("min_lr_ratio", "decay_share"),
        "constant": (),
        "custom": ("custom_schedule",),
    },
}
# Accepted even where they have no effect: an experiment may set them, and a command line then choose another schedule.
HARMLESS = ("min_lr_ratio", "decay_share")


def check_optim(optim: OptimConfig) -> None:
    """Refuse a setting that the chosen optimizer or schedule would ignore, or lacks.

    Raises:
        ConfigError: one line that names the setting and what it belongs to.
    """
    default = OptimConfig()
    for kind, choices in OWN.items():
        chosen = getattr(optim, kind)
        for name in sorted({name for names in choices.values() for name in names} - {*choices[chosen], *HARMLESS}):
            if getattr(optim, name) != getattr(default, name):
                owners = ", ".join(option for option, names in choices.items() if name in names)
                raise ConfigError(
                    f"optim.{name} is a setting of optim.{kind}={owners}, and optim.{kind}={chosen} would ignore it"
                )
        own = "custom" if kind == "name" else "custom_schedule"
        if chosen == "custom" and not getattr(optim, own).get("_target_"):
            raise ConfigError(f"optim.{kind}=custom needs a class: optim.{own}={{_target_: package.Class, setting: 1}}")
    if optim.ema == 1:
        raise ConfigError("optim.ema=1 would never update the average; it must be below 1, for instance 0.999")
    for pattern, values in optim.groups.items():
        entries = dict(values) if hasattr(values, "items") else {"": values}
        legal = all(
            key in ("lr", "weight_decay") and type(value) in (int, float) and value >= 0
            for key, value in entries.items()
        )
        if not legal or not entries:
            raise ConfigError(
                f"optim.groups.{pattern}={values} must be {{lr: factor, weight_decay: value}}, one or both, at least 0"
            )


def last_before_decay(optim: OptimConfig, steps: int) -> int | None:
    """The last of `steps` steps at the full rate of "wsd", from which a run can be extended; None if there is none."""
    return math.floor(steps - optim.decay_share * steps) if optim.schedule == "wsd" else None
