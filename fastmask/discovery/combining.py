"""Combining the subnetworks of several seeds: one seed is noisy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmask.errors import unknown
from fastmask.subnetworks.subnetworks import Subnetworks

__all__ = ["combine"]


def combine(found: Sequence[Subnetworks], how: str = "majority") -> Subnetworks:
    """Combine the subnetworks that several seeds found for the same languages.

    Args:
        found: one or more, over the same languages and units.
        how: "majority" keeps a unit that more than half of the seeds keep, "union" any, "intersection" all of them.
            A layer left without a unit keeps the one most seeds kept (the lower one on a tie).

    Raises:
        KeyError: an unknown way to combine.
        ValueError: nothing to combine, or subnetworks that do not fit together.
    """
    ways = {"majority": lambda votes: votes > len(found) / 2, "union": lambda votes: votes > 0}
    ways["intersection"] = lambda votes: votes == len(found)
    if how not in ways:
        raise unknown("way to combine", how, ways)
    if not found:
        raise ValueError("no subnetworks to combine")
    first = found[0]
    for other in found[1:]:
        if other.languages != first.languages:
            raise ValueError(f"cannot combine subnetworks of {other.languages} with those of {first.languages}")

    def combined(keeps: list[Tensor | None]) -> Tensor | None:
        present = [keep for keep in keeps if keep is not None]
        if not present:
            return None
        if len(present) < len(keeps) or len({keep.shape for keep in present}) > 1:
            raise ValueError("cannot combine subnetworks over different units")
        votes = torch.stack(present).sum(0)
        result = ways[how](votes)
        best = torch.zeros_like(result).scatter_(-1, votes.argmax(-1, keepdim=True), True)
        return torch.where(result.any(-1, keepdim=True), result, best)

    return Subnetworks(
        first.languages,
        combined([subnets.heads for subnets in found]),
        combined([subnets.neurons for subnets in found]),
    )
