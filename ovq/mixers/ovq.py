"""OVQ-attention as a layer (arXiv 2602.03922, eqs. 15-19): unit-norm keys and queries, no positions."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ovq.mixers.attention_layer import AttentionLayer
from ovq.mixers.base import MixerShape, keys_in_chunk
from ovq.ops.common import check_backend
from ovq.ops.ovq_attention import OVQSpec, OVQState, attend


class OVQ(AttentionLayer):
    """Attends to a dictionary of at most `num_centroids` running means of keys and values, and exactly to the current
    chunk.

    logits = beta_h sqrt(K) cos(q, k) (+ log count for a centroid), with beta_h learned and initialised to `beta_init`.
    All other arguments are those of `ovq.ops.ovq_attention`, whose `step` is `step_size` here. State: the dictionary,
    and the keys and values of the unfinished chunk.

    Raises:
        ValueError: a setting outside its legal values (see `ovq.ops.ovq_attention.spec.OVQSpec`).
    """

    def __init__(
        self,
        shape: MixerShape,
        *,
        num_centroids: int = 2048,
        chunk_size: int = 128,
        growth: str = "plateau",
        growth_tokens: int | None = None,
        seeding: str = "spread",
        seed: int = 0,
        step_size: str | float = "count",
        first_chunk: str = "merge",
        assign_on: str = "key",
        beta_init: float = 1.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(shape, qk_norm=True, beta_init=beta_init)
        check_backend("ovq", backend, "triton")
        self.backend = backend
        self.spec = OVQSpec(
            num_centroids=num_centroids,
            chunk_size=chunk_size,
            growth=growth,
            growth_tokens=growth_tokens,
            seeding=seeding,
            seed=seed,
            step_size=step_size,
            first_chunk=first_chunk,
            assign_on=assign_on,
        )

    @property
    def capacity(self) -> int:
        return self.spec.num_centroids

    def set_capacity(self, capacity: int) -> None:
        self.spec = dataclasses.replace(self.spec, num_centroids=capacity)  # validates the capacity

    def forward(
        self,
        x_BTD: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        state: OVQState | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, OVQState | None]:
        q, k, v = self.project(x_BTD)
        beta = self.inverse_temperature()
        report = self.collect_health and cu_seqlens is None
        o, new_state = self._attend(
            q, k, v, beta, cu_seqlens=cu_seqlens, state=state, return_state=return_state or report
        )
        if report:
            assert new_state is not None
            self._report(new_state)
        elif self.collect_health and cu_seqlens is not None:
            self._report_longest_document(q, k, v, beta, cu_seqlens)
        return self.project_out(o), new_state if return_state else None

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, **options: Any) -> tuple[Tensor, OVQState | None]:
        return attend(q, k, v, beta, self.spec, backend=self.backend, **options)

    @torch.no_grad()
    def _report_longest_document(self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, cu_seqlens: Tensor) -> None:
        """Each packed document has its own dictionary: report that at the end of the longest one."""
        bounds = cu_seqlens.tolist()
        start, end = max(zip(bounds, bounds[1:]), key=lambda pair: pair[1] - pair[0])
        part = slice(start, end)
        _, state = self._attend(q[:, part], k[:, part], v[:, part], beta, return_state=True)
        assert state is not None
        self._report(state)

    @torch.no_grad()
    def _report(self, state: OVQState) -> None:
        used = self.all_heads(state.count[:, :, : max(state.size, 1)].transpose(0, 1))
        self.health = {
            "fill": used.new_tensor(state.size / self.spec.num_centroids),
            "used_once": (used == 1).float().mean(),
            "mean_count": used.mean(),
            "beta": self.mean_beta(),
        }

    def state_size(self, context: int) -> int:
        """N key sums, value sums and counts, and the keys and values of an unfinished chunk."""
        shape, N = self.shape, self.spec.num_centroids
        pending = context % self.spec.chunk_size
        return shape.num_kv_heads * (N * (2 * shape.head_dim + 1) + 2 * shape.head_dim * pending)

    def float32_state(self, context: int) -> int:
        return self.shape.num_kv_heads * self.spec.num_centroids * (2 * self.shape.head_dim + 1)

    def mixing_flops(self, context: int) -> float:
        """Assignment (a product of each key with the centroids), prediction (two per query), and the current chunk."""
        L = self.spec.chunk_size
        seen = sum(min(L, context - start) * self.spec.size_at(start) for start in range(0, context, L)) / context
        predict = 4 * self.shape.num_heads * self.shape.head_dim * (seen + keys_in_chunk(context, L))
        return self.assignment_flops(context) + predict

    def assignment_flops(self, context: int) -> float:
        L = self.spec.chunk_size
        found = sum(L * self.spec.size_at(start) for start in range(0, context - L + 1, L))  # by whole chunks
        return 2 * self.shape.num_kv_heads * self.shape.head_dim * found / context
