"""What several tests share: small models of every kind, and a comparison that NaN cannot pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ovq.config import Config, compose, options
from ovq.model import Transformer, build_model

TINY = [
    "model.num_layers=2",
    "model.dim=32",
    "model.num_heads=2",
    "model.num_kv_heads=2",
    "model.head_dim=16",
    "model.ffn_dim=48",
]

# Settings that make each mixer small enough for a test to meet its edges (several chunks, a full window or dictionary).
SMALL_MIXER = {
    "sliding_window": {"window": 7},
    "ovq": {"num_centroids": 12, "chunk_size": 8},
    "vq": {"num_codes": 12, "block_size": 8},
    "linear_attention": {"chunk_size": 8},
    "gated_deltanet": {"chunk_size": 8},
    "mamba2": {"chunk_size": 8},
    "mesa_net": {"chunk_size": 8},
    "fifo": {"num_centroids": 12, "chunk_size": 8},
    "reservoir": {"num_centroids": 12, "chunk_size": 8},
    "learned_compression": {"num_centroids": 12, "chunk_size": 8},
    "kvm": {"num_centroids": 12, "chunk_size": 8},
}

MODELS = options("model")
MIXERS = options("model/mixer")


def small_config(model: str, *overrides: str) -> Config:
    """The config of a named model at a size for tests."""
    cfg = compose([f"model={model}", *TINY])
    small = [
        f"model.mixers.{name}.{key}={value}"
        for name in cfg.model.mixers
        for key, value in SMALL_MIXER.get(name, {}).items()
        if key in cfg.model.mixers[name]
    ]
    return compose([f"model={model}", *TINY, *small, *overrides])


def small_model(model: str, *overrides: str, vocab_size: int = 61, seed: int = 0) -> Transformer:
    built = build_model(small_config(model, *overrides).model, vocab_size)
    built.init_weights(seed)
    return built


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want|| in float64; NaN or infinity in either counts as infinite."""
    got, want = got.detach().double(), want.detach().double()
    if not (torch.isfinite(got).all() and torch.isfinite(want).all()):
        return float("inf")
    return float((got - want).norm() / want.norm().clamp_min(1e-12))
