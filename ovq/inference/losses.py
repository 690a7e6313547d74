"""The loss of every token of some documents, which are run through a model piece by piece.

The state is carried from one piece to the next, so memory grows with the context only by what the mixers themselves
keep.

Shapes: D documents in a batch, T positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ovq.mixers.base import detach_state
from ovq.model import IGNORE, Transformer
from ovq.processes import Axis

ALONE = Axis("context")


def exp(x: float) -> float:
    """e^x, or infinity where a float would overflow."""
    return math.exp(x) if not x > 700 else math.inf


@torch.no_grad()
def losses_by_position(
    model: Transformer,
    rows: list[np.ndarray],
    *,
    positions: int,
    piece: int,
    device: torch.device,
    should_stop: Callable[[], bool],
    context: Axis = ALONE,
) -> np.ndarray | None:
    """Loss in nats of each label of each row, float64 [D, positions]; 0 past a row's end. None if told to stop.

    Args:
        rows: the tokens of each document, at most positions + 1.
        piece: tokens per forward pass, over all ranks that share the rows.
        should_stop: called before every forward pass, the same number of times on every rank.
        context: the ranks that share the rows, which must be the `context_axis` of the model's mixers. All pass the
            same rows; each computes its part of every piece, and all return all losses.
    """
    padded, piece = (-(-length // context.size) * context.size for length in (positions, piece))
    tokens_DT = torch.zeros(len(rows), padded + 1, dtype=torch.int64)
    labels_DT = torch.full((len(rows), padded), IGNORE)
    for index, row in enumerate(rows):
        tokens_DT[index, : len(row)] = torch.from_numpy(row)
        labels_DT[index, : len(row) - 1] = tokens_DT[index, 1 : len(row)]
    state: list[Any] | None = None
    parts: list[Tensor] = []
    for start in range(0, padded, piece):
        if should_stop():
            return None
        width = min(piece, padded - start) // context.size
        span = slice(start + context.rank * width, start + (context.rank + 1) * width)
        out = model(
            tokens_DT[:, span].to(device),
            targets_BT=labels_DT[:, span].to(device),
            state=state,
            return_state=True,
            reduction="none",
        )
        state = detach_state(out.state)
        parts.append(context.gather(out.loss.T) if context.size > 1 else out.loss.T)
    return torch.cat(parts)[:positions].T.to("cpu", torch.float64).numpy()


def losses_with_restarts(
    model: Transformer,
    rows: list[np.ndarray],
    *,
    positions: int,
    restart: int,
    piece: int,
    device: torch.device,
    should_stop: Callable[[], bool],
    context: Axis = ALONE,
) -> np.ndarray | None:
    """Like `losses_by_position`, but a prediction sees only between `restart` and 2 x `restart` tokens before it.

    The document is cut into overlapping stretches of 2 x `restart` tokens, each run without a carried state, and only
    the second half of each counts (both halves of the first). The difference from the losses with the full context is
    what the model gains from the tokens further back.
    """
    nats_DT = np.zeros((len(rows), positions))
    at_once = max(1, piece // (2 * restart))  # stretches
    for index, row in enumerate(rows):
        starts = range(0, max(1, len(row) - 1 - restart), restart)
        stretches = [row[start : start + 2 * restart + 1] for start in starts]
        for first in range(0, len(stretches), at_once):
            losses = losses_by_position(
                *(model, stretches[first : first + at_once]),
                positions=2 * restart,
                piece=piece,
                device=device,
                should_stop=should_stop,
                context=context,
            )
            if losses is None:
                return None
            for start, nats_T in zip(starts[first : first + at_once], losses):
                begin = start + restart if start else 0
                end = min(start + 2 * restart, positions)
                nats_DT[index, begin:end] = nats_T[begin - start : end - start]
    return nats_DT
