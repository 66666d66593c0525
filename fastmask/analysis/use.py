"""Use of units: how many languages own each head or neuron, layer by layer, against random masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fastmask.analysis.chance import chance_owners
from fastmask.analysis.drawing import COLOURS, MARKERS, bare, heatmap, legend_above, new_figure
from fastmask.analysis.result import Result, kind_of
from fastmask.subnetworks import Subnetworks

__all__ = ["unit_use"]

GROUPS = ("all", "one", "none")


def unit_use(
    subnets: Subnetworks, *, units: str | None = None, level: float = 0.95, seed: int = 0, draws: int = 1000
) -> Result:
    """How many of the L languages own each unit, and how many units all, exactly one or no language owns.

    The control: L random masks with the same live units in each layer. With p_l the share of a layer that language l
    owns, n prod_l p_l of its n units are expected to be owned by all, n prod_l (1 - p_l) by none and
    n sum_l p_l prod_(k != l) (1 - p_k) by exactly one. The band is drawn (`chance.chance_owners`).

    Args:
        subnets: L languages, at least two.
        units: "heads" or "neurons"; default the first of these that is masked.
        level: of the random masks' band.
        seed: of the drawn random masks.
        draws: how many sets of L random masks.

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
    table = pd.DataFrame(
        [
            (units, layer, unit, int(number), " ".join(names[keep[:, layer, unit]]))
            for (layer, unit), number in np.ndenumerate(owners)
        ],
        columns=["units", "layer", "unit", "owners", "languages"],
    )
    summary = _layers(keep, units, level, seed, draws)
    caption = (
        f"How many of {L} languages own each of {size} {units} in each of {layers} layers. Points: {units} owned by "
        f"all languages, by exactly one, and by none. Ticks: expected of random masks with the same number of live "
        f"{units} in each layer of each language; bars: {level:.0%} of {draws:,} sets of them. A point right of its "
        "bar says that languages agree (all, none), or keep units to themselves (one), more than by chance."
    )
    return Result("use", table, caption, lambda: _draw(owners, summary, L, units), {"layers": summary})


def _layers(keep: NDArray[np.bool_], units: str, level: float, seed: int, draws: int) -> pd.DataFrame:
    L, layers, size = keep.shape
    tails = [(1 - level) / 2, (1 + level) / 2]
    rows = []
    for layer in range(layers):
        share = keep[:, layer].mean(1)
        nobody_else = np.array([np.prod(np.delete(1 - share, language)) for language in range(L)])
        expected = (share.prod(), (share * nobody_else).sum(), (1 - share).prod())
        drawn = chance_owners(keep[:, layer].sum(1).tolist(), size, draws, [seed, layer])
        found = np.bincount(keep[:, layer].sum(0), minlength=L + 1)
        for group, mean, number in zip(GROUPS, expected, (L, 1, 0), strict=True):
            # counts: no means between two of them
            low, high = np.quantile(drawn[:, number], tails, method="inverted_cdf")
            rows.append((units, layer, size, group, int(found[number]), size * mean, int(low), int(high)))
    return pd.DataFrame(rows, columns=["units", "layer", "size", "group", "count", "expected", "low", "high"])


def _draw(owners: NDArray[np.int64], summary: pd.DataFrame, L: int, units: str) -> Any:
    layers, size = owners.shape
    few = size <= 32
    columns = size if few else L + 1
    width = 1.6 + max(3.2, (0.34 if columns <= 14 else 0.26) * columns)
    figure = new_figure(width + 4.2, max(2.8, 0.36 * layers + 1.4))
    left, right = figure.subplots(1, 2, width_ratios=[width, 4.0])
    names, unit = [str(layer) for layer in range(layers)], units.removesuffix("s")
    if few:
        image = heatmap(left, owners, names, [str(unit) for unit in range(size)], low=0, high=L, numbers="{:.0f}")
        left.set_xlabel(unit)
        figure.colorbar(image, ax=left, label=f"languages that own it, of {L}")
    else:
        shares = np.stack([np.bincount(layer, minlength=L + 1) for layer in owners]) / size * 100
        every = [str(number) for number in range(L + 1)]
        image = heatmap(left, shares, names, every, low=0, high=100, numbers="{:.0f}")
        left.set_xlabel(f"languages that own a {unit}, of {L}")
        figure.colorbar(image, ax=left, label=f"% of the layer's {size} {units}")
    left.set_ylabel("layer")
    for at, group in enumerate(GROUPS):
        rows = summary[summary.group == group]
        y = rows.layer + (at - 1) * 0.25
        right.barh(y, 100 * (rows.high - rows.low) / size, 0.2, 100 * rows.low / size, color=COLOURS[at], alpha=0.3)
        right.plot(100 * rows.expected / size, y, "|", color="black")
        right.plot(100 * rows["count"] / size, y, MARKERS[at], color=COLOURS[at], markersize=5, label=group)
    right.set_yticks(range(layers))
    right.set(ylim=(layers - 0.5, -0.5), xlim=(-3, 103), xlabel=f"% of {units} owned by ... (bars, ticks: random)")
    bare(right)
    legend_above(right, ncols=3)
    return figure
