"""What was made of a tensor's values, kept for as long as the tensor lives: tables of masks, plans of batches."""

from __future__ import annotations

from collections.abc import Callable, Hashable, MutableMapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

T = TypeVar("T")

_NAME = "_fastmask_made"
_MOST = 64  # that are kept of one tensor: ids may outlive numbers of tokens, of which there can be any number
_Places = dict[tuple[Hashable, ...], tuple[int, Any]]  # by (Kept, key, stream): the tensor's version, and what was made


def never_written(tensor: Tensor) -> Tensor:
    """The tensor, of which it is known from now on that nobody writes to it; not for tensors of others."""
    if not hasattr(tensor, _NAME):
        setattr(tensor, _NAME, ({}, is_capturing(tensor.device)))
    return tensor


class Kept(Generic[T]):
    """Made once for each tensor, key and stream, and again when the tensor was written to.

    Each stream makes its own: nothing says when another one has finished. Inside the capture of a CUDA graph nothing is
    kept, but of a tensor that was made there too: it lies in the graph's memory, and holds nothing before a replay.
    What is there already is used there, from whatever stream (a capture begins when the device is idle), but only of
    tensors that are `never_written`: a replay reads what lies in the others then. Tensors of inference mode do not
    count what is written to them, so of those nothing is kept either.
    """

    # Not as an attribute, which copies and pickles of other people's tensors would take along.
    _of_others: MutableMapping[Tensor, _Places] = WeakIdKeyDictionary()

    def of(self, tensor: Tensor, make: Callable[[], T], key: Hashable = None, on: torch.device | None = None) -> T:
        """What `make` makes of a tensor on a device, by default its own.

        It must not hold the tensor itself, or neither would ever be freed.
        """
        device = on or tensor.device
        places: _Places
        own, version, capturing = getattr(tensor, _NAME, None), 0, is_capturing(device)
        if own is not None:
            places, captured = own
        elif capturing or tensor.is_inference():
            return make()
        else:
            version, places, captured = tensor._version, self._of_others.setdefault(tensor, {}), False
        if capturing and not captured:
            found: list[T] = [made for place, (_, made) in places.items() if place[:2] == (self, key)]
            return found[0] if found else make()
        place = (self, key, stream_of(device))
        if place not in places or places[place][0] != version:
            places[place] = version, make()
            while len(places) > _MOST:
                places.pop(next(iter(places)), None)
        return places[place][1]


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`, without waiting for it; whoever owns the tensor may write to it at once.

    From pinned memory the device copies when it gets there, which may be long after: it is given a copy that stays as
    it is. A CUDA graph takes the tensor itself: each replay reads what lies there then.
    """
    if tensor.device == device:
        return tensor
    asked = tensor.device.type == "cpu" and not torch.compiler.is_compiling()  # a tracer knows no pinned memory
    if asked and tensor.is_pinned() and not is_capturing(device):
        tensor = tensor.clone()  # not pinned
    return tensor.to(device, non_blocking=True)


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched on `device` goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def stream_of(device: torch.device) -> int:
    """A number for the stream that `device` works on now; 0 where there are none."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
