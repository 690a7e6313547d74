"""Claims about chunked cross-entropy: it equals torch's in value and gradients, with one chunk of logits in memory."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from ovq.ops import chunked_cross_entropy
from tests.helpers import Largest, relative_error

N, D, V, IGNORE = 50, 16, 33, -100


def inputs(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and targets; some targets are IGNORE."""
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(size, D, generator=generator, dtype=torch.float64).to(dtype) for size in (N, V))
    targets = torch.randint(V, (N,), generator=generator)
    targets[torch.randperm(N, generator=generator)[:9]] = IGNORE
    return x, weight, targets


def losses(x: Tensor, weight: Tensor, targets: Tensor, backend: str, **settings: object) -> tuple[Tensor, list[Tensor]]:
    """(all outputs, [gradients of x and weight]), where the gradients are those of a weighted sum of the outputs."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    loss, z = chunked_cross_entropy(x, weight, targets, backend=backend, **settings)  # type: ignore[arg-type]
    total = (loss * torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).view_as(loss)).sum()
    total = 1.7 * total if z is None else 1.7 * total + 0.3 * z
    outputs = loss.flatten() if z is None else torch.cat([loss.flatten(), z[None]])
    return outputs, list(torch.autograd.grad(total, (x, weight)))


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("z_loss", [0.0, 0.02])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("chunk", [1, 7, 50, 2048])
def test_losses_and_gradients_equal_those_from_all_logits_at_once(
    chunk: int, reduction: str, z_loss: float, dtype: torch.dtype, tolerance: float
) -> None:
    x, weight, targets = inputs(chunk, dtype)
    settings = {"reduction": reduction, "z_loss": z_loss, "chunk": chunk}
    want, want_grads = losses(x.double(), weight.double(), targets, "reference", **settings)
    got, got_grads = losses(x, weight, targets, "torch", **settings)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative_error(got, want) < tolerance
    for a, b in zip(got_grads, want_grads):
        assert a.dtype == dtype and relative_error(a, b) < 2 * tolerance


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("reduction,z_loss", [("sum", 0.0), ("sum", 0.02), ("none", 0.0)])
def test_capped_logits_have_the_losses_and_gradients_of_autograd(
    reduction: str, z_loss: float, dtype: torch.dtype, tolerance: float
) -> None:
    x, weight, targets = inputs(11, dtype)
    settings = {"reduction": reduction, "z_loss": z_loss, "softcap": 2.0, "chunk": 7}
    assert (x.double() @ weight.double().T).abs().max() > 6, "the cap matters"
    want, want_grads = losses(x.double(), weight.double(), targets, "reference", **settings)
    got, got_grads = losses(x, weight, targets, "torch", **settings)
    assert relative_error(got, want) < tolerance
    assert all(relative_error(a, b) < 2 * tolerance for a, b in zip(got_grads, want_grads))
    if reduction == "none":
        logits = 2 * torch.tanh(x.double() @ weight.double().T / 2)
        plain = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
        assert relative_error(got, plain) < tolerance


def test_without_z_loss_it_equals_torchs_cross_entropy() -> None:
    x, weight, targets = inputs(0)
    for reduction in ("sum", "none"):
        want = F.cross_entropy(x @ weight.T, targets, ignore_index=IGNORE, reduction=reduction)
        got, z = chunked_cross_entropy(x, weight, targets, chunk=8, reduction=reduction)
        assert z is None and relative_error(got, want) < 1e-13


def test_tokens_without_a_label_have_no_loss_and_no_gradient() -> None:
    x, weight, targets = inputs(1)
    for z_loss in (0.0, 0.1):
        _, (dx, _) = losses(x, weight, targets, "torch", z_loss=z_loss, chunk=8)
        assert torch.equal(dx[targets == IGNORE], torch.zeros_like(dx[targets == IGNORE]))
        assert (dx[targets != IGNORE].abs().sum(-1) > 0).all()
        nothing, grads = losses(x, weight, torch.full_like(targets, IGNORE), "torch", z_loss=z_loss, chunk=8)
        assert not nothing.any() and not any(grad.any() for grad in grads)


def test_large_logits_do_not_overflow() -> None:
    x, weight, targets = inputs(2, torch.float32)
    got, grads = losses(1e3 * x, weight, targets, "torch", chunk=8)
    want, _ = losses(1e3 * x.double(), weight.double(), targets, "reference")
    assert relative_error(got, want) < 1e-5 and all(torch.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize(
    "reduction,z_loss,cap", [("sum", 0.0, 0.0), ("sum", 0.1, 0.0), ("none", 0.0, 0.0), ("sum", 0.0, 5.0)]
)
def test_the_logits_of_a_chunk_are_the_largest_tensor_allocated(reduction: str, z_loss: float, cap: float) -> None:
    generator = torch.Generator().manual_seed(3)
    tokens, width, vocabulary, chunk = 4096, 8, 1024, 64
    x = torch.randn(tokens, width, generator=generator, requires_grad=True)
    weight = torch.randn(vocabulary, width, generator=generator, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    with Largest() as largest:
        how = {"z_loss": z_loss, "reduction": reduction, "softcap": cap}
        loss, z = chunked_cross_entropy(x, weight, targets, chunk=chunk, **how)  # type: ignore[arg-type]
        (loss.sum() if z is None else loss.sum() + z).backward()
    assert largest.elements == chunk * vocabulary < tokens * vocabulary / 50
    assert x.grad is not None and weight.grad is not None
    with Largest() as largest:  # the same measurement does detect full logits
        chunked_cross_entropy(x, weight, targets, backend="reference")
    assert largest.elements == tokens * vocabulary


def test_the_scale_of_bf16_gradients_is_not_rounded() -> None:
    x, weight, targets = inputs(7, torch.bfloat16)
    x.requires_grad_()
    scale = 0.6973  # midway between two bf16 numbers, 0.3% from each
    norms = []
    for factor in (1.0, scale):
        (dx,) = torch.autograd.grad(factor * chunked_cross_entropy(x, weight, targets, chunk=8)[0], x)
        norms.append(dx.double().norm())
    assert abs(norms[1] / norms[0] / scale - 1) < 5e-4


def test_only_what_needs_a_gradient_gets_one() -> None:
    x, weight, targets = inputs(4)
    for frozen in (x, weight):
        trained = weight if frozen is x else x
        trained.requires_grad_()
        chunked_cross_entropy(x, weight, targets, chunk=8)[0].backward()
        assert trained.grad is not None and frozen.grad is None
        trained.requires_grad_(False)
        trained.grad = None
    assert not chunked_cross_entropy(x, weight, targets, chunk=8)[0].requires_grad


class Head(nn.Module):
    """As in the model: the loss is computed from the head's weight inside the forward of the module that FSDP wraps."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(D, V, bias=False)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        return chunked_cross_entropy(x, self.head.weight, targets, chunk=8)[0]


def test_gradients_reach_a_weight_that_fsdp_shards_and_casts() -> None:
    x, weight, targets = inputs(5, torch.float32)
    model = Head()
    model.head.weight.data.copy_(weight)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
        model(x, targets).backward()
        got = model.head.weight.grad.full_tensor()
    finally:
        dist.destroy_process_group()
    _, (_, want) = losses(x.bfloat16().double(), weight.bfloat16().double(), targets, "reference")
    assert got.dtype == torch.float32 and relative_error(1.7 * got, want) < 1e-2


def test_bad_settings_fail_with_the_legal_values() -> None:
    x, weight, targets = inputs(6)
    with pytest.raises(ValueError, match="legal: sum, none"):
        chunked_cross_entropy(x, weight, targets, reduction="mean")
    with pytest.raises(ValueError, match="legal: auto, reference, torch"):
        chunked_cross_entropy(x, weight, targets, backend="triton")
    with pytest.raises(ValueError, match="chunk=0 .* at least 1"):
        chunked_cross_entropy(x, weight, targets, chunk=0)
    with pytest.raises(ValueError, match="do not match"):
        chunked_cross_entropy(x, weight.float(), targets)
    with pytest.raises(ValueError, match="do not match"):
        chunked_cross_entropy(x[:9], weight, targets)
