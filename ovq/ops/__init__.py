"""The operators that mixers and models are built from; each folder holds a reference and its fast implementations."""

from ovq.ops.cross_entropy import chunked_cross_entropy, soft_cap
from ovq.ops.ovq_attention import OVQState, ovq_attention

__all__ = ["OVQState", "chunked_cross_entropy", "ovq_attention", "soft_cap"]
