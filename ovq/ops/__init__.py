"""The operators that mixers and models are made of; each folder holds its definition and its fast forms."""

from ovq.ops.ovq_attention import OVQState, ovq_attention

__all__ = ["OVQState", "ovq_attention"]
