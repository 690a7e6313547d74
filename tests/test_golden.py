"""Golden losses: eight training steps of every named model in float64, compared with the losses on file.

If a change must not alter results, these files staying unchanged proves that it does not. If it must, rewrite them with
`OVQ_UPDATE_GOLDEN=1 pytest tests/test_golden.py`; the diff shows by how much the results change.

A loss can be golden on every processor only if no choice depends on rounding. Models that choose (the nearest centroid,
the keys that start new ones) diverge when the last bit of a tie differs, as it does between AVX2 and AVX-512.
The smallest margin of any choice is therefore checked, and models that have ties on repeated text are tested on text
without repeats.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ovq.model import build_model
from tests.helpers import MODELS, small_config

GOLDEN = Path(__file__).parent / "golden"
STEPS, BATCH, TOKENS = 8, 2, 55
TIED_BY_REPEATS = ("sw_ovq", "sw_kvm", "vq")
SMALLEST_MARGIN = 1e-9  # relative; float64 rounding, amplified by eight steps, stays below 1e-12


def losses(name: str, *, repeats: bool) -> list[float]:
    """The mean loss per token of each step, on text with or without repeated tokens."""
    vocab_size, texts = (31, noisy_phrase()) if repeats else (128, distinct_tokens())
    model = build_model(small_config(name).model, vocab_size=vocab_size).double()
    model.init_weights(0)  # drawn in float64: in float32, normal draws differ in the last bit between processors
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    out = []
    for _, text in zip(range(STEPS), texts):
        result = model(text[:, :-1], targets_BT=text[:, 1:])
        loss = result.loss / (text.numel() - BATCH)
        total = loss + result.aux_loss / text.numel() if result.aux_loss is not None else loss
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        out.append(float(loss.detach()))
    return out


def noisy_phrase() -> Iterator[Tensor]:
    """int64 [BATCH, TOKENS] for each step: a phrase of 11 tokens over and over, with a tenth of the tokens replaced."""
    generator = torch.Generator().manual_seed(0)
    phrase = torch.randint(31, (11,), generator=generator)
    while True:
        text = phrase.repeat(TOKENS // 11)[None].repeat(BATCH, 1)
        noise = torch.rand(text.shape, generator=generator) < 0.1
        yield torch.where(noise, torch.randint(31, text.shape, generator=generator), text)


def distinct_tokens() -> Iterator[Tensor]:
    """int64 [BATCH, TOKENS], the same for each step, in which no token appears twice.

    Equal context gives equal keys, and equal keys give ties. OVQ and KVM: a key's similarity to a centroid made of that
    key alone is 1 before rounding, so among several such keys, rounding picks the one that starts a new centroid.
    VQ: two dead codes replaced by equal keys are equally near to every key.
    """
    text = torch.randperm(128, generator=torch.Generator().manual_seed(0))[: BATCH * TOKENS].view(BATCH, TOKENS)
    while True:
        yield text


class Margins(TorchDispatchMode):
    """Records the margin of every choice: each max, argmax and sort of floating-point values along a dimension.

    `smallest` is the smallest difference between the two best candidates, or between neighbours in a sort (wherever its
    result is cut), relative to the largest magnitude among the candidates; infinite until a choice is made.
    """

    smallest = float("inf")
    CHOICES = (torch.ops.aten.max.dim, torch.ops.aten.argmax.default)
    SORTS = (torch.ops.aten.sort.default, torch.ops.aten.sort.stable)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if (func in self.CHOICES or func in self.SORTS) and args[0].is_floating_point():
            self._record(func, args[0], dict(zip([a.name for a in func._schema.arguments], args)) | (kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _record(self, func: Any, candidates: Tensor, arguments: dict[str, Any]) -> None:
        ordered = candidates.movedim(arguments.get("dim", -1), -1).sort(dim=-1).values
        scale = ordered.abs().nan_to_num(posinf=0).amax(-1)  # -inf: a candidate that is ruled out
        if func in self.CHOICES:
            ordered = ordered[..., -2:]
        if ordered.shape[-1] > 1:
            margin = ordered.diff(dim=-1).nan_to_num(nan=torch.inf, posinf=torch.inf)
            self.smallest = min(self.smallest, float((margin.amin(-1) / scale).min()))


@pytest.mark.parametrize("name", MODELS)
def test_losses_equal_the_golden_ones(name: str) -> None:
    path = GOLDEN / f"{name}.json"
    with Margins() as margins:
        got = losses(name, repeats=name not in TIED_BY_REPEATS)
    assert margins.smallest > SMALLEST_MARGIN, (
        f"{name} made a choice by a relative margin of {margins.smallest:.1e}, which rounding may decide otherwise on "
        "another processor: give it text without such a tie"
    )
    if os.environ.get("OVQ_UPDATE_GOLDEN"):
        GOLDEN.mkdir(exist_ok=True)
        path.write_text(json.dumps({"model": name, "steps": STEPS, "loss": [round(x, 9) for x in got]}) + "\n")
    want = json.loads(path.read_text())["loss"]
    assert got == pytest.approx(want, rel=1e-7), name
    assert got[-1] < got[0] - 0.1


@pytest.mark.parametrize("name", TIED_BY_REPEATS)
def test_ties_of_repeated_text_are_noticed(name: str) -> None:
    with Margins() as margins:
        losses(name, repeats=True)
    assert margins.smallest < SMALLEST_MARGIN
