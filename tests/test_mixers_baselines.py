"""Claims about the baselines: every fast form equals its step-by-step reference, every mixer its definition."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ovq.compose import CONFIG_DIR
from ovq.mixers.base import MixerShape
from ovq.mixers.fifo import FIFO
from ovq.mixers.gated_deltanet import GatedDeltaNet
from ovq.mixers.kvm import KVM
from ovq.mixers.learned_compression import LearnedCompression
from ovq.mixers.mamba2 import Mamba2
from ovq.mixers.mesa_net import MesaNet
from ovq.mixers.reservoir import Reservoir
from ovq.mixers.short_conv import ShortConv
from ovq.mixers.vq import VQ
from ovq.model import build_model, count_parameters
from ovq.ops import fla_backend
from ovq.ops.gated_delta_rule import gated_delta_rule
from ovq.ops.linear_attention import linear_attention
from ovq.ops.memory_attention import memory_attention
from ovq.ops.mesa import mesa
from ovq.ops.position_hash import position_hash
from ovq.ops.simple_gla import simple_gla
from ovq.ops.vq_attention import assign, vq_attention
from ovq.processes import Axis
from tests.helpers import MODELS, TINY, relative_error, small_config

SHAPE = MixerShape(dim=24, num_heads=2, num_kv_heads=2, head_dim=12, num_layers=2)


def inputs(op: str, seed: int, T: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Random inputs of an operator with widths that are not multiples of any tile size."""
    generator = torch.Generator().manual_seed(seed)
    B, H, K, V = 2, 2, 7, 5

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    def unit(*size: int) -> Tensor:
        return F.normalize(normal(*size), dim=-1)

    g, beta = -F.softplus(normal(B, T, H)), normal(B, T, H).sigmoid()
    made = {
        "simple_gla": lambda: [normal(B, T, 1, K), normal(B, T, 1, K), normal(B, T, H, V), g],
        "linear_attention": lambda: [F.elu(normal(B, T, H, K)) + 1, F.elu(normal(B, T, H, K)) + 1, normal(B, T, H, V)],
        "gated_delta_rule": lambda: [unit(B, T, H, K), unit(B, T, H, K), normal(B, T, H, V), g, beta],
        "mesa": lambda: [
            unit(B, T, H, K), unit(B, T, H, K), normal(B, T, H, V), g, beta, 0.25 + F.softplus(normal(H, K))
        ],
        "vq_attention": lambda: [
            unit(B, T, 4, K), unit(B, T, H, K), normal(B, T, H, V), unit(H, 6, K), 2 + normal(4).abs()
        ],
    }[op]()  # fmt: skip
    return [x.to(dtype) for x in made]


OPS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "simple_gla": (simple_gla, {"chunk_size": 8}),
    "linear_attention": (linear_attention, {"chunk_size": 8}),
    "gated_delta_rule": (gated_delta_rule, {"chunk_size": 8}),
    "mesa": (mesa, {"chunk_size": 8, "iterations": 20}),
    "vq_attention": (vq_attention, {"block_size": 8}),
}


def gradients(op: str, tensors: list[Tensor], backend: str, **extra: Any) -> tuple[Tensor, list[Tensor], Any]:
    function, settings = OPS[op]
    # The codebook (argument 3 of VQ) is not trained by gradient.
    leaves = [x.clone().requires_grad_(not (op == "vq_attention" and i == 3)) for i, x in enumerate(tensors)]
    o, state = function(*leaves, **settings, **extra, backend=backend)
    weight = torch.randn(o.shape, generator=torch.Generator().manual_seed(99), dtype=o.dtype)
    wanted = [x for x in leaves if x.requires_grad]
    return o, list(torch.autograd.grad((o * weight).sum(), wanted)), state


@pytest.mark.parametrize("T", [1, 8, 21, 43])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("seed", [0, 1])
def test_outputs_gradients_and_state_equal_the_reference(op: str, seed: int, T: int) -> None:
    tensors = inputs(op, seed, T)
    want, want_grads, want_state = gradients(op, tensors, "reference")
    got, got_grads, got_state = gradients(op, tensors, "torch")
    assert relative_error(got, want) < 1e-9
    for index, (a, b) in enumerate(zip(got_grads, want_grads)):
        # An absolute floor for gradients that are 0, such as that of the first token's query, which sees only itself.
        assert float((a - b).norm()) < 1e-8 * float(b.norm()) + 1e-10, f"gradient of argument {index}"
    for a, b in zip(*(torch.utils._pytree.tree_leaves(s) for s in (got_state, want_state))):
        if isinstance(a, Tensor):
            assert a.shape == b.shape and float((a - b).detach().norm()) < 1e-9 * float(b.detach().norm()) + 1e-12


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("seed", [3])
def test_gradients_flow_through_a_carried_state(op: str, seed: int) -> None:
    tensors = inputs(op, seed, 29)
    function, settings = OPS[op]
    timed = [i for i, x in enumerate(tensors) if x.dim() >= 3 and x.shape[1] == 29]

    def two_pieces(backend: str) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in tensors]
        first = function(*(x[:, :13] if i in timed else x for i, x in enumerate(leaves)), **settings, backend=backend)
        rest = [x[:, 13:] if i in timed else x for i, x in enumerate(leaves)]
        o = function(*rest, **settings, state=first[1], backend=backend)[0]
        return list(torch.autograd.grad(o.square().sum(), [leaves[i] for i in (1, 2)]))

    # VQ: pairs quantised in an earlier piece keep the values' gradient, but not the keys' straight-through gradient.
    for got, want in zip(two_pieces("torch"), two_pieces("reference")):
        assert relative_error(got, want) < 1e-8


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize("op", [op for op in OPS if op != "vq_attention"])
def test_bfloat16_and_float32_are_near_float64(op: str, dtype: torch.dtype, tolerance: float) -> None:
    rounded = [x.to(dtype) for x in inputs(op, 4, 43)]
    want = gradients(op, [x.double() for x in rounded], "torch")[0]
    got = gradients(op, rounded, "torch")[0]
    assert got.dtype == dtype and relative_error(got, want) < tolerance


@pytest.mark.parametrize("op", OPS)
def test_packed_documents_equal_documents_alone(op: str) -> None:
    function, settings = OPS[op]
    tensors = [x[:1] if x.dim() >= 3 and x.shape[1] == 30 else x for x in inputs(op, 5, 30)]
    timed = [x.dim() >= 3 and x.shape[1] == 30 for x in tensors]
    bounds = [0, 3, 19, 30]
    packed, state = function(*tensors, **settings, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    alone = [
        function(*(x[:, a:b] if t else x for x, t in zip(tensors, timed)), **settings)[0]
        for a, b in zip(bounds, bounds[1:])
    ]
    assert state is None and relative_error(packed, torch.cat(alone, dim=1)) < 1e-12
    with pytest.raises(ValueError, match="state and cu_seqlens"):
        function(*tensors, **settings, cu_seqlens=torch.tensor(bounds), state=function(*tensors, **settings)[1])


@pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="fla-core is an optional extra")
@pytest.mark.parametrize("op", ["simple_gla", "linear_attention", "gated_delta_rule", "mesa"])
def test_references_agree_with_those_of_flash_linear_attention(op: str) -> None:
    tensors = inputs(op, 6, 33, torch.float32)
    got = OPS[op][0](*tensors, backend="reference")[0]
    if op == "gated_delta_rule":
        from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule as naive

        q, k, v, g, beta = tensors
        want = naive(q, k, v, beta, g)[0]
    elif op == "mesa":
        from fla.ops.mesa_net.naive import naive_mesa_net_exact

        q, k, v, g, beta, lamb = tensors
        v = F.pad(v, (0, 2))  # theirs requires V = K
        got = mesa(q, k, v, g, beta, lamb, backend="reference")[0]
        want = naive_mesa_net_exact(q, k, v, g, lamb, beta)[0]
    elif op == "simple_gla":
        from fla.ops.simple_gla.naive import naive_recurrent_simple_gla

        q, k, v, g = tensors
        q, k = (x.expand(-1, -1, 2, -1) for x in (q, k))
        want = naive_recurrent_simple_gla(q, k, v, g, scale=1.0)[0]
    else:
        from fla.ops.linear_attn.naive import naive_recurrent_linear_attn

        want = naive_recurrent_linear_attn(*tensors, scale=1.0, normalize=True)[0]
    assert relative_error(got, want) < 1e-5


class OnGPU:
    """Stands in for a CUDA tensor where there is no GPU."""

    is_cuda, dtype, shape, device, requires_grad = True, torch.bfloat16, (1, 64, 2, 8), "cuda:0", True


def test_kernels_that_cannot_run_here_fail_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs("gated_delta_rule", 7, 20)
    with pytest.raises(ValueError, match="backend=fla of gated_delta_rule needs a CUDA tensor, got cpu") as error:
        gated_delta_rule(*tensors, backend="fla")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="backend=triton of mesa is not a legal value; legal: auto, "):
        mesa(*inputs("mesa", 7, 9), backend="triton")

    monkeypatch.setattr(fla_backend, "installed", lambda: False)
    with pytest.raises(ValueError, match=r"needs fla-core; install it with: pip install -e '\.\[fla\]'"):
        fla_backend.uses_fla("fla", OnGPU(), "mesa")  # type: ignore[arg-type]
    fla_backend._warn_missing.cache_clear()
    with pytest.warns(UserWarning, match="fla-core is not installed"):
        assert not fla_backend.uses_fla("auto", OnGPU(), "mesa")  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the warning is given only once
        assert not fla_backend.uses_fla("auto", OnGPU(), "mesa")  # type: ignore[arg-type]
    monkeypatch.setattr(fla_backend, "installed", lambda: True)
    assert fla_backend.uses_fla("auto", OnGPU(), "mesa")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("version", "chip", "op", "grad", "used"),
    [
        ((3, 6, 0), 9, "simple_gla", True, False),
        ((3, 6, 0), 9, "gated_delta_rule", True, False),
        ((3, 6, 0), 9, "gated_delta_rule", False, True),
        ((3, 6, 0), 9, "mesa", True, True),
        ((3, 6, 0), 9, "linear_attention", True, True),  # without a gate
        ((3, 7, 1), 9, "simple_gla", True, True),
        ((3, 3, 1), 9, "simple_gla", True, True),
        ((3, 6, 0), 8, "simple_gla", True, True),
    ],
)
def test_kernels_whose_gradients_fla_refuses_are_not_chosen(
    version: tuple[int, ...], chip: int, op: str, grad: bool, used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fla_backend, "installed", lambda: True)
    monkeypatch.setattr(fla_backend, "_triton_version", lambda: version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (chip, 0))
    fla_backend._warn_refused.cache_clear()
    with torch.set_grad_enabled(grad), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert fla_backend.uses_fla("auto", OnGPU(), op) == used  # type: ignore[arg-type]
        assert ["has no gradients on this GPU" in str(warning.message) for warning in told] == [True] * (not used)
        if not used:
            with pytest.raises(ValueError, match=f"backend=fla of {op} has no gradients .*or set backend=torch"):
                fla_backend.uses_fla("fla", OnGPU(), op)  # type: ignore[arg-type]


def test_train_py_rejects_a_backend_that_cannot_run_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import train

    small = ["model=sw_gdn", *TINY, "data=recall", "data.task.key_vocab=64", "trainer.device=cpu"]
    batch = ["trainer.steps=1", "trainer.context=32", "trainer.global_batch=1", "trainer.micro_batch=1"]
    line = [*small, *batch, "model.mixers.gated_deltanet.backend=fla", "eval.at_end=false", f"run_dir={tmp_path}/run"]
    assert train.main([*line, "trainer.progress=false"]) == 2
    (error,) = [text for text in capfd.readouterr().err.splitlines() if "error" in text]
    assert error == "error: backend=fla of gated_delta_rule needs a CUDA tensor, got cpu; use backend=torch"


def test_conjugate_gradients_converge_to_the_direct_solution() -> None:
    tensors = inputs("mesa", 8, 40)
    exact = mesa(*tensors, backend="reference")[0]
    errors = [relative_error(mesa(*tensors, iterations=n, backend="torch")[0], exact) for n in (1, 3, 7)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-9 < errors[1]


@pytest.mark.parametrize("scale", [2.0**-48, 2.0**-64, 2.0**-80, 2.0**80])
def test_gradients_of_any_size_are_solved_for(scale: float) -> None:
    """The square of a small gradient underflows: the solve then divided by zero (recall at a rate of 1e-2, step 44)."""
    tensors = [x.requires_grad_() for x in inputs("mesa", 8, 40, torch.float32)]
    o = mesa(*tensors, backend="torch")[0]
    direction = torch.randn(o.shape, generator=torch.Generator().manual_seed(3))
    plain = torch.autograd.grad(o, tensors, direction, retain_graph=True)
    scaled = torch.autograd.grad(o, tensors, scale * direction)
    assert all(relative_error(got / scale, want) < 1e-6 for got, want in zip(scaled, plain))


def test_memory_attention_equals_its_definition() -> None:
    generator = torch.Generator().manual_seed(9)
    sizes = [(2, 5, 4, 6), (2, 3, 2, 6), (2, 3, 2, 7), (2, 2, 3), (2, 8, 2, 6), (2, 8, 2, 7), (4,)]
    tensors = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    tensors[3][0, 0, 1] = -math.inf
    assert relative_error(memory_attention(*tensors), memory_attention(*tensors, backend="reference")) < 1e-12
    # An entry of weight n counts as n tokens: duplicating an entry equals adding log 2 to its log weight.
    twice = [torch.cat([x, x], dim=1) for x in tensors[1:3]] + [torch.cat([tensors[3]] * 2, dim=2)]
    heavier = [*tensors[:3], tensors[3] + math.log(2), *tensors[4:]]
    assert relative_error(memory_attention(*heavier), memory_attention(tensors[0], *twice, *tensors[4:])) < 1e-12
    with pytest.raises(ValueError, match="backend=triton of memory_attention is not a legal value; legal: auto, "):
        memory_attention(*tensors, backend="triton")


def test_short_convolution_equals_torchs() -> None:
    conv = ShortConv(5, 4, bias=True).double()
    conv.init_weights()
    x = torch.randn(2, 19, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(10))
    want = F.conv1d(F.pad(x.transpose(1, 2), (3, 0)), conv.weight[:, None], conv.bias, groups=5).transpose(1, 2)
    y, tail = conv(x)
    assert relative_error(y, F.silu(want)) < 1e-12 and torch.equal(tail, x[:, -3:])
    packed = conv(x[:1], torch.tensor([0, 2, 3, 19], dtype=torch.int32))[0]
    alone = torch.cat([conv(x[:1, a:b])[0] for a, b in ((0, 2), (2, 3), (3, 19))], dim=1)
    assert relative_error(packed, alone) < 1e-12


# --- VQ-attention -----------------------------------------------------------------------------------------------------


def vq_mixer(**settings: Any) -> VQ:
    mixer = VQ(SHAPE, num_codes=10, block_size=6, **settings)
    torch.manual_seed(0)
    mixer.init_weights(0.2)
    return mixer.double()


def random_x(seed: int, T: int = 40, batch: int = 2) -> Tensor:
    return torch.randn(batch, T, SHAPE.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_vq_attends_to_old_keys_replaced_by_their_codes() -> None:
    q, k, v, codes, beta = inputs("vq_attention", 11, 37)
    got = vq_attention(q, k, v, codes, beta, block_size=8)[0]
    nearest = torch.stack([codes[g, assign(k, codes)[:, :, g]] for g in range(2)], dim=2)
    for t in (0, 15, 16, 36):
        old = max(0, t // 8 - 1) * 8
        keys = torch.cat([nearest[:, :old], k[:, old : t + 1]], dim=1).repeat_interleave(2, dim=2)
        logits = torch.einsum("bhk,bshk->bhs", q[:, t] * beta[:, None], keys)
        values = v[:, : t + 1].repeat_interleave(2, dim=2)
        assert relative_error(got[:, t], torch.einsum("bhs,bshv->bhv", logits.softmax(-1), values)) < 1e-12


def test_vq_codes_that_equal_the_keys_give_full_attention() -> None:
    q, k, v, _, beta = inputs("vq_attention", 12, 33)
    q, k, v = q[:1], k[:1], v[:1]
    codes = k[0].transpose(0, 1)
    got = vq_attention(q, k, v, codes, beta, block_size=4)[0]
    full = memory_attention(q, k[:, :0], v[:, :0], k.new_zeros(1, 2, 0), k, v, beta)
    assert relative_error(got, full) < 1e-12


def test_vq_quantize_recent_gives_keys_their_codes_gradient() -> None:
    tensors = inputs("vq_attention", 13, 21)
    got, got_grads, _ = gradients("vq_attention", tensors, "torch", quantize_recent=True)
    want, want_grads, _ = gradients("vq_attention", tensors, "reference", quantize_recent=True)
    assert relative_error(got, want) < 1e-9
    assert all(relative_error(a, b) < 1e-8 for a, b in zip(got_grads, want_grads))
    assert relative_error(got, gradients("vq_attention", tensors, "torch")[0]) > 1e-3


def test_vq_codebook_moves_only_in_training_and_once_per_pass() -> None:
    mixer = vq_mixer()
    x = random_x(14)

    def averages() -> Tensor:
        return torch.cat([mixer.ema_count.flatten(), mixer.ema_sum.flatten()]).clone()

    mixer.eval()
    before = averages()
    state = mixer(x, return_state=True)[1]
    mixer.train()
    mixer(x, state=state)
    assert torch.equal(averages(), before)
    mixer(x)
    once = averages()
    assert not torch.equal(once, before)

    # Activation checkpointing repeats the forward pass during backward: same averages, same gradient.
    results = []
    for repeat in (False, True):
        other = vq_mixer().train()
        for _ in range(3):
            other.zero_grad()
            y = checkpoint(lambda z: other(z)[0], x, use_reentrant=False) if repeat else other(x)[0]  # noqa: B023
            aux = other.auxiliary_loss()
            assert aux is not None
            (y.square().mean() + aux).backward()
        results.append((other.state_dict(), other.k_proj.weight.grad))
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-12, atol=0)
    for key, value in results[0][0].items():
        assert torch.equal(value, results[1][0][key]), key


def test_vq_codebook_becomes_the_means_of_its_keys_and_dead_codes_are_revived() -> None:
    mixer = vq_mixer(ema_decay=0.0).train()
    # Keys in three directions: at most three codes can be alive, and the others are repeatedly replaced by keys.
    x = random_x(15, T=3, batch=1).repeat(1, 12, 1)
    for _ in range(4):
        mixer(x)
    keys = mixer.project(x)[1][0, :3]
    nearest = mixer.codebook[torch.arange(2), assign(mixer.project(x)[1], mixer.codebook)[0, :3]]
    assert relative_error(nearest, keys) < 1e-3
    distance = torch.cdist(mixer.codebook, keys.transpose(0, 1)).min(-1).values
    assert float(distance.detach().max()) < 1e-3, "a dead code was not replaced by a key"


def test_vq_averages_are_laplace_smoothed() -> None:
    mixer = vq_mixer(ema_decay=0.5, laplace=0.1).train()
    mixer(random_x(16))
    count, total = mixer.ema_count.clone(), mixer.ema_sum.clone()
    mixer(random_x(17))
    all_keys = count.sum(-1, keepdim=True)
    want = total / ((count + 0.1) / (all_keys + 1.0) * all_keys)[..., None]
    assert relative_error(mixer.codebook, want) < 1e-12


def test_vq_commitment_pulls_keys_towards_their_codes() -> None:
    mixer = vq_mixer(commitment=1.0).train()
    x = random_x(18)
    optimizer = torch.optim.SGD([mixer.k_proj.weight], lr=4.0)
    losses = []
    for _ in range(6):
        mixer(x)
        loss = mixer.auxiliary_loss()
        assert loss is not None and mixer.auxiliary_loss() is None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[1]
    mixer.eval()
    mixer(x)
    assert mixer.auxiliary_loss() is None


def alive_vq(dead_below: float) -> VQ:
    """A mixer whose codes all have a history, so that none is dead at the start."""
    mixer = vq_mixer(dead_below=dead_below).train()
    mixer.ema_count.fill_(1.0)
    mixer.ema_sum.copy_(mixer.codebook)
    return mixer


def vq_rank(rank: int, folder: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for dead_below in (0.0, 0.9):
        mixer = alive_vq(dead_below)
        mixer.data_axis = Axis("data", rank, 2)
        for step in range(4):
            mixer(random_x(20 + step)[rank : rank + 1])
        torch.save(mixer.state_dict(), f"{folder}/{rank}-{dead_below}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_vq_codebooks_of_two_ranks_equal_that_of_one(tmp_path: Any) -> None:
    torch.multiprocessing.spawn(vq_rank, args=(str(tmp_path),), nprocs=2)
    alone = alive_vq(0.0)
    for step in range(4):
        alone(random_x(20 + step))
    buffers = ("codebook", "ema_count", "ema_sum")
    for dead_below in (0.0, 0.9):
        ranks = [torch.load(tmp_path / f"{rank}-{dead_below}.pt") for rank in range(2)]
        assert all(torch.equal(ranks[0][key], ranks[1][key]) for key in buffers)
        same = all(relative_error(ranks[0][key], getattr(alone, key)) < 1e-12 for key in buffers)
        # Which key replaces a dead code depends on how the batch is divided; the averages do not.
        assert same == (dead_below == 0.0)


# --- memories of equal size -------------------------------------------------------------------------------------------


def memory(cls: type, **settings: Any) -> Any:
    mixer = cls(SHAPE, **{"capacity": 9, "chunk_size": 6, **settings})
    torch.manual_seed(1)
    mixer.init_weights(0.3)
    return mixer.double()


def test_fifo_is_a_window_of_the_last_pairs_before_the_chunk() -> None:
    mixer, x = memory(FIFO), random_x(30)
    q, k, v = mixer.project(x)
    t = torch.arange(40)
    oldest = (t // 6 * 6 - 9).clamp_min(0)
    seen = (t[None] >= oldest[:, None]) & (t[None] <= t[:, None])
    logits = torch.einsum("bthk,bshk->bhts", q, k) * 12**0.5  # beta starts at 1
    p = logits.masked_fill(~seen, -math.inf).softmax(-1)
    want = mixer.project_out(torch.einsum("bhts,bshv->bthv", p, v))
    assert relative_error(mixer(x)[0], want) < 1e-12


@pytest.mark.parametrize("cls", [FIFO, Reservoir, LearnedCompression, KVM])
def test_memory_layers_equal_full_attention_while_nothing_is_dropped(cls: type) -> None:
    settings = {"tokens_per_slot": 1} if cls is LearnedCompression else {}
    mixer, x = memory(cls, capacity=12, **settings), random_x(31, T=15)
    q, k, v = mixer.project(x)
    want = memory_attention(q, k[:, :0], v[:, :0], k.new_zeros(2, 2, 0), k, v, mixer.beta * 12**0.5)
    assert relative_error(mixer(x)[0], mixer.project_out(want)) < 1e-12


@pytest.mark.parametrize("cls", [FIFO, Reservoir, LearnedCompression, KVM])
def test_memory_layer_backends_agree(cls: type) -> None:
    settings = {"tokens_per_slot": 3} if cls is LearnedCompression else {}
    fast, slow, x = memory(cls, **settings), memory(cls, backend="reference", **settings), random_x(32)
    results = []
    for mixer in (fast, slow):
        y = mixer(x)[0]
        y.square().sum().backward()
        results.append([y, *(p.grad for p in mixer.parameters())])
    assert all(relative_error(a, b) < 1e-9 for a, b in zip(*results))


def test_reservoir_is_uniform_seeded_and_weighted_by_the_tokens_it_represents() -> None:
    mixer = memory(Reservoir)
    kept = mixer(random_x(33, T=37), return_state=True)[1].memory.note
    lowest = position_hash(0, torch.arange(36)).argsort()[:9].sort().values
    assert torch.equal(kept, lowest)
    assert mixer.log_weight(9, 36) == math.log(4)
    assert not torch.equal(memory(Reservoir, seed=1)(random_x(33, T=37), return_state=True)[1].memory.note, kept)
    # Over many seeds every position is kept about equally often.
    count = torch.zeros(36)
    for seed in range(400):
        count[position_hash(seed, torch.arange(36)).argsort()[:9]] += 1
    assert float(count.min()) > 60 and float(count.max()) < 145  # 100 expected, standard deviation 8.7


def test_compression_starts_as_a_mean_of_neighbours() -> None:
    mixer, x = memory(LearnedCompression, tokens_per_slot=3), random_x(34, T=12)
    _, k, v = mixer.project(x)
    state = mixer(x, return_state=True)[1]
    assert relative_error(state.memory.key, k.unflatten(1, (4, 3)).mean(2)) < 1e-12
    assert relative_error(state.memory.value, v.unflatten(1, (4, 3)).mean(2)) < 1e-12
    assert state.memory.note.tolist() == [0, 3, 6, 9]


def test_kvm_fills_its_slots_then_merges_by_cosine() -> None:
    mixer, x = memory(KVM), random_x(35, T=24)
    q, k, v = (part[:1, :, :1] for part in mixer.project(x))
    entries: list[list[int]] = []  # tokens merged into each slot
    for start in range(0, 24, 6):
        chunk = list(range(start, start + 6))
        if not entries:
            entries.append([chunk.pop(0)])
        centres = F.normalize(torch.stack([k[0, members, 0].sum(0) for members in entries]), dim=-1)
        similarity = k[0, chunk, 0] @ centres.T
        order = similarity.max(-1).values.argsort().tolist()
        novel = {chunk[i] for i in order[: 9 - len(entries)]}
        for i, token in enumerate(chunk):
            if token in novel:
                entries.append([token])
            else:
                entries[int(similarity[i].argmax())].append(token)
    state = mixer(x, return_state=True)[1].memory
    assert state.note[0, 0].tolist() == [len(members) for members in entries]
    want = torch.stack([v[0, members, 0].sum(0) for members in entries])
    assert relative_error(state.value[0, :, 0], want) < 1e-12
    assert relative_error(mixer.read(state, 24)[0].norm(dim=-1), torch.ones(2, 9, 2)) < 1e-12


# --- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [GatedDeltaNet, Mamba2, MesaNet])
def test_recurrent_layers_give_the_same_on_the_reference(cls: type) -> None:
    outputs = []
    for backend in ("reference", "torch"):
        mixer = cls(SHAPE, chunk_size=8, backend=backend)
        torch.manual_seed(2)
        mixer.init_weights(0.2)
        outputs.append(mixer.double()(random_x(40))[0])
    assert relative_error(outputs[1], outputs[0]) < 1e-8


@pytest.mark.parametrize("cls", [GatedDeltaNet, Mamba2, MesaNet])
def test_the_gates_of_recurrent_layers_start_with_slow_decay(cls: type) -> None:
    mixer = cls(MixerShape(dim=64, num_heads=64, num_kv_heads=64, head_dim=4), chunk_size=8)
    torch.manual_seed(3)
    mixer.init_weights(0.02)
    log_decay, step = mixer.decay(torch.zeros(1, 1, len(mixer.decay.A_log)))
    assert float(step.min()) > 0.9e-3 and float(step.max()) < 0.11
    assert float(log_decay.min()) > -1.8 and float(log_decay.max()) < 0


@pytest.mark.parametrize("size", ["tiny", "70m", "150m", "480m"])
def test_compared_models_have_the_same_number_of_parameters(size: str) -> None:
    settings = OmegaConf.load(CONFIG_DIR / "model" / "size" / f"{size}.yaml")
    counts = {}
    for name in MODELS:
        cfg = small_config(name)
        cfg.model.merge_with(settings)  # type: ignore[attr-defined]
        with torch.device("meta"):
            counts[name] = count_parameters(build_model(cfg.model, 256))
    want = counts["std_att"]
    for name, got in counts.items():
        assert abs(got[0] / want[0] - 1) < 0.02 and abs(got[1] / want[1] - 1) < 0.02, (name, got, want)


@pytest.mark.parametrize(
    "cls,settings,words",
    [
        (VQ, {"num_codes": 0}, "num_codes=0"),
        (VQ, {"ema_decay": 1.0}, "ema_decay=1.0"),
        (GatedDeltaNet, {"num_heads": 5}, "num_heads=5 of gated_deltanet must divide"),
        (GatedDeltaNet, {"conv_size": 0}, "conv_size=0"),
        (Mamba2, {"state_dim": -1}, "state_dim=-1"),
        (MesaNet, {"lambda_init": 0.1}, "lambda_init=0.1 of mesa_net must be above lambda_min=0.25"),
        (FIFO, {"capacity": 0}, "capacity=0"),
        (Reservoir, {"backend": "fla"}, "backend=fla of Reservoir is not a legal value"),
        (LearnedCompression, {"chunk_size": 10, "tokens_per_slot": 4}, "chunk_size=10 .* multiple of tokens_per_slot"),
    ],
)  # fmt: skip
def test_bad_settings_fail_in_one_line(cls: type[nn.Module], settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        cls(SHAPE, **settings)
    assert "\n" not in str(error.value)


def test_a_large_ridge_begins_as_set() -> None:
    layer = MesaNet(SHAPE, lambda_init=1000.0)
    layer.init_weights(0.02)
    torch.testing.assert_close(F.softplus(layer.ridge) + layer.lambda_min, torch.full_like(layer.ridge, 1000.0))


def test_the_skip_of_mamba2_starts_as_set() -> None:
    for settings, wanted in (({}, 1), ({"skip_init": 0}, 0)):
        mixer = Mamba2(SHAPE, **settings)
        mixer.init_weights(0.02)
        assert mixer.skip.eq(wanted).all()
