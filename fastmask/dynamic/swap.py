"""The strategy `swap`: weak live units give their place to dead ones that would lower the loss.

Live and dead units are judged by different numbers, as different things are asked of them. Both are averaged
exponentially over updates.

- What a live unit is worth is its score in static discovery, the mean over examples of |dL_example / dgate|. Its signed
  mean says nothing of what removing it costs: the weights behind it are trained, which drives that mean to zero.
- What a dead unit would bring is minus the signed mean of dL_example / dgate, the fall of the loss per unit of gate
  where the gate begins to open. Magnitude alone would also let in units that raise the loss, which most dead ones do.

Both are divided by one number, the L2 norm over all units of the layer of the mean absolute gradient, so that layers
can be compared and that the two stay on one scale: loss per unit of gate, in shares of its layer. As
|mean| <= mean of | |, a unit comes in only where its examples agree.

The strategy `random-swap` is its control: what dead units would bring is dealt out among them anew, so as many are
swapped, and the same ones leave, but which ones come in is chance.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["Swap", "layer_norms", "swapped"]


class Swap:
    """Exponential averages of the units' two scores, and the swaps that follow from them.

    Args:
        masks: bool [L, layers, units] by kind of unit.
        swaps: most pairs swapped in one update: a number from 1 on, or a share of the live units (at least one pair).
        margin: a unit comes in if what it would bring is more than (1 + margin) times the worth of the one that leaves.
        decay: weight of the old average when a new score comes in; 0 keeps the last score only.
        shuffled: deal out what dead units would bring among them, by random numbers that follow from the language, its
            number of updates and the kind of unit.
    """

    reads = ("absolute", "signed")

    def __init__(
        self, masks: Mapping[str, Tensor], swaps: float, margin: float, decay: float, shuffled: bool = False
    ) -> None:
        self.swaps, self.margin, self.decay, self.shuffled = swaps, margin, decay, shuffled
        self.state: dict[str, Tensor] = {}
        for kind, keep in masks.items():
            for name in self.reads:
                self.state[f"{name}.{kind}"] = torch.zeros(keep.shape, dtype=torch.float64)
            self.state[f"updates.{kind}"] = torch.zeros(keep.shape[0], dtype=torch.int64)

    def update(self, kind: str, row: int, keep: Tensor, sums: Mapping[str, Tensor]) -> Tensor:
        """One language's new mask.

        Args:
            kind: "heads" or "neurons".
            row: the language.
            keep: its mask, bool [layers, units].
            sums: of its gates' gradients since the last update, over examples: those named in `reads`.
        """
        absolute, signed = (self.state[f"{name}.{kind}"][row] for name in self.reads)
        updates = self.state[f"updates.{kind}"]
        decay = self.decay if updates[row] else 0.0  # the first score stands for all that came before
        norms = layer_norms(sums["absolute"])
        absolute.mul_(decay).add_(sums["absolute"] / norms, alpha=1 - decay)
        signed.mul_(decay).add_(sums["signed"] / norms, alpha=1 - decay)
        updates[row] += 1
        pairs = int(self.swaps) if self.swaps >= 1 else max(1, int(self.swaps * int(keep.sum())))
        scores = torch.where(keep, absolute, -signed)
        if self.shuffled:
            kinds = [name for name in self.state if name.startswith("updates.")]
            seed = (int(updates[row]) * len(updates) + row) * len(kinds) + kinds.index(f"updates.{kind}")
            dead = scores[~keep]
            order = torch.randperm(len(dead), generator=torch.Generator().manual_seed(seed))
            scores[~keep] = dead[order]
        return swapped(keep, scores, pairs, self.margin)


def layer_norms(scores: Tensor) -> Tensor:
    """The L2 norm of each layer's scores [layers, units], as [layers, 1]; never zero."""
    return scores.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)


def swapped(keep: Tensor, scores: Tensor, pairs: int, margin: float) -> Tensor:
    """Swap the weakest live units for the strongest dead ones, in order, where those are worth it.

    Args:
        keep: bool [layers, units].
        scores: float [layers, units]: of live units, >= 0, what they are worth; of dead ones what they would bring.
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
