"""One softmax over a weighted memory and, causally, over the current tokens.

OVQ's prediction step (arXiv 2602.03922, eq. 15) for a memory built by any rule.
"""

from __future__ import annotations

from torch import Tensor

from ovq.ops.common import check_backend
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
    """softmax(beta q.[memory keys, own keys] + [log weight, 0]) applied to the values; causal in the own keys.

    Args:
        q_BTHK: [B, T, H, K]; query t is at position S - T + t of the own keys.
        key_BMGK, value_BMGV: [B, M, G, K or V], M memory entries, each counting as exp(log weight) tokens; M may be 0.
        log_weight_BGM: [B, G, M], -inf to mask out an entry.
        own_key_BSGK, own_value_BSGV: [B, S, G, K or V], S >= T current tokens.
        beta_H: [H], inverse temperature.
        backend: auto | reference | torch.

    Returns:
        o [B, T, H, V] in the values' dtype.

    Raises:
        BackendError: an invalid backend.
    """
    check_backend("memory_attention", backend)
    forward = reference.forward if backend == "reference" else chunked.forward
    return forward(q_BTHK, key_BMGK, value_BMGV, log_weight_BGM, own_key_BSGK, own_value_BSGV, beta_H)
