"""Sequence length by step: `trainer.lengths`, a curriculum over rows of `trainer.context` tokens.

Rows are read as usual and then cut into shorter sequences: a step has the same tokens at any sequence length, and which
tokens are in step n still does not depend on the schedule.
"""

from __future__ import annotations

from typing import Protocol


class Settings(Protocol):
    """The part of `ovq.config.TrainerConfig` that is used here."""

    steps: int
    context: int
    context_parallel: int
    lengths: dict[int, int]


def length_at(step: int, trainer: Settings) -> int:
    """Tokens per sequence in step `step` (the first step is 1), from the last entry whose key is below `step`."""
    return [trainer.context, *(trainer.lengths[done] for done in sorted(trainer.lengths) if done < step)][-1]


def phases(trainer: Settings) -> list[tuple[int, int]]:
    """(number of steps, length) of each phase of the run."""
    bounds = (
        [*(done for done in sorted(trainer.lengths) if done < trainer.steps), trainer.steps] if trainer.lengths else []
    )
    parts = [(end - start, length_at(start + 1, trainer)) for start, end in zip(bounds, bounds[1:])]
    return parts or [(trainer.steps, trainer.context)]


def problem(trainer: Settings) -> str:
    """What is wrong with the lengths of a run, or their division among ranks, as one line; empty if nothing is."""
    context, ranks, lengths = trainer.context, trainer.context_parallel, trainer.lengths
    if context % ranks:
        return f"trainer.context_parallel={ranks} must divide trainer.context={context}"
    if lengths and min(lengths) != 0:
        return f"trainer.lengths must begin with step 0, but begins with {min(lengths)}; add 0: and a number of tokens"
    for done, length in lengths.items():
        if length < 1 or context % length:
            return (
                f"trainer.lengths has {length} tokens from step {done} on, which must divide trainer.context={context}"
            )
        if length % ranks:
            return f"trainer.context_parallel={ranks} must divide all trainer.lengths, {length} of step {done} too"
    return ""
