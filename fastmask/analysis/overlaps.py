"""Overlap: how much the subnetworks of languages, and of seeds, have in common, against random ones."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fastmask.analysis.chance import chance_jaccard, jaccard
from fastmask.analysis.drawing import GREY, ON_LIGHT, bare, colour_languages, heatmap, new_figure
from fastmask.analysis.language_families import UNKNOWN_FAMILY, families_of, family_colour
from fastmask.analysis.result import Result, kind_of
from fastmask.analysis.statistics import p_text, share_of_orders
from fastmask.subnetworks import Subnetworks

__all__ = ["overlap"]

LANGUAGES, SEEDS, BOTH = "languages", "seeds", "languages and seeds"


def overlap(
    subnets: Subnetworks,
    *,
    seeds: Sequence[Subnetworks] = (),
    same_start: bool = True,
    units: str | None = None,
    families: Mapping[str, str] | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> Result:
    """Jaccard similarity |A and B| / |A or B| of masks: between languages, and between seeds of one language.

    The control is a pair of random masks with the same number of live units in every layer: the exact expectation and
    central band of its Jaccard similarity (`chance.chance_jaccard`). Between languages and seeds at once ("languages
    and seeds") is the fair measure of what is a language's own: lower than between seeds of one language, if anything
    is.

    Args:
        subnets: the subnetworks of the first seed.
        seeds: those that further seeds found for the same languages.
        same_start: whether all seeds began with the same weights, as of a pretrained model. Where each began with
            random ones of its own, unit 3 of one seed is not unit 3 of another: only pairs of one seed are compared.
        units: "heads", "neurons" or "weights"; default the first of these that is masked.
        families: language -> family; default `language_families.LANGUAGE_FAMILIES`.
        level: of the random masks' band.
        seed: of the permutation test, where there are more than 9 languages.

    Returns:
        table: one row for each pair of masks: `relation` ("languages": one seed, two languages; "seeds": one language,
            two seeds; "languages and seeds": both differ), `language_a`, `seed_a`, `language_b`, `seed_b`, `jaccard`,
            `expected`, `low`, `high` (of random masks), `band` ("above", "inside" or "below").
        more["relations"]: mean, least and largest of each relation, beside the random masks' mean.
        more["families"]: mean over pairs within and across families (one seed), and the one-sided p-value of the
            difference: families are dealt to the languages anew, in all orders or 20,000 drawn ones. Empty where no two
            languages are related.

    Raises:
        KeyError: no such units are masked.
        ValueError: seeds with other languages or another geometry.
    """
    runs = [subnets, *seeds]
    units, masks = _masks(runs, units)
    languages = subnets.languages
    groups = families_of(languages, families)
    table = _pairs(languages, masks, groups, level, same_start)
    matrix = _mean_matrix(table, languages)
    related = _related(matrix, languages, groups, seed)
    relations = table.groupby("relation", sort=False).agg(
        pairs=("jaccard", "size"),
        mean=("jaccard", "mean"),
        least=("jaccard", "min"),
        largest=("jaccard", "max"),
        random=("expected", "mean"),
        above_band=("band", lambda band: float((band == "above").mean())),
    )
    n_seeds = f"{len(runs)} seeds" if seeds else "one seed"
    band = f"{level:.0%} band of random masks with the same number of live {units} in each layer (exact)"
    caption = (
        f"Jaccard similarity of the {units} that {len(languages)} languages own, {n_seeds}. Left: languages joined by "
        "average linkage of 1 - similarity. Middle: mean over seeds"
        + (", on the diagonal between seeds of one language" if seeds and same_start else "")
        + f"; a dot marks pairs inside the {band}"
        + (" in most seeds" if seeds else "")
        + ". Right: all pairs; grey bars, those bands. Languages share more than by chance where points lie above "
        "their bar; masks follow kinship where one family lies above two families."
        + _families_sentence(related)
        + ("" if same_start or not seeds else " Pairs are of one seed: each began with its own weights.")
    )
    more = {"relations": relations.reset_index(), "families": related}
    shown = table.drop(columns="related")
    return Result("overlap", shown, caption, lambda: _draw(matrix, table, languages, groups, units, level), more)


Masks = list[list[list[NDArray[np.bool_]]]]
"""Of each seed, of each language, of each layer: its units."""


def _masks(runs: Sequence[Subnetworks], units: str | None) -> tuple[str, Masks]:
    """Which units are compared, and the masks over them."""
    first = runs[0]
    units = kind_of(first, units, ("heads", "neurons", "weights"))
    found: Masks = []
    for run in runs:
        if run.languages != first.languages:
            raise ValueError(f"seeds must have the same languages: {list(run.languages)}, not {list(first.languages)}")
        keep = getattr(run, units)
        if keep is None:
            raise ValueError(f"seeds must mask the same units: one of them does not mask {units}")
        layers = [layer.flatten(1).cpu().numpy() for layer in (keep.values() if units == "weights" else keep.unbind(1))]
        found.append([[layer[row] for layer in layers] for row in range(len(run.languages))])
        here, there = ([len(layer) for layer in of_run[0]] for of_run in (found[-1], found[0]))
        if here != there:
            raise ValueError(f"seeds must have one geometry: layers of {here} {units}, not {there}")
    return units, found


def _pairs(
    languages: Sequence[str], masks: Masks, groups: Mapping[str, str], level: float, same_start: bool
) -> pd.DataFrame:
    shapes = [len(layer) for layer in masks[0][0]]
    chance = functools.cache(lambda a, b: chance_jaccard(a, b, shapes, level))
    every = [
        (seed, name, np.concatenate(layers), tuple(int(layer.sum()) for layer in layers))
        for seed, of_seed in enumerate(masks)
        for name, layers in zip(languages, of_seed, strict=True)
    ]
    rows = []
    for (seed_a, a, one, sizes_a), (seed_b, b, other, sizes_b) in itertools.combinations(every, 2):
        if seed_a != seed_b and not same_start:
            continue
        random = chance(*sorted((sizes_a, sizes_b)))
        common = jaccard(one, other)
        band = "above" if common > random.high else "below" if common < random.low else "inside"
        relation = LANGUAGES if seed_a == seed_b else SEEDS if a == b else BOTH
        related = groups[a] == groups[b] != UNKNOWN_FAMILY
        values = (common, random.expected, random.low, random.high, band, related)
        rows.append((relation, a, seed_a, b, seed_b, *values))
    columns = ["relation", "language_a", "seed_a", "language_b", "seed_b"]
    return pd.DataFrame(rows, columns=[*columns, "jaccard", "expected", "low", "high", "band", "related"])


def _mean_matrix(table: pd.DataFrame, languages: Sequence[str]) -> NDArray[np.float64]:
    """Mean over seeds between languages, [L, L]; the diagonal between seeds, 1 where none are compared."""
    means = table[table.relation != BOTH].groupby(["language_a", "language_b"])["jaccard"].mean().unstack()
    upper = means.reindex(index=languages, columns=languages).to_numpy()
    matrix = np.where(np.isnan(upper), upper.T, upper)
    return np.where(np.isnan(matrix), np.eye(len(languages)), matrix)


def _related(
    matrix: NDArray[np.float64], languages: Sequence[str], groups: Mapping[str, str], seed: int
) -> pd.DataFrame:
    """Mean similarity within and across families, with a permutation test."""
    n = len(languages)
    family = np.array([groups[language] for language in languages])
    upper = np.triu(np.ones((n, n), dtype=bool), 1)
    same = (family[:, None] == family[None]) & (family != UNKNOWN_FAMILY)[:, None] & upper
    columns = ["pairs_within", "pairs_across", "within", "across", "difference", "p"]
    if not same.any() or not (upper & ~same).any():
        return pd.DataFrame([], columns=columns)
    within, across = float(matrix[same].mean()), float(matrix[upper & ~same].mean())
    # With as many pairs within families in every order, the difference grows with the sum within alone.
    a, b = np.nonzero(same)
    close = matrix[a, b].sum() - 1e-9
    p = share_of_orders(n, lambda orders: matrix[orders[:, a], orders[:, b]].sum(1) >= close, [seed, 1])
    values = [int(same.sum()), int((upper & ~same).sum()), within, across, within - across, p]
    return pd.DataFrame([values], columns=columns)


def _families_sentence(related: pd.DataFrame) -> str:
    if related.empty:
        return ""
    row = related.iloc[0]
    return (
        f" Within families {row.within:.2f} ({row.pairs_within:.0f} pairs), across {row.across:.2f} "
        f"({row.pairs_across:.0f} pairs), permutation p = {p_text(row.p)}."
    )


def _draw(
    matrix: NDArray[np.float64],
    table: pd.DataFrame,
    languages: Sequence[str],
    groups: Mapping[str, str],
    units: str,
    level: float,
) -> Any:
    from scipy.cluster.hierarchy import dendrogram, linkage
    from scipy.spatial.distance import squareform

    n = len(languages)
    side = max(2.6, 0.24 * n + 0.8) if n > 14 else max(2.6, 0.42 * n + 0.6)
    figure = new_figure(1.6 + side + 4.6, side + 1.3)
    tree, middle, right = figure.subplots(1, 3, width_ratios=[1.3, side + 0.9, 3.4])
    order = list(range(n))
    if n > 1:
        distance = 1 - matrix
        np.fill_diagonal(distance, 0)
        joined = linkage(squareform(distance, checks=False), "average", optimal_ordering=True)
        drawn = dendrogram(joined, ax=tree, orientation="left", color_threshold=0, above_threshold_color=GREY)
        order = drawn["leaves"]
        tree.set_ylim(10 * n, 0)
    tree.set(yticks=[], xlim=(1, 0), xlabel="1 - Jaccard")
    tree.spines[["top", "left", "right"]].set_visible(False)

    names, values = [languages[at] for at in order], matrix[np.ix_(order, order)]
    if not (table.relation == SEEDS).any():
        np.fill_diagonal(values, np.nan)
    image = heatmap(middle, values, names, names, low=0, high=1)
    colour_languages(middle, groups)
    among = table[table.relation == LANGUAGES].assign(inside=lambda rows: rows.band == "inside")
    for pair, share in among.groupby(["language_a", "language_b"])["inside"].mean().items():
        row, column = (names.index(name) for name in pair)
        if share > 0.5:
            x, y = (column + 0.33, row + 0.33), (row - 0.33, column - 0.33)
            middle.plot(x, y, ".", color="white", markersize=4, markeredgecolor=ON_LIGHT, mew=0.4)
    middle.set_title(f"{units} in common, Jaccard", fontsize=10)
    figure.colorbar(image, ax=middle, shrink=0.8, pad=0.01)
    _draw_relations(right, table, groups, level)
    several = [name for name, size in Counter(groups.values()).items() if size > 1 and name != UNKNOWN_FAMILY]
    if several:
        points = [tree.plot([], [], "o", color=family_colour(family, GREY))[0] for family in several]
        # Given one by one: matplotlib leaves out a name that starts with an underscore.
        figure.legend(points, several, loc="outside lower left", fontsize=8, ncols=4 if n <= 14 else 8, frameon=False)
    return figure


def _draw_relations(axis: Any, table: pd.DataFrame, groups: Mapping[str, str], level: float) -> None:
    """All pairs by relation, each beside the band of random masks of its sizes; those of one family in its colour."""
    among, related = table.relation == LANGUAGES, table.related
    kinds = {
        "one\nfamily": table[among & related],
        "two\nfamilies" if (among & related).any() else "languages": table[among & ~related],
        "one language,\ntwo seeds": table[table.relation == SEEDS],
        "two of\nboth": table[table.relation == BOTH],
    }
    kinds = {name: pairs for name, pairs in kinds.items() if len(pairs)}
    for place, pairs in enumerate(kinds.values()):
        spread = np.random.default_rng([place, 0]).uniform(-0.25, 0.25, len(pairs)) if len(pairs) > 1 else [0.0]
        colours = [family_colour(groups[row.language_a], GREY) if row.related else GREY for row in pairs.itertuples()]
        line = [place - 0.4, place + 0.4]
        axis.bar(place, pairs.high.max() - pairs.low.min(), 0.8, pairs.low.min(), color=GREY, alpha=0.25, zorder=1)
        axis.plot(line, [pairs.expected.mean()] * 2, color=GREY, linestyle="--", zorder=2)
        axis.scatter(place + np.asarray(spread), pairs.jaccard, 9, colours, alpha=0.8, linewidths=0, zorder=3)
        axis.plot(line, [pairs.jaccard.mean()] * 2, color="black", linewidth=1.5, zorder=4)
        axis.annotate(f"n = {len(pairs)}", (place, 1.01), ha="center", va="bottom", fontsize=7)
    axis.set_xticks(range(len(kinds)), kinds, fontsize=8)
    axis.set(xlim=(-0.6, max(len(kinds), 1) - 0.4), ylim=(0, 1.06), ylabel="Jaccard")
    axis.set_title(f"points: pairs; line: mean\ngrey: {level:.0%} of random masks", fontsize=9)
    bare(axis)
