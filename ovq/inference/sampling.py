"""How the next token is chosen from a model's logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ovq.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: divides the logits; 0 takes the most probable token.
        top_k: keep only the k most probable tokens; None: all.
        top_p: keep the fewest most probable tokens whose total probability reaches this (arXiv 1904.09751).
        min_p: keep tokens with at least this fraction of the largest probability (arXiv 2407.01082).
        repetition_penalty: applied first: divide the logits of tokens in the prompt or the text so far by this number,
            or multiply them by it if they are negative (arXiv 1909.05858, as in transformers); 1: none.
        seed: seed of the random draws. A draw depends only on the seed, the row and the number of tokens before it.

    Raises:
        ConfigError: a value out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        legal = {
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_k": (self.top_k is None or self.top_k >= 1, "at least 1"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "in 0 to 1"),
            "repetition_penalty": (0.01 <= self.repetition_penalty <= 100, "in 0.01 to 100"),
            "seed": (self.seed >= 0, "at least 0"),
        }
        for name, (good, words) in legal.items():
            if not good:
                raise ConfigError(f"{name}={getattr(self, name)} must be {words}")

    def choose(self, logits_V: Tensor, row: int, step: int, seen_V: Tensor | None = None) -> int:
        """The next token.

        Args:
            row: index of the row.
            step: the number of tokens already chosen for it.
            seen_V: bool, which tokens are in the prompt or the text so far; used only with a repetition penalty.
        """
        if self.repetition_penalty != 1 and seen_V is not None:
            penalised = torch.where(
                logits_V > 0, logits_V / self.repetition_penalty, logits_V * self.repetition_penalty
            )
            logits_V = torch.where(seen_V, penalised, logits_V)
        if self.temperature == 0:
            return int(logits_V.argmax())
        logits_V = logits_V.double()
        p_V = ((logits_V - logits_V.max()) / self.temperature).softmax(-1).cpu().numpy()  # none overflows to infinity
        order = np.argsort(-p_V, kind="stable")
        sorted_p = p_V[order]
        keep = (sorted_p >= self.min_p * sorted_p[0]) & (np.cumsum(sorted_p) - sorted_p < self.top_p)
        if self.top_k is not None:
            keep[self.top_k :] = False
        # Accumulated in the order of ids, so that rounding that swaps two equally probable tokens changes nothing.
        kept = np.sort(order[keep])
        total = np.cumsum(p_V[kept])
        uniform = np.random.default_rng((self.seed, row, step)).random()
        return int(kept[min(np.searchsorted(total, uniform * total[-1], side="right"), len(kept) - 1)])
