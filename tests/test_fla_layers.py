"""Claims about the baselines: with the same weights, each equals the published flash-linear-attention layer.

The published layer's own `forward` runs, except for its Triton kernels, which need a GPU. Each kernel is replaced by a
torch implementation: the recurrences, the decay gate and the norms by flash-linear-attention's own references, and the
short convolution, elu + 1, SiLU and unit norm by functions below. That its kernels equal these is not tested here.

Differences, which the settings and weights of the test cases remove:

- Mesa-Net: the published decay is sigmoid(a) with a = W x + b. Ours is Mamba's, exp(-A softplus(a)), which is
  sigmoid(-a) where A = 1. At initialisation the published decay is near 1/2 per token; ours is slow, and A is learned.
- Linear attention: by default, the published layer's features are products of two projections, with no normaliser and
  an RMSNorm of the output. Ours follows arXiv 2006.16236, which the published layer offers through its settings.
- Gated DeltaNet: A is initialised uniformly in 1 .. 16, as in Mamba-2; the published layer's in 0 .. 16.
- Sizes: ours follow from model.num_heads and model.head_dim, so that models are comparable.
- Epsilons: the published unit norm adds 1e-6 under the root, ours has a floor of 1e-12; linear attention's normaliser
  has 1e-10 there, 1e-6 here. In these cases both change results by less than the tolerance.
- Initial weights: ours are normal with model.init_std, smaller for output projections; convolutions are initialised as
  in nn.Conv1d, like the published layers. The published models draw projections and convolutions with std 0.02.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovq.mixers.base import MixerShape, SequenceMixer
from ovq.mixers.gated_deltanet import GatedDeltaNet
from ovq.mixers.linear_attention import LinearAttention
from ovq.mixers.mamba2 import Mamba2
from ovq.mixers.mesa_net import MesaNet
from tests.helpers import relative_error

# Importing flash-linear-attention, and transformers with it, takes several seconds.
pytestmark = pytest.mark.slow

NEEDED = "needs the layers of flash-linear-attention: pip install flash-linear-attention==0.6.0 (fla-core lacks them)"
SHAPE = MixerShape(dim=20, num_heads=4, num_kv_heads=4, head_dim=6)
GROUPED = MixerShape(dim=20, num_heads=4, num_kv_heads=2, head_dim=6)

Weights = Mapping[str, Tensor]

# --- the published layers, without a GPU ------------------------------------------------------------------------------


def unit(x: Tensor) -> Tensor:
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def short_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, activation: str, **unused: Any
) -> tuple[Tensor, None]:
    """nn.Conv1d, the base class of the published ShortConvolution, without the outputs after the last token."""
    assert activation == "silu" and not any(unused.get(name) for name in ("residual", "initial_state", "cu_seqlens"))
    y = F.conv1d(x.mT, weight[:, None], bias, padding=weight.shape[1] - 1, groups=len(weight))
    return F.silu(y[..., : x.shape[1]].mT), None


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, A_log: Tensor, dt_bias: Tensor, **flags: Any
) -> tuple[Tensor, None]:
    from fla.ops.gated_delta_rule.gate import naive_gdn_gate
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule

    in_kernel = {f"use_{name}_in_kernel" for name in ("qk_l2norm", "beta_sigmoid", "gate")}
    assert {name for name, on in flags.items() if on} == in_kernel | {"state_v_first"}
    decay = naive_gdn_gate(g, A_log, dt_bias)
    return naive_recurrent_gated_delta_rule(unit(q), unit(k), v, beta.sigmoid(), decay)[0], None


def mesa(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, lamb: Tensor, *, max_CG_iteration: int, **flags: Any
) -> tuple[Tensor, None, None]:
    from fla.ops.mesa_net.naive import naive_mesa_net_exact

    assert {name for name, on in flags.items() if on} == {"use_qk_l2norm_in_kernel"}
    return naive_mesa_net_exact(unit(q), unit(k), v, g, lamb, beta)[0], None, None


def linear_attention(q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: None, **settings: Any) -> tuple[Tensor, None]:
    from fla.ops.linear_attn.naive import naive_recurrent_linear_attn

    return naive_recurrent_linear_attn(q, k, v, **settings)[0], None


def norm(x: Tensor, weight: Tensor, bias: None, *, eps: float, **unused: Any) -> Tensor:
    from fla.modules.norm.layernorm import rms_norm_ref

    assert not any(unused.values())
    return rms_norm_ref(x, weight, bias, eps=eps)


def norm_then_gate(x: Tensor, g: Tensor, weight: Tensor, bias: None, *, eps: float, **unused: Any) -> Tensor:
    from fla.modules.norm.layernorm_gated import rms_norm_ref

    assert unused["activation"] == "swish"
    return rms_norm_ref(x, weight, bias, g, eps, norm_before_gate=True)


@pytest.fixture(scope="module")
def fla() -> Iterator[ModuleType]:
    """`fla.layers`, with every kernel that the forward passes below would call replaced by a torch implementation."""
    layers = pytest.importorskip("fla.layers", reason=NEEDED)
    from fla.modules.norm.layernorm_gated import rms_norm_ref as gated_norm

    definitions: dict[str, Callable[..., Any]] = {
        "fla.layers.gated_deltanet.causal_conv1d": short_conv,
        "fla.layers.gated_deltanet.chunk_gated_delta_rule": gated_delta_rule,
        "fla.layers.linear_attn.chunk_linear_attn": linear_attention,
        "fla.layers.linear_attn.elu_p1": lambda x: F.elu(x) + 1,
        "fla.layers.mesa_net.chunk_mesa_net": mesa,
        "fla.modules.causal_conv1d.ops.causal_conv1d": short_conv,
        "fla.modules.norm.fused_norm_gate.rms_norm_gated": norm_then_gate,
        "fla.modules.norm.layernorm.rms_norm": norm,
        "fla.modules.norm.layernorm_gated.rmsnorm_fn": gated_norm,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FLA_CONV_BACKEND", raising=False)
        patch.setitem(layers.mamba2.ACT2FN, "silu", F.silu)
        for name, definition in definitions.items():
            patch.setattr(name, definition)
        yield layers


# --- our sizes and weights in the published layers --------------------------------------------------------------------


def published(fla: ModuleType, mixer: SequenceMixer) -> nn.Module:
    """The published layer of the same sizes; other settings have its defaults unless given here."""
    common = {"hidden_size": mixer.shape.dim, "norm_eps": mixer.shape.norm_eps}
    if isinstance(mixer, GatedDeltaNet):
        return fla.GatedDeltaNet(
            num_heads=mixer.num_heads,
            head_dim=mixer.key_width // mixer.num_heads,
            expand_v=mixer.value_width / mixer.key_width,
            conv_size=mixer.conv.weight.shape[1],
            **common,
        )
    if isinstance(mixer, Mamba2):
        return fla.Mamba2(
            num_heads=mixer.num_heads,
            head_dim=mixer.shape.head_dim,
            expand=mixer.inner / mixer.shape.dim,
            state_size=mixer.state_dim,
            conv_kernel=mixer.conv.weight.shape[1],
            chunk_size=16,
            **common,
        )
    if isinstance(mixer, MesaNet):
        return fla.MesaNet(
            num_heads=mixer.shape.num_heads,
            head_dim=mixer.shape.head_dim,
            conv_size=mixer.conv.weight.shape[1],
            lambda_lower_bound=mixer.lambda_min,
            **common,
        )
    expand = mixer.shape.num_heads * mixer.shape.head_dim / mixer.shape.dim
    return fla.LinearAttention(
        num_heads=mixer.shape.num_heads,
        num_kv_heads=mixer.shape.num_kv_heads,
        expand_k=expand,
        expand_v=expand,
        feature_map="elu",
        do_feature_map_norm=True,
        output_norm="identity",
        **common,
    )


def in_published(mixer: SequenceMixer, ours: Weights) -> dict[str, Tensor]:
    """Our parameters under the published names. The map is orthogonal, so it maps gradients as well."""
    if isinstance(mixer, Mamba2):
        return {
            "in_proj.weight": ours["in_proj.weight"],
            "conv1d.weight": ours["conv.weight"][:, None],
            "conv1d.bias": ours["conv.bias"],
            "A_log": ours["decay.A_log"],
            "dt_bias": ours["decay.dt_bias"],
            "D": ours["skip"],
            "norm.weight": ours["norm.weight"],
            "out_proj.weight": ours["out_proj.weight"],
        }
    named = {f"{x}_proj.weight": ours[f"{x}_proj.weight"] for x in "qkv"} | {"o_proj.weight": ours["out_proj.weight"]}
    if isinstance(mixer, GatedDeltaNet):
        q, k, v = ours["conv.weight"][:, None].split([mixer.key_width, mixer.key_width, mixer.value_width])
        named |= {
            "q_conv1d.weight": q,
            "k_conv1d.weight": k,
            "v_conv1d.weight": v,
            "a_proj.weight": ours["alpha_proj.weight"],
            "A_log": ours["decay.A_log"],
            "dt_bias": ours["decay.dt_bias"],
            "b_proj.weight": ours["beta_proj.weight"],
            "o_norm.weight": ours["norm.weight"],
            "g_proj.weight": ours["g_proj.weight"],
        }
    elif isinstance(mixer, MesaNet):
        q, k = ours["conv.weight"][:, None].chunk(2)
        named |= {
            "q_conv1d.weight": q,
            "k_conv1d.weight": k,
            # sigmoid(-a) = exp(-softplus(a)): the published gate is ours with A = 1 and the opposite sign.
            "a_proj.weight": -ours["alpha_proj.weight"],
            "a_proj.bias": -ours["decay.dt_bias"],
            "b_proj.weight": ours["beta_proj.weight"],
            "b_proj.bias": ours["beta_proj.bias"],
            "lambda_params": ours["ridge"],
            "o_norm.weight": ours["norm.weight"],
        }
    return named


def randomised(mixer: SequenceMixer, seed: int) -> SequenceMixer:
    """The mixer with every parameter randomised, including those initialised to 0 or 1; for Mesa-Net, A = 1."""
    torch.manual_seed(seed)
    mixer.init_weights(0.4)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        if isinstance(mixer, MesaNet):
            mixer.decay.A_log.zero_()
    return mixer


CASES: dict[str, Callable[[], SequenceMixer]] = {
    "gated_deltanet": lambda: GatedDeltaNet(SHAPE, chunk_size=8),
    "gated_deltanet, other sizes": lambda: GatedDeltaNet(SHAPE, num_heads=3, expand_v=0.75, conv_size=3, chunk_size=8),
    "mamba2": lambda: Mamba2(SHAPE, chunk_size=8),
    "mamba2, other sizes": lambda: Mamba2(SHAPE, num_heads=5, state_dim=7, conv_size=3, chunk_size=8),
    "mesa_net": lambda: MesaNet(SHAPE, chunk_size=8),
    "mesa_net, other sizes": lambda: MesaNet(SHAPE, conv_size=3, lambda_min=0.5, chunk_size=8),
    "linear_attention": lambda: LinearAttention(SHAPE, chunk_size=8),
    "linear_attention, grouped heads": lambda: LinearAttention(GROUPED, chunk_size=8),
}


@pytest.mark.parametrize("T", [1, 19, 67])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_equal_those_of_the_published_layer(fla: ModuleType, case: str, T: int) -> None:
    mixer = randomised(CASES[case](), seed=T)
    layer = published(fla, mixer).train()
    layer.load_state_dict(in_published(mixer, dict(mixer.named_parameters())))  # strict: all of its parameters
    x, weight = torch.randn(2, T, SHAPE.dim), torch.randn(2, T, SHAPE.dim)

    def run(module: nn.Module) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        leaf = x.clone().requires_grad_()
        y = module(leaf)[0]
        (y * weight).sum().backward()
        return y, leaf.grad, {name: p.grad for name, p in module.named_parameters()}

    (got, got_x, got_weights), (want, want_x, want_weights) = run(mixer), run(layer)
    assert relative_error(got, want) < 1e-4  # the epsilons of unit norm differ; with equal ones it is below 1e-5
    assert relative_error(got_x, want_x) < 1e-4
    got_weights = in_published(mixer, got_weights)
    assert got_weights.keys() == want_weights.keys()
    # An absolute floor for gradients that are 0, such as that of the first token's query in linear attention.
    floor = 1e-6 * max(float(gradient.norm()) for gradient in want_weights.values())
    for name, gradient in want_weights.items():
        assert float((got_weights[name] - gradient).norm()) < 1e-4 * float(gradient.norm()) + floor, name


# --- defaults and initial values --------------------------------------------------------------------------------------


def test_defaults_that_are_not_sizes_are_the_published_ones(fla: ModuleType) -> None:
    def default(cls: type, name: str) -> Any:
        return inspect.signature(cls).parameters[name].default

    for layer in (fla.GatedDeltaNet, fla.Mamba2, fla.MesaNet, fla.LinearAttention):
        assert default(layer, "norm_eps") == default(MixerShape, "norm_eps")
    assert default(GatedDeltaNet, "conv_size") == default(fla.GatedDeltaNet, "conv_size")
    values_per_key = default(GatedDeltaNet, "expand_v") / default(GatedDeltaNet, "expand_k")
    assert values_per_key == default(fla.GatedDeltaNet, "expand_v")
    assert default(Mamba2, "conv_size") == default(fla.Mamba2, "conv_kernel")
    wide = MixerShape(dim=256, num_heads=4, num_kv_heads=4, head_dim=64)
    assert Mamba2(wide).state_dim == default(fla.Mamba2, "state_size")
    assert default(MesaNet, "conv_size") == default(fla.MesaNet, "conv_size")
    assert default(MesaNet, "lambda_min") == default(fla.MesaNet, "lambda_lower_bound")
    assert default(MesaNet, "iterations") == default(fla.MesaNet, "max_cg_step_training")


@pytest.mark.parametrize("cls", [GatedDeltaNet, Mamba2, MesaNet])
def test_gates_and_convolutions_start_as_published(fla: ModuleType, cls: type[SequenceMixer]) -> None:
    mixer = cls(MixerShape(dim=4, num_heads=4000, num_kv_heads=4000, head_dim=1))
    torch.manual_seed(0)
    mixer.init_weights(0.02)
    want = dict(published(fla, mixer).named_parameters())
    got = in_published(mixer, dict(mixer.named_parameters()))
    drawn = [name for name in want if "conv" in name or name in ("dt_bias", "A_log")]
    for name in drawn:
        ours, theirs = (x[name].detach().flatten().sort().values for x in (got, want))
        if name == "A_log":
            ours, theirs = ours.exp(), theirs.exp()
            if cls is GatedDeltaNet:
                theirs = 1 + theirs * 15 / 16  # uniform in 0 .. 16 there, in 1 .. 16 here
        # Quantiles of thousands of draws.
        assert float((ours - theirs).abs().max()) < 0.04 * float(theirs.max() - theirs.min()), name
    for name in want.keys() & {"D", "lambda_params", "norm.weight", "o_norm.weight"}:
        torch.testing.assert_close(got[name], want[name])
