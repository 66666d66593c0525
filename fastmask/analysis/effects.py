"""Effect: what each training method does to each language's score, and what of it is inside the noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from fastmask.analysis.drawing import COLOURS, GREY, MARKERS, bare, colour_languages, new_figure
from fastmask.analysis.result import Result
from fastmask.analysis.statistics import LEVEL, SAMPLES, SURE, bootstrap_interval, holm, p_text, paired, t_of_mean
from fastmask.errors import unknown

KEYS = ["method", "language", "seed"]
ENOUGH = 6  # differences from which a sign-flip test can fall below 0.05: 2^(1 - 6) = 0.03
COLUMNS = 4  # of panels in the picture


def effect(
    scores: pd.DataFrame | Sequence[Mapping[str, Any]],
    baseline: str | Mapping[str, str] = "full",
    *,
    seed: int = 0,
    higher_is_better: bool = True,
) -> Result:
    """Gains of each method over its baseline, paired by language and seed, over those that both have.

    d(method, language, seed) = score(method, language, seed) - score(baseline, language, seed), or the other way round
    where a lower score is better: above 0 the method is better.

    - For a language, the mean of d over seeds, with a paired percentile bootstrap over seeds, which is too narrow for
      few of them, and a t-test over seeds, corrected over the languages of the method (Holm), which decides. Below 6
      seeds the verdict is "too few".
    - For a method, the mean over languages (each the mean over its seeds), a bootstrap interval over languages and
      seeds, and the larger of the p-values of a sign-flip test over languages and a t-test over seeds
      (`statistics.paired`), corrected over methods (Holm). Below 6 languages no test can reach p = 0.05: "too few". All
      languages of a seed come from one pair of models, so of one seed nothing follows for others: "one seed", and no
      p-value.

    Args:
        scores: a table with columns `method`, `language`, `seed`, `score`, or rows as mappings.
        baseline: the method that all others are compared with; or, for each method that is to be compared, with which.
        seed: of the bootstrap.
        higher_is_better: of the scores.

    Returns:
        table: one row for each method and language: `score`, `baseline`, `difference`, `low`, `high`, `n` seeds,
            `p_holm`, `verdict` ("better", "worse", "inside noise", "too few").
        more["methods"]: one row for each method: `against` (its baseline), `difference`, `low`, `high`, `languages`,
            `languages_better`, `p`, `p_holm`, `seeds`, `seeds_agree`, `verdict` ("better", "worse", "inside noise",
            "one seed", "too few").

    Raises:
        KeyError: an unknown baseline, or a method that has no scores.
        ValueError: missing columns, scores that are not finite, repeated rows, no method besides the baseline, a method
            that is its own baseline, or no language and seed that a method and its baseline both have.
    """
    frame = _checked(scores)
    against = _against(baseline, list(dict.fromkeys(frame.method)))
    wide = frame.set_index(KEYS)["score"].unstack("method")
    every = list(dict.fromkeys(frame.language))
    rows, summary = [], []
    for number, (method, other) in enumerate(against.items()):
        pair = wide[[method, other]].dropna()
        gains = (pair[method] - pair[other]) * (1 if higher_is_better else -1)
        known = [name for name in every if name in gains.index.get_level_values("language")]
        of_each = [gains.loc[language].to_numpy() for language in known]
        corrected = holm([t_of_mean(d) if len(d) >= ENOUGH else math.nan for d in of_each])
        for place, (language, d, p) in enumerate(zip(known, of_each, corrected, strict=True)):
            says = "inside noise" if p > SURE else "better" if d.mean() > 0 else "worse"
            interval = bootstrap_interval(d, [seed, number, place])
            numbers = (*pair.loc[language].mean(), float(d.mean()), *interval, len(d), p)
            rows.append((method, language, *numbers, "too few" if math.isnan(p) else says))
        if len(gains):
            summary.append({"method": method, "against": other, **paired(gains)})
    if not summary:
        raise ValueError(f"none of {', '.join(against)} has a language and seed in common with its baseline")
    columns = ["method", "language", "score", "baseline", "difference", "low", "high", "n", "p_holm", "verdict"]
    table = pd.DataFrame(rows, columns=columns)
    columns = ["method", "against", "difference", "low", "high", "languages", "languages_better", "p", "seeds"]
    methods = pd.DataFrame(summary)[[*columns, "seeds_agree"]]
    methods.insert(columns.index("p") + 1, "p_holm", holm(methods.p))
    methods["verdict"] = [verdict(row, row.p_holm) for row in methods.itertuples()]

    n, of_baselines = int(methods.seeds.max()), methods.groupby("against", sort=False)["method"]
    pairs = "; ".join(f"{name!r} of {', '.join(of)}" for name, of in of_baselines)
    few = ", too narrow with so few seeds: read them as the spread of seeds" if n < ENOUGH else ""
    caption = (
        f"Gain over {pairs}, paired; {table.language.nunique()} languages, {n} seed{'s' if n > 1 else ''}. "
        f"Points: means over seeds; bars: {LEVEL:.0%} bootstrap intervals over seeds ({SAMPLES:,} samples){few}. "
        "'mean': over languages, each the mean over its seeds, with a bootstrap interval over languages and seeds; p: "
        "the larger of a sign-flip test's over languages and a t-test's over seeds, Holm-corrected over the methods of "
        "this table. Right of 0 the method is better; it is only known to be where p is small."
    )
    extent = float(pd.concat([table, methods])[["low", "high"]].abs().max(axis=None)) or 1.0
    return Result("effect", table, caption, partial(_draw, table, methods), {"methods": methods}, extent)


def verdict(row: Any, p: float) -> str:
    """What a row of `more["methods"]` says, with a p-value that is corrected for the tests beside it."""
    if row.languages < ENOUGH:
        return "too few"
    if row.seeds < 2:
        return "one seed"
    if p > SURE:
        return "inside noise"
    return "better" if row.difference > 0 else "worse"


def _against(baseline: str | Mapping[str, str], methods: Sequence[str]) -> dict[str, str]:
    """Method -> what it is compared with, in the order of the scores."""
    wanted = baseline if isinstance(baseline, Mapping) else {name: baseline for name in methods if name != baseline}
    for name in [*wanted, *wanted.values(), *([baseline] if isinstance(baseline, str) else ())]:
        if name not in methods:
            raise unknown("method", name, methods)
    if not wanted:
        raise ValueError(f"there is no method besides the baseline {baseline!r}")
    if own := [name for name, other in wanted.items() if name == other]:
        raise ValueError(f"{own[0]!r} is given as its own baseline (expected another method)")
    return {name: wanted[name] for name in methods if name in wanted}


def _checked(scores: pd.DataFrame | Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The rows as a table."""
    frame = scores if isinstance(scores, pd.DataFrame) else pd.DataFrame(list(scores))
    missing = [column for column in (*KEYS, "score") if column not in frame.columns]
    if missing:
        raise ValueError(f"expected columns {', '.join([*KEYS, 'score'])}; {', '.join(missing)} missing")
    if not np.isfinite(frame["score"].to_numpy(dtype=float)).all():
        raise ValueError("expected finite scores")
    repeated = frame[frame.duplicated(KEYS)]
    if len(repeated):
        raise ValueError(f"several scores for {dict(repeated.iloc[0][KEYS])}: expected one")
    return frame


def _draw(table: pd.DataFrame, methods: pd.DataFrame, extent: float) -> Any:
    """A panel for each method, a row for each language, the mean below."""
    languages = list(dict.fromkeys(table.language))
    one = methods.against.nunique() == 1
    columns = min(len(methods), COLUMNS)
    lines = -(-len(methods) // columns)
    figure = new_figure(1.0 + 2.3 * columns, (0.2 * len(languages) + 1.4) * lines + 0.5)
    panels = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    for panel in panels[len(methods) :]:
        panel.set_axis_off()
    y, mean = np.arange(len(languages)), len(languages) + 0.6
    for at, (panel, row) in enumerate(zip(panels, methods.itertuples(), strict=False)):
        mine = table[table.method == row.method].set_index("language").reindex(languages)
        panel.axvline(0, color=GREY, linewidth=1)
        panel.axhline(len(languages) - 0.2, color=GREY, linewidth=0.6)
        panel.hlines(y, mine.low, mine.high, color=COLOURS[0], linewidth=1.3)
        panel.plot(mine.difference, y, MARKERS[0], color=COLOURS[0], markersize=4)
        panel.hlines(mean, row.low, row.high, color=COLOURS[1], linewidth=2.2)
        panel.plot(row.difference, mean, MARKERS[3], color=COLOURS[1], markersize=6)
        over = "" if one else f"\nover {row.against}"
        agree = f"{row.seeds_agree} of {row.seeds} seeds agree"
        panel.set_title(f"{row.method}: {row.difference:+.2f}{over}\np = {p_text(row.p_holm)}, {agree}", fontsize=8)
        panel.grid(axis="x", color=GREY, alpha=0.2)
        panel.set_axisbelow(True)
        bare(panel)
        panel.tick_params(labelsize=8, labelbottom=at + columns >= len(methods))
    panels[0].set_yticks([*y, mean], [*languages, "mean"])
    panels[0].set(ylim=(len(languages) + 1.3, -0.8), xlim=(-1.05 * extent, 1.05 * extent))
    colour_languages(panels[0])
    figure.supxlabel(f"gain over {methods.against[0] if one else 'the baseline'}", fontsize=9)
    return figure
