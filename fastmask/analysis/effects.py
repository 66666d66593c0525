"""Effect: what each training method does to each language's score, and what of it is inside the noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fastmask.analysis.drawing import COLOURS, GREY, MARKERS, new_figure
from fastmask.analysis.result import Result
from fastmask.analysis.statistics import bootstrap_interval, holm, paired_sign_flip
from fastmask.errors import unknown

__all__ = ["effect"]

KEYS = ["method", "language", "seed"]
ENOUGH = 6  # differences from which a sign-flip test can fall below 0.05: 2^(1 - 6) = 0.03
DRAWS = 10_000
COLUMNS = 4  # of panels in the picture


def effect(
    scores: pd.DataFrame | Sequence[Mapping[str, Any]],
    baseline: str = "full",
    *,
    level: float = 0.95,
    seed: int = 0,
) -> Result:
    """Differences of each method to a baseline, paired by language and seed, and by sentence where those are there.

    d(method, language, seed) = score(method, language, seed) - score(baseline, language, seed), higher is better.

    - For a language, the mean of d over seeds. Its interval is a paired percentile bootstrap: over **sentences** where
      the table has them (each with the mean over seeds of its difference, weighted by `weight`; it says how the method
      would do on other sentences, with these seeds), else over **seeds**. Below 6 seeds no test can reach p = 0.05, and
      the interval of so few is too narrow, so the verdict is then "too few".
    - For a method, the mean over languages and seeds, an interval over these pairs, and the p-value of a sign-flip test
      over them, corrected over methods (Holm). `p_languages` is the test over languages alone (their means over seeds),
      as the seeds of a language tend to differ alike. All languages of a seed come from one model, so neither test says
      what further seeds would do: `seeds_agree` counts the seeds whose mean difference has the sign of the whole, and
      where they do not all agree the verdict is "seeds disagree", whatever p is.

    Args:
        scores: a table with columns `method`, `language`, `seed`, `score`, or rows as mappings. A column `sentence`
            makes it one row for each sentence, with `weight` (such as its words; default 1): a language's score is then
            the weighted mean, as LAS is of the words.
        baseline: the method that others are compared with.
        level: of the intervals; 1 - level is where a p-value counts.
        seed: of the bootstrap.

    Returns:
        table: one row for each method and language: `score`, `baseline`, `difference`, `low`, `high`, `n` (sentences or
            seeds), `over` ("sentences" or "seeds"), `verdict` ("better", "worse", "inside noise", "too few").
        more["methods"]: one row for each method: `difference`, `low`, `high`, `n`, `p`, `p_holm`, `p_languages`,
            `seeds`, `seeds_agree`, `languages_better`, `verdict` ("better", "worse", "inside noise", "seeds disagree").

    Raises:
        KeyError: an unknown baseline.
        ValueError: missing columns, scores that are not finite, repeated rows, no method besides the baseline, or a
            method without scores where the baseline has some (or the other way round).
    """
    frame, sentences = _checked(scores, baseline)
    methods = [method for method in dict.fromkeys(frame.method) if method != baseline]
    per_seed = _per_seed(frame)
    wide = _paired(per_seed, methods, baseline)
    languages = list(dict.fromkeys(frame.language))
    rows, summary = [], []
    for number, method in enumerate(methods):
        gains = wide[method] - wide[baseline]
        for place, language in enumerate(languages):
            d = gains.loc[language].to_numpy()
            where = [seed, number, place]
            if sentences:
                low, high, n = _over_sentences(frame, method, baseline, language, level, where)
            else:
                (low, high), n = bootstrap_interval(d, level, where, draws=DRAWS), len(d)
            enough = sentences or n >= ENOUGH
            verdict = "too few" if not enough else "better" if low > 0 else "worse" if high < 0 else "inside noise"
            of_language = wide.loc[language]
            means = (of_language[method].mean(), of_language[baseline].mean(), float(d.mean()))
            rows.append((method, language, *means, low, high, n, "sentences" if sentences else "seeds", verdict))
        summary.append((method, *_summary(gains, level, [seed, number, len(languages)])))
    columns = ["method", "language", "score", "baseline", "difference", "low", "high", "n", "over", "verdict"]
    table = pd.DataFrame(rows, columns=columns)
    columns = ["method", "difference", "low", "high", "n", "p", "p_languages", "seeds", "seeds_agree"]
    more = pd.DataFrame(summary, columns=[*columns, "languages_better"])
    more.insert(6, "p_holm", holm(list(more.p)))
    more["verdict"] = [_verdict(row, 1 - level) for row in more.itertuples()]
    n_seeds = int(wide.groupby(level="language").size().max())
    caption = (
        f"Difference to {baseline!r} of {', '.join(methods)}, paired; {len(languages)} languages, {n_seeds} "
        f"seed{'s' if n_seeds > 1 else ''}. Points: means over seeds; bars: {level:.0%} bootstrap intervals over "
        f"{'sentences' if sentences else 'seeds'} ({DRAWS:,} samples)"
        + ("" if sentences or n_seeds >= ENOUGH else ", too narrow with so few seeds: read them as the spread of seeds")
        + ". 'mean': over languages and seeds, with the interval over these pairs and the p-value of a sign-flip test, "
        "Holm-corrected over methods."
    )
    return Result("effect", table, caption, lambda: _draw(table, more, baseline), {"methods": more})


def _checked(scores: pd.DataFrame | Sequence[Mapping[str, Any]], baseline: str) -> tuple[pd.DataFrame, bool]:
    """The rows as a table with `weight`, and whether they are of single sentences."""
    frame = scores.copy() if isinstance(scores, pd.DataFrame) else pd.DataFrame(list(scores))
    missing = [column for column in (*KEYS, "score") if column not in frame.columns]
    if missing:
        raise ValueError(f"expected columns {', '.join([*KEYS, 'score'])}; {', '.join(missing)} missing")
    methods = list(dict.fromkeys(frame.method))
    if baseline not in methods:
        raise unknown("method", baseline, methods)
    if len(methods) < 2:
        raise ValueError(f"there is no method besides the baseline {baseline!r}")
    sentences = "sentence" in frame.columns
    if "weight" not in frame.columns:
        frame["weight"] = 1.0
    if not np.isfinite(frame[["score", "weight"]].to_numpy(dtype=float)).all() or (frame.weight < 0).any():
        raise ValueError("expected finite scores, and weights that are finite and not negative")
    keys = [*KEYS, "sentence"] if sentences else KEYS
    repeated = frame[frame.duplicated(keys)]
    if len(repeated):
        raise ValueError(f"several scores for {dict(repeated.iloc[0][keys])}: expected one")
    return frame, sentences


def _per_seed(frame: pd.DataFrame) -> pd.Series:
    """The score of each method, language and seed: a weighted mean where there are sentences."""
    weighted = frame.assign(product=frame.score * frame.weight).groupby(KEYS, sort=False)[["product", "weight"]].sum()
    return weighted["product"] / weighted["weight"]


def _paired(per_seed: pd.Series, methods: Sequence[str], baseline: str) -> pd.DataFrame:
    """Methods as columns over (language, seed), each with the same rows as the baseline."""
    wide = per_seed.unstack("method")
    for method in methods:
        lonely = wide[wide[method].isna() | wide[baseline].isna()]
        if len(lonely):
            language, seed = lonely.index[0]
            has, lacks = (method, baseline) if np.isnan(lonely.iloc[0][baseline]) else (baseline, method)
            raise ValueError(f"{has!r} has a score for language {language!r}, seed {seed}, and {lacks!r} has none")
    return wide


def _over_sentences(
    frame: pd.DataFrame, method: str, baseline: str, language: str, level: float, seed: Sequence[int]
) -> tuple[float, float, int]:
    """Paired bootstrap over sentences of sum(weight * mean over seeds of the difference) / sum(weight)."""
    chosen = frame[frame.language == language]
    mine, theirs = (chosen[chosen.method == name].set_index(["sentence", "seed"]) for name in (method, baseline))
    if mine.index.symmetric_difference(theirs.index).size:
        raise ValueError(f"{method!r} and {baseline!r} were not scored on the same sentences of {language!r}")
    theirs = theirs.loc[mine.index]
    if not np.array_equal(mine.weight, theirs.weight):
        raise ValueError(f"the weights of sentences of {language!r} differ between {method!r} and {baseline!r}")
    weighted = ((mine.score - theirs.score) * mine.weight).groupby("sentence").sum().to_numpy()
    weights = mine.weight.groupby("sentence").sum().to_numpy()
    low, high = np.quantile(_ratios(weighted, weights, seed), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high), len(weights)


def _ratios(weighted: NDArray[np.float64], weights: NDArray[np.float64], seed: Sequence[int]) -> NDArray[np.float64]:
    """`DRAWS` bootstrap samples of sum(weighted) / sum(weights), the same sentences in both sums."""
    generator = np.random.default_rng(seed)
    n = len(weights)
    piece = max(1, 2_000_000 // n)  # samples in memory at a time
    found = []
    for first in range(0, DRAWS, piece):
        drawn = generator.integers(0, n, (min(piece, DRAWS - first), n))
        found.append(weighted[drawn].sum(1) / np.maximum(weights[drawn].sum(1), np.finfo(float).tiny))
    return np.concatenate(found)


def _summary(gains: pd.Series, level: float, seed: Sequence[int]) -> tuple[Any, ...]:
    d = gains.to_numpy()
    low, high = bootstrap_interval(d, level, seed, draws=DRAWS)
    by_language, by_seed = gains.groupby(level="language").mean(), gains.groupby(level="seed").mean()
    p, p_languages = paired_sign_flip(d, seed=[*seed, 1]), paired_sign_flip(by_language, seed=[*seed, 2])
    agree = int((np.sign(by_seed) == np.sign(d.mean())).sum())
    better = int((by_language > 0).sum())
    return float(d.mean()), low, high, len(d), p, p_languages, len(by_seed), agree, better


def _verdict(row: Any, threshold: float) -> str:
    if row.p_holm > threshold:
        return "inside noise"
    if row.seeds_agree < row.seeds:
        return "seeds disagree"
    return "better" if row.difference > 0 else "worse"


def _draw(table: pd.DataFrame, methods: pd.DataFrame, baseline: str) -> Any:
    """A panel for each method, a row for each language, the mean below."""
    languages = list(dict.fromkeys(table.language))
    columns = min(len(methods), COLUMNS)
    lines = -(-len(methods) // columns)
    figure = new_figure(1.0 + 2.3 * columns, (0.2 * len(languages) + 1.4) * lines + 0.5)
    panels = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    for panel in panels[len(methods) :]:
        panel.set_axis_off()
    y = np.arange(len(languages))
    for at, (panel, whole) in enumerate(zip(panels, methods.itertuples(), strict=False)):
        mine = table[table.method == whole.method].set_index("language").loc[languages]
        panel.axvline(0, color=GREY, linewidth=1)
        panel.axhline(len(languages) - 0.2, color=GREY, linewidth=0.6)
        panel.hlines(y, mine.low, mine.high, color=COLOURS[0], linewidth=1.3)
        panel.plot(mine.difference, y, MARKERS[0], color=COLOURS[0], markersize=4)
        panel.hlines(len(languages) + 0.6, whole.low, whole.high, color=COLOURS[1], linewidth=2.2)
        panel.plot(whole.difference, len(languages) + 0.6, MARKERS[3], color=COLOURS[1], markersize=6)
        agree = f"{whole.seeds_agree} of {whole.seeds} seeds agree"
        panel.set_title(f"{whole.method}: {whole.difference:+.2f}\np = {whole.p_holm:.2g}, {agree}", fontsize=8)
        panel.grid(axis="x", color="#EEEEEE")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8, labelbottom=at + columns >= len(methods))
        if at == 0:
            panel.set_yticks([*y, len(languages) + 0.6], [*languages, "mean"])
            panel.set_ylim(len(languages) + 1.3, -0.8)
    figure.supxlabel(f"score - score of {baseline}", fontsize=9)
    return figure
