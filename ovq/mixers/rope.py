"""Rotary position embedding (RoFormer, arXiv 2104.09864, eq. 34), half-split layout as in Llama and GPT-NeoX, and
ways to extend it to a longer context than a model was trained with.

Shapes: B batch, T tokens, H heads, K head width (even), F = K / 2 frequencies.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TYPES = ("linear", "ntk", "yarn")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies change for `factor` times the context; names and meanings are those of Hugging Face.

    linear: every frequency is divided by factor (position interpolation, arXiv 2306.15595).
    ntk: the base becomes base * factor^(K / (K - 2)), which divides the lowest frequency by factor and keeps the
        highest (arXiv 2309.00071, section 3.1).
    yarn: frequencies that turn less than beta_slow times over the original context are divided by factor, those that
        turn more than beta_fast times are kept, with a linear ramp over the frequencies between (section 3.2; as in the
        authors' code, the ramp is over frequency indices, with its ends rounded outwards); and cos and sin are
        multiplied by attention_factor, 0.1 ln(factor) + 1 unless given (section 3.3).

    Attributes:
        original_max_position_embeddings: tokens of the context that the model was trained with, for yarn.

    Raises:
        ValueError: an illegal value, or yarn without the original context.
    """

    rope_type: str
    factor: float
    original_max_position_embeddings: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        if self.rope_type not in TYPES:
            raise ValueError(f"rope_scaling.rope_type={self.rope_type} is not a legal value; legal: {', '.join(TYPES)}")
        if not 1 <= self.factor < math.inf:
            raise ValueError(f"rope_scaling.factor={self.factor} must be at least 1")
        original = self.original_max_position_embeddings
        if self.rope_type == "yarn" and (original is None or original < 1):
            raise ValueError(
                f"rope_scaling.original_max_position_embeddings={original} must be the context, in tokens, that the "
                "model was trained with"
            )
        if not 0 < self.beta_slow < self.beta_fast:
            raise ValueError(f"rope_scaling needs 0 < beta_slow={self.beta_slow} < beta_fast={self.beta_fast}")

    @classmethod
    def of(cls, settings: Mapping[str, Any] | None) -> RopeScaling | None:
        """Build it from a mixer's `rope_scaling`; None stays None.

        Raises:
            ValueError: an unknown setting, one that is missing, or an illegal value.
        """
        if settings is None:
            return None
        legal = [item.name for item in dataclasses.fields(cls)]
        given = dict(settings) if isinstance(settings, Mapping) else {}
        if set(given) - set(legal) or not {"rope_type", "factor"} <= set(given):
            raise ValueError(
                f"rope_scaling={settings} must be {{rope_type: yarn, factor: 8}} or similar; legal: {', '.join(legal)}"
            )
        return cls(**given)

    def amplitude(self) -> float:
        """The factor that cos and sin are multiplied by."""
        if self.rope_type != "yarn":
            return 1.0
        return 0.1 * math.log(self.factor) + 1 if self.attention_factor is None else self.attention_factor

    def frequencies(self, K: int, base: float, device: torch.device) -> Tensor:
        """Radians per token, float64 [F]."""
        if self.rope_type == "ntk":
            return _frequencies(K, base * self.factor ** (K / max(1, K - 2)), device)
        plain_F = _frequencies(K, base, device)
        if self.rope_type == "linear":
            return plain_F / self.factor
        assert self.original_max_position_embeddings is not None

        def index_of(turns: float) -> float:
            """Index of the frequency that makes this many turns over the original context."""
            assert self.original_max_position_embeddings is not None
            return K * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = max(0, math.floor(index_of(self.beta_fast))), min(K - 1, math.ceil(index_of(self.beta_slow)))
        index_F = torch.arange(K // 2, device=device, dtype=torch.float64)
        slow_F = ((index_F - low) / max(high - low, 1e-3)).clamp(0, 1)
        return plain_F / self.factor * slow_F + plain_F * (1 - slow_F)


def check_rope(head_dim: int, base: float) -> None:
    """Raise ValueError unless heads of this width can be rotated with this base."""
    if head_dim % 2:
        raise ValueError(f"model.head_dim={head_dim} must be even for rotary positions")
    if base <= 1:
        raise ValueError(f"rope_base={base:g} must be above 1")


def rotate(x_BTHK: Tensor, start: int, base: float = 10000.0, scaling: RopeScaling | None = None) -> Tensor:
    """Rotate each head of x [B, T, H, K] by the angles of positions start .. start + T - 1; same shape and dtype.

    Angles are computed in float64: in float32 they are off by 0.03 radians at position 500,000.
    """
    T, K = x_BTHK.shape[1], x_BTHK.shape[3]
    position_T = torch.arange(start, start + T, device=x_BTHK.device, dtype=torch.float64)
    if scaling is None:
        angle_TF = position_T[:, None] * _frequencies(K, base, x_BTHK.device)
        cos_TF, sin_TF = angle_TF.cos(), angle_TF.sin()
    else:
        angle_TF = position_T[:, None] * scaling.frequencies(K, base, x_BTHK.device)
        cos_TF, sin_TF = angle_TF.cos() * scaling.amplitude(), angle_TF.sin() * scaling.amplitude()
    cos, sin = cos_TF.to(x_BTHK.dtype)[:, None, :], sin_TF.to(x_BTHK.dtype)[:, None, :]
    left, right = x_BTHK.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def _frequencies(K: int, base: float, device: torch.device) -> Tensor:
    return base ** (-torch.arange(0, K, 2, device=device, dtype=torch.float64) / K)
