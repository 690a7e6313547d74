"""Compare the Triton kernels with torch on the run's GPU before training, and use torch if they are wrong."""

from __future__ import annotations

import sys

import torch

from ovq.config import Config
from ovq.errors import ConfigError
from ovq.mixers.ovq import OVQ
from ovq.model import Transformer
from ovq.ops.ovq_attention import selftest
from ovq.ops.ovq_attention.interface import backend_of
from ovq.ops.ovq_attention.verify import Problem
from ovq.processes import World, gather_objects


def choose_backends(model: Transformer, cfg: Config, world: World) -> None:
    """Test the kernels at the run's own shapes, if any layers would use them. If they fail on any machine, set those
    layers' backend to "torch" on all ranks, and say so.

    The first rank of each machine tests, while the others wait for its verdict. Without a GPU nothing is done. A
    collective.

    Layers that hand their state over (`hand_over`) use "torch" in any case, unless the config names another backend.

    Raises:
        ConfigError: they fail, and the config asks for the kernels by name.
        BackendError: the config asks for the kernels by name, and they do not support this run.
    """
    if world.device.type != "cuda":
        return
    ours = [mixer for mixer in model.mixers() if isinstance(mixer, OVQ)]
    for mixer in ours:
        if mixer.hands_over and mixer.backend == "auto":
            mixer.backend = "torch"  # the kernels have no gradient for a state that is handed over
    if not cfg.trainer.kernel_test_s:
        return
    layers = {mixer: problem for mixer in ours if (problem := problem_of(mixer, cfg, world)) is not None}
    failures = gather_objects(_first_failure(set(layers.values()), cfg, world) if world.local_rank == 0 else None)
    failure = next((what for what in failures if what is not None), None)
    if failure is None:
        return
    asked = [name for name in names_of(cfg) if cfg.model.mixers[name].get("backend") == "triton"]
    name = (asked or names_of(cfg) or ["ovq"])[0]
    what = f"the Triton kernels fail their self-test on {failure}"
    force = "trainer.kernel_test_s=0"
    if any(mixer.backend == "triton" for mixer in layers):
        raise ConfigError(
            f"model.mixers.{name}.backend=triton, but {what}; use model.mixers.{name}.backend=torch, or add {force} to "
            "train with them untested"
        )
    for mixer in layers:
        mixer.backend = "torch"
    if world.is_main:
        print(
            f"ovq: {what}; training uses the torch backend, which is slower. To train with them untested: {force}",
            file=sys.stderr,
            flush=True,
        )


def _first_failure(problems: set[Problem], cfg: Config, world: World) -> str | None:
    """'NVIDIA H200, ... (what failed)' for the first problem that the kernels fail on; None if they fail on none."""
    for problem in sorted(problems, key=str):
        verdict = selftest.check(problem, world.device, seconds=cfg.trainer.kernel_test_s, kernels=selftest.KERNELS)
        if not verdict.passed:
            return f"{selftest.card_of(world.device)} ({verdict.what})"
    return None


def problem_of(mixer: OVQ, cfg: Config, world: World) -> Problem | None:
    """The shape, dtype and settings that a layer needs from the kernels in this run; None if it does not use them."""
    if mixer.hands_over:
        return None
    shape, trainer, ranks = mixer.shape, cfg.trainer, mixer.head_ranks
    dtype = torch.bfloat16 if world.precision == "bf16" else torch.float32
    packed = cfg.data.isolate_documents
    batch = 1 if packed else trainer.micro_batch
    q, k = (
        torch.empty(batch, 1, heads, shape.head_dim, dtype=dtype, device=world.device)
        for heads in (shape.num_heads // ranks, shape.num_kv_heads // ranks)
    )
    if backend_of(mixer.backend, q, k, k, mixer.spec) != "triton":
        return None
    return Problem(
        batch=batch,
        heads=shape.num_heads // ranks,
        kv_heads=shape.num_kv_heads // ranks,
        key_width=shape.head_dim,
        value_width=shape.head_dim,
        dtype=str(dtype).removeprefix("torch."),
        context=trainer.context,
        packed=packed,
        settings=mixer.spec.text,
        several_ranks=world.size > 1,
    )


def names_of(cfg: Config) -> list[str]:
    """The names that the config gives to the OVQ mixers of its pattern."""
    own = f"{OVQ.__module__}.{OVQ.__qualname__}"
    return [name for name in dict.fromkeys(cfg.model.pattern) if cfg.model.mixers[name].get("_target_") == own]
