"""AdamW and the learning rate, a pure function of the step: there is no scheduler state to save or lose."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from ovq.config import Config, OptimConfig
from ovq.errors import ConfigError
from ovq.model import Transformer

# Weight decay is not applied to parameters of these modules, nor to vectors (norms, biases, temperatures): it is meant
# for weights that multiply activations, and the rows of a look-up table multiply nothing.
UNDECAYED = ("embed.",)


def lr_at(step: int, cfg: Config) -> float:
    """Learning rate of step `step` (the first step is 1): linear warm-up, then `optim.schedule`.

    "cosine" and "linear" reach lr * min_lr_ratio at the last step; "wsd" stays at lr and decays linearly over the last
    `decay_share` of the steps; "constant" stays at lr.
    """
    optim, steps = cfg.optim, cfg.trainer.steps
    if step < optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    share = min(1.0, (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps))  # of the steps after warm-up
    if optim.schedule == "cosine":
        height = 0.5 * (1 + math.cos(math.pi * share))
    elif optim.schedule == "linear":
        height = 1 - share
    elif optim.schedule == "wsd":
        height = min(1.0, (steps - step) / max(1.0, optim.decay_share * steps))
    else:
        height = 1.0
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * max(0.0, height))


def check_extension(cfg: Config, steps_before: int, step: int) -> None:
    """Refuse to continue at a much higher learning rate than the run had at this step because it got more steps.

    Args:
        steps_before: trainer.steps of the run that saved the checkpoint.

    Raises:
        ConfigError: the rate would jump, and trainer.allow_rate_jump is not set.
    """
    before = copy.deepcopy(cfg)
    before.trainer.steps = steps_before
    old, new = lr_at(step, before), lr_at(step, cfg)
    if new > 1.01 * old and not cfg.trainer.allow_rate_jump:
        raise ConfigError(
            f"trainer.steps: {steps_before} -> {cfg.trainer.steps} changes the {cfg.optim.schedule} schedule: the "
            f"learning rate would jump from {old:.3g} to {new:.3g} at step {step}. Start a new run with "
            "init_from=DIR, resume a checkpoint from before the decay of optim.schedule=wsd, or accept the jump with "
            "trainer.allow_rate_jump=true"
        )


def build_optimizer(model: Transformer, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) with weight decay for matrices, but not for vectors and `UNDECAYED`.

    Call after sharding.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in named if p.ndim >= 2 and not name.startswith(UNDECAYED)]
    rest = [p for name, p in named if p.ndim < 2 or name.startswith(UNDECAYED)]
    groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=optim.lr,
        betas=(optim.betas[0], optim.betas[1]),
        eps=optim.eps,
        fused=optim.fused,
    )


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
    """One optimizer step at learning rate `lr`, or none if `bad` (bool scalar on the device) is true.

    The fused kernel reads the flag on the device (the same one that gradient scalers set), so the host does not wait;
    the unfused optimizer needs its value on the host.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        optimizer.step()
    elif not bad.item():
        optimizer.step()


class LearnedBuffers:
    """The buffers that a forward pass changes (a codebook and its averages), which a skipped step must leave as they
    were."""

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
