"""Dynamics: how dynamic masks move while the model is trained."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fastmask.analysis import drawing
from fastmask.analysis.drawing import COLOURS, GREY, MARKERS, UNKNOWN_FAMILY
from fastmask.analysis.result import Result, kind_of
from fastmask.analysis.sharing import chance_jaccard, jaccard
from fastmask.dynamic import History, Snapshot
from fastmask.files import StrPath


def dynamics(
    history: Sequence[Snapshot] | StrPath,
    *,
    units: str | None = None,
    steps: Sequence[int] | None = None,
    families: Mapping[str, str] | None = None,
) -> Result:
    """How much each language's mask changes, how far it gets, and whether related languages' masks come together.

    At each step, with M the mask before and M' after it:
    - churn: |M' without M| / |M'|, the share of live units that are new since the step before in the table;
    - distance: 1 - Jaccard(M', first mask).
    Between languages: Jaccard of their masks, over pairs of one family and of different ones, beside the expectation
    for random masks of the same sizes. Masks come together where it grows.

    Args:
        history: of `DynamicSubnetworks`, or the `dynamic.safetensors` of a run.
        units: "heads" or "neurons"; default the first of these that the history has.
        steps: at which masks are looked at; default every step at which some mask changed. Give the steps of all
            updates to count those that changed nothing.
        families: language -> family; default `drawing.LANGUAGE_FAMILIES`.

    Returns:
        table: `step`, `language`, `churn`, `distance`, `live` (units).
        more["pairs"]: `step`, `relation` ("one family", "two families"), `pairs`, mean `jaccard`, `random` (expected).

    Raises:
        FileNotFoundError: no such file.
        KeyError: units that the history does not have.
        ValueError: not a history, or an empty one.
    """
    known = History.load(history) if isinstance(history, str | PathLike) else History(history)
    if not len(known):
        raise ValueError("this history has no masks")
    units = kind_of(known[0].masks, units)
    changes, languages = {entry.step for entry in known}, list(known.languages)
    groups = drawing.families_of(languages, families)
    wanted = sorted(changes if steps is None else {min(changes), *steps})
    masks, rows, pairs = [known.at(step).units[units].cpu().numpy() for step in wanted], [], []
    for step, before, current in zip(wanted, [masks[0], *masks], masks, strict=False):
        for name, was, mask, first in zip(languages, before, current, masks[0], strict=True):
            live, fresh = int(mask.sum()), int((mask & ~was).sum())
            rows.append((step, name, fresh / live if live else 0.0, 1 - jaccard(mask, first), live))
        pairs += _pairs(step, dict(zip(languages, current, strict=True)), groups)
    table = pd.DataFrame(rows, columns=["step", "language", "churn", "distance", "live"])
    between = pd.DataFrame(pairs, columns=["step", "relation", "pairs", "jaccard", "random"])
    caption = (
        f"The {units} of {len(languages)} languages at {len(wanted)} steps, from {wanted[0]} to {wanted[-1]}. Churn: "
        "share of live units that are new since the step before (line: mean; grey: least to largest language). "
        "Distance: 1 - Jaccard to the first mask. Right: mean Jaccard between languages; dashed, expected of random "
        "masks of the same sizes. Churn that falls says that masks settle; lines that rise above their dashed ones say "
        "that languages come to share units."
    )
    extent = float(table.churn.max()) or 1.0
    draw = functools.partial(_draw, table, between, languages, units)
    return Result("dynamics", table, caption, draw, {"pairs": between}, extent)


def _pairs(step: int, current: Mapping[str, NDArray[np.bool_]], groups: Mapping[str, str]) -> list[tuple[Any, ...]]:
    found: dict[str, list[tuple[float, float]]] = {}
    chance = functools.cache(lambda a, b: chance_jaccard(a, b, [units] * len(a)).expected)
    units = next(iter(current.values())).shape[1]
    for a, b in itertools.combinations(groups, 2):
        relation = "one family" if groups[a] == groups[b] != UNKNOWN_FAMILY else "two families"
        random = chance(tuple(current[a].sum(1).tolist()), tuple(current[b].sum(1).tolist()))
        found.setdefault(relation, []).append((jaccard(current[a], current[b]), random))
    return [(step, relation, len(values), *np.mean(values, 0).tolist()) for relation, values in sorted(found.items())]


def _draw(table: pd.DataFrame, between: pd.DataFrame, languages: Sequence[str], units: str, extent: float) -> Any:
    n, steps = len(languages), sorted(set(table.step))
    figure = drawing.new_figure(11.5, max(3.2, 0.2 * n + 1.2))
    left, middle, right = figure.subplots(1, 3, width_ratios=[3, 4, 3])
    churn = table[table.step > steps[0]].groupby("step")["churn"].agg(["min", "max", "mean"]) * 100
    left.fill_between(churn.index, churn["min"], churn["max"], color=GREY, alpha=0.3, linewidth=0)
    left.plot(churn.index, churn["mean"], "o-", color=COLOURS[0], markersize=3)
    left.set(ylim=(0, 103 * extent), ylabel=f"churn: new {units}, %")
    grid = table.pivot(index="language", columns="step", values="distance").loc[list(languages), steps]
    image = drawing.heatmap(middle, grid.to_numpy(), languages, [str(step) for step in steps], low=0, high=1)
    shown = range(0, len(steps), max(1, -(-len(steps) // 12)))
    middle.set_xticks(list(shown), [str(steps[at]) for at in shown], rotation=90 if len(str(steps[-1])) > 3 else 0)
    figure.colorbar(image, ax=middle, label="distance to the first mask", pad=0.01)
    for at, (relation, rows) in enumerate(between.groupby("relation")):
        label = f"{relation} ({rows.pairs.iloc[0]} pairs)"
        right.plot(rows.step, rows.jaccard, f"{MARKERS[at]}-", color=COLOURS[at], markersize=3, label=label)
        right.plot(rows.step, rows.random, "--", color=COLOURS[at], linewidth=1)
    right.set(ylim=(0, 1.03), ylabel="Jaccard between languages")
    if len(between):
        drawing.legend_above(right, ncols=1)
    for panel in (left, middle, right):
        panel.set_xlabel("step")
    drawing.bare(left, right)
    return figure
