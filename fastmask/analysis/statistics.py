"""Statistics of small samples: intervals and tests that assume no distribution, and the correction for many tests.

Comparisons of training methods have few numbers: some languages, a few seeds. So p-values come from permutations, all
of them where they can be counted, and a drawn sample of them otherwise. A drawn p-value is (1 + hits) / (1 + draws):
the observed order is one of the permutations, and a p-value is never 0 (Phipson and Smyth 2010).

`scipy.stats.permutation_test` counts the same permutations, one by one in Python: a second and more for what takes
milliseconds here, and a comparison has dozens of tests.

`paired` sets one method against another on the same languages and seeds: the one test that every table and picture
prints. A result should hold for other languages and for other seeds. All languages of a seed come from one pair of
models, so pairs of language and seed are no independent draws, and each of the two is tested by itself: languages, each
the mean over its seeds, by a sign-flip test; seeds, each the mean over its languages, by a t-test. A difference is one
where both see it, so the p-value of the whole is the larger of the two. Each counts one source of chance only, so they
are a little too hopeful where both are large: `crossed_t`, which counts both at once, stands beside. The interval is a
bootstrap that draws languages and seeds both.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata, ttest_1samp
from scipy.stats import t as student

LEVEL = 0.95  # of every interval and band
SURE = 0.05  # p-values up to this count
FLIPS_COUNTED = 20  # differences with at most 2^20 sign patterns, of which half are mirror images
ORDERS_COUNTED = 9  # items with at most 9! = 362,880 orders
DRAWS = 20_000  # of a permutation test that cannot count them all
SAMPLES = 10_000  # of a bootstrap
CHUNK = 4_000_000  # numbers in memory at a time
TIE = 1e-9  # means of equal scores differ by rounding

Seed = int | Sequence[int]


def paired_sign_flip(differences: ArrayLike) -> float:
    """Two-sided p-value of "the mean difference is zero": the paired sign-flip (Fisher randomisation) test.

    If two methods do not differ, each paired difference d_i is as likely as -d_i. p is the share of the sign patterns s
    with |sum_i s_i d_i| >= |sum_i d_i| (Fisher 1935, section 21). Exact up to 20 differences; with n of them the
    smallest possible p is 2^(1 - n), so fewer than 6 can never show anything at 0.05.
    """
    d = _finite(differences, "differences")
    close = abs(d.sum()) - 1e-12 * np.abs(d).sum()  # sums of the same numbers in another order are ties
    if len(d) > FLIPS_COUNTED:
        signs = 2.0 * np.random.default_rng(0).integers(0, 2, (DRAWS, len(d))) - 1
        return float((1 + (np.abs(signs @ d) >= close).sum()) / (1 + DRAWS))
    sums = d[:1]  # the sign of the first stays: a pattern and its mirror image have the same |sum|
    for value in d[1:]:
        sums = np.concatenate([sums + value, sums - value])
    return float((np.abs(sums) >= close).mean())


def t_of_mean(values: ArrayLike) -> float:
    """Two-sided p-value of "the mean is zero", by Student's t; 1 where all values are 0."""
    v = _finite(values, "values")
    if len(v) < 2:
        raise ValueError("expected at least two values, given one")
    if (v == v[0]).all():  # no spread, and no t
        return 1.0 if v[0] == 0 else 0.0
    return float(ttest_1samp(v, 0).pvalue)


def bootstrap_interval(values: ArrayLike, seed: Seed = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values` [n] (Efron 1979).

    The means of `SAMPLES` samples of n of the n values, with replacement; the interval runs from their (1 - LEVEL) / 2
    to their (1 + LEVEL) / 2 quantile. With few values it is too narrow (a sample's spread is smaller than its source's
    by (n - 1) / n in variance): with 3 seeds of one language read it as a lower bound of the doubt.
    """
    v = _finite(values, "values")
    drawn = np.random.default_rng(seed).integers(0, len(v), (SAMPLES, len(v)))
    return _middle(v[drawn].mean(1))


def crossed_interval(values: ArrayLike) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of a table whose rows and columns are both draws of something.

    Rows and columns are sampled with replacement, each for itself, and the entries where they cross are averaged (the
    pigeonhole bootstrap, Owen 2007): the interval says how far the mean moves with other rows and other columns. A
    single column, or row, is every sample's: the interval then says nothing of others.
    """
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2:
        raise ValueError(f"expected a table, given shape {table.shape}")
    known = ~np.isnan(table)
    _finite(table[known], "values")
    generator = np.random.default_rng(0)
    rows, columns = (generator.multinomial(n, np.full(n, 1 / n), SAMPLES).astype(np.float64) for n in table.shape)
    sums = ((rows @ np.where(known, table, 0.0)) * columns).sum(1)
    counts = ((rows @ known) * columns).sum(1)
    return _middle(sums[counts > 0] / counts[counts > 0])


def crossed_t(values: ArrayLike) -> float:
    """Two-sided p-value of "the mean is zero" for a whole table whose rows and columns are both draws of something.

    The variance of the mean is (MS_rows + MS_columns - MS_rest) / n, in the mean squares of a two-way layout without
    repetitions, with Satterthwaite's (1946) degrees of freedom. It is estimated badly where rows and columns are few,
    so the p-value is never below that of rows, or of columns, alone.

    NaN for a table with a gap, or with a single row or column.
    """
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2:
        raise ValueError(f"expected a table, given shape {table.shape}")
    rows, columns = table.shape
    if min(rows, columns) < 2 or np.isnan(table).any():
        return math.nan
    alone = [t_of_mean(table.mean(1)), t_of_mean(table.mean(0))]
    square_rows, square_columns = columns * table.mean(1).var(ddof=1), rows * table.mean(0).var(ddof=1)
    rest = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    freedom = (rows - 1, columns - 1, (rows - 1) * (columns - 1))
    squares = (square_rows, square_columns, float((rest**2).sum()) / freedom[2])
    both = squares[0] + squares[1] - squares[2]
    if both <= max(squares[:2]):
        return max(alone)
    statistic = table.mean() / math.sqrt(both / table.size)
    freedoms = both**2 / sum(square**2 / of for square, of in zip(squares, freedom, strict=True))
    return max(*alone, float(2 * student.sf(abs(statistic), freedoms)))


def paired(differences: pd.Series) -> dict[str, Any]:
    """Test a method against another one, by their differences: a series over `language` and `seed`, NaN for a gap.

    Returns:
        A row of a table: `difference` (the mean over languages, each the mean over its seeds), `low`, `high` (its
        interval, over languages and seeds), `p_languages` (of the sign-flip test), `p_seeds` (of the t-test; NaN for a
        single seed), `p_crossed` (`crossed_t`, which no verdict goes by), `p` (the larger of the first two; NaN for a
        single seed, which says nothing of others; not corrected), `languages` and how many of them are
        `languages_better`, `seeds` and in how many of them `seeds_agree` with the sign of the whole.
    """
    known = differences.dropna()
    by_language, by_seed = (known.groupby(level=level).mean().to_numpy() for level in ("language", "seed"))
    table = known.unstack("seed").sort_index().to_numpy()
    low, high = crossed_interval(table)
    difference = float(np.mean(by_language))
    p_languages = paired_sign_flip(by_language)
    p_seeds = t_of_mean(by_seed) if len(by_seed) > 1 else math.nan
    return {
        "difference": difference,
        "low": low,
        "high": high,
        "p_languages": p_languages,
        "p_seeds": p_seeds,
        "p_crossed": crossed_t(table),
        "p": math.nan if math.isnan(p_seeds) else max(p_languages, p_seeds),
        "languages": len(by_language),
        "languages_better": int((by_language > TIE).sum()),
        "seeds": len(by_seed),
        "seeds_agree": int((by_seed * np.sign(difference) > TIE).sum()),
    }


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values that keep the chance of any false alarm among all tests below the threshold (Holm 1979).

    The k-th smallest of m p-values, counted from 0, is multiplied by m - k; none becomes smaller than one before it,
    and none larger than 1. The order of the input is kept. NaN is no test: it stays, and does not count.

    Raises:
        ValueError: a p-value outside [0, 1].
    """
    given = pd.Series(p_values, dtype=np.float64)
    p = given.dropna().sort_values(kind="stable")
    if not p.between(0, 1).all():
        raise ValueError(f"expected p-values between 0 and 1, given {list(p_values)}")
    adjusted = (p * np.arange(len(p), 0, -1)).cummax().clip(upper=1)
    return [float(value) for value in adjusted.reindex(given.index)]


def p_text(p: float) -> str:
    """A p-value as every table, caption and picture prints it: three significant digits; a dash for no test (NaN)."""
    return "–" if math.isnan(p) else f"{p:.3g}"


def spearman_permutation(x: ArrayLike, y: ArrayLike, *, seed: Seed = 0) -> tuple[float, float]:
    """Spearman's rank correlation, and the two-sided p-value of "x says nothing about y".

    rho is Pearson's correlation of the ranks, ties sharing mean ranks (Spearman 1904). p is the share of the orders of
    y with |rho| at least as large as observed: all n! of them up to n = 9, `DRAWS` drawn ones above.

    Returns:
        (rho, p); both NaN where x or y is constant or n < 2, and there is no correlation to speak of.
    """
    a, b = rankdata(_finite(x, "x")), rankdata(_finite(y, "y"))
    if len(a) != len(b):
        raise ValueError(f"expected x and y of one length, given {len(a)} and {len(b)}")
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float((a @ a) * (b @ b)))
    if scale == 0:
        return math.nan, math.nan
    close = abs(float(a @ b)) - 1e-9
    return float(a @ b) / scale, share_of_orders(len(a), lambda orders: np.abs(b[orders] @ a) >= close, seed)


def diagonal_permutation(matrix: ArrayLike, *, seed: Seed = 0) -> float:
    """One-sided p-value of "rows do no better with their own column than with any other".

    If columns were handed to rows at random, each order pi of them would be as likely. p is the share of the orders
    with sum_i M[i, pi(i)] >= sum_i M[i, i]; a row's or a column's general level cancels. Exact up to 9 rows.
    """
    m = np.asarray(matrix, dtype=np.float64)
    if m.ndim != 2 or m.shape[0] != m.shape[1]:
        raise ValueError(f"expected a square matrix, given shape {m.shape}")
    close = float(np.trace(m)) - 1e-12 * float(np.abs(_finite(m, "matrix")).sum())
    rows = np.arange(len(m))
    return share_of_orders(len(m), lambda orders: m[rows, orders].sum(1) >= close, seed)


def share_of_orders(n: int, hit: Callable[[NDArray[np.int64]], NDArray[np.bool_]], seed: Seed) -> float:
    """The share of the orders of n items for which `hit`(orders int [any, n]) -> bool [any] is true."""
    if n <= ORDERS_COUNTED:
        return float(hit(np.array(list(itertools.permutations(range(n))))).mean())
    generator = np.random.default_rng(seed)
    size = max(1, CHUNK // n)
    hits = 0
    for first in range(0, DRAWS, size):
        orders = np.tile(np.arange(n), (min(size, DRAWS - first), 1))
        hits += int(hit(generator.permuted(orders, axis=1)).sum())
    return (1 + hits) / (1 + DRAWS)


def _middle(drawn: NDArray[np.float64]) -> tuple[float, float]:
    """The quantiles between which the share `LEVEL` lies."""
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _finite(values: ArrayLike, what: str) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64).reshape(-1)
    if array.size == 0:
        raise ValueError(f"expected {what}, given none")
    if bad := int((~np.isfinite(array)).sum()):
        raise ValueError(f"expected finite {what}, given {bad} of {array.size} that are not")
    return array
