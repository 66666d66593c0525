"""Typology: do unseen languages gain more the nearer they are to the training languages?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from fastmask.analysis.drawing import GREY, bare, label_points, new_figure
from fastmask.analysis.language_families import families_of, family_colour
from fastmask.analysis.result import Result
from fastmask.analysis.statistics import bootstrap_interval, p_text, spearman_permutation

__all__ = ["typology"]

Gains = Mapping[str, float | Sequence[float]]
Similarities = Mapping[str, float | Mapping[str, float]]


def typology(
    gains: Gains,
    similarity: Similarities,
    *,
    what: str = "gain over full",
    measure: str = "similarity to the nearest training language",
    seed: int = 0,
) -> Result:
    """Rank correlation of the gain on unseen languages with their similarity to the training languages.

    Spearman's rho over languages, with a permutation p-value (exact up to 9 languages). With few languages only strong
    correlations can be told from chance: for n = 8 it takes |rho| >= 0.74 for p < 0.05.

    Args:
        gains: by unseen language: the score of a method minus that of the full network, or one for each seed (or
            support set), of which the mean counts.
        similarity: by unseen language: one number, or one for each training language, of which the largest counts.
        what: what the gains are, for the picture.
        measure: what the similarities are, for the picture.
        seed: of the permutations, with more than 9 languages, and of the intervals.

    Returns:
        table: `language`, `family`, `similarity`, `nearest` (training language; empty if not known), `gain`, `low`,
            `high` (95% bootstrap over seeds; equal to the gain for a single one), `n` gains.
        more["correlation"]: `n` languages, `rho`, `p`.

    Raises:
        ValueError: fewer than three languages, a gain without a similarity, or a number that is not finite.
    """
    names = list(gains)
    if len(names) < 3:
        raise ValueError(f"a correlation needs at least three languages, given {names}")
    if missing := [name for name in names if name not in similarity]:
        raise ValueError(f"no similarity of {', '.join(missing)} to the training languages")
    groups = families_of(names)
    rows = []
    for place, name in enumerate(names):
        values = np.atleast_1d(np.asarray(gains[name], dtype=np.float64))
        low, high = bootstrap_interval(values, 0.95, [seed, place])
        near = similarity[name]
        nearest = max(near, key=lambda other: near[other]) if isinstance(near, Mapping) else ""
        closeness = float(near[nearest]) if isinstance(near, Mapping) else float(near)
        rows.append((name, groups[name], closeness, nearest, float(values.mean()), low, high, len(values)))
    columns = ["language", "family", "similarity", "nearest", "gain", "low", "high", "n"]
    table = pd.DataFrame(rows, columns=columns)
    rho, p = spearman_permutation(table.similarity, table.gain, seed=[seed, len(names)])
    correlation = pd.DataFrame([(len(names), rho, p)], columns=["n", "rho", "p"])
    repeats = int(table.n.max())
    caption = (
        f"{what[:1].upper()}{what[1:]} on {len(names)} languages, against their {measure}. Spearman rho = {rho:.2f}, "
        f"permutation p = {p_text(p)}."
        + (f" Points: means of {repeats} runs; bars: 95% bootstrap intervals over them." if repeats > 1 else "")
        + " A rising cloud says that nearness foretells the gain. The control: gains dealt anew to the languages."
    )
    extent = float(table[["low", "high"]].abs().max(axis=None)) or 1.0
    return Result(
        "typology",
        table,
        caption,
        lambda extent=extent: _draw(table, what, measure, extent),
        {"correlation": correlation},
        extent,
    )


def _draw(table: pd.DataFrame, what: str, measure: str, extent: float) -> Any:
    figure = new_figure(*((5.2, 3.8) if len(table) <= 14 else (7.2, 5.2)))
    axis = figure.subplots()
    axis.axhline(0, color=GREY, linewidth=0.8)
    colours = [family_colour(family, GREY) for family in table.family]
    axis.vlines(table.similarity, table.low, table.high, color=colours, alpha=0.4, linewidth=1.2, zorder=1)
    axis.scatter(table.similarity, table.gain, 25, colours, zorder=2)
    axis.set(xlabel=measure, ylabel=what)
    axis.margins(0.1)
    axis.set_ylim(-1.2 * extent, 1.2 * extent)
    bare(axis)
    label_points(axis, list(table.similarity), list(table.gain), list(table.language))
    return figure
