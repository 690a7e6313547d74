"""Sequence mixers: one file each, all with the interface of `base.SequenceMixer`.

A config names a mixer by its class path (`_target_`), so there is no registry, and a mixer from outside the package
works the same way.
"""

from ovq.mixers.base import MixerShape, SequenceMixer

__all__ = ["MixerShape", "SequenceMixer"]
