"""A moving average of the weights, which often predicts better than the weights themselves: `optim.ema`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ovq.train.parallelize import reshard


class WeightAverage:
    """Exponential moving average of a model's parameters (Polyak and Juditsky 1992), sharded as they are, in float32.

        average = d_n average + (1 - d_n) weights after step n,    d_n = min(decay, (n - 1) / (n + 9))

    Early in a run, the average spans the last tenth of the steps so far, and so forgets the initial weights; it starts
    from the weights after step 1. It depends only on the weights and on n, so that a resumed run continues it exactly.
    It takes 4 bytes per parameter. Learned buffers (VQ's codebook) are averages already, and are not averaged again.

    Attributes:
        weights: the average, by parameter name.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def restart(self, model: nn.Module) -> None:
        """Restart from the model's weights, as after resuming a run that kept no average."""
        for name, p in model.named_parameters():
            local(self.weights[name]).copy_(local(p))

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, bad: Tensor) -> None:
        """Update the average with the weights after `step` (from 1), unless `bad` (bool scalar on the device) is true;
        the host does not wait."""
        decay = min(self.decay, (step - 1) / (step + 9))
        share = torch.where(bad, 0.0, 1.0 - decay)
        for name, p in model.named_parameters():
            average = local(self.weights[name])
            average.lerp_(local(p), share.to(average.dtype))

    @contextlib.contextmanager
    def in_place(self, model: nn.Module) -> Iterator[None]:
        """Give the model the averaged weights within the `with` block, and its own, bit for bit, afterwards."""
        reshard(model)  # parameters gathered by an earlier forward pass must not be used after the swap
        self._swap(model)
        try:
            yield
        finally:
            reshard(model)
            self._swap(model)

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        for name, p in model.named_parameters():
            mine, theirs = local(self.weights[name]), local(p)
            kept = theirs.clone()  # one tensor at a time: no second copy of the model
            theirs.copy_(mine)
            mine.copy_(kept)


def evaluated_weights(
    model: nn.Module, ema: WeightAverage | None, which: str
) -> contextlib.AbstractContextManager[None]:
    """A `with` block in which the model has the weights that `eval.weights` names."""
    return ema.in_place(model) if ema is not None and which == "ema" else contextlib.nullcontext()


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, detached from the autograd graph."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
