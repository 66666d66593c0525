"""One method against another on the same languages: the one test that every table and picture prints.

Languages are what the test generalises over: the differences of a language are averaged over its seeds first, so that
one number per language enters the sign-flip test. All languages of a seed come from one pair of models, so pairs of
language and seed are no independent draws, and a test over them finds differences that are not there. What further
seeds would do no test over languages says; their means stand beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from fastmask.analysis.statistics import paired_sign_flip

__all__ = ["Paired", "paired_by_language"]

TIE = 1e-9  # means of equal scores differ by rounding


@dataclass(frozen=True)
class Paired:
    """One method against another.

    Attributes:
        by_language: the mean difference of each language over its seeds, [languages].
        p: two-sided, of the sign-flip test over `by_language`; not corrected.
        by_seed: the mean difference of each seed over its languages, [seeds].
    """

    by_language: tuple[float, ...]
    p: float
    by_seed: tuple[float, ...]

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


def paired_by_language(differences: pd.Series) -> Paired:
    """Average over seeds, and test over languages.

    Args:
        differences: score of a method less that of another one, higher is better; its index has the levels `language`
            and `seed`. Gaps (NaN) are left out.

    Raises:
        ValueError: no difference.
    """
    known = differences.dropna()
    by_language = known.groupby(level="language").mean()
    p = paired_sign_flip(by_language.to_numpy())
    by_seed = known.groupby(level="seed").mean()
    return Paired(tuple(map(float, by_language)), p, tuple(map(float, by_seed)))
