"""Claims about an export's single file that do not need transformers; for the others see tests/test_export.py."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from ovq.export import flatten
from ovq.model import build_mixer
from tests.helpers import MIXERS, relative_error, small_config


@pytest.mark.parametrize("name", MIXERS)
def test_a_mixer_in_a_file_of_its_own_computes_what_the_packages_does(name: str, tmp_path: Path) -> None:
    """Outputs of one pass, their gradients, and outputs from a carried state."""
    added = [] if name == "sliding_window" else [f"+model/mixer@model.mixers.{name}={name}", f"model.pattern=[{name}]"]
    cfg = small_config("sw", *added)
    own = build_mixer(cfg.model, 0)
    torch.manual_seed(0)
    own.init_weights(0.2)
    settings = dict(cfg.model.mixers[name])
    module, _, kind = settings.pop("_target_").rpartition(".")
    file = tmp_path / f"flat_{name}.py"
    file.write_text(flatten.flatten([(module, kind), ("ovq.mixers.base", "MixerShape")], '"""One mixer."""'))
    assert "\nfrom ovq" not in file.read_text() and "\nimport ovq" not in file.read_text()
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    flat_module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(flat_module)
    flat = getattr(flat_module, kind)(flat_module.MixerShape(**dataclasses.asdict(own.shape)), **settings)
    flat.load_state_dict(own.state_dict())
    results = []
    for mixer in (own.double().eval(), flat.double().eval()):
        x = torch.randn(2, 45, own.shape.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        y, state = mixer(x[:, :40].requires_grad_(), return_state=True)
        y.square().sum().backward()
        later = mixer(x[:, 40:], state=state)[0]
        results.append([y, later, *(p.grad for p in mixer.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 2  # outputs, and the gradient of one parameter at least
    assert max(relative_error(a, b) for a, b in zip(*results)) < 1e-12
