"""Cross-evaluation: every language under every language's subnetwork; is one's own the best?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.patches import Rectangle

from fastmask.analysis.drawing import ON_LIGHT, SIGNED, WRITTEN, heatmap, new_figure
from fastmask.analysis.result import Result
from fastmask.analysis.statistics import diagonal_permutation, p_text

__all__ = ["cross_evaluation"]


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
    values = np.empty((len(languages), len(names)))
    for row, language in enumerate(languages):
        for column, name in enumerate(names):
            values[row, column] = evaluate(language, name)
            if not np.isfinite(values[row, column]):
                raise ValueError(f"the metric of {language!r} under {name!r} is {values[row, column]}")

    owns = [language in columns for language in languages]
    cells = [
        (a, b, "control" if b not in columns else "own" if b == a else "other", values[row, column])
        for row, a in enumerate(languages)
        for column, b in enumerate(names)
    ]
    table = pd.DataFrame(cells, columns=["language", "subnetwork", "kind", "value"])
    sign = 1.0 if higher_is_better else -1.0
    rows = []
    for language, of_language in zip(languages, values.tolist(), strict=True):
        mine = dict(zip(columns, of_language, strict=False))
        own, others = mine.get(language, np.nan), [value for name, value in mine.items() if name != language]
        mean = float(np.mean(others)) if others else np.nan
        best = max(mine, key=lambda name: sign * mine[name])
        rows.append((language, own, mean, sign * (own - mean), best, *of_language[len(columns) :]))
    per_language = pd.DataFrame(rows, columns=["language", "own", "others", "advantage", "best", *controls])
    both = per_language[owns]
    square = values[owns][:, [columns.index(language) for language in both.language]]
    found = {
        "languages": len(both),
        "advantage": both.advantage.mean(),
        "p": diagonal_permutation(sign * square, seed=seed) if len(both) > 1 else np.nan,
        "own_is_best": int((both.best == both.language).sum()),
        **{f"own_minus_{name}": sign * (both.own - both[name]).mean() for name in controls},
    }
    caption = (
        f"Metric of {len(languages)} languages (rows) under {len(columns)} subnetworks (columns)"
        + (f" and the controls {', '.join(controls)}" if controls else "")
        + ". Colours: difference to the language's own subnetwork"
        + ("." if all(owns) else ", or to the mean of its row where it has none.")
    )
    if len(both) > 1:
        caption += (
            f" Own against the mean of the others: {found['advantage']:+.2f} (permutation p = {p_text(found['p'])}); "
            f"{found['own_is_best']} of {len(both)} languages do best under their own. Where "
            "frames stand out, languages depend on their own masks; whether because these were found, or only because "
            "weights were trained through them, the same picture of random masks says."
        )
    reference = per_language.own.fillna(pd.Series(values[:, : len(columns)].mean(1)))
    difference = values - reference.to_numpy()[:, None]
    # One far worse subnetwork must not take all the colours.
    largest = float(np.quantile(np.abs(difference), 0.95)) or 1.0
    better = "higher" if higher_is_better else "lower"
    what = "own" if all(owns) else "own, or to the row's mean"
    label = f"difference to {what} ({better} is better)"
    return Result(
        "cross",
        table,
        caption,
        lambda extent=largest: _draw(values, difference, list(languages), columns, list(controls), label, extent),
        {"languages": per_language, "overall": pd.DataFrame([found])},
        largest,
    )


def _draw(
    values: Any,
    difference: Any,
    languages: Sequence[str],
    columns: Sequence[str],
    controls: Sequence[str],
    label: str,
    extent: float,
) -> Any:
    rows, n = len(languages), len(columns) + len(controls)
    figure = new_figure(max(3.6, 0.42 * n + 1.8) if n <= 16 else 0.27 * n + 1.8, max(2.4, 0.27 * rows + 1.3))
    axis = figure.subplots()
    names = [*columns, *controls]
    image = heatmap(axis, difference, languages, names, colours=SIGNED, low=-extent, high=extent, numbers=None)
    if n <= WRITTEN:
        for (row, column), value in np.ndenumerate(values):
            colour = "white" if abs(difference[row, column]) > 0.7 * extent else ON_LIGHT
            text = f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
            axis.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    for row, language in enumerate(languages):
        if language in columns:
            corner = (columns.index(language) - 0.5, row - 0.5)
            axis.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=ON_LIGHT, linewidth=1))
    if controls:
        axis.axvline(len(columns) - 0.5, color=ON_LIGHT, linewidth=2)
    axis.set(xlabel="subnetwork of", ylabel="language")
    figure.colorbar(image, ax=axis, label=label, extend="both", pad=0.02)
    return figure
