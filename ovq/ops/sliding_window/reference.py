"""The definition is that of full attention with a bound on how far back a query sees."""

from ovq.ops.attention.reference import forward

__all__ = ["forward"]
