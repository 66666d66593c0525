"""What the subnetworks of languages, and of seeds, share: overlap of masks and use of units, against random masks.

The random masks are those of `fastmask.subnetworks.controls.random_like`: in each layer of each language as many live
units as in the real masks, each choice of units as likely as any other.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.cluster.hierarchy import dendrogram, linkage
from scipy.spatial.distance import squareform
from scipy.stats import hypergeom

from fastmask.analysis import drawing
from fastmask.analysis.drawing import COLOURS, GREY, MARKERS, ON_LIGHT, UNKNOWN_FAMILY
from fastmask.analysis.result import Result, kind_of
from fastmask.analysis.statistics import LEVEL, p_text, share_of_orders
from fastmask.subnetworks import Subnetworks

LANGUAGES, SEEDS, BOTH = "languages", "seeds", "languages and seeds"
DRAWS = 1000  # sets of random masks, one for each language, where no exact band is known
NEGLIGIBLE = 1e-20  # probabilities below this are left out of sums over a layer


# ---- random masks


class Chance(NamedTuple):
    """The Jaccard similarity of two random masks: its mean and the ends of its central band."""

    expected: float
    low: float
    high: float


def jaccard(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    """The Jaccard similarity |A and B| / |A or B| of two masks; 1 of two that own nothing."""
    either = int((a | b).sum())
    return int((a & b).sum()) / either if either else 1.0


def chance_jaccard(sizes_a: Sequence[int], sizes_b: Sequence[int], units: Sequence[int]) -> Chance:
    """Distribution of the Jaccard similarity of two random masks; exact, nothing is drawn.

    In a layer of n units, masks of a and b units share I ~ Hypergeometric(n, a, b); layers are independent, so the sum
    of I has the convolution of these distributions, and J = I / (A + B - I) with fixed totals A and B grows with I.
    """
    first, shared = 0, np.ones(1)
    for a, b, n in zip(sizes_a, sizes_b, units, strict=True):
        middle, spread = a * b / n, np.sqrt(a * b * (n - a) * (n - b) / (n * n * max(n - 1, 1)))
        least = max(0, a + b - n, int(middle - 12 * spread) - 12)
        most = min(a, b, int(middle + 12 * spread) + 12)
        probabilities = hypergeom.pmf(np.arange(least, most + 1), n, a, b)
        keep = np.flatnonzero(probabilities > NEGLIGIBLE)
        first += least + int(keep[0])
        shared = np.convolve(shared, probabilities[keep[0] : keep[-1] + 1])
    total = sum(sizes_a) + sum(sizes_b)
    intersection = first + np.arange(len(shared))
    values = np.ones(1) if total == 0 else intersection / (total - intersection)
    # Rounding must not move the ends where a tail is exactly (1 - LEVEL) / 2.
    ends = (1 - LEVEL) / 2 * (1 + 1e-12), (1 + LEVEL) / 2 * (1 - 1e-12)
    low, high = values[np.searchsorted(shared.cumsum(), ends).clip(max=len(values) - 1)]
    return Chance(float(shared @ values), float(low), float(high))


def chance_owners(sizes: Sequence[int], units: int, draws: int, seed: Sequence[int]) -> NDArray[np.int64]:
    """How many units of a layer are owned by 0, 1, ... L languages with random masks; int64 [draws, L + 1].

    One language after the other chooses its units; of those that have k owners so far it takes a multivariate
    hypergeometric share, drawn class by class. So a layer of thousands of units costs as little as one of twelve.
    """
    generator = np.random.default_rng(seed)
    owners = np.zeros((draws, len(sizes) + 1), dtype=np.int64)
    owners[:, 0] = units
    for language, size in enumerate(sizes):
        wanted, others = np.full(draws, int(size)), np.full(draws, units)
        taken = np.zeros_like(owners)
        for k in range(language + 1):
            others = others - owners[:, k]
            taken[:, k] = generator.hypergeometric(owners[:, k], others, wanted)
            wanted = wanted - taken[:, k]
        owners -= taken
        owners[:, 1:] += taken[:, :-1]
    return owners


# ---- overlap


def overlap(
    subnets: Subnetworks,
    *,
    seeds: Sequence[Subnetworks] = (),
    same_start: bool = True,
    units: str | None = None,
    families: Mapping[str, str] | None = None,
    seed: int = 0,
) -> Result:
    """Jaccard similarity |A and B| / |A or B| of masks: between languages, and between seeds of one language.

    The control is a pair of random masks with the same number of live units in every layer: the exact expectation and
    central band of its Jaccard similarity (`chance_jaccard`). Between languages and seeds at once ("languages and
    seeds") is the fair measure of what is a language's own: lower than between seeds of one language, if anything is.

    Args:
        subnets: the subnetworks of the first seed.
        seeds: those that further seeds found for the same languages.
        same_start: whether all seeds began with the same weights, as of a pretrained model. Where each began with
            random ones of its own, unit 3 of one seed is not unit 3 of another: only pairs of one seed are compared.
        units: "heads", "neurons" or "weights"; default the first of these that is masked.
        families: language -> family; default `drawing.LANGUAGE_FAMILIES`.
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
    units = kind_of(subnets, units, ("heads", "neurons", "weights"))
    runs = [subnets, *seeds]
    masks = [_layers_of(run, subnets, units) for run in runs]
    languages = subnets.languages
    groups = drawing.families_of(languages, families)
    shapes = [layer.shape[1] for layer in masks[0]]
    for of_seed in masks:
        if (here := [layer.shape[1] for layer in of_seed]) != shapes:
            raise ValueError(f"seeds must have one geometry: layers of {here} {units}, not {shapes}")

    chance = functools.cache(lambda a, b: chance_jaccard(a, b, shapes))
    every = [
        (number, name, np.concatenate([layer[row] for layer in run]), tuple(int(layer[row].sum()) for layer in run))
        for number, run in enumerate(masks)
        for row, name in enumerate(languages)
    ]
    rows = []
    for (seed_a, a, one, sizes_a), (seed_b, b, other, sizes_b) in itertools.combinations(every, 2):
        if seed_a == seed_b or same_start:
            random, common = chance(*sorted((sizes_a, sizes_b))), jaccard(one, other)
            band = "above" if common > random.high else "below" if common < random.low else "inside"
            relation = LANGUAGES if seed_a == seed_b else SEEDS if a == b else BOTH
            related = groups[a] == groups[b] != UNKNOWN_FAMILY
            rows.append((relation, a, seed_a, b, seed_b, common, *random, band, related))
    columns = ["relation", "language_a", "seed_a", "language_b", "seed_b", "jaccard"]
    table = pd.DataFrame(rows, columns=[*columns, "expected", "low", "high", "band", "related"])
    relations = table.groupby("relation", sort=False).agg(
        pairs=("jaccard", "size"),
        mean=("jaccard", "mean"),
        least=("jaccard", "min"),
        largest=("jaccard", "max"),
        random=("expected", "mean"),
        above_band=("band", lambda band: float((band == "above").mean())),
    )
    # Mean over seeds between languages, [L, L]; the diagonal between seeds, 1 where none are compared.
    means = table[table.relation != BOTH].groupby(["language_a", "language_b"])["jaccard"].mean().unstack()
    upper = means.reindex(index=languages, columns=languages).to_numpy()
    matrix = np.where(np.isnan(upper), upper.T, upper)
    matrix = np.where(np.isnan(matrix), np.eye(len(languages)), matrix)
    related = _related(matrix, [groups[language] for language in languages], seed)

    n_seeds = f"{len(runs)} seeds" if seeds else "one seed"
    caption = (
        f"Jaccard similarity of the {units} that {len(languages)} languages own, {n_seeds}. Left: languages joined by "
        "average linkage of 1 - similarity. Middle: mean over seeds"
        + (", on the diagonal between seeds of one language" if seeds and same_start else "")
        + f"; a dot marks pairs inside the {LEVEL:.0%} band of random masks with the same number of live {units} in "
        "each layer (exact)"
        + (" in most seeds" if seeds else "")
        + ". Right: all pairs; grey bars, those bands. Languages share more than by chance where points lie above "
        "their bar; masks follow kinship where one family lies above two families."
    )
    for row in related.itertuples():
        caption += (
            f" Within families {row.within:.2f} ({row.pairs_within} pairs), across {row.across:.2f} "
            f"({row.pairs_across} pairs), permutation p = {p_text(row.p)}."
        )
    if seeds and not same_start:
        caption += " Pairs are of one seed: each began with its own weights."
    more = {"relations": relations.reset_index(), "families": related}
    shown = table.drop(columns="related")
    return Result("overlap", shown, caption, lambda: _draw_overlap(matrix, table, groups, units), more)


def _layers_of(run: Subnetworks, first: Subnetworks, units: str) -> list[NDArray[np.bool_]]:
    """The masks of each layer, bool [L, units]."""
    if run.languages != first.languages:
        raise ValueError(f"seeds must have the same languages: {list(run.languages)}, not {list(first.languages)}")
    if (keep := getattr(run, units)) is None:
        raise ValueError(f"seeds must mask the same units: one of them does not mask {units}")
    return [layer.flatten(1).cpu().numpy() for layer in (keep.values() if units == "weights" else keep.unbind(1))]


def _related(matrix: NDArray[np.float64], families: Sequence[str], seed: int) -> pd.DataFrame:
    """Mean similarity within and across families, with a permutation test."""
    n, family = len(families), np.array(families)
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


def _draw_overlap(matrix: NDArray[np.float64], table: pd.DataFrame, groups: Mapping[str, str], units: str) -> Any:
    n, order, names = len(groups), list(range(len(groups))), list(groups)
    side = max(2.6, 0.24 * n + 0.8) if n > 14 else max(2.6, 0.42 * n + 0.6)
    figure = drawing.new_figure(1.6 + side + 4.6, side + 1.3)
    tree, middle, right = figure.subplots(1, 3, width_ratios=[1.3, side + 0.9, 3.4])
    if n > 1:
        distance = 1 - matrix
        np.fill_diagonal(distance, 0)
        joined = linkage(squareform(distance, checks=False), "average", optimal_ordering=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that of equal masks has no width
            drawn = dendrogram(joined, ax=tree, orientation="left", color_threshold=0, above_threshold_color=GREY)
        order = drawn["leaves"]
        tree.set_ylim(10 * n, 0)
    tree.set(yticks=[], xlim=(1, 0), xlabel="1 - Jaccard")
    tree.spines[["top", "left", "right"]].set_visible(False)

    names, values = [names[at] for at in order], matrix[np.ix_(order, order)]
    if not (table.relation == SEEDS).any():
        np.fill_diagonal(values, np.nan)
    image = drawing.heatmap(middle, values, names, names, low=0, high=1)
    drawing.colour_languages(middle, groups)
    among = table[table.relation == LANGUAGES].assign(inside=lambda rows: rows.band == "inside")
    for pair, share in among.groupby(["language_a", "language_b"])["inside"].mean().items():
        row, column = (names.index(name) for name in pair)
        if share > 0.5:
            x, y = (column + 0.33, row + 0.33), (row - 0.33, column - 0.33)
            middle.plot(x, y, ".", color="white", markersize=4, markeredgecolor=ON_LIGHT, mew=0.4)
    middle.set_title(f"{units} in common, Jaccard", fontsize=10)
    figure.colorbar(image, ax=middle, shrink=0.8, pad=0.01)

    # All pairs by relation, each beside the band of random masks of its sizes; those of one family in its colour.
    several = [name for name, size in Counter(groups.values()).items() if size > 1 and name != UNKNOWN_FAMILY]
    kinds = {
        "one\nfamily": among[among.related],
        "two\nfamilies" if among.related.any() else "languages": among[~among.related],
        "one language,\ntwo seeds": table[table.relation == SEEDS],
        "two of\nboth": table[table.relation == BOTH],
    }
    kinds = {name: pairs for name, pairs in kinds.items() if len(pairs)}
    for place, pairs in enumerate(kinds.values()):
        spread = np.random.default_rng([place, 0]).uniform(-0.25, 0.25, len(pairs)) if len(pairs) > 1 else np.zeros(1)
        colours = [
            drawing.family_colour(groups[row.language_a], GREY) if row.related else GREY for row in pairs.itertuples()
        ]
        line = [place - 0.4, place + 0.4]
        low, high = pairs.low.min(), pairs.high.max()
        right.bar(place, high - low, 0.8, low, color=GREY, alpha=0.25, zorder=1)
        right.plot(line, [pairs.expected.mean()] * 2, color=GREY, linestyle="--", zorder=2)
        right.scatter(place + spread, pairs.jaccard, 9, colours, alpha=0.8, linewidths=0, zorder=3)
        right.plot(line, [pairs.jaccard.mean()] * 2, color="black", linewidth=1.5, zorder=4)
        right.annotate(f"n = {len(pairs)}", (place, 1.01), ha="center", va="bottom", fontsize=7)
    right.set_xticks(range(len(kinds)), kinds, fontsize=8)
    right.set(xlim=(-0.6, max(len(kinds), 1) - 0.4), ylim=(0, 1.06), ylabel="Jaccard")
    right.set_title(f"points: pairs; line: mean\ngrey: {LEVEL:.0%} of random masks", fontsize=9)
    drawing.bare(right)
    if several:
        points = [tree.plot([], [], "o", color=drawing.family_colour(family, GREY))[0] for family in several]
        # Given one by one: matplotlib leaves out a name that starts with an underscore.
        figure.legend(points, several, loc="outside lower left", fontsize=8, ncols=4 if n <= 14 else 8, frameon=False)
    return figure


# ---- use of units


def unit_use(subnets: Subnetworks, *, units: str | None = None, seed: int = 0) -> Result:
    """How many of the L languages own each unit, and how many units all, exactly one or no language owns.

    The control: L random masks with the same live units in each layer. With p_l the share of a layer that language l
    owns, n prod_l p_l of its n units are expected to be owned by all, n prod_l (1 - p_l) by none and
    n sum_l p_l prod_(k != l) (1 - p_k) by exactly one. The band is drawn (`chance_owners`).

    Args:
        subnets: L languages, at least two.
        units: "heads" or "neurons"; default the first of these that is masked.
        seed: of the drawn random masks.

    Returns:
        table: one row for each unit: `units`, `layer`, `unit`, `owners` (0..L), `languages` (names, by spaces).
        more["layers"]: for each layer and group ("all", "one", "none"): `count` of its `size` units, `expected`, `low`,
            `high` of random masks.

    Raises:
        KeyError: no such units are masked.
        ValueError: a single language.
    """
    units = kind_of(subnets, units)
    if len(subnets.languages) < 2:
        raise ValueError(f"who shares a unit needs at least two languages, given {list(subnets.languages)}")
    keep = getattr(subnets, units).cpu().numpy()
    L, layers, size = keep.shape
    owners = keep.sum(0)
    names = np.array(subnets.languages, dtype=object)
    rows = [(units, *at, int(number), " ".join(names[keep[:, at[0], at[1]]])) for at, number in np.ndenumerate(owners)]
    table = pd.DataFrame(rows, columns=["units", "layer", "unit", "owners", "languages"])

    counts = []
    for layer in range(layers):
        share = keep[:, layer].mean(1)
        nobody_else = np.array([np.prod(np.delete(1 - share, language)) for language in range(L)])
        groups = {"all": (L, share.prod()), "one": (1, (share * nobody_else).sum()), "none": (0, (1 - share).prod())}
        drawn = chance_owners(keep[:, layer].sum(1).tolist(), size, DRAWS, [seed, layer])
        for group, (number, expected) in groups.items():
            # counts: no means between two of them
            band = np.quantile(drawn[:, number], [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="inverted_cdf")
            count = int((owners[layer] == number).sum())
            counts.append((units, layer, size, group, count, size * expected, *map(int, band)))
    summary = pd.DataFrame(counts, columns=["units", "layer", "size", "group", "count", "expected", "low", "high"])
    caption = (
        f"How many of {L} languages own each of {size} {units} in each of {layers} layers. Points: {units} owned by "
        f"all languages, by exactly one, and by none. Ticks: expected of random masks with the same number of live "
        f"{units} in each layer of each language; bars: {LEVEL:.0%} of {DRAWS:,} sets of them. A point right of its "
        "bar says that languages agree (all, none), or keep units to themselves (one), more than by chance."
    )
    return Result("use", table, caption, lambda: _draw_use(owners, summary, L, units), {"layers": summary})


def _draw_use(owners: NDArray[np.int64], summary: pd.DataFrame, L: int, units: str) -> Any:
    layers, size = owners.shape
    few = size <= 32
    columns = size if few else L + 1
    width = 1.6 + max(3.2, (0.34 if columns <= 14 else 0.26) * columns)
    figure = drawing.new_figure(width + 4.2, max(2.8, 0.36 * layers + 1.4))
    left, right = figure.subplots(1, 2, width_ratios=[width, 4.0])
    names, unit = [str(layer) for layer in range(layers)], units.removesuffix("s")
    if few:
        values, high, label = owners, L, f"languages that own it, of {L}"
    else:
        values = np.stack([np.bincount(layer, minlength=L + 1) for layer in owners]) / size * 100
        high, label = 100, f"% of the layer's {size} {units}"
    image = drawing.heatmap(left, values, names, [str(at) for at in range(columns)], low=0, high=high, numbers="{:.0f}")
    left.set(xlabel=unit if few else f"languages that own a {unit}, of {L}", ylabel="layer")
    figure.colorbar(image, ax=left, label=label)
    for at, (group, rows) in enumerate(summary.groupby("group", sort=False)):
        y = rows.layer + (at - 1) * 0.25
        percent = rows[["count", "expected", "low", "high"]] * 100 / size
        right.barh(y, percent.high - percent.low, 0.2, percent.low, color=COLOURS[at], alpha=0.3)
        right.plot(percent.expected, y, "|", color="black")
        right.plot(percent["count"], y, MARKERS[at], color=COLOURS[at], markersize=5, label=group)
    right.set_yticks(range(layers))
    right.set(ylim=(layers - 0.5, -0.5), xlim=(-3, 103), xlabel=f"% of {units} owned by ... (bars, ticks: random)")
    drawing.bare(right)
    drawing.legend_above(right, ncols=3)
    return figure
