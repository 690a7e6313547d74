"""Context parallelism where the ranks cannot divide a mixer's heads: each rank hands the layer's state to the next.

Rank r mixes its T/R tokens starting from the state after the tokens of rank r - 1, and hands on its own; in the
backward pass the gradients of the states travel back. The ranks of a sequence wait for each other for only one row of
one layer: a rank continues with the next row and the next layer while the rank after it begins.

This works for any mixer whose state carries gradients (`SequenceMixer.differentiable_state`), with the same results as
on one rank: the ranks' tokens are the consecutive pieces of a stream.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from ovq.errors import ConfigError
from ovq.mixers.base import SequenceMixer
from ovq.processes import Axis


def hand_over(mixer: SequenceMixer, axis: Axis) -> None:
    """From now on, in training, make the mixer start from the previous rank's state and hand its own to the next rank.

    It does so one row at a time, so that the next rank can begin after the first row. The mixer's `forward` raises
    ConfigError for packed documents, and if its backend has no gradient for a carried state.

    In evaluation, where successive pieces carry a state of their own, every rank mixes the tokens of all ranks and
    keeps its own outputs.
    """
    forward = mixer.forward
    # Shapes and dtypes of the states that arrive, by those of the input; and those of the inputs for which the next
    # rank has been told. Both are the same in every step.
    known: dict[Any, Any] = {}
    told = set[Any]()

    def row(x_1TD: Tensor) -> Tensor:
        state = None
        made_from = x_1TD.shape, x_1TD.dtype
        if axis.rank > 0:
            if made_from not in known:
                known[made_from] = _receive_object(axis)
            like, spec = pytree.tree_flatten(known[made_from])
            state = pytree.tree_unflatten(list(_Take.apply(x_1TD, axis, like)), spec)
        y, state = forward(x_1TD, state=state, return_state=axis.rank < axis.size - 1)
        if state is None:
            return y
        leaves = pytree.tree_leaves(state)
        if not any(leaf.requires_grad for leaf in leaves):
            raise ConfigError(
                f"{type(mixer).__name__} cannot pass its state on to the next rank: this backend computes no gradient "
                "for it. Use its backend=torch, or a trainer.context_parallel that divides the heads instead of "
                f"{axis.size}"
            )
        if made_from not in told:
            _send_object(axis, pytree.tree_map(lambda leaf: torch.empty_like(leaf, device="meta"), state))
            told.add(made_from)
        return _Give.apply(y, axis, *leaves)

    @functools.wraps(forward)
    @torch.compiler.disable
    def wrapped(
        x_BTD: Tensor, *, cu_seqlens: Tensor | None = None, state: Any = None, return_state: bool = False
    ) -> tuple[Tensor, Any]:
        if not mixer.training:
            T = x_BTD.shape[1]
            whole = axis.gather(x_BTD.transpose(0, 1)).transpose(0, 1)
            y, state = forward(whole, cu_seqlens=cu_seqlens, state=state, return_state=return_state)
            return y[:, axis.rank * T : (axis.rank + 1) * T], state
        if cu_seqlens is not None:
            raise ConfigError(
                "data.isolate_documents=true needs a trainer.context_parallel that divides the heads of "
                f"{type(mixer).__name__}, and {axis.size} does not"
            )
        return torch.cat([row(x) for x in x_BTD.split(1)]), None

    mixer.hands_over = True
    mixer.forward = wrapped  # type: ignore[method-assign]


class _Take(torch.autograd.Function):
    """The tensors that the previous rank sends; their gradients go back to it. `x` only ties them to the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, like: list[Tensor]) -> tuple[Tensor, ...]:
        ctx.axis = axis
        leaves = _unpacked(_receive(axis, -1, _bytes(like), x.device), like)
        ctx.mark_non_differentiable(*(leaf for leaf in leaves if not leaf.is_floating_point()))
        return leaves

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        _send(ctx.axis, -1, [gradient for gradient in gradients if gradient.is_floating_point()])
        return None, None, None


class _Give(torch.autograd.Function):
    """Sends tensors to the next rank, which returns their gradients; ties this to the graph through the returned y."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, axis: Axis, *leaves: Tensor) -> Tensor:
        ctx.axis, ctx.like = axis, [torch.empty_like(leaf, device="meta") for leaf in leaves]
        _send(axis, 1, leaves)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        floating = [leaf for leaf in ctx.like if leaf.is_floating_point()]
        received = iter(_unpacked(_receive(ctx.axis, 1, _bytes(floating), dy.device), floating))
        gradients = [next(received) if leaf.is_floating_point() else None for leaf in ctx.like]
        return dy, None, *gradients


_ON_THEIR_WAY: deque[tuple[Any, Tensor]] = deque()  # sends, whose messages must stay in memory until they have arrived
MOST = 4


def _send(axis: Axis, step: int, leaves: Sequence[Tensor]) -> None:
    message = torch.cat([leaf.detach().contiguous().flatten().view(torch.uint8) for leaf in leaves])
    _ON_THEIR_WAY.append((dist.isend(message, _neighbour(axis, step), axis.group), message))
    while len(_ON_THEIR_WAY) > MOST:
        _ON_THEIR_WAY.popleft()[0].wait()


def _receive(axis: Axis, step: int, size: int, device: torch.device) -> Tensor:
    message = torch.empty(size, dtype=torch.uint8, device=device)
    dist.recv(message, _neighbour(axis, step), axis.group)
    return message


def _send_object(axis: Axis, thing: Any) -> None:
    dist.send_object_list([thing], _neighbour(axis, 1), axis.group)


def _receive_object(axis: Axis) -> Any:
    received = [None]
    dist.recv_object_list(received, _neighbour(axis, -1), axis.group)
    return received[0]


def _neighbour(axis: Axis, step: int) -> int:
    """The global rank of the process `step` places after this one on the axis."""
    rank = axis.rank + step
    return rank if axis.group is None else dist.get_global_rank(axis.group, rank)


def _bytes(like: Sequence[Tensor]) -> int:
    return sum(leaf.numel() * leaf.itemsize for leaf in like)


def _unpacked(message: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Tensors like those of `like`, from their bytes; copies, since a part may begin at any byte."""
    parts = message.split([leaf.numel() * leaf.itemsize for leaf in like])
    return tuple(part.clone().view(leaf.dtype).view(leaf.shape) for part, leaf in zip(parts, like))
