"""What languages have of one another's subnetworks: cross-evaluation, specificity, and typology of the unseen ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.patches import Rectangle

from fastmask.analysis import drawing
from fastmask.analysis.drawing import GREY, ON_LIGHT, SIGNED, WRITTEN
from fastmask.analysis.result import Result
from fastmask.analysis.statistics import bootstrap_interval, diagonal_permutation, p_text, spearman_permutation


def cross_evaluation(
    evaluate: Callable[[str, str], float],
    languages: Sequence[str],
    subnetworks: Sequence[str] | None = None,
    *,
    controls: Sequence[str] = ("full", "random"),
    higher_is_better: bool = True,
    seed: int = 0,
) -> Result:
    """Metric of language i under subnetwork j, and how much better a language does under its own.

    The diagonal advantage of language i is M[i, i] - mean over j != i of M[i, j] (with the sign turned where lower is
    better). Its p-value is that of dealing the subnetworks to the languages anew (`statistics.diagonal_permutation`):
    what a language or a subnetwork is worth in general cancels. The controls are the full network and random masks.

    Args:
        evaluate: (language, subnetwork) -> metric; called once for each pair, row by row.
        languages: whose data is evaluated: the rows.
        subnetworks: names of the columns; default `languages`. A language without one (unseen) has no diagonal.
        controls: further columns, passed to `evaluate` by these names; () for none.
        higher_is_better: False for a loss.
        seed: of the permutations, with more than 9 languages.

    Returns:
        table: `language`, `subnetwork`, `kind` ("own", "other", "control"), `value`.
        more["languages"]: `language`, `own`, `others` (mean), `advantage`, `best` (the best subnetwork), a column for
            each control.
        more["overall"]: `languages` with a subnetwork of their own, mean `advantage`, `p` (NaN below two),
            `own_is_best` (how many do best under their own), and mean `own_minus_` each control.

    Raises:
        ValueError: no languages, repeated names, or a metric that is not finite.
    """
    columns = list(languages if subnetworks is None else subnetworks)
    names = [*columns, *controls]
    if not languages or not columns:
        raise ValueError("cross-evaluation needs at least one language and one subnetwork")
    for given in (list(languages), names):
        if len(set(given)) < len(given):
            raise ValueError(f"expected distinct names, given {given}")
    sign = 1.0 if higher_is_better else -1.0
    cells, rows = [], []
    for language in languages:
        of = {name: float(evaluate(language, name)) for name in names}
        for name, value in of.items():
            if not np.isfinite(value):
                raise ValueError(f"the metric of {language!r} under {name!r} is {value}")
            kind = "control" if name in controls else "own" if name == language else "other"
            cells.append((language, name, kind, value))
        others = [of[name] for name in columns if name != language]
        own, mean = of[language] if language in columns else np.nan, float(np.mean(others)) if others else np.nan
        best = max(columns, key=lambda name: sign * of[name])
        rows.append((language, own, mean, sign * (own - mean), best, *(of[name] for name in controls)))
    table = pd.DataFrame(cells, columns=["language", "subnetwork", "kind", "value"])
    per_language = pd.DataFrame(rows, columns=["language", "own", "others", "advantage", "best", *controls])
    values = table.pivot(index="language", columns="subnetwork", values="value").loc[list(languages), names]
    owns = [language for language in languages if language in columns]
    both = per_language[per_language.language.isin(owns)]
    found = {
        "languages": len(owns),
        "advantage": both.advantage.mean(),
        "p": diagonal_permutation(sign * values.loc[owns, owns], seed=seed) if len(owns) > 1 else np.nan,
        "own_is_best": int((both.best == both.language).sum()),
        **{f"own_minus_{name}": sign * (both.own - both[name]).mean() for name in controls},
    }
    everywhere = len(owns) == len(languages)
    caption = (
        f"Metric of {len(languages)} languages (rows) under {len(columns)} subnetworks (columns)"
        + (f" and the controls {', '.join(controls)}" if controls else "")
        + ". Colours: difference to the language's own subnetwork"
        + ("." if everywhere else ", or to the mean of its row where it has none.")
    )
    if len(owns) > 1:
        caption += (
            f" Own against the mean of the others: {found['advantage']:+.2f} (permutation p = {p_text(found['p'])}); "
            f"{found['own_is_best']} of {len(owns)} languages do best under their own. Where "
            "frames stand out, languages depend on their own masks; whether because these were found, or only because "
            "weights were trained through them, the same picture of random masks says."
        )
    reference = per_language.set_index("language").own.fillna(values[columns].mean(axis=1))
    difference = values.sub(reference, axis=0)
    what = "own" if everywhere else "own, or to the row's mean"
    label = f"difference to {what} ({'higher' if higher_is_better else 'lower'} is better)"
    draw = partial(_draw_grid, values, difference, len(columns), label, "subnetwork of")
    more = {"languages": per_language, "overall": pd.DataFrame([found])}
    return Result("cross", table, caption, draw, more, _extent(difference))


def specificity(
    evaluate: Callable[[str, str], float],
    languages: Sequence[str],
    *,
    higher_is_better: bool = True,
    seed: int = 0,
) -> Result:
    """What language i loses when language j's own units are switched off: whether units are a language's causally.

    The loss L[i, j] is the metric of i in the whole network minus that without the units of j (with the sign turned
    where lower is better). The specificity of j is L[j, j] - mean over i != j of L[i, j]: how much more j loses than
    the others. Its p-value is that of dealing the languages' units to them anew (`statistics.diagonal_permutation`).
    The control is as many random units of the same layers, switched off for the language that they are drawn for: units
    that matter to nobody in particular cost as much.

    Args:
        evaluate: (language, switched off) -> metric of the language, where what is switched off is "nothing", the own
            units of one of the languages, or "random": as many as are the language's own.
        languages: those that own units of their own; at least two.
        higher_is_better: False for a loss.
        seed: of the permutations, with more than 9 languages.

    Returns:
        table: `language`, `off`, `kind` ("own", "other", "random"), `loss`.
        more["languages"]: `language`, `own` (the loss without its own units), `random` (without as many random ones),
            `others` (mean loss of the other languages without its units), `specificity`.
        more["overall"]: the means of these, `languages`, `p`, and `most_of_all`: in how many the language itself loses
            most of all languages without its units.

    Raises:
        ValueError: fewer than two languages, repeated names, or a metric that is not finite.
    """
    names = list(languages)
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"specificity needs two distinct languages or more, given {names}")
    sign = 1.0 if higher_is_better else -1.0
    cells = []
    for language in names:
        whole = float(evaluate(language, "nothing"))
        for off in (*names, "random"):
            loss = sign * (whole - float(evaluate(language, off)))
            if not np.isfinite(loss):
                raise ValueError(f"the metric of {language!r} without the units of {off!r} is not finite")
            cells.append((language, off, {language: "own", "random": "random"}.get(off, "other"), loss))
    table = pd.DataFrame(cells, columns=["language", "off", "kind", "loss"])
    losses = table.pivot(index="language", columns="off", values="loss").loc[names, [*names, "random"]]
    square = losses[names].to_numpy()
    own = np.diag(square)
    others = (square.sum(0) - own) / (len(names) - 1)
    columns = {"own": own, "random": losses["random"].to_numpy(), "others": others, "specificity": own - others}
    per_language = pd.DataFrame({"language": names, **columns})
    found = {
        "languages": len(names),
        **per_language[list(columns)].mean(),
        "p": diagonal_permutation(square, seed=seed),
        "most_of_all": int((square.argmax(0) == np.arange(len(names))).sum()),
    }
    caption = (
        f"What {len(names)} languages (rows) lose in the whole network when a language's own units (columns) are "
        f"switched off. Without its own units a language loses {found['own']:.2f}, without those of another "
        f"{found['others']:.2f} (permutation p = {p_text(found['p'])}), without as many random ones "
        f"{found['random']:.2f}; in {found['most_of_all']} of {len(names)} it loses most of all. Where columns stand "
        "out, units matter to all languages alike; where frames do, they are a language's own."
    )
    label = f"loss (the metric {'falls' if higher_is_better else 'rises'} by)"
    draw = partial(_draw_grid, losses, -losses, len(names), label, "units switched off of")
    more = {"languages": per_language, "overall": pd.DataFrame([found])}
    return Result("specificity", table, caption, draw, more, _extent(losses))


def _extent(difference: pd.DataFrame) -> float:
    """One far worse subnetwork must not take all the colours."""
    return float(np.quantile(difference.abs().to_numpy(), 0.95)) or 1.0


def _draw_grid(values: pd.DataFrame, difference: pd.DataFrame, owned: int, label: str, of: str, extent: float) -> Any:
    """The last columns, from `owned` on, are the controls."""
    languages, names = list(values.index), list(values.columns)
    n = len(names)
    width = max(3.6, 0.42 * n + 1.8) if n <= 16 else 0.27 * n + 1.8
    figure = drawing.new_figure(width, max(2.4, 0.27 * len(languages) + 1.3))
    axis = figure.subplots()
    scale: dict[str, Any] = {"colours": SIGNED, "low": -extent, "high": extent}
    image = drawing.heatmap(axis, difference, languages, names, **scale, numbers=None)
    if n <= WRITTEN:
        for (row, column), value in np.ndenumerate(values.to_numpy()):
            colour = "white" if abs(difference.iat[row, column]) > 0.7 * extent else ON_LIGHT
            text = f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
            axis.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    for row, language in enumerate(languages):
        if language in names[:owned]:
            corner = (names.index(language) - 0.5, row - 0.5)
            axis.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=ON_LIGHT, linewidth=1))
    if owned < n:
        axis.axvline(owned - 0.5, color=ON_LIGHT, linewidth=2)
    axis.set(xlabel=of, ylabel="language")
    figure.colorbar(image, ax=axis, label=label, extend="both", pad=0.02)
    return figure


def typology(
    gains: Mapping[str, float | Sequence[float]],
    similarity: Mapping[str, float | Mapping[str, float]],
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
    rows = []
    for place, (name, family) in enumerate(drawing.families_of(names).items()):
        values = np.atleast_1d(np.asarray(gains[name], dtype=np.float64))
        interval = bootstrap_interval(values, [seed, place])
        near = similarity[name]
        nearest = max(near, key=lambda other: near[other]) if isinstance(near, Mapping) else ""
        closeness = float(near[nearest]) if isinstance(near, Mapping) else float(near)
        rows.append((name, family, closeness, nearest, float(values.mean()), *interval, len(values)))
    columns = ["language", "family", "similarity", "nearest", "gain", "low", "high", "n"]
    table = pd.DataFrame(rows, columns=columns)
    rho, p = spearman_permutation(table.similarity, table.gain, seed=[seed, len(names)])
    repeats = int(table.n.max())
    caption = (
        f"{what[:1].upper()}{what[1:]} on {len(names)} languages, against their {measure}. Spearman rho = {rho:.2f}, "
        f"permutation p = {p_text(p)}."
        + (f" Points: means of {repeats} runs; bars: 95% bootstrap intervals over them." if repeats > 1 else "")
        + " A rising cloud says that nearness foretells the gain. The control: gains dealt anew to the languages."
    )
    extent = float(table[["low", "high"]].abs().max(axis=None)) or 1.0
    correlation = pd.DataFrame([(len(names), rho, p)], columns=["n", "rho", "p"])
    draw = partial(_draw_typology, table, what, measure)
    return Result("typology", table, caption, draw, {"correlation": correlation}, extent)


def _draw_typology(table: pd.DataFrame, what: str, measure: str, extent: float) -> Any:
    """Points, and their names in a column beside them, by gain."""
    n = len(table)
    figure = drawing.new_figure(5.2 if n <= 14 else 7.2, max(3.8, 0.17 * n))
    axis = figure.subplots()
    axis.axhline(0, color=GREY, linewidth=0.8)
    colours = [drawing.language_colour(name, GREY) for name in table.language]
    axis.vlines(table.similarity, table.low, table.high, color=colours, alpha=0.4, linewidth=1.2, zorder=1)
    axis.scatter(table.similarity, table.gain, 25, colours, zorder=2)
    axis.set(xlabel=measure, ylabel=what)
    axis.margins(0.1)
    axis.set_ylim(-1.2 * extent, 1.2 * extent)
    drawing.bare(axis)
    line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.5, "alpha": 0.5, "shrinkB": 3}
    style = {"textcoords": ("axes fraction", "data"), "va": "center", "fontsize": 8, "arrowprops": line}
    places = np.linspace(-1.15 * extent, 1.15 * extent, n)
    for row, place in zip(table.sort_values(["gain", "language"]).itertuples(), places, strict=True):
        colour = drawing.language_colour(row.language, "#000000")
        axis.annotate(row.language, (row.similarity, row.gain), (1.03, place), color=colour, **style)
    return figure
