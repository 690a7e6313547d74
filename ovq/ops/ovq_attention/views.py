"""What a chunk's queries see, as views that the torch backend makes once for all chunks of the same shape.

Shapes: l tokens and t queries of one chunk, H query heads, G key/value heads, R = H / G, P = batch x G, n centroids in
use, in whole grains, K key width, V value width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ovq.ops.ovq_attention.table import Chunk, Scratch, Table, whole_grains


@dataclass
class Views:
    """What a chunk's queries see: views of the table, and of scratch memory for their probabilities.

    keys [P, l + n, K] and values [P, l + n, V], their transposes, log_count [P, 1, l + n]; p and ds [P, R t, l + n],
    their transposes, p_own [P, R, t, l], the part of p on the chunk's own tokens, and future [t, l], -inf where a token
    comes after the query; dkeys and dvalues, the gradients of the means.
    """

    keys: Tensor
    values: Tensor
    log_count: Tensor
    p: Tensor
    p_own: Tensor
    future: Tensor
    ds: Tensor
    dkeys: Tensor | None = None
    dvalues: Tensor | None = None

    def __post_init__(self) -> None:
        self.keys_T, self.values_T, self.p_T = self.keys.mT, self.values.mT, self.p.mT
        self.ds_T = self.ds.mT


class Seen:
    """The views of each chunk, made once for all chunks that have the same."""

    def __init__(
        self, table: Table, scratch: Scratch, chunks: list[Chunk], R: int, gradient: Tensor | None = None
    ) -> None:
        self.table, self.R, self.gradient, self.views = table, R, gradient, dict[tuple[int, ...], Views]()
        largest = table.P * R * max(c.length for c in chunks) * max(c.length + whole_grains(c.before) for c in chunks)
        self.memory = scratch.take("p", largest), scratch.take("p" if gradient is None else "ds", largest)

    def __call__(self, chunk: Chunk) -> Views:
        l, t, n = chunk.length, chunk.num_queries, whole_grains(chunk.before)
        if (l, t, n) not in self.views:
            table, V = self.table, self.table.V
            span = slice(table.L - l, table.L + n)
            means = table.means[:, span]
            p, ds = (x[: table.P * self.R * t * (l + n)].view(table.P, self.R * t, l + n) for x in self.memory)
            views = Views(
                keys=means[..., V:],
                values=means[..., :V],
                log_count=table.log_count[..., span],
                p=p,
                p_own=p.unflatten(1, (self.R, t))[..., :l],
                future=table.future_LL[l - t : l, :l],
                ds=ds,
            )
            if self.gradient is not None:
                views.dvalues, views.dkeys, _ = self.gradient[:, span].split([V, table.K, V + table.K], dim=-1)
            self.views[l, t, n] = views
        return self.views[l, t, n]
