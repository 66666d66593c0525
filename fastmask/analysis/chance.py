"""What two, or L, random masks of given sizes have in common: the control of every analysis of masks.

The random masks are those of `fastmask.subnetworks.controls.random_like`: in each layer of each language as many live
units as in the real masks, each choice of units as likely as any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Chance", "chance_jaccard", "chance_owners", "jaccard"]

NEGLIGIBLE = 1e-20  # probabilities below this are left out of sums over a layer


@dataclass(frozen=True)
class Chance:
    """The Jaccard similarity of two random masks: its mean and the ends of its central band."""

    expected: float
    low: float
    high: float


def jaccard(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    """The Jaccard similarity |A and B| / |A or B| of two masks; 1 of two that own nothing."""
    either = int((a | b).sum())
    return int((a & b).sum()) / either if either else 1.0


def chance_jaccard(sizes_a: Sequence[int], sizes_b: Sequence[int], units: Sequence[int], level: float = 0.95) -> Chance:
    """Distribution of the Jaccard similarity of two random masks; exact, nothing is drawn.

    In a layer of n units, masks of a and b units share I ~ Hypergeometric(n, a, b); layers are independent, so the sum
    of I has the convolution of these distributions, and J = I / (A + B - I) with fixed totals A and B grows with I.

    Args:
        sizes_a: live units of the first mask in each layer.
        sizes_b: of the second.
        units: units of each layer.
        level: of the band, the narrowest below which, and above which, at most (1 - level) / 2 lies.
    """
    first, shared = 0, np.ones(1)
    for a, b, n in zip(sizes_a, sizes_b, units, strict=True):
        start, probabilities = _hypergeometric(int(n), int(a), int(b))
        first += start
        shared = np.convolve(shared, probabilities)
    total = sum(sizes_a) + sum(sizes_b)
    intersection = first + np.arange(len(shared))
    jaccard = np.ones(1) if total == 0 else intersection / (total - intersection)
    cumulated = shared.cumsum()
    # Rounding must not move the ends where a tail is exactly (1 - level) / 2.
    low = int(np.searchsorted(cumulated, (1 - level) / 2 * (1 + 1e-12), side="left"))
    high = int(np.searchsorted(cumulated, (1 + level) / 2 * (1 - 1e-12), side="left"))
    last = len(jaccard) - 1
    return Chance(float(shared @ jaccard), float(jaccard[min(low, last)]), float(jaccard[min(high, last)]))


def _hypergeometric(n: int, a: int, b: int) -> tuple[int, NDArray[np.float64]]:
    """The least shared count that is not negligible, and the probabilities from there on."""
    from scipy.stats import hypergeom

    middle, spread = a * b / n, np.sqrt(a * b * (n - a) * (n - b) / (n * n * max(n - 1, 1)))
    least = max(0, a + b - n, int(middle - 12 * spread) - 12)
    most = min(a, b, int(middle + 12 * spread) + 12)
    probabilities = hypergeom.pmf(np.arange(least, most + 1), n, a, b)
    keep = np.flatnonzero(probabilities > NEGLIGIBLE)
    return least + int(keep[0]), probabilities[keep[0] : keep[-1] + 1]


def chance_owners(sizes: Sequence[int], units: int, draws: int, seed: Sequence[int]) -> NDArray[np.int64]:
    """How many units of a layer are owned by 0, 1, ... L languages with random masks; int64 [draws, L + 1].

    One language after the other chooses its units; of those that have k owners so far it takes a multivariate
    hypergeometric share, drawn class by class. So a layer of thousands of units costs as little as one of twelve.

    Args:
        sizes: live units of each language in this layer.
        units: units of the layer.
        draws: how many sets of L masks.
        seed: of the draws.
    """
    generator = np.random.default_rng(seed)
    owners = np.zeros((draws, len(sizes) + 1), dtype=np.int64)
    owners[:, 0] = units
    for language, size in enumerate(sizes):
        wanted = np.full(draws, int(size))
        others = np.full(draws, units)
        taken = np.zeros_like(owners)
        for k in range(language + 1):
            others = others - owners[:, k]
            taken[:, k] = generator.hypergeometric(owners[:, k], others, wanted)
            wanted = wanted - taken[:, k]
        owners -= taken
        owners[:, 1:] += taken[:, :-1]
    return owners
