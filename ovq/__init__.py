"""ovq: long-context pretraining with online vector-quantised attention (arXiv 2602.03922).

import ovq

model = ovq.load("runs/cpu_demo")
model.loss("It was a dark and stormy night.")
print(model.generate("It was a dark", tokens=100))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ovq.cpu import quiet_threads

if TYPE_CHECKING:
    from ovq.inference.load import load as load

quiet_threads()  # before anything imports torch


def __getattr__(name: str) -> Any:
    """`ovq.load`, imported on first use: most code that imports ovq does not need torch."""
    if name == "load":
        from ovq.inference.load import load

        return load
    raise AttributeError(f"module 'ovq' has no attribute '{name}'")
