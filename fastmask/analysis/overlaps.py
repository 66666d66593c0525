"""Overlap: how much the subnetworks of languages, and of seeds, have in common, against random ones."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fastmask.analysis.chance import chance_jaccard
from fastmask.analysis.drawing import COLOURS, GREY, MARKERS, heatmap, new_figure
from fastmask.analysis.language_families import UNKNOWN_FAMILY, families_of
from fastmask.analysis.result import Result
from fastmask.analysis.statistics import p_text, share_of_orders
from fastmask.errors import unknown
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
    units, masks = _flat(runs, units)
    languages = subnets.languages
    groups = families_of(languages, families)
    table = _pairs(languages, masks, level, same_start)
    matrix = _mean_matrix(table, languages, len(runs))
    relations = _relations(table)
    related = _related(matrix, languages, groups, seed)
    n_seeds = f"{len(runs)} seeds" if seeds else "one seed"
    band = f"{level:.0%} band of random masks with the same number of live {units} in each layer (exact)"
    caption = (
        f"Jaccard similarity of the {units} that {len(languages)} languages own, {n_seeds}. Left: languages joined by "
        "average linkage of 1 - similarity; a marker shows the family. Middle: mean over seeds"
        + (", on the diagonal between seeds of one language" if seeds and same_start else "")
        + f"; a dot marks pairs inside the {band}"
        + (" in most seeds" if seeds else "")
        + ". Right: all pairs; grey bars, those bands."
        + _families_sentence(related)
        + ("" if same_start or not seeds else " Pairs are of one seed: each began with its own weights.")
    )
    return Result(
        "overlap",
        table,
        caption,
        lambda: _draw(matrix, table, languages, groups, units, level),
        {"relations": relations, "families": related},
    )


Masks = list[list[tuple[NDArray[np.bool_], list[int], list[int]]]]


def _flat(runs: Sequence[Subnetworks], units: str | None) -> tuple[str, Masks]:
    """Each seed's and language's mask, flat, with its live units in each layer and the units of each layer."""
    first = runs[0]
    known = [kind for kind in ("heads", "neurons", "weights") if getattr(first, kind) is not None]
    if units is None:
        units = known[0]
    if units not in known:
        raise unknown("masked part", units, known)
    flat: Masks = []
    for run in runs:
        if run.languages != first.languages:
            raise ValueError(f"seeds must have the same languages: {list(run.languages)}, not {list(first.languages)}")
        keep = getattr(run, units)
        if keep is None:
            raise ValueError(f"seeds must mask the same units: one of them does not mask {units}")
        layers = list(keep.values()) if units == "weights" else list(keep.unbind(1))
        layers = [layer.flatten(1).cpu().numpy() for layer in layers]
        shapes = [layer.shape[1] for layer in layers]
        if flat and shapes != flat[0][0][2]:
            raise ValueError(f"seeds must have one geometry: layers of {shapes} {units}, not {flat[0][0][2]}")
        flat.append(
            [
                (np.concatenate([layer[row] for layer in layers]), [int(layer[row].sum()) for layer in layers], shapes)
                for row in range(len(run.languages))
            ]
        )
    return units, flat


def _pairs(languages: Sequence[str], masks: Masks, level: float, same_start: bool) -> pd.DataFrame:
    rows = []
    cache: dict[tuple[tuple[int, ...], tuple[int, ...]], Any] = {}
    every = [(seed, row) for seed in range(len(masks)) for row in range(len(languages))]
    for (seed_a, a), (seed_b, b) in itertools.combinations(every, 2):
        if seed_a != seed_b and not same_start:
            continue
        (one, sizes_a, shapes), (other, sizes_b, _) = masks[seed_a][a], masks[seed_b][b]
        first, second = sorted((tuple(sizes_a), tuple(sizes_b)))
        if (first, second) not in cache:
            cache[first, second] = chance_jaccard(first, second, shapes, level)
        chance = cache[first, second]
        either = int((one | other).sum())
        jaccard = int((one & other).sum()) / either if either else 1.0
        band = "above" if jaccard > chance.high else "below" if jaccard < chance.low else "inside"
        relation = LANGUAGES if seed_a == seed_b else SEEDS if a == b else BOTH
        values = (jaccard, chance.expected, chance.low, chance.high, band)
        rows.append((relation, languages[a], seed_a, languages[b], seed_b, *values))
    columns = ["relation", "language_a", "seed_a", "language_b", "seed_b"]
    return pd.DataFrame(rows, columns=[*columns, "jaccard", "expected", "low", "high", "band"])


def _mean_matrix(table: pd.DataFrame, languages: Sequence[str], n_seeds: int) -> NDArray[np.float64]:
    """Mean over seeds between languages, [L, L]; the diagonal between seeds, 1 where none are compared."""
    place = {language: at for at, language in enumerate(languages)}
    sums = np.zeros((len(languages), len(languages)))
    for row in table[table.relation != BOTH].itertuples():
        a, b = place[row.language_a], place[row.language_b]
        sums[a, b] += row.jaccard
        if a != b:
            sums[b, a] += row.jaccard
    counts = np.full_like(sums, n_seeds)
    np.fill_diagonal(counts, (table.relation == SEEDS).sum() / len(languages))
    return np.divide(sums, counts, out=np.ones_like(sums), where=counts > 0)


def _relations(table: pd.DataFrame) -> pd.DataFrame:
    grouped = table.groupby("relation", sort=False)
    found = grouped.agg(
        pairs=("jaccard", "size"),
        mean=("jaccard", "mean"),
        least=("jaccard", "min"),
        largest=("jaccard", "max"),
        random=("expected", "mean"),
    )
    found["above_band"] = grouped["band"].apply(lambda band: float((band == "above").mean()))
    return found.reset_index()


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
    p = share_of_orders(n, lambda orders: matrix[orders[:, a], orders[:, b]].sum(1) >= close, [seed, 1], 20_000)
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


# ---- the picture


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
    figure = new_figure(2.2 + side + 4.6, side + 1.3)
    tree, middle, right = figure.subplots(1, 3, width_ratios=[1.9, side + 0.9, 3.4])
    order = list(range(n))
    if n > 1:
        distance = 1 - matrix
        np.fill_diagonal(distance, 0)
        joined = linkage(squareform(distance, checks=False), "average", optimal_ordering=True)
        drawn = dendrogram(joined, ax=tree, orientation="left", color_threshold=0, above_threshold_color="#444444")
        order = drawn["leaves"]
        tree.set_ylim(10 * n, 0)
    names = [languages[at] for at in order]
    _family_markers(tree, names, groups)
    tree.set_yticks([])
    tree.set_xlabel("1 - Jaccard")
    tree.spines[["top", "left", "right"]].set_visible(False)

    values = matrix[np.ix_(order, order)]
    if not (table.relation == SEEDS).any():
        np.fill_diagonal(values, np.nan)
    least = float(np.min(values[np.isfinite(values)], initial=1.0))
    image = heatmap(middle, values, names, names, low=np.floor(least * 10) / 10)
    at = {name: place for place, name in enumerate(names)}
    among = table[table.relation == LANGUAGES].assign(inside=lambda rows: rows.band == "inside")
    for (a, b), share in among.groupby(["language_a", "language_b"])["inside"].mean().items():
        for row, column in ((at[a], at[b]), (at[b], at[a])) if share > 0.5 else ():
            middle.plot(column + 0.33, row - 0.33, ".", color="white", markersize=4, markeredgecolor="black", mew=0.4)
    middle.set_title(f"{units} in common, Jaccard", fontsize=10)
    figure.colorbar(image, ax=middle, shrink=0.8, pad=0.01)
    _draw_relations(right, table, groups, level)
    return figure


def _family_markers(tree: Any, names: Sequence[str], groups: Mapping[str, str]) -> None:
    """A marker for the family at each leaf; a language without relatives here has a grey point."""
    handles = []
    several = [family for family in dict.fromkeys(groups[name] for name in names) if _count(names, groups, family) > 1]
    for at, family in enumerate(several):
        places = [10 * row + 5 for row, name in enumerate(names) if groups[name] == family]
        colour, marker = COLOURS[at % 8], MARKERS[(at + at // 8) % 8]
        handles += tree.plot([0] * len(places), places, marker, color=colour, markersize=6, clip_on=False, zorder=3)
    places = [10 * row + 5 for row, name in enumerate(names) if groups[name] not in several]
    if places:
        handles += tree.plot([0] * len(places), places, ".", color=GREY, clip_on=False, zorder=3)
    if several:
        # Given one by one: matplotlib leaves out a name that starts with an underscore.
        labels = [*several, *(["no relative here"] if places else [])]
        ncols = 4 if len(names) <= 14 else 8
        tree.figure.legend(handles, labels, loc="outside lower left", fontsize=8, ncols=ncols, frameon=False)


def _count(names: Sequence[str], groups: Mapping[str, str], family: str) -> int:
    return 0 if family == UNKNOWN_FAMILY else sum(groups[name] == family for name in names)


def _draw_relations(axis: Any, table: pd.DataFrame, groups: Mapping[str, str], level: float) -> None:
    """All pairs by relation, each beside the band of random masks of its sizes."""
    same = [groups[a] == groups[b] != UNKNOWN_FAMILY for a, b in zip(table.language_a, table.language_b, strict=True)]
    related = pd.Series(same, index=table.index)
    among = table.relation == LANGUAGES
    kinds = {
        "one\nfamily": table[among & related],
        "two\nfamilies" if (among & related).any() else "languages": table[among & ~related],
        "one language,\ntwo seeds": table[table.relation == SEEDS],
        "two of\nboth": table[table.relation == BOTH],
    }
    kinds = {name: pairs for name, pairs in kinds.items() if len(pairs)}
    for place, pairs in enumerate(kinds.values()):
        spread = np.random.default_rng([place, 0]).uniform(-0.25, 0.25, len(pairs)) if len(pairs) > 1 else [0.0]
        axis.bar(place, pairs.high.max() - pairs.low.min(), 0.8, pairs.low.min(), color="#DDDDDD", zorder=1)
        axis.plot([place - 0.4, place + 0.4], [pairs.expected.mean()] * 2, color=GREY, linestyle="--", zorder=2)
        axis.plot(place + np.asarray(spread), pairs.jaccard, ".", color=COLOURS[0], markersize=4, alpha=0.7, zorder=3)
        axis.plot([place - 0.4, place + 0.4], [pairs.jaccard.mean()] * 2, color="black", linewidth=1.5, zorder=4)
        axis.annotate(f"n = {len(pairs)}", (place, 1.01), ha="center", va="bottom", fontsize=7)
    axis.set_xticks(range(len(kinds)), kinds, fontsize=8)
    axis.set_xlim(-0.6, max(len(kinds), 1) - 0.4)
    axis.set_ylim(0, 1.06)
    axis.set_ylabel("Jaccard")
    axis.set_title(f"points: pairs; line: mean\ngrey: {level:.0%} of random masks", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
