"""Device copies of small host arrays, made once without synchronising, safe for several streams and CUDA graphs.

The copy is queued on the stream of the call that first needs it. A call on another stream waits for that copy, on the
device, and marks the memory as in use there, so that the allocator cannot reuse it before the call's kernels have run,
no matter when the owner of the copies is dropped. During a CUDA-graph capture nothing is copied: every replay would
repeat the copy, from host memory that is long gone. A call at the same shape before the capture makes the copies; a
capture that uses them keeps them alive for the rest of the process.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

Arrays = Mapping[str, np.ndarray]


class Streams:
    """What `Copies` needs from CUDA; tests replace it with a fake."""

    def current(self, device: torch.device) -> Any:
        return torch.cuda.current_stream(device)

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def copy(self, host: Tensor, device: torch.device) -> Tensor:
        return host.pin_memory().to(device, non_blocking=True)

    def done(self, stream: Any) -> Any:
        """An event recorded after everything queued on the stream so far."""
        return stream.record_event()

    def wait(self, stream: Any, event: Any) -> None:
        stream.wait_event(event)

    def use(self, stream: Any, tensor: Tensor) -> None:
        tensor.record_stream(stream)


CUDA = Streams()
_captured: dict[int, dict[str, Tensor]] = {}  # copies whose addresses are in CUDA graphs


@dataclass
class _Copied:
    tensors: dict[str, Tensor]
    event: Any
    streams: set[Any] = field(default_factory=set)  # that may use the tensors


class Copies:
    """The copies of one owner, by key and device."""

    def __init__(self) -> None:
        self._made: dict[tuple[Hashable, torch.device], _Copied] = {}

    def get(self, key: Hashable, device: torch.device, make: Callable[[], Arrays]) -> dict[str, Tensor]:
        """int32 copies of the arrays that `make()` returns for this key, made at the first call.

        Raises:
            RuntimeError: the first call is within a CUDA-graph capture.
        """
        found = self._made.get((key, device))
        if device.type != "cuda":
            if found is None:
                found = self._made[key, device] = _Copied({name: _int32(x) for name, x in make().items()}, None)
            return found.tensors
        stream, capturing = CUDA.current(device), CUDA.capturing()
        if found is None:
            if capturing:
                raise RuntimeError(
                    "ovq_attention is called for the first time at this shape within a CUDA-graph capture, which must "
                    "not copy from the host; call it once (forward and backward) before the capture"
                )
            tensors = {name: CUDA.copy(_int32(array), device) for name, array in make().items()}
            found = self._made[key, device] = _Copied(tensors, CUDA.done(stream), {stream})
        elif capturing:
            # No wait: whoever captures has synchronised before (torch.cuda.graph does), and waiting for an event from
            # outside would break the capture.
            _captured[id(found.tensors)] = found.tensors
        elif stream not in found.streams:
            CUDA.wait(stream, found.event)
            for tensor in found.tensors.values():
                CUDA.use(stream, tensor)
            found.streams.add(stream)
        return found.tensors


def _int32(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.int32))
