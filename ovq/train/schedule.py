"""The learning rate, a pure function of the step: there is no scheduler state to save or lose."""

from __future__ import annotations

import copy
import math
from typing import Any

from omegaconf import OmegaConf

from ovq.config import Config, OptimConfig
from ovq.errors import ConfigError
from ovq.instantiate import instantiate


class Schedule:
    """Base class of a custom schedule: `optim.schedule=custom optim.custom_schedule={_target_: mine.Sawtooth, ...}`.

    A subclass takes its settings by keyword, after `steps` and `warmup_steps`, and defines `factor`.

    Attributes:
        steps: trainer.steps.
        warmup_steps: optim.warmup_steps; before that step the rate rises linearly, and `factor` is not called.
    """

    def __init__(self, steps: int, warmup_steps: int) -> None:
        self.steps, self.warmup_steps = steps, warmup_steps

    def factor(self, step: int) -> float:
        """Learning rate of `step` (the first is 1) as a fraction of optim.lr, finite and at least 0.

        It must depend only on the step and the settings, or a resumed run would diverge from an uninterrupted one.
        """
        raise NotImplementedError


def lr_at(step: int, cfg: Config) -> float:
    """Learning rate of step `step` (the first step is 1): linear warm-up, then `optim.schedule`.

    "cosine" and "linear" reach lr * min_lr_ratio at the last step; "wsd" stays at lr and decays linearly over the last
    `decay_share` of the steps; "constant" stays at lr; "inverse_sqrt" falls as lr sqrt(warmup_steps / step) (arXiv
    1706.03762, section 5.3) to lr * min_lr_ratio, whatever the number of steps.

    Raises:
        ConfigError: the class of `optim.custom_schedule` cannot be used, or the factor that it returned.
    """
    optim, steps = cfg.optim, cfg.trainer.steps
    if step < optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    if optim.schedule == "custom":
        return optim.lr * _custom_factor(step, cfg)
    if optim.schedule == "inverse_sqrt":
        return optim.lr * max(optim.min_lr_ratio, math.sqrt(max(1, optim.warmup_steps) / step))
    share = min(1.0, (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps))  # of the steps after warm-up
    if optim.schedule == "cosine":
        height = 0.5 * (1 + math.cos(math.pi * share))
    elif optim.schedule == "linear":
        height = 1 - share
    elif optim.schedule == "wsd":
        decay = optim.decay_share * steps
        height = min(1.0, (steps - step) / decay) if decay else 1.0
    else:
        height = 1.0
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * max(0.0, height))


def _custom_factor(step: int, cfg: Config) -> float:
    optim = cfg.optim
    factor = _custom(cfg).factor(step)
    if not isinstance(factor, (int, float)) or not 0 <= factor < math.inf:
        raise ConfigError(
            f"optim.custom_schedule: {optim.custom_schedule['_target_']} gave {factor!r} at step {step}; "
            "a factor of optim.lr must be a finite number of at least 0"
        )
    return factor


def _custom(cfg: Config) -> Schedule:
    settings: dict[str, Any] = OmegaConf.to_container(OmegaConf.create(dict(cfg.optim.custom_schedule)))  # type: ignore
    key = (repr(settings), cfg.trainer.steps, cfg.optim.warmup_steps)
    if key not in _MADE:
        _MADE[key] = instantiate(settings, Schedule, "optim.custom_schedule", *key[1:])
    return _MADE[key]


_MADE: dict[tuple[str, int, int], Schedule] = {}


def check_extension(cfg: Config, saved: dict[str, Any], step: int) -> None:
    """Refuse to continue to fewer steps than were made, or so that the learning rate would jump up at this step.

    That is where both the rate and its share of optim.lr would rise: a branch may ask for a higher optim.lr.

    Args:
        saved: the config of the run that saved the checkpoint.

    Raises:
        ConfigError: the run is further already, or the rate would jump, and trainer.allow_rate_jump is not set.
    """
    if step > cfg.trainer.steps:
        raise ConfigError(
            f"trainer.steps={cfg.trainer.steps}, but the run is already at step {step}; give at least as many, or go "
            "back with resume=CHECKPOINT run_dir=NEW"
        )
    if step == 0:  # no step has been made at any rate
        return
    before = copy.deepcopy(cfg)
    before.trainer.steps = saved["trainer"]["steps"]
    before.optim = OmegaConf.merge(OmegaConf.structured(OptimConfig), saved["optim"])  # type: ignore
    old, new = lr_at(step, before), lr_at(step, cfg)
    rises = new > 1.01 * old and new * before.optim.lr > 1.01 * old * cfg.optim.lr
    if rises and not cfg.trainer.allow_rate_jump:
        shapes = ("schedule", "warmup_steps", "min_lr_ratio", "decay_share", "custom_schedule")
        was_now = {"trainer.steps": (before.trainer.steps, cfg.trainer.steps)}
        was_now |= {f"optim.{name}": (getattr(before.optim, name), getattr(cfg.optim, name)) for name in shapes}
        changes = ", ".join(f"{name}: {was} -> {now}" for name, (was, now) in was_now.items() if was != now)
        raise ConfigError(
            f"{changes}: the learning rate would jump from {old:.3g} to {new:.3g} at step {step}. Start a new run with "
            "init_from=DIR, resume a checkpoint from before the decay of optim.schedule=wsd, or accept the jump with "
            "trainer.allow_rate_jump=true"
        )


def due(step: int, every: int) -> bool:
    """Whether something that is done every `every` steps is due after step `step`; 0: never."""
    return every > 0 and step % every == 0
