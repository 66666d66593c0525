"""Controls: masks that keep the size of given ones and lose what makes them a language's own."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask.subnetworks.subnetworks import Subnetworks, random_of_sizes

__all__ = ["random_like", "shared_like", "shuffled"]


def random_like(subnets: Subnetworks, seed: int) -> Subnetworks:
    """Random masks with as many live units in each layer of each language as `subnets`."""
    generator = torch.Generator().manual_seed(seed)
    return subnets.map(lambda keep: random_of_sizes(keep.sum(-1), keep.shape[-1], generator))


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


def shuffled(subnets: Subnetworks, seed: int) -> Subnetworks:
    """The same masks under other names: no language keeps its own (two languages or more)."""
    count = len(subnets.languages)
    if count < 2:
        raise ValueError("shuffling masks needs at least two languages")
    # A random cycle is a derangement: everyone gets the mask of the next one in a random order.
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed), device="cpu")
    source = torch.empty_like(order)
    source[order] = order.roll(1)
    return subnets.map(lambda keep: keep[source])
