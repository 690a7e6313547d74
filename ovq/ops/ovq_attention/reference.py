"""OVQ-attention, chunk by chunk in plain tensors: the definition, differentiated by autograd.

Slow, and it keeps one dictionary per chunk for the backward pass. Equation numbers refer to arXiv 2602.03922.

Shapes: B batch, T queries, S tokens, L tokens per chunk, H query heads, G key/value heads, R = H / G, N capacity,
n centroids in use, K key width, V value width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ovq.ops.common import work_dtype
from ovq.ops.ovq_attention.spec import Dictionary, OVQSpec

STATE_GRADIENT = True  # the sums passed in and those returned carry gradients


def forward(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    beta_H: Tensor,
    spec: OVQSpec,
    dictionary: Dictionary,
    assignment: Tensor | None = None,
) -> tuple[Tensor, Dictionary, Tensor]:
    """Outputs of the last T tokens, the dictionary after the last whole chunk, and each token's centroid [B, G, S].

    The centroids are int32, -1 in an unfinished last chunk; `assignment` forces them.
    """
    work = work_dtype(q_BTHK)
    S, L, first = k_BSGK.shape[1], spec.chunk_size, k_BSGK.shape[1] - q_BTHK.shape[1]  # first token that has a query
    k_BGSK, v_BGSV = k_BSGK.to(work).transpose(1, 2), v_BSGV.to(work).transpose(1, 2)
    q_BHTK = (beta_H.to(work)[:, None] * q_BTHK.to(work)).transpose(1, 2)
    S_k, S_v, c = dictionary.key_sum, dictionary.value_sum, dictionary.count.detach()
    n, outputs, assignments = dictionary.size, [], []
    for start in range(0, S, L):
        chunk = slice(start, min(start + L, S))
        k, v = k_BGSK[:, :, chunk], v_BGSV[:, :, chunk]
        inverse = c[:, :, :n, None].reciprocal()  # rounded once, in every backend
        mu_k, mu_v = S_k[:, :, :n] * inverse, S_v[:, :, :n] * inverse
        queries = slice(max(start, first) - first, max(chunk.stop - first, 0))
        outputs.append(predict(q_BHTK[:, :, queries], mu_k, mu_v, c[:, :, :n], k, v))
        if k.shape[2] < L:  # an unfinished chunk is not committed
            assignments.append(torch.full(k.shape[:3], -1, device=k.device))
            break
        after = spec.size_at(dictionary.position + chunk.stop)
        if assignment is None:
            a_BGL = assign(k, v, mu_k, mu_v, after, dictionary.position + start, spec, q_BTHK.dtype)
        else:
            a_BGL = assignment[:, :, chunk].long()
        S_k, S_v, c, n = *commit(S_k, S_v, c, k, v, a_BGL, spec), after
        assignments.append(a_BGL)
    o_BTHV = torch.cat(outputs, dim=2).transpose(1, 2).to(q_BTHK.dtype)
    position = dictionary.position + S - S % L
    new = Dictionary(S_k, S_v, c, n, position)
    return o_BTHV, new, torch.cat(assignments, dim=2).to(torch.int32)


def predict(q_BHTK: Tensor, mu_k: Tensor, mu_v: Tensor, c_BGn: Tensor, k_BGLK: Tensor, v_BGLV: Tensor) -> Tensor:
    """o = softmax([beta q.mu^k + log c, beta q.k_s for s <= t]) [mu^v, v_s] (eq. 15), for the chunk's last T tokens."""
    T, L = q_BHTK.shape[2], k_BGLK.shape[2]
    q_BGRTK = q_BHTK.unflatten(1, (k_BGLK.shape[1], -1))
    old = torch.einsum("bgrtk,bgnk->bgrtn", q_BGRTK, mu_k) + c_BGn.log()[:, :, None, None, :]
    own = torch.einsum("bgrtk,bglk->bgrtl", q_BGRTK, k_BGLK)
    future = torch.ones(T, L, dtype=torch.bool, device=own.device).triu(L - T + 1)
    p = torch.cat([old, own.masked_fill(future, -torch.inf)], dim=-1).softmax(-1)
    return torch.einsum("bgrtn,bgnv->bgrtv", p, torch.cat([mu_v, v_BGLV], dim=2)).flatten(1, 2)


@torch.no_grad()
def assign(
    k: Tensor, v: Tensor, mu_k: Tensor, mu_v: Tensor, after: int, start: int, spec: OVQSpec, dtype: torch.dtype
) -> Tensor:
    """int64 [B, G, L]: the centroid of each key of the chunk that starts at token `start` and leaves `after` in use."""
    n = mu_k.shape[2]
    if n == 0:
        mu_k, mu_v = k[:, :, :1], v[:, :, :1]  # the first key is centroid 0
    similarity = similarities(k, v, mu_k, mu_v, spec, dtype)
    best, a = similarity.max(-1)  # eq. 18; ties go to the lowest index
    order = best.argsort(dim=-1, stable=True)
    if spec.seeding == "random":
        order = spec.hash_order(start, k.device).expand_as(order)
    founded = after - n
    if n == 0:  # the first key always founds centroid 0
        others = order[order != 0].view(*order.shape[:2], -1)
        order = torch.cat([torch.zeros_like(order[..., :1]), others], dim=-1)
    founders = order[..., :founded].sort(-1).values  # numbered in text order
    if n == 0 and spec.first_chunk == "nearest":
        seeds = k.gather(2, founders[..., None].expand(-1, -1, -1, k.shape[3]))
        a = torch.einsum("bglk,bgnk->bgln", k, seeds).argmax(-1)
    return a.scatter(2, founders, torch.arange(n, after, device=k.device).expand_as(founders))


def similarities(k: Tensor, v: Tensor, mu_k: Tensor, mu_v: Tensor, spec: OVQSpec, dtype: torch.dtype) -> Tensor:
    """[B, G, L, n], with means rounded to the inputs' dtype, which is `dtype`, as in every backend."""
    mu_k, mu_v = mu_k.to(dtype).to(k.dtype), mu_v.to(dtype).to(v.dtype)
    similarity = torch.einsum("bglk,bgnk->bgln", k, mu_k)
    if spec.assign_on == "key_value":
        # -(|k - mu^k|^2 + |v - mu^v|^2)
        similarity = 2 * (similarity + torch.einsum("bglv,bgnv->bgln", v, mu_v))
        similarity = similarity - (mu_k.square().sum(-1) + mu_v.square().sum(-1))[:, :, None, :]
        similarity = similarity - (k.square().sum(-1) + v.square().sum(-1))[:, :, :, None]
    return similarity


def commit(
    S_k: Tensor, S_v: Tensor, c: Tensor, k: Tensor, v: Tensor, a_BGL: Tensor, spec: OVQSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums and counts after the chunk (eq. 19)."""
    member_BGNL = F.one_hot(a_BGL, c.shape[2]).transpose(2, 3).to(k.dtype)
    m = member_BGNL.sum(-1)
    more_k, more_v = member_BGNL @ k, member_BGNL @ v
    if spec.rate is None:
        return S_k + more_k, S_v + more_v, c + m
    # A sum is count x mean. A new centroid starts as the mean of its keys; one that gets no keys is left unchanged.
    kept = torch.where(c > 0, (1 - spec.rate) ** m, (m == 0).to(m.dtype))
    old, new = kept * (c + m) / c.clamp_min(1), (1 - kept) * (c + m) / m.clamp_min(1)
    return old[..., None] * S_k + new[..., None] * more_k, old[..., None] * S_v + new[..., None] * more_v, c + m
