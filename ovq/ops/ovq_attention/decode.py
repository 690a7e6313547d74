"""The torch backend's path for decoding: a few tokens that do not complete a chunk, without gradients.

The dictionary does not change, so it is used in place: dividing the products by the counts, rather than the sums,
avoids a copy of the dictionary for every token.

Shapes: B batch, T queries, S tokens of the unfinished chunk, H query heads, G key/value heads, R = H / G, n centroids
in use, K key width, V value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ovq.ops.ovq_attention.spec import Dictionary


def predict(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, beta_H: Tensor, dictionary: Dictionary) -> Tensor:
    """o [B, T, H, V], as `reference.predict`, for inputs of the dictionary's dtype and the last T of S tokens."""
    (B, T, H), (S, G), n = q_BTHK.shape[:3], k_BSGK.shape[1:3], dictionary.size
    x_BGrK = (q_BTHK * beta_H.to(q_BTHK.dtype)[:, None]).unflatten(2, (G, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    count_BG1n = dictionary.count[:, :, None, :n]
    logits = x_BGrK.new_empty(*x_BGrK.shape[:3], n + S)
    torch.div(x_BGrK @ dictionary.key_sum[:, :, :n].mT, count_BG1n, out=logits[..., :n])
    logits[..., :n] += count_BG1n.log()
    own_BGRTS = logits[..., n:].unflatten(2, (-1, T))
    own_BGRTS.copy_((x_BGrK @ k_BSGK.permute(0, 2, 3, 1)).view(own_BGRTS.shape))
    if T > 1:
        own_BGRTS.masked_fill_(torch.ones(T, S, dtype=torch.bool, device=q_BTHK.device).triu(S - T + 1), -torch.inf)
    p = logits.softmax(-1)
    o_BGrV = p[..., n:] @ v_BSGV.transpose(1, 2) + (p[..., :n] / count_BG1n) @ dictionary.value_sum[:, :, :n]
    return o_BGrV.view(B, H, T, -1).transpose(1, 2)
