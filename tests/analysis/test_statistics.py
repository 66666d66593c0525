"""Statistics against cases counted by hand, literal loops, and scipy where it has the same."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmask.analysis import statistics
from fastmask.analysis.statistics import (
    bootstrap_interval,
    crossed_interval,
    diagonal_permutation,
    holm,
    paired_sign_flip,
    spearman_permutation,
    t_of_mean,
)

small_numbers = st.integers(-4, 4)  # few values: many ties


def test_sign_flip_by_hand() -> None:
    """The paired test gives the p-value computed by hand."""
    # 8 patterns of (1, 2, 3): |sum| = 6, 4, 2, 0, each twice; observed 6.
    assert paired_sign_flip([1, 2, 3]) == 2 / 8
    # Observed |1 + 2 - 3| = 0: every pattern is as extreme.
    assert paired_sign_flip([1, 2, -3]) == 1
    # Observed |1 - 2 + 3| = 2: only the two zeros are smaller.
    assert paired_sign_flip([1, -2, 3]) == 6 / 8
    assert paired_sign_flip([0.0, 0.0]) == 1
    assert paired_sign_flip([0.5]) == 1
    assert paired_sign_flip([0.1] * 6) == 2 / 64


@settings(max_examples=30, deadline=None)
@given(st.lists(small_numbers, min_size=1, max_size=9))
def test_sign_flip_equals_the_literal_count(differences: list[int]) -> None:
    """The exact p-value counts all sign patterns, ties in rounding included."""
    d = [value / 10 for value in differences]
    sums = [
        abs(sum(s * v for s, v in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(d))
    ]
    assert paired_sign_flip(d) == sum(s >= abs(sum(differences)) for s in sums) / len(sums)


def test_sign_flip_equals_scipy() -> None:
    """The test is scipy's paired permutation test."""
    d = np.random.default_rng(3).normal(0.4, 1, 12)
    ours = paired_sign_flip(d)
    theirs = scipy.stats.permutation_test((d,), np.sum, permutation_type="samples", n_resamples=np.inf).pvalue
    assert ours == pytest.approx(theirs, abs=1e-12)


def test_drawn_sign_flip_is_close_to_the_exact_one() -> None:
    """Past 20 differences, drawn patterns give the same p-value in every call, never 0."""
    d = np.random.default_rng(0).normal(0.25, 1, 24)
    sums = d[:1]
    for value in d[1:]:
        sums = np.concatenate([sums + value, sums - value])
    exact = float((abs(sums) >= abs(d.sum()) - 1e-12).mean())
    drawn = paired_sign_flip(d)
    assert abs(drawn - exact) < 5 * math.sqrt(exact * (1 - exact) / 20_000)
    assert drawn == paired_sign_flip(d)
    assert paired_sign_flip(np.ones(40)) == 1 / 20_001


def test_bootstrap_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ends of the interval are quantiles of the resampled means."""
    # Means of two of (0, 1): 0, 1/2, 1 with shares 1/4, 1/2, 1/4.
    assert bootstrap_interval([0, 1]) == (0, 1)
    assert bootstrap_interval([7.0]) == (7, 7)
    assert bootstrap_interval([2.5] * 5) == (2.5, 2.5)
    monkeypatch.setattr(statistics, "LEVEL", 0.4)
    assert bootstrap_interval([0, 1]) == (0.5, 0.5)


def test_bootstrap_equals_the_literal_loop_and_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples are drawn with replacement, each for itself, and as large as the data."""
    values = np.random.default_rng(5).gamma(2, size=15)
    generator = np.random.default_rng([3, 1])
    means = sorted(float(np.mean([values[i] for i in generator.integers(0, 15, 15)])) for _ in range(10_000))
    monkeypatch.setattr(statistics, "LEVEL", 0.9)
    low, high = bootstrap_interval(values, [3, 1])
    assert (low, high) == pytest.approx((np.quantile(means, 0.05), np.quantile(means, 0.95)))
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, method="percentile", confidence_level=0.9, n_resamples=10_000
    ).confidence_interval
    # A quantile of 10,000 means wanders by about sqrt(0.05 * 0.95 / 10,000) / density = 0.02 standard deviations.
    spread = values.std() / math.sqrt(15)
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.15 * spread)


def test_t_is_that_of_scipy() -> None:
    """The p-value of a mean by Student's t, also where nothing varies."""
    values = [0.3, -0.1, 0.9, 0.4]
    assert t_of_mean(values) == pytest.approx(scipy.stats.ttest_1samp(values, 0).pvalue)
    assert t_of_mean([0.0, 0.0]) == 1
    assert t_of_mean([2.0, 2.0]) == 0


def test_crossed_interval_by_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and columns are drawn each for itself: with two of both, every mean of the 16 samples, by hand."""
    table = np.array([[0.0, 1.0], [2.0, 7.0]])
    pairs = list(itertools.product((0, 1), repeat=2))
    means = [table[np.ix_(rows, columns)].mean() for rows in pairs for columns in pairs]
    wanted = [np.quantile(means, end, method="inverted_cdf") for end in (0.1, 0.9)]
    with monkeypatch.context() as patched:
        patched.setattr(statistics, "LEVEL", 0.8)
        assert crossed_interval(table) == tuple(wanted)
    assert crossed_interval([[1.0, 3.0]]) == (1, 3)
    gap = crossed_interval([[1.0, math.nan], [math.nan, 3.0]])
    assert gap == (1, 3)


def test_holm_by_hand() -> None:
    """Corrected p-values are Holm's, each in its method's place."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9, 0.001]) == pytest.approx([1, 1, 0.003])
    assert holm([0.2]) == [0.2]
    assert holm([]) == []
    assert holm([0.01, math.nan, 0.04]) == pytest.approx([0.02, math.nan, 0.04], nan_ok=True)  # no test does not count


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.floats(0.001, 0.999))
def test_holm_rejects_what_the_step_down_rule_rejects(p_values: list[float], level: float) -> None:
    """Comparing adjusted p-values with a level rejects what the step-down rule rejects."""
    rejected = set()
    for k, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if p_values[i] * (len(p_values) - k) > level:
            break
        rejected.add(i)
    assert {i for i, p in enumerate(holm(p_values)) if p <= level} == rejected


def test_spearman_by_hand() -> None:
    """Rank correlations and their p-values are those computed by hand."""
    # rho of (1, 2, 3) with its six orders: 1, 1/2, 1/2, -1/2, -1/2, -1.
    assert spearman_permutation([1, 2, 3], [10, 30, 20]) == pytest.approx((0.5, 1))
    assert spearman_permutation([1, 2, 3], [3, 2, 1]) == pytest.approx((-1, 2 / 6))
    assert all(math.isnan(value) for value in spearman_permutation([1, 1, 1], [1, 2, 3]))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(small_numbers, small_numbers), min_size=3, max_size=6))
def test_spearman_equals_the_literal_count(pairs: list[tuple[int, int]]) -> None:
    """The p-value is the share of all orders that are as extreme, ties and rounding included."""
    x, y = [a for a, _ in pairs], [b for _, b in pairs]
    rho, p = spearman_permutation(x, y)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert math.isnan(rho)
        assert math.isnan(p)
        return
    every = [scipy.stats.spearmanr(x, order).statistic for order in itertools.permutations(y)]
    assert rho == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    assert p == pytest.approx(np.mean([abs(other) >= abs(rho) - 1e-9 for other in every]))


def test_drawn_spearman_is_close_to_scipys() -> None:
    """Past 9 points, drawn orders give a p-value close to scipy's, the same in every call."""
    generator = np.random.default_rng(2)
    x = generator.normal(size=22)
    y = 0.4 * x + generator.normal(size=22)
    rho, p = spearman_permutation(x, y, seed=1)
    theirs = scipy.stats.spearmanr(x, y)
    assert rho == pytest.approx(theirs.statistic)
    assert abs(p - theirs.pvalue) < 0.02  # scipy's is the t approximation
    assert (rho, p) == spearman_permutation(x, y, seed=1)


def test_diagonal_permutation_by_hand() -> None:
    """The p-value of the diagonal advantage is that computed by hand."""
    assert diagonal_permutation(np.eye(3)) == 1 / 6
    assert diagonal_permutation(np.ones((3, 3))) == 1
    # Sums over the orders of [[2, 1], [5, 3]]: 5 (diagonal) and 6.
    assert diagonal_permutation([[2, 1], [5, 3]]) == 1
    # The general level of a row or a column is no advantage.
    m = np.random.default_rng(0).normal(size=(5, 5))
    levels = m + np.arange(5)[:, None] * 10 - np.arange(5)[None] * 7
    literal = np.mean(
        [sum(m[i, o[i]] for i in range(5)) >= np.trace(m) - 1e-9 for o in itertools.permutations(range(5))]
    )
    assert diagonal_permutation(levels) == diagonal_permutation(m) == literal


def test_drawn_diagonal_permutation() -> None:
    """Past 9 languages, the p-value is the share of drawn orders that are as extreme, never 0."""
    assert diagonal_permutation(np.eye(12)) == 1 / 20_001
    assert diagonal_permutation(np.zeros((12, 12))) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paired_sign_flip([]), "expected differences, given none"),
        (lambda: bootstrap_interval([1, math.nan]), "1 of 2 that are not"),
        (lambda: holm([0.5, 1.5]), "between 0 and 1"),
        (lambda: t_of_mean([1.0]), "at least two values"),
        (lambda: crossed_interval([1.0, 2.0]), r"expected a table, given shape \(2,\)"),
        (lambda: crossed_interval([[math.nan]]), "expected values, given none"),
        (lambda: spearman_permutation([1, 2], [1, 2, 3]), "given 2 and 3"),
        (lambda: diagonal_permutation(np.zeros((2, 3))), r"given shape \(2, 3\)"),
    ],
)
def test_bad_input(call: object, message: str) -> None:
    """Numbers that cannot be used are refused."""
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
