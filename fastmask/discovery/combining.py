"""Combining the subnetworks of several draws of scoring examples, or of several models: one draw is noisy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmask.discovery.importance import Importance
from fastmask.discovery.pruning import live_units
from fastmask.errors import unknown
from fastmask.subnetworks.subnetworks import Subnetworks

__all__ = ["VOTES", "Draw", "combine"]

VOTES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "majority": lambda votes, draws: 2 * votes > draws,
    "union": lambda votes, draws: votes > 0,
    "intersection": lambda votes, draws: votes == draws,
}


@dataclass(frozen=True)
class Draw:
    """What one call of `discover` found.

    Attributes:
        subnetworks: of all languages.
        scores: language -> what `discover` gave to `on_scores`.
    """

    subnetworks: Subnetworks
    scores: Mapping[str, Importance]


def combine(draws: Sequence[Draw], vote: str = "majority", density: float | None = None) -> Subnetworks:
    """Combine the subnetworks that several draws found for the same languages.

    Units are ordered by the number of draws that keep them and, with equal votes, by their mean score over the draws.
    The best unit of every layer always stays.

    Args:
        draws: one or more, over the same languages and units.
        vote: without a density: "majority" keeps a unit that more than half of the draws keep (of two draws: both, as a
            tie is no majority), "union" any, "intersection" all of them. The result is of whatever size this gives.
        density: with it, a language keeps exactly as many units as `discover` keeps at this density, the first ones in
            that order, whatever the vote.

    Raises:
        KeyError: an unknown vote.
        ValueError: nothing to combine, or draws that do not fit together.
    """
    if vote not in VOTES:
        raise unknown("vote", vote, VOTES)
    if not draws:
        raise ValueError("no subnetworks to combine")
    languages = draws[0].subnetworks.languages
    for draw in draws[1:]:
        if draw.subnetworks.languages != languages:
            raise ValueError(f"cannot combine subnetworks of {draw.subnetworks.languages} with those of {languages}")

    def combined(kind: str) -> Tensor | None:
        keeps = [getattr(draw.subnetworks, kind) for draw in draws]
        present = [keep for keep in keeps if keep is not None]
        if not present:
            return None
        if len(present) < len(keeps) or len({keep.shape for keep in present}) > 1:
            raise ValueError(f"cannot combine subnetworks over different {kind}")
        votes = torch.stack(present).sum(0)
        scores = [torch.stack([getattr(draw.scores[name], kind) for name in languages]) for draw in draws]
        masks = [
            _kept(of_language, score, VOTES[vote](of_language, len(draws)), density)
            for of_language, score in zip(votes, torch.stack(scores).double().mean(0), strict=True)
        ]
        return torch.stack(masks)

    return Subnetworks(languages, combined("heads"), combined("neurons"))


def _kept(votes: Tensor, scores: Tensor, elected: Tensor, density: float | None) -> Tensor:
    """One language's mask: as many units as the density says, or those elected, of [layers, units] each."""
    order = scores.flatten().argsort(stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    key = (votes.flatten() * len(order) + rank).view_as(votes)  # no two units have the same
    best = torch.zeros_like(elected).scatter_(1, key.argmax(1, keepdim=True), True)
    count = int((elected | best).sum()) if density is None else live_units(density, *votes.shape)
    first = key.masked_fill(best, int(key.max()) + 1).flatten().argsort(descending=True, stable=True)[:count]
    return torch.zeros(votes.numel(), dtype=torch.bool).scatter_(0, first, True).view_as(votes)
