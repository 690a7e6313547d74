"""Claims about a mixer from outside the package: one file and one config line make it work like any other."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ovq.compose import CONFIG_DIR, compose
from ovq.errors import ConfigError
from ovq.mixers.base import SequenceMixer
from ovq.model import build_mixer, build_model
from tests import test_mixers as contract
from tests.helpers import TINY

# A leaky running mean of the past: h_t = decay h_{t-1} + (1 - decay) x_t, y = W h.
MODULE = '''
import torch
from torch import nn

from ovq.mixers import SequenceMixer


class Leaky(SequenceMixer):
    """y_t = W h_t, h_t = decay h_{t-1} + (1 - decay) x_t, from h = 0 at the start of every document."""

    def __init__(self, shape, *, decay: float = 0.9) -> None:
        super().__init__(shape)
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} of leaky must be in [0, 1)")
        self.decay = decay
        self.out_proj = nn.Linear(shape.dim, shape.dim, bias=False)

    def forward(self, x, *, cu_seqlens=None, state=None, return_state=False):
        starts = set(cu_seqlens.tolist()) if cu_seqlens is not None else {0}
        h, rows = torch.zeros_like(x[:, 0]) if state is None else state, []
        for t in range(x.shape[1]):
            if t in starts and state is None:
                h = torch.zeros_like(h)
            h = self.decay * h + (1 - self.decay) * x[:, t]
            rows.append(h)
        return self.out_proj(torch.stack(rows, dim=1)), h if return_state else None

    def state_size(self, context: int) -> int:
        return self.shape.dim

    def mixing_flops(self, context: int) -> float:
        return 3 * self.shape.dim
'''
ADDED = [
    "model=sw",
    "+model.mixers.leaky={_target_: toy_mixer.Leaky, decay: 0.5}",
    "model.pattern=[sliding_window,leaky]",
]


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder outside the package, on the import path, that holds the mixer's module."""
    (tmp_path / "toy_mixer.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield tmp_path
    sys.modules.pop("toy_mixer", None)


def test_a_mixer_from_outside_meets_the_common_contract(outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(name: str, *, kv_heads: int = 2, seed: int = 0) -> SequenceMixer:
        mixer = build_mixer(compose([*ADDED, *TINY]).model, 1)
        torch.manual_seed(seed)
        mixer.init_weights(0.2)
        return mixer.double().eval()

    assert type(make("leaky")).__module__ == "toy_mixer"
    monkeypatch.setattr(contract, "make", make)
    contract.test_output_before_t_ignores_token_t("leaky")
    for pieces in ([contract.T], [1, 6, 20, 18], [1] * contract.T):
        contract.test_streamed_in_pieces_equals_one_pass("leaky", pieces)
    contract.test_a_state_is_not_modified_by_using_it("leaky")
    contract.test_packed_documents_do_not_see_each_other("leaky")
    contract.test_every_parameter_and_the_input_get_a_finite_gradient("leaky")
    contract.test_state_size_is_what_is_held("leaky")


def test_the_contract_rejects_a_mixer_that_looks_ahead(outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from toy_mixer import Leaky  # type: ignore[import-not-found]

    class LooksAhead(Leaky):  # type: ignore[misc]
        def forward(self, x, **kwargs):
            return super().forward(x + x.roll(-1, dims=1), **kwargs)

    shape = build_mixer(compose([*ADDED, *TINY]).model, 1).shape
    monkeypatch.setattr(contract, "make", lambda name: LooksAhead(shape).double().eval())
    with pytest.raises(AssertionError, match="token 1 changed an output before it"):
        contract.test_output_before_t_ignores_token_t("leaky")


def test_its_settings_are_checked_like_those_of_any_other(outside: Path) -> None:
    with pytest.raises(ConfigError, match="no setting 'model.mixers.leaky.colour'; legal: decay"):
        build_model(compose([*ADDED, *TINY, "+model.mixers.leaky.colour=3"]).model, 8)
    with pytest.raises(ConfigError, match=r"model.mixers.leaky: decay=2.0 of leaky must be in \[0, 1\)"):
        build_model(compose([*ADDED, *TINY, "model.mixers.leaky.decay=2"]).model, 8)


def test_train_py_trains_a_mixer_from_outside(outside: Path) -> None:
    line = [
        *ADDED,
        *TINY,
        "data=recall",
        *("data.task.key_vocab=16", "data.task.value_vocab=4", "optim.lr=1e-2", "optim.warmup_steps=1"),
        *("trainer.steps=12", "trainer.context=32", "trainer.global_batch=8", "trainer.micro_batch=8"),
        *("trainer.device=cpu", "trainer.progress=false", "eval.at_end=false", f"run_dir={outside}/run"),
    ]
    environment = os.environ | {"PYTHONPATH": str(outside), "OMP_NUM_THREADS": "1"}
    root = CONFIG_DIR.parent
    done = subprocess.run(
        [sys.executable, "train.py", *line], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (outside / "run" / "summary.json").is_file()
    from ovq.train.metrics import read_rows

    losses = [row["loss"] for row in read_rows(outside / "run" / "metrics.jsonl")]
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.5
