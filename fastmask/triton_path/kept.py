"""What was made of a tensor that never changes: kept for as long as the tensor lives."""

from __future__ import annotations

from collections.abc import Callable, Hashable, MutableMapping
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["Kept", "is_capturing", "stream_of"]

T = TypeVar("T")


class Kept(Generic[T]):
    """Made once for each tensor and stream: nothing says when another stream has finished making it.

    Inside the capture of a CUDA graph what is there already is used, from whatever stream: a capture begins when the
    device is idle. What is made there is not kept: it lies in the graph's memory, and holds nothing before a replay.
    """

    def __init__(self) -> None:
        self._made: MutableMapping[Tensor, dict[Hashable, T]] = WeakIdKeyDictionary()

    def __len__(self) -> int:
        return len(self._made)

    def of(self, tensor: Tensor, make: Callable[[], T]) -> T:
        """What `make` makes of a tensor."""
        made = self._made.get(tensor, {})
        if is_capturing(tensor.device):
            return next(iter(made.values())) if made else make()
        stream = stream_of(tensor.device)
        if stream not in made:
            made = self._made.setdefault(tensor, {})
            made[stream] = make()
        return made[stream]


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched on `device` goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def stream_of(device: torch.device) -> int:
    """A number for the stream that `device` works on now; 0 where there are none."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
