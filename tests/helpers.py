"""Shared test helpers: small models of every kind, a comparison that NaN cannot pass, and jobs of two ranks."""

from __future__ import annotations

import copy
import functools
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eval.bench.gpu.checks import relative_error as relative_error  # tests and the GPU checks use the same measure
from ovq.cli import guarded
from ovq.compose import CONFIG_DIR, compose, options
from ovq.config import Config
from ovq.model import Transformer, build_model
from ovq.ops.ovq_attention import OVQSpec
from ovq.train import checkpoint

TINY = [
    "model.num_layers=2",
    "model.dim=32",
    "model.num_heads=2",
    "model.num_kv_heads=2",
    "model.head_dim=16",
    "model.ffn_dim=48",
]

# Settings that make each mixer small enough for tests to reach edge cases: several chunks, a full window or dictionary.
SMALL_MIXER = {
    "sliding_window": {"window": 7},
    "ovq": {"num_centroids": 12, "chunk_size": 8},
    "vq": {"num_codes": 12, "block_size": 8},
    "linear_attention": {"chunk_size": 8},
    "gated_deltanet": {"chunk_size": 8},
    "mamba2": {"chunk_size": 8},
    "mesa_net": {"chunk_size": 8},
    "fifo": {"capacity": 12, "chunk_size": 8},
    "reservoir": {"capacity": 12, "chunk_size": 8},
    "learned_compression": {"capacity": 12, "chunk_size": 8},
    "kvm": {"capacity": 12, "chunk_size": 8},
}

MODELS = options("model")
MIXERS = options("model/mixer")


def chosen(run_dir: Path | str, resume: str = "auto", keep_last: int | None = None) -> Path | None:
    """The checkpoint that a run resumes from; the folder is made to fit, as at a start that is not refused."""
    choice = checkpoint.choose(run_dir, resume)
    checkpoint.settle(run_dir, choice, keep_last)
    return choice.path


def small_config(model: str, *overrides: str) -> Config:
    """The config of a named model at test size: a copy of a cached one, since composing takes a tenth of a second."""
    return copy.deepcopy(_small_config(model, overrides))


@functools.cache
def _small_config(model: str, overrides: tuple[str, ...]) -> Config:
    cfg = compose([f"model={model}", *TINY, *overrides])
    given = [override.partition("=")[0].lstrip("+") for override in overrides]
    for name in cfg.model.mixers:
        for key, value in SMALL_MIXER.get(name, {}).items():
            assert key in cfg.model.mixers[name], f"SMALL_MIXER names {name}.{key}, but {name} has no such setting"
            if f"model.mixers.{name}.{key}" not in given:
                cfg.model.mixers[name][key] = value
    return cfg


def started(base: Config, *words: str, start: Callable[[Config, Path], None]) -> int:
    """Exit status of `start` (train.train or train.dry_run) with a composed config and further key=value words, as from
    the command line but without composing again."""
    cfg: Any = OmegaConf.merge(base, OmegaConf.from_dotlist([*words]))
    return guarded(lambda: start(cfg, Path(cfg.run_dir)))


def extra_of(step: int) -> dict[str, Any]:
    """What a checkpoint of an evaluation test holds besides weights."""
    return {"step": step, "tokens": 24 * step}


def small_model(model: str, *overrides: str, vocab_size: int = 61, seed: int = 0) -> Transformer:
    built = build_model(small_config(model, *overrides).model, vocab_size)
    built.init_weights(seed)
    return built


def spec_of(num_centroids: int, chunk_size: int, *, step: str | float = "count", **settings: Any) -> OVQSpec:
    """An OVQSpec from the keywords of `ovq_attention`."""
    return OVQSpec(num_centroids, chunk_size, step_size=step, **settings)


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest storage that any operator returned, forward or backward."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *(leaf.untyped_storage().nbytes() // leaf.itemsize for leaf in made)])
        return out


class InsideOperators(TorchDispatchMode):
    """Shows enclosing modes what happens inside our own operators on the CPU, which torch sees as single calls."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace != "ovq":
            return func(*args, **(kwargs or {}))
        with self:
            return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **(kwargs or {}))


def two_ranks(program: str, folder: Path) -> list[subprocess.Popen[str]]:
    """Start two ranks of a job, which run the source code `program` with the folder as argument; output is piped."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(CONFIG_DIR.parent)}
    return [
        subprocess.Popen(
            [sys.executable, "-c", program, str(folder)],
            cwd=CONFIG_DIR.parent,
            env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
