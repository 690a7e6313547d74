"""The definition is that of full attention, with a limit on how far back a query attends."""

from ovq.ops.attention.reference import forward

__all__ = ["forward"]
