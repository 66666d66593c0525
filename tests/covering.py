"""Combinations of parameters: few that hold all that matters, and with ``-m slow`` every one."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import pytest

Axis = Mapping[str, Any] | Iterable[Any]


def covering(*axes: Axis, strength: int = 1, whole: bool = False) -> list[Any]:
    """Every combination of one value of each axis for `pytest.mark.parametrize`; all but a few are marked slow.

    The few are found greedily, as in pairwise testing: what goes wrong with a value goes wrong beside any other, or
    beside one certain other, and hardly ever beside a certain four.

    Args:
        axes: values by name, or values that are their own names.
        strength: any so many values of different axes are together in one of the few: 1 for each value, 2 for pairs.
        whole: none is slow, as where a GPU launches kernels.
    """
    named = [dict(axis) if isinstance(axis, Mapping) else {str(value): value for value in axis} for axis in axes]
    every = list(itertools.product(*named))
    few = set(every) if whole else _few(every, strength)
    return [
        pytest.param(
            *(axis[name] for axis, name in zip(named, names, strict=True)),
            id="-".join(names),
            marks=() if names in few else pytest.mark.slow,
        )
        for names in every
    ]


def _few(every: list[tuple[str, ...]], strength: int) -> set[tuple[str, ...]]:
    """Combinations that hold each `strength` values that are together in any, no value much more often than another."""

    def groups(names: tuple[str, ...]) -> set[tuple[tuple[int, str], ...]]:
        return set(itertools.combinations(enumerate(names), strength))

    few, uses = set(), Counter[tuple[int, str]]()
    missing = set().union(*map(groups, every))
    while missing:
        best = max(every, key=lambda names: (len(groups(names) & missing), -sum(uses[v] for v in enumerate(names))))
        few.add(best)
        uses.update(enumerate(best))
        missing -= groups(best)
    return few
