"""Cross-entropy of a linear head that never materialises all of its logits."""

from __future__ import annotations

from torch import Tensor

from ovq.ops.common import check_backend
from ovq.ops.cross_entropy import chunked, reference
from ovq.ops.cross_entropy.reference import soft_cap

__all__ = ["chunked_cross_entropy", "soft_cap"]


def chunked_cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    chunk: int = 2048,
    z_loss: float = 0.0,
    reduction: str = "sum",
    softcap: float = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """-log softmax(weight x)[target], in nats, and z_loss * logsumexp(weight x)^2 (PaLM, arXiv 2204.02311, sec. 5).

    Args:
        x_ND: [N, D].
        weight_VD: [V, D], of x's dtype.
        targets_N: int64 [N]; tokens with target -100 have no label and contribute no loss.
        chunk: number of tokens whose logits [chunk, V] are in memory at once.
        z_loss: weight of the second term.
        reduction: "sum" over labelled tokens, or "none" for the loss of each token [N], 0 for those without a label.
        softcap: c > 0 replaces the logits by c tanh(logits / c) (Gemma 2, arXiv 2408.00118, sec. 2); 0 leaves them
            unchanged.
        backend: auto | reference | torch.

    Returns:
        (loss, z term summed over labelled tokens or None if z_loss = 0), in float32 (float64 for float64 inputs).
        Both are differentiable in x and weight.

    Raises:
        ValueError: an invalid setting, or shapes or dtypes that do not match.
    """
    if reduction not in ("sum", "none"):
        raise ValueError(f"reduction={reduction} of chunked_cross_entropy is not a legal value; legal: sum, none")
    check_backend("chunked_cross_entropy", backend)
    if chunk < 1:
        raise ValueError(f"chunk={chunk} of chunked_cross_entropy must be at least 1")
    if not softcap >= 0:
        raise ValueError(f"softcap={softcap} of chunked_cross_entropy must be at least 0")
    if x_ND.shape[0] != targets_N.shape[0] or x_ND.shape[1] != weight_VD.shape[1] or x_ND.dtype != weight_VD.dtype:
        raise ValueError(
            f"chunked_cross_entropy got x {tuple(x_ND.shape)} {x_ND.dtype}, weight {tuple(weight_VD.shape)} "
            f"{weight_VD.dtype} and {targets_N.shape[0]} targets, which do not match"
        )
    forward = reference.forward if backend == "reference" else chunked.forward
    return forward(x_ND, weight_VD, targets_N, chunk, z_loss, reduction, softcap)
