"""The operators that mixers and models are made of; each folder holds its definition and its fast forms."""

from ovq.ops.cross_entropy import chunked_cross_entropy
from ovq.ops.ovq_attention import OVQState, ovq_attention

__all__ = ["OVQState", "chunked_cross_entropy", "ovq_attention"]
