"""Sequence mixers: one file each, all with the interface of `base.SequenceMixer`.

A mixer is named in a config by its class path (`_target_`), so nothing is registered here and one from outside the
package works the same way.
"""

from ovq.mixers.base import MixerShape, SequenceMixer

__all__ = ["MixerShape", "SequenceMixer"]
