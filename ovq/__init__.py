"""ovq: long-context pretraining with online vector-quantised attention (arXiv 2602.03922).

import ovq

model = ovq.load("runs/cpu_demo")
model.loss("It was a dark and stormy night.")
print(model.generate("It was a dark", tokens=100))
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from ovq.cpu import quiet_threads

if TYPE_CHECKING:
    from pathlib import Path

    from ovq.inference.load import LoadedModel

quiet_threads()  # before anything imports torch


def load(
    path: str | Path,
    *,
    checkpoint: str | int | None = None,
    device: str = "auto",
    precision: str | None = None,
    num_centroids: int | None = None,
    trust: Collection[str] = (),
) -> LoadedModel:
    """Open a trained model: its weights, its tokenizer and its config. Nothing in the folder is changed.

    Args:
        path: a run folder, or one of its checkpoints.
        checkpoint: of a run folder, a checkpoint's folder, name or step; None: the newest good one.
        device: auto | cpu | cuda.
        precision: fp32 | bf16 | auto; None: that of the run.
        num_centroids: capacity of the dictionaries, if not that of training.
        trust: what the config may use: classes outside this project, whose code then runs, and oc.env:NAME.

    Raises:
        ConfigError: no such run, a class that is not trusted, an unusable device, or no dictionary to change.
        CheckpointError: there is no good checkpoint, or a damaged one was named.
    """
    from ovq.inference import load

    return load.load(
        path, checkpoint=checkpoint, device=device, precision=precision, num_centroids=num_centroids, trust=trust
    )
