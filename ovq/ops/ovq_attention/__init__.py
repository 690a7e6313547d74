"""OVQ-attention (arXiv 2602.03922): attention to a dictionary learned while reading, and exactly to the own chunk.

`interface` is the call, `spec` the settings and the state, and beside them lie the backends: `reference` (the
definition), `torch` (fast on any device) and `triton` (GPU). This file imports no torch: the backend's name hides it.
"""

from ovq.ops.ovq_attention.interface import ovq_attention
from ovq.ops.ovq_attention.spec import OVQSpec, OVQState

__all__ = ["OVQSpec", "OVQState", "ovq_attention"]
