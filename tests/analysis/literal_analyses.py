"""Analyses written out as loops over names and units, in plain Python: slow, and easy to read."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

Mask = list[set[int]]  # of each layer the live units


def jaccard(a: Mask, b: Mask) -> float:
    shared = sum(len(x & y) for x, y in zip(a, b, strict=True))
    either = sum(len(x | y) for x, y in zip(a, b, strict=True))
    return shared / either if either else 1.0


def expected_jaccard(a: Mask, b: Mask, units: int) -> float:
    """Over every pair of masks with as many units in each layer."""
    every = []
    for mask in (a, b):
        layers = [[set(chosen) for chosen in itertools.combinations(range(units), len(layer))] for layer in mask]
        every.append([list(layers) for layers in itertools.product(*layers)])
    return math.fsum(jaccard(x, y) for x in every[0] for y in every[1]) / (len(every[0]) * len(every[1]))


def owners(masks: Sequence[Mask], layer: int, unit: int) -> int:
    return sum(unit in mask[layer] for mask in masks)


def churn_and_distance(history: Sequence[tuple[int, str, Mask]]) -> dict[tuple[int, str], tuple[float, float]]:
    """(step, language) -> share of new units since the step before in the history, and distance to the first mask."""
    first: dict[str, Mask] = {}
    now: dict[str, Mask] = {}
    found = {}
    steps = sorted({step for step, _, _ in history})
    for step in steps:
        before = dict(now)
        for when, language, mask in history:
            if when == step:
                now[language] = mask
                first.setdefault(language, mask)
        for language, mask in now.items():
            old = before.get(language, mask)
            new = sum(unit not in old[layer] for layer, units in enumerate(mask) for unit in units)
            live = sum(len(units) for units in mask)
            found[step, language] = (new / live if live else 0.0, 1 - jaccard(mask, first[language]))
    return found


def advantages(values: Mapping[tuple[str, str], float], names: Sequence[str]) -> tuple[dict[str, float], float]:
    """The advantage of each language's own column, and the share of the orders of columns that do as well."""
    own = {
        name: values[name, name] - sum(values[name, other] for other in names if other != name) / (len(names) - 1)
        for name in names
    }
    as_given = sum(values[name, name] for name in names)
    orders = list(itertools.permutations(names))
    as_good = sum(sum(values[a, b] for a, b in zip(names, order, strict=True)) >= as_given - 1e-9 for order in orders)
    return own, as_good / len(orders)


def ranked(values: Sequence[float]) -> list[float]:
    """Rank from 1; of equal values the mean rank."""
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2 for value in values
    ]


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Spearman's rho, and the share of the orders of y with one as far from zero."""

    def rho(a: Sequence[float], b: Sequence[float]) -> float:
        n = len(a)
        mean_a, mean_b = sum(a) / n, sum(b) / n
        product = sum((p - mean_a) * (q - mean_b) for p, q in zip(a, b, strict=True))
        squares = sum((p - mean_a) ** 2 for p in a) * sum((q - mean_b) ** 2 for q in b)
        return product / math.sqrt(squares)

    a, b = ranked(x), ranked(y)
    observed = rho(a, b)
    orders = list(itertools.permutations(b))
    return observed, sum(abs(rho(a, order)) >= abs(observed) - 1e-9 for order in orders) / len(orders)


def sign_flip(differences: Sequence[float]) -> float:
    """The share of the sign patterns whose mean is as far from zero."""
    observed = abs(sum(differences))
    patterns = list(itertools.product((1, -1), repeat=len(differences)))
    sums = [abs(sum(sign * value for sign, value in zip(signs, differences, strict=True))) for signs in patterns]
    return sum(value >= observed - 1e-9 for value in sums) / len(patterns)
