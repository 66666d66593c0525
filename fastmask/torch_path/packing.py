"""What lies where on the masked side of an activation, and moving it to and from where the whole weight has it.

Nothing is written in place: an exported graph of ATen operators holds these lines too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def slots(index: Tensor, counts: Tensor, size: int, packed: bool) -> Tensor:
    """What each place of the masked side holds for each language, the full network last: int64 [L + 1, size].

    `size` for what is dead. Packed, the masked side has only as many of the places as the batch needs.
    """
    places = torch.arange(size, device=index.device)
    held = torch.where(places < counts[:, None], F.pad(index, (0, size - index.shape[1])), size)
    if not packed:
        everything = torch.full((len(held), size + 1), size, device=places.device)
        held = everything.scatter(1, held, held)[:, :size]
    return torch.cat([held, places[None]])


def enter(given: Tensor, slots: Tensor, size: int) -> Tensor:
    """A masked side [B, ..., width] as the whole weight takes it: [B, ..., size], dead units zero.

    slots: of each example, [B, width or more].
    """
    at = _beside(slots, given, given.shape[-1]).expand(given.shape)
    wide = given.new_zeros(()).expand(*given.shape[:-1], size + 1).scatter(-1, at, given)
    return wide[..., :-1]  # in the last place lies what dead units held


def leave(wide: Tensor, slots: Tensor, width: int) -> Tensor:
    """Undo `enter`: [B, ..., size] -> [B, ..., width], zero at what is dead."""
    at, size = _beside(slots, wide, width), wide.shape[-1]
    given = wide.gather(-1, at.clamp(max=size - 1).expand(*wide.shape[:-1], width))
    return torch.where(at == size, 0, given)


def _beside(slots: Tensor, x: Tensor, width: int) -> Tensor:
    """The first `width` of each example as [B, 1, ..., width] of x [B, ..., any]."""
    return slots[(slice(None), *[None] * (x.ndim - 2), slice(width))]
