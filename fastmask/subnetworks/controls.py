"""Controls: masks that keep the size of given ones and lose what makes them a language's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmask.subnetworks.subnetworks import Subnetworks, random_of_sizes


def full_like(subnets: Subnetworks, model: Any = None) -> Subnetworks:
    """Every language owns all that there is of what `subnets` mask; `model` is that of `random_like`."""
    return _map(subnets, model, _all)


def without_own(subnets: Subnetworks, model: Any = None) -> Subnetworks:
    """For each language all units but its own: those of its mask that fewer than half of the other languages have.

    A layer that would lose all of its units keeps them. `model` is that of `random_like`.
    """

    def others(keep: Tensor, units: Sequence[int]) -> Tensor:
        own = keep & (2 * (keep.sum(0) - keep.long()) < len(keep) - 1)
        left = _all(keep, units) & ~own
        return torch.where(left.any(-1, keepdim=True), left, _all(keep, units))

    return _map(subnets, model, others)


def random_like(subnets: Subnetworks, seed: int, model: Any = None) -> Subnetworks:
    """Random masks with as many live units in each layer of each language as `subnets`.

    `model` says how many units a layer has, where they differ; without it all layers have as many as the masks.
    """
    generator = torch.Generator().manual_seed(seed)
    return _map(subnets, model, lambda keep, units: random_of_sizes(keep.sum(-1), units, generator))


def shared_like(subnets: Subnetworks) -> Subnetworks:
    """One mask for all languages: in each layer the units most languages own, as many as a language owns on average.

    A layer's average is rounded up or down so that all layers together have as many units as a language on average.
    Ties go to the lower unit.
    """

    def shared(keep: Tensor) -> Tensor:
        votes = keep.sum(0)
        means = keep.sum(-1).double().mean(0)
        sizes = means.floor().long()
        left = round(float(means.sum())) - int(sizes.sum())
        sizes[(means - sizes).argsort(descending=True, stable=True)[:left]] += 1
        rank = votes.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        return (rank < sizes[:, None]).expand_as(keep).contiguous()

    return subnets.map(shared)


def permuted_like(subnets: Subnetworks, seed: int, model: Any = None) -> Subnetworks:
    """The same masks over other units: each layer's units are renumbered at random, for all languages alike.

    Sizes and overlaps of languages stay what they are, so what is left of a gain is due to how languages share units,
    and what is lost is due to which units they were. `model` is that of `random_like`.
    """
    generator = torch.Generator().manual_seed(seed)

    def permuted(keep: Tensor, units: Sequence[int]) -> Tensor:
        result = keep.clone()
        for layer, size in enumerate(units):
            result[:, layer, :size] = keep[:, layer, torch.randperm(size, generator=generator, device="cpu")]
        return result

    return _map(subnets, model, permuted)


def _all(keep: Tensor, units: Sequence[int]) -> Tensor:
    """A mask like `keep` of all units that there are."""
    there = torch.arange(keep.shape[-1], device="cpu") < torch.tensor(units, device="cpu")[:, None]
    return there.to(keep.device).expand_as(keep).clone()


def _map(subnets: Subnetworks, model: Any, function: Callable[[Tensor, Sequence[int]], Tensor]) -> Subnetworks:
    """New subnetworks of `function` of every mask tensor and of how many units each of its layers has."""
    from fastmask.models.structure import structure_of  # which imports this package

    structure = None if model is None else structure_of(model)

    def units(of: str, keep: Tensor) -> Sequence[int]:
        if structure is None or of not in subnets.units:
            return [keep.shape[-1]] * keep.shape[1]
        return structure.sizes(of)

    changed = {of: function(keep, units(of, keep)) for of, keep in subnets._tensors().items()}
    return Subnetworks.of(subnets.languages, changed)


def shuffled(subnets: Subnetworks) -> Subnetworks:
    """The same masks under other names: no language keeps its own, and all get those most unlike theirs.

    Of all ways to hand masks to other languages it is the one with the least overlap (mean Jaccard index over kinds of
    units) between what languages have and what they get.

    Raises:
        ValueError: fewer than two languages.
    """
    count = len(subnets.languages)
    if count < 2:
        raise ValueError("shuffling masks needs at least two languages")
    from scipy.optimize import linear_sum_assignment

    kinds = dict.fromkeys(name.partition(".")[0] for name in subnets._tensors())
    overlap = torch.stack([subnets.overlap(kind).double().cpu() for kind in kinds]).sum(0)
    _, order = linear_sum_assignment(overlap.fill_diagonal_(10.0 * count))  # more than all others together
    return subnets.map(lambda keep: keep[torch.from_numpy(order)])
