"""One method against another on the same languages and seeds: the one test that every table and picture prints.

A result should hold for other languages and for other seeds. All languages of a seed come from one pair of models, so
pairs of language and seed are no independent draws, and each of the two is tested by itself: languages, each the mean
over its seeds, by a sign-flip test; seeds, each the mean over its languages, by a t-test. A difference is one where
both see it, so the p-value of the whole is the larger of the two. The interval is a bootstrap that draws languages and
seeds both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from fastmask.analysis.statistics import crossed_interval, paired_sign_flip, t_of_mean

__all__ = ["Paired", "paired"]

TIE = 1e-9  # means of equal scores differ by rounding


@dataclass(frozen=True)
class Paired:
    """One method against another.

    Attributes:
        by_language: the mean difference of each language over its seeds, [languages].
        by_seed: the mean difference of each seed over its languages, [seeds].
        p_languages: two-sided, of the sign-flip test over `by_language`; not corrected.
        p_seeds: two-sided, of the t-test over `by_seed`; not corrected, NaN for a single seed.
        low: the beginning of the interval of the mean difference, over languages and seeds.
        high: its end.
    """

    by_language: tuple[float, ...]
    by_seed: tuple[float, ...]
    p_languages: float
    p_seeds: float
    low: float
    high: float

    @property
    def p(self) -> float:
        """The larger of the two p-values; NaN for a single seed, which says nothing of others."""
        return math.nan if math.isnan(self.p_seeds) else max(self.p_languages, self.p_seeds)

    @property
    def difference(self) -> float:
        """The mean over languages."""
        return float(np.mean(self.by_language))

    @property
    def wins(self) -> int:
        """In how many languages the method is better."""
        return sum(value > TIE for value in self.by_language)

    @property
    def seeds_agree(self) -> int:
        """In how many seeds the mean difference has the sign of the whole."""
        return sum(value * np.sign(self.difference) > TIE for value in self.by_seed)


def paired(differences: pd.Series, *, level: float = 0.95) -> Paired:
    """Test a method against another one, over languages and over seeds.

    Args:
        differences: score of a method minus that of another one, higher is better; its index has the levels `language`
            and `seed`. Gaps (NaN) are left out.
        level: of the interval.

    Raises:
        ValueError: no difference.
    """
    known = differences.dropna()
    by_language = known.groupby(level="language").mean()
    by_seed = known.groupby(level="seed").mean()
    p_languages = paired_sign_flip(by_language.to_numpy())
    low, high = crossed_interval(known.unstack("seed").sort_index().to_numpy(), level)
    p_seeds = t_of_mean(by_seed.to_numpy()) if len(by_seed) > 1 else math.nan
    return Paired(tuple(map(float, by_language)), tuple(map(float, by_seed)), p_languages, p_seeds, low, high)
