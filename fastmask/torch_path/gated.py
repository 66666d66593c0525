"""Row and column masks when languages have few tokens: the whole weight, and gates on the masked side of activations.

One language after the other, live weights are gathered and dW is added for each, which takes as long as the products of
64 tokens. With fewer it is less work to multiply all tokens of the batch by the whole weight at once, dead units
and all, and to close gates on the activations of units that a language does not own: between `enter` and `leave` every
language is the full network.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastmask.torch_path.split import Split
from fastmask.torch_path.units import Units

__all__ = ["enter", "is_cheaper", "leave"]

# What the two ways cost, in multiply-adds; fitted to times of projections of width 384 and 768, 3 to 16 languages, 16
# to 144 tokens of each and densities of 0.3 to 0.9 on one core, float32.
GATHERED = 64  # what gathering a live weight and adding its gradient cost, in tokens that it is multiplied by
CALLS = 2**21  # what the calls for one language cost
READ = 64  # what reading the whole weight and writing its gradient cost, in tokens
GATE = 192  # what a gate on an activation costs


def is_cheaper(layers: Sequence[Units], tokens: int, split: Split, full_forward: bool = False) -> bool:
    """Whether layers that share an input of so many tokens an example are run faster whole, with gates.

    With `full_forward` that is asked of weight gradients alone; the whole weight is read in any case.
    """
    looped = gated = 0.0
    read = 0 if full_forward else READ
    for layer in layers:
        work = sum(layer.live[language] * ((last - first) * tokens + GATHERED) for language, first, last in split.parts)
        looped += work * layer.other + len(split.parts) * CALLS
        gated += layer.size * (len(split.languages) * tokens * (layer.other + GATE) + read * layer.other)
    return gated < looped


def enter(given: Tensor, units: Units, split: Split) -> Tensor:
    """The masked side of an activation as the whole weight takes it: [B, T, width] -> [B, T, size], dead units zero."""
    B, T, width = given.shape
    slots = units.slots[split.ids, None, :width].expand(-1, T, -1)
    wide = given.new_zeros(B, T, units.size + 1).scatter_(2, slots, given)
    return wide[..., :-1]  # in the last place lies what dead units held


def leave(wide: Tensor, units: Units, split: Split, width: int) -> Tensor:
    """Undo `enter`: [B, T, size] -> [B, T, width], zero at what is dead."""
    slots = units.slots[split.ids, None, :width]
    given = wide.gather(2, slots.clamp(max=units.size - 1).expand(-1, wide.shape[1], -1))
    return given.masked_fill_(slots == units.size, 0)
