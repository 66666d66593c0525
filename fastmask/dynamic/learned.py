"""The strategy `learned`: one real-valued score for each language and unit, and the strongest units are live.

Forward, a unit's gate is 1 if its score is among the k highest of its kind and 0 otherwise; backward, the gradient of
the gate passes straight through to the score (Bengio, Leonard and Courville 2013). k never changes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastmask.errors import unknown

__all__ = ["OPTIMIZERS", "Learned", "strongest"]

OPTIMIZERS = ("adam", "sgd")
BETAS, EPSILON = (0.9, 0.999), 1e-8


class Learned:
    """Scores of the units, trained by their gates' gradients; they start at 1 for live units and 0 for dead ones.

    Args:
        masks: bool [L, layers, units] by kind of unit.
        learning_rate: of the scores, in units of that distance.
        optimizer: "adam", which does not depend on the scale of the loss, or "sgd".
    """

    reads = "signed"

    def __init__(self, masks: Mapping[str, Tensor], learning_rate: float, optimizer: str) -> None:
        if optimizer not in OPTIMIZERS:
            raise unknown("optimizer of scores", optimizer, OPTIMIZERS)
        self.learning_rate, self.optimizer = learning_rate, optimizer
        self.state: dict[str, Tensor] = {}
        for kind, keep in masks.items():
            self.state[f"scores.{kind}"] = keep.to("cpu", torch.float64, copy=True)
            if optimizer == "adam":
                self.state[f"first_moment.{kind}"] = torch.zeros(keep.shape, dtype=torch.float64)
                self.state[f"second_moment.{kind}"] = torch.zeros(keep.shape, dtype=torch.float64)
                self.state[f"updates.{kind}"] = torch.zeros(keep.shape[0], dtype=torch.int64)

    def update(self, kind: str, row: int, keep: Tensor, mean: Tensor) -> Tensor:
        """One language's new mask, from its mask `keep` bool [layers, units] and its gates' mean gradient."""
        scores = self.state[f"scores.{kind}"][row]
        scores.sub_(self._direction(kind, row, mean), alpha=self.learning_rate)
        return strongest(scores, keep)

    def _direction(self, kind: str, row: int, gradient: Tensor) -> Tensor:
        """What the learning rate multiplies: the gradient, or that of Adam (Kingma and Ba 2015)."""
        if self.optimizer == "sgd":
            return gradient
        first, second = self.state[f"first_moment.{kind}"][row], self.state[f"second_moment.{kind}"][row]
        updates = self.state[f"updates.{kind}"]
        updates[row] += 1
        first.lerp_(gradient, 1 - BETAS[0])
        second.lerp_(gradient.square(), 1 - BETAS[1])
        steps = int(updates[row])
        return (first / (1 - BETAS[0] ** steps)) / ((second / (1 - BETAS[1] ** steps)).sqrt() + EPSILON)


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
