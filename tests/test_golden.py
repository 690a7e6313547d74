"""Golden losses: eight training steps of every named model, in float64, as they were when the file was written.

A change that must not alter results is proved by this file staying as it is. One that must alter them rewrites it with
`OVQ_UPDATE_GOLDEN=1 pytest tests/test_golden.py`, and the diff shows by how much.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from ovq.model import build_model
from tests.helpers import MODELS, small_config

GOLDEN = Path(__file__).parent / "golden"
STEPS = 8


def losses(name: str) -> list[float]:
    model = build_model(small_config(name).model, vocab_size=31).double()
    model.init_weights(0)  # drawn in float64: in float32, processors differ in the last bit of a normal number
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    # A sequence with something to learn: tokens repeat with period 11, under a little noise.
    generator = torch.Generator().manual_seed(0)
    phrase = torch.randint(31, (11,), generator=generator)
    out = []
    for _ in range(STEPS):
        text = phrase.repeat(5)[None].repeat(2, 1)
        noise = torch.rand(text.shape, generator=generator) < 0.1
        text = torch.where(noise, torch.randint(31, text.shape, generator=generator), text)
        result = model(text[:, :-1], targets_BT=text[:, 1:])
        loss = result.loss / (text.numel() - 2)
        total = loss + result.aux_loss / text.numel() if result.aux_loss is not None else loss
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        out.append(float(loss.detach()))
    return out


@pytest.mark.parametrize("name", MODELS)
def test_losses_are_the_golden_ones(name: str) -> None:
    path = GOLDEN / f"{name}.json"
    got = losses(name)
    if os.environ.get("OVQ_UPDATE_GOLDEN"):
        GOLDEN.mkdir(exist_ok=True)
        path.write_text(json.dumps({"model": name, "steps": STEPS, "loss": [round(x, 9) for x in got]}) + "\n")
    want = json.loads(path.read_text())["loss"]
    assert got == pytest.approx(want, rel=1e-7), name
    assert got[-1] < got[0] - 0.1
