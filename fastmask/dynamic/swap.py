"""The strategy `swap`: weak live units give their place to dead ones that have shown more importance.

The score of a unit is that of static discovery, I_h = mean over examples of |dL_example / dgate_h| divided by the
layer's L2 norm, here over all units of the layer. It is averaged exponentially over updates.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["Swap", "layer_scores", "swapped"]


class Swap:
    """Exponential averages of the units' scores, and the swaps that follow from them.

    Args:
        masks: bool [L, layers, units] by kind of unit.
        swaps: most pairs swapped in one update: a number from 1 on, or a share of the live units (at least one pair).
        margin: a unit comes in if its score is more than (1 + margin) times that of the one that leaves.
        decay: weight of the old average when a new score comes in; 0 keeps the last score only.
    """

    reads = "absolute"

    def __init__(self, masks: Mapping[str, Tensor], swaps: float, margin: float, decay: float) -> None:
        self.swaps, self.margin, self.decay = swaps, margin, decay
        self.state: dict[str, Tensor] = {}
        for kind, keep in masks.items():
            self.state[f"average.{kind}"] = torch.zeros(keep.shape, dtype=torch.float64)
            self.state[f"updates.{kind}"] = torch.zeros(keep.shape[0], dtype=torch.int64)

    def update(self, kind: str, row: int, keep: Tensor, mean: Tensor) -> Tensor:
        """One language's new mask, from its mask `keep` bool [layers, units] and its gates' mean absolute gradient."""
        average, updates = self.state[f"average.{kind}"][row], self.state[f"updates.{kind}"]
        decay = self.decay if updates[row] else 0.0  # the first score stands for all that came before
        average.mul_(decay).add_(layer_scores(mean), alpha=1 - decay)
        updates[row] += 1
        pairs = int(self.swaps) if self.swaps >= 1 else max(1, int(self.swaps * int(keep.sum())))
        return swapped(keep, average, pairs, self.margin)


def layer_scores(mean: Tensor) -> Tensor:
    """Each layer's scores [layers, units] over their L2 norm, so that layers can be compared."""
    return mean / mean.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(mean.dtype).tiny)


def swapped(keep: Tensor, scores: Tensor, pairs: int, margin: float) -> Tensor:
    """Swap the weakest live units for the strongest dead ones, in order, where those are worth it.

    Args:
        keep: bool [layers, units].
        scores: float [layers, units], >= 0.
        pairs: how many of the strongest dead units are considered.
        margin: the j-th pair is swapped if score_in > (1 + margin) * score_out.

    Returns:
        A new mask with as many live units, and at least one in every layer that had one: the last one of a layer leaves
        only for another one of its layer.
    """
    n_units = keep.shape[1]
    flat, values, live = keep.flatten().clone(), scores.flatten(), keep.sum(1).tolist()
    weakest, strongest = values.argsort(stable=True), values.argsort(stable=True, descending=True)
    leaving: list[int] = weakest[flat[weakest]].tolist()
    entering: list[int] = strongest[~flat[strongest]][:pairs].tolist()
    worth: list[float] = values.tolist()
    for incoming in entering:
        layer = incoming // n_units
        candidates = (at for at, unit in enumerate(leaving) if live[unit // n_units] > 1 or unit // n_units == layer)
        place = next(candidates, None)
        if place is None or not worth[incoming] > (1 + margin) * worth[leaving[place]]:
            continue
        outgoing = leaving.pop(place)
        flat[outgoing], flat[incoming] = False, True
        live[outgoing // n_units] -= 1
        live[layer] += 1
    return flat.view_as(keep)
