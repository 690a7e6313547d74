"""One softmax over a weighted memory and, causally, over the tokens at hand.

OVQ's prediction (arXiv 2602.03922, eq. 15) for memories made by any other rule.
"""

from __future__ import annotations

from torch import Tensor

from ovq.ops.memory_attention import chunked, reference


def memory_attention(
    q_BTHK: Tensor,
    key_BMGK: Tensor,
    value_BMGV: Tensor,
    log_weight_BGM: Tensor,
    own_key_BSGK: Tensor,
    own_value_BSGV: Tensor,
    beta_H: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """softmax(beta q.[memory keys, own keys] + [log weight, 0]) applied to the values; own keys causally.

    Args:
        q_BTHK: [B, T, H, K]; query t stands at own position S - T + t.
        key_BMGK, value_BMGV: M entries of memory, each standing for exp(log weight) tokens; M may be 0.
        log_weight_BGM: [B, G, M], -inf for an entry that does not count.
        own_key_BSGK, own_value_BSGV: S >= T tokens.
        beta_H: [H], inverse temperature.
        backend: auto | reference | torch.

    Returns:
        o [B, T, H, V] in the values' dtype.
    """
    forward = reference.forward if backend == "reference" else chunked.forward
    return forward(q_BTHK, key_BMGK, value_BMGV, log_weight_BGM, own_key_BSGK, own_value_BSGV, beta_H)
