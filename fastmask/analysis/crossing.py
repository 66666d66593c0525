"""Cross-evaluation: every language under every language's subnetwork; is one's own the best?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from fastmask.analysis.drawing import SIGNED, WRITTEN, heatmap, new_figure
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
    on_cell: Callable[[str, str, float], None] | None = None,
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
        on_cell: called after each evaluation.

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
            if on_cell is not None:
                on_cell(language, name, float(values[row, column]))

    def kind(language: str, name: str) -> str:
        return "control" if name not in columns else "own" if name == language else "other"

    cells = [
        (language, name, kind(language, name), values[row, column])
        for row, language in enumerate(languages)
        for column, name in enumerate(names)
    ]
    table = pd.DataFrame(cells, columns=["language", "subnetwork", "kind", "value"])
    sign = 1.0 if higher_is_better else -1.0
    per_language = _per_language(values, list(languages), columns, list(controls), sign)
    overall = _overall(values, per_language, list(languages), columns, list(controls), sign, seed)
    caption = _caption(per_language, overall, len(languages), len(columns), controls)
    more = {"languages": per_language, "overall": overall}
    return Result("cross", table, caption, lambda: _draw(values, list(languages), columns, list(controls), sign), more)


def _per_language(
    values: Any, languages: Sequence[str], columns: Sequence[str], controls: Sequence[str], sign: float
) -> pd.DataFrame:
    rows = []
    for row, language in enumerate(languages):
        mine = values[row, : len(columns)]
        others = np.array([value for name, value in zip(columns, mine, strict=True) if name != language])
        own = float(mine[columns.index(language)]) if language in columns else np.nan
        mean = float(others.mean()) if len(others) else np.nan
        best = columns[int((sign * mine).argmax())]
        rows.append((language, own, mean, sign * (own - mean), best, *values[row, len(columns) :]))
    return pd.DataFrame(rows, columns=["language", "own", "others", "advantage", "best", *controls])


def _overall(
    values: Any,
    per_language: pd.DataFrame,
    languages: Sequence[str],
    columns: Sequence[str],
    controls: Sequence[str],
    sign: float,
    seed: int,
) -> pd.DataFrame:
    both = [language for language in languages if language in columns]
    square = values[np.ix_([languages.index(n) for n in both], [columns.index(n) for n in both])]
    p = diagonal_permutation(sign * square, seed=seed) if len(both) > 1 else np.nan
    mine = per_language[per_language.language.isin(both)]
    result = {
        "languages": len(both),
        "advantage": float(mine.advantage.mean()) if both else np.nan,
        "p": p,
        "own_is_best": int((mine.best == mine.language).sum()),
        **{f"own_minus_{name}": sign * float((mine.own - mine[name]).mean()) if both else np.nan for name in controls},
    }
    return pd.DataFrame([result])


def _caption(
    per_language: pd.DataFrame, overall: pd.DataFrame, rows: int, columns: int, controls: Sequence[str]
) -> str:
    found = overall.iloc[0]
    text = f"Metric of {rows} languages (rows) under {columns} subnetworks (columns)"
    text += f" and the controls {', '.join(controls)}" if controls else ""
    text += ". Colours: difference to the language's own subnetwork"
    text += ", or to the mean of its row where it has none." if per_language.own.isna().any() else "."
    if found.languages > 1:
        text += (
            f" Own against the mean of the others: {found.advantage:+.2f} (permutation p = {p_text(found.p)}); "
            f"{found.own_is_best:.0f} of {found.languages:.0f} languages do best under their own."
        )
    return text


def _draw(values: Any, languages: Sequence[str], columns: Sequence[str], controls: Sequence[str], sign: float) -> Any:
    rows, n = len(languages), len(columns) + len(controls)
    reference = np.array(
        [
            values[row, columns.index(language)] if language in columns else values[row, : len(columns)].mean()
            for row, language in enumerate(languages)
        ]
    )
    difference = values - reference[:, None]
    # One far worse subnetwork must not take all the colours.
    most = float(np.quantile(np.abs(difference), 0.95)) or 1.0
    figure = new_figure(max(3.6, 0.42 * n + 1.8) if n <= 16 else 0.27 * n + 1.8, max(2.4, 0.27 * rows + 1.3))
    axis = figure.subplots()
    image = heatmap(
        axis, difference, languages, [*columns, *controls], colours=SIGNED, low=-most, high=most, numbers=None
    )
    if n <= WRITTEN:
        for (row, column), value in np.ndenumerate(values):
            dark = abs(difference[row, column]) > 0.7 * most
            text = f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
            axis.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    for row, language in enumerate(languages):
        if language in columns:
            at = columns.index(language)
            axis.plot(
                [at - 0.5, at + 0.5, at + 0.5, at - 0.5, at - 0.5],
                [row - 0.5, row - 0.5, row + 0.5, row + 0.5, row - 0.5],
                color="black",
                linewidth=1,
            )
    if controls:
        axis.axvline(len(columns) - 0.5, color="black", linewidth=2)
    axis.set_xlabel("subnetwork of")
    axis.set_ylabel("language")
    better = "higher" if sign > 0 else "lower"
    own = "own" if set(languages) <= set(columns) else "own, or to the row's mean"
    figure.colorbar(image, ax=axis, label=f"difference to {own} ({better} is better)", extend="both", pad=0.02)
    return figure
