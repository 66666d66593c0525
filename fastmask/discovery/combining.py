"""Combining the subnetworks of several draws of scoring examples, or of several models: one draw is noisy.

How noisy, `stability` says: draws of one language must agree more than those of two, or a mask is no language's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmask.discovery.importance import Importance
from fastmask.discovery.pruning import live_units
from fastmask.errors import unknown
from fastmask.subnetworks.subnetworks import Subnetworks

__all__ = ["VOTES", "Draw", "Stability", "combine", "stability"]

VOTES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "majority": lambda votes, draws: 2 * votes > draws,
    "union": lambda votes, draws: votes > 0,
    "intersection": lambda votes, draws: votes == draws,
}


_KINDS = ("heads", "neurons")


@dataclass(frozen=True)
class Draw:
    """What one call of `discover` found.

    Attributes:
        subnetworks: of some languages of one model, or all.
        scores: language -> what `discover` gave to `on_scores`.
    """

    subnetworks: Subnetworks
    scores: Mapping[str, Importance]


def combine(draws: Sequence[Draw], vote: str = "majority", density: float | None = None) -> Subnetworks:
    """Combine what several draws found for the units of one model.

    A language's subnetwork comes from the draws that have it: draws may be over the same languages, or each over one,
    found in a model that was fine-tuned on that language alone. Units are ordered by the number of draws that keep them
    and, with equal votes, by their mean score over the draws. The best unit of every layer always stays.

    Args:
        draws: one or more, over the same units.
        vote: without a density: "majority" keeps a unit that more than half of the draws keep (of two draws: both, as a
            tie is no majority), "union" any, "intersection" all of them. The result is of whatever size this gives.
        density: with it, a language keeps exactly as many units as `discover` keeps at this density, the first ones in
            that order, whatever the vote.

    Returns:
        Subnetworks of all languages, in the order in which the draws name them first.

    Raises:
        KeyError: an unknown vote.
        ValueError: nothing to combine, or draws over different units.
    """
    if vote not in VOTES:
        raise unknown("vote", vote, VOTES)
    if not draws:
        raise ValueError("no subnetworks to combine")
    for kind in _KINDS:
        if len({_shape(draw.subnetworks, kind) for draw in draws}) > 1:
            raise ValueError(f"cannot combine subnetworks over different {kind}")
    names = dict.fromkeys(name for draw in draws for name in draw.subnetworks.languages)
    return Subnetworks.stack([_combined(name, draws, VOTES[vote], density) for name in names])


def _shape(subnets: Subnetworks, kind: str) -> tuple[int, ...] | None:
    keep = getattr(subnets, kind)
    return None if keep is None else tuple(keep.shape[1:])


def _combined(
    name: str, draws: Sequence[Draw], vote: Callable[[Tensor, int], Tensor], density: float | None
) -> Subnetworks:
    """One language's subnetwork."""
    own = [draw for draw in draws if name in draw.subnetworks.languages]
    masks = {}
    for kind in _KINDS:
        if getattr(own[0].subnetworks, kind) is not None:
            votes = torch.stack([getattr(draw.subnetworks.select([name]), kind)[0] for draw in own]).sum(0)
            score = torch.stack([getattr(draw.scores[name], kind) for draw in own]).double().mean(0)
            masks[kind] = _kept(votes, score, vote(votes, len(own)), density)[None]
    return Subnetworks([name], masks.get("heads"), masks.get("neurons"))


def _kept(votes: Tensor, scores: Tensor, elected: Tensor, density: float | None) -> Tensor:
    """One language's mask: as many units as the density says, or those elected, of [layers, units] each."""
    order = scores.flatten().argsort(stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    key = (votes.flatten() * len(order) + rank).view_as(votes)  # no two units have the same
    best = torch.zeros_like(elected).scatter_(1, key.argmax(1, keepdim=True), True)
    count = int((elected | best).sum()) if density is None else live_units(density, *votes.shape)
    first = key.masked_fill(best, int(key.max()) + 1).flatten().argsort(descending=True, stable=True)[:count]
    return torch.zeros(votes.numel(), dtype=torch.bool).scatter_(0, first, True).view_as(votes)


@dataclass(frozen=True)
class Stability:
    """How much masks of single draws agree: mean Jaccard similarities, |A and B| / |A or B|.

    Attributes:
        draws: of two draws of one language, mean over languages; None where no language has two.
        languages: of draws of two languages; None where there is one language.
        chance: expected of random masks that keep as many units in every layer as these.
    """

    draws: float | None
    languages: float | None
    chance: float


def stability(draws: Sequence[Draw]) -> dict[str, Stability]:
    """By kind of unit ("heads", "neurons"), how much single draws agree within a language and between two.

    Chance is (sum of a * b / n over layers) / (units in either), of masks with a and b of a layer's n units: the
    expectation of the intersection is exact, that of the quotient to first order.

    Raises:
        ValueError: fewer than two masks, of one language or several.
    """
    names = [name for draw in draws for name in draw.subnetworks.languages]
    if len(names) < 2:
        raise ValueError(f"expected two masks or more to compare, given {len(names)}")
    same = torch.tensor([[a == b for b in names] for a in names])
    pairs = torch.ones(len(names), len(names)).triu(1).bool()
    found = {}
    for kind in _KINDS:
        if _shape(draws[0].subnetworks, kind) is None:
            continue
        keep = torch.cat([getattr(draw.subnetworks, kind) for draw in draws]).double()
        flat, counts, sizes = keep.flatten(1), keep.sum(2), keep.sum((1, 2))

        def jaccard(both: Tensor, sizes: Tensor = sizes) -> Tensor:
            return both / (sizes[:, None] + sizes[None, :] - both)

        agreement = jaccard(flat @ flat.t())
        within = [
            float(agreement[pairs & same & torch.tensor([[name == own] for name in names])].mean())
            for own in dict.fromkeys(names)
            if names.count(own) > 1
        ]
        between = agreement[pairs & ~same]
        chance = jaccard(counts @ counts.t() / keep.shape[2])
        found[kind] = Stability(
            math.fsum(within) / len(within) if within else None,
            float(between.mean()) if len(between) else None,
            float(chance[pairs].mean()),
        )
    return found
