"""OVQ-attention (arXiv 2602.03922): attention to a dictionary learned online, and exact attention to the current chunk.

`interface` holds the entry points, `spec` the settings and the state; the backends are `reference` (the definition),
`chunked` ("torch", fast on any device) and `kernels` ("triton", GPU).
"""

from ovq.ops.ovq_attention.interface import attend, ovq_attention
from ovq.ops.ovq_attention.spec import OVQSpec, OVQState

__all__ = ["OVQSpec", "OVQState", "attend", "ovq_attention"]
