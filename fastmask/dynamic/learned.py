"""The strategy `learned`: one real-valued score for each language and unit, and the strongest units are live.

Forward, a unit's gate is 1 if its score is among the k highest of its kind and 0 otherwise; backward, the gradient of
the gate passes straight through to the score (Bengio, Leonard and Courville 2013). k never changes.

A score moves by evidence: by how many standard errors the gate's mean gradient lies from zero, beyond those that noise
reaches. A few sentences give gradients that are mostly noise; an optimiser that scales each of them to one size (Adam)
moves every score alike, and replaces a mask by chance.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["NOISE", "Learned", "strongest"]

NOISE = 3.0
"""Standard errors from zero that count as noise: beyond them lies 1 in 370 of the units that do not matter."""


class Learned:
    """Scores of the units, moved by their gates' gradients; they start at 1 for live units and 0 for dead ones.

    An update forgets a share of what was seen before, adds the new examples, and moves a score by
    -learning_rate * sign(z) * max(0, |z| - NOISE), z being the mean gradient over its standard error. It stays between
    -1 and 2, so that what was learnt long ago can be undone.

    Args:
        masks: bool [L, layers, units] by kind of unit.
        learning_rate: what one standard error beyond noise moves a score by, where live and dead ones start 1 apart.
        decay: weight of the examples before an update, beside those of the update.
    """

    reads = ("signed", "squared")

    def __init__(self, masks: Mapping[str, Tensor], learning_rate: float, decay: float) -> None:
        self.learning_rate, self.decay = learning_rate, decay
        self.state: dict[str, Tensor] = {}
        for kind, keep in masks.items():
            self.state[f"scores.{kind}"] = keep.to("cpu", torch.float64, copy=True)
            for name in self.reads:
                self.state[f"{name}.{kind}"] = torch.zeros(keep.shape, dtype=torch.float64)
            self.state[f"weights.{kind}"] = torch.zeros(keep.shape[0], 2, dtype=torch.float64)

    def update(self, kind: str, row: int, keep: Tensor, sums: Mapping[str, Tensor], examples: float) -> Tensor:
        """One language's new mask; see `Swap.update`."""
        signed, squared = (self.state[f"{name}.{kind}"][row] for name in self.reads)
        weights = self.state[f"weights.{kind}"][row]  # of all examples: their sum, and that of their squares
        signed.mul_(self.decay).add_(sums["signed"])
        squared.mul_(self.decay).add_(sums["squared"])
        weights.mul_(torch.tensor([self.decay, self.decay**2], dtype=torch.float64)).add_(examples)
        z = standard_errors(signed / weights[0], squared / weights[0], float(weights[0] ** 2 / weights[1]))
        scores = self.state[f"scores.{kind}"][row]
        scores.sub_(z.sign() * (z.abs() - NOISE).clamp(min=0), alpha=self.learning_rate).clamp_(-1, 2)
        return strongest(scores, keep)


def standard_errors(mean: Tensor, mean_square: Tensor, examples: float) -> Tensor:
    """How many standard errors a mean lies from zero, by the normal distribution however few the examples.

    Student's t is turned into the normal deviate of nearly the same probability (Wallace 1959).

    Args:
        mean: of a gate's gradient over examples, float64 of any shape.
        mean_square: of its squares.
        examples: how many there were; with weights, (sum of weights)^2 / sum of squared weights. Below 2, nothing is
            known of the spread: zeros.
    """
    freedom = examples - 1
    if freedom < 1:
        return torch.zeros_like(mean)
    variance = (mean_square - mean.square()).clamp(min=torch.finfo(mean.dtype).eps * mean_square)
    t = torch.where(mean == 0, 0.0, mean / (variance / freedom).sqrt())
    return t.sign() * (8 * freedom + 1) / (8 * freedom + 3) * (freedom * torch.log1p(t.square() / freedom)).sqrt()


def strongest(scores: Tensor, keep: Tensor) -> Tensor:
    """The units with the highest scores, as many as `keep` [layers, units] has, and the best one of every layer.

    Ties go to units that are live in `keep`, then to the lower one.
    """
    by_life = (~keep.flatten()).to(torch.int8).argsort(stable=True)
    order = by_life[scores.flatten()[by_life].argsort(stable=True, descending=True)]
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order))).view_as(keep)
    rank.scatter_(1, rank.argmin(1, keepdim=True), -1)
    chosen = torch.zeros(keep.numel(), dtype=torch.bool)
    chosen[rank.flatten().argsort(stable=True)[: int(keep.sum())]] = True
    return chosen.view_as(keep)
