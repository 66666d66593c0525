"""The one test of a method against another: over languages, by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student

import fastmask as fm
from fastmask.analysis import statistics
from fastmask.analysis.statistics import crossed_t, paired_sign_flip, t_of_mean
from fastmask.compare import tables


def differences(by_language):
    """A series over (language, seed), from language -> one difference for each seed."""
    values = {(name, seed): value for name, of_seeds in by_language.items() for seed, value in enumerate(of_seeds)}
    return pd.Series(values).rename_axis(["language", "seed"])


def paired(given):
    return SimpleNamespace(**statistics.paired(given))


def test_by_hand():
    """Each language must count once, whatever its number of seeds, and each seed once beside it."""
    found = paired(differences({"fi": [2, 0], "ja": [3, 1], "ta": [-1, np.nan]}))
    assert found.p_languages == paired_sign_flip([1, 2, -1]) == 0.75
    assert found.p_seeds == t_of_mean([4 / 3, 0.5])
    assert found.p == max(found.p_languages, found.p_seeds)
    assert -1 <= found.low < found.difference < found.high <= 3
    assert found.difference == pytest.approx(2 / 3)
    assert (found.languages, found.languages_better, found.seeds, found.seeds_agree) == (3, 2, 2, 2)
    with pytest.raises(ValueError, match="given none"):
        paired(differences({"fi": [np.nan]}))


def test_both_sources_of_chance_at_once_by_hand():
    """Six languages and six seeds, i + j - 3: mean 2, mean squares 21, 21 and 0, so a variance of 42 / 36."""
    table = np.add.outer(np.arange(6.0), np.arange(6.0)) - 3
    # 42 ** 2 / (21 ** 2 / 5 + 21 ** 2 / 5 + 0) = 10 degrees of freedom
    assert crossed_t(table) == pytest.approx(2 * student.sf(2 / np.sqrt(42 / 36), 10)) == pytest.approx(0.094, abs=1e-3)
    assert t_of_mean(table.mean(0)) == t_of_mean(table.mean(1)) == pytest.approx(0.047, abs=1e-3)  # one source each
    alike = np.repeat([[1.0], [2.0], [4.0]], 5, axis=1)  # seeds that say the same are one seed
    assert crossed_t(alike) == t_of_mean([1.0, 2.0, 4.0])
    assert np.isnan(crossed_t(table[:1]))
    assert np.isnan(crossed_t([[1.0, np.nan], [1.0, 2.0]]))
    with pytest.raises(ValueError, match=r"expected a table, given shape \(2,\)"):
        crossed_t([1.0, 2.0])


def test_both_sources_of_chance_give_false_alarms_no_more_often_than_said():
    """Where languages and seeds vary alike, 5 in 100 tables without a difference fall below 0.05."""
    draw = np.random.default_rng(0).normal
    tables = [draw(size=(8, 1)) + draw(size=(1, 6)) + draw(size=(8, 6)) for _ in range(1000)]
    assert 0.02 < np.mean([crossed_t(table) <= 0.05 for table in tables]) < 0.06


def test_more_seeds_are_not_more_languages():
    """Ten seeds that are the same leave the test over languages as it is: they are no new languages."""
    gains = {name: [gain] for name, gain in zip("abcdefg", (0.5, 0.4, 0.6, 0.2, 0.3, 0.1, -0.2), strict=True)}
    once = paired(differences(gains))
    often = paired(differences({name: gain * 10 for name, gain in gains.items()}))
    assert often.p_languages == once.p_languages == paired_sign_flip([gain[0] for gain in gains.values()]) == 4 / 64
    assert (often.low, often.high) == pytest.approx((once.low, once.high), abs=0.02)


def test_one_seed_says_nothing_of_others():
    """With a single seed there is no p-value, however many languages agree; with two it is that of seeds."""
    one = paired(differences({name: [1.0] for name in "abcdefgh"}))
    assert np.isnan(one.p)
    assert one.p_languages == 2 / 256
    two = paired(differences({name: [0.1, 1.9] for name in "abcdefgh"}))
    assert two.p_languages == 2 / 256
    assert two.p == two.p_seeds == pytest.approx(0.466, abs=0.001)  # t = 1 / 0.9 with one degree of freedom


def test_the_interval_is_wider_than_that_over_languages_alone():
    """Where seeds differ and languages do not, the interval is as wide as the seeds are apart."""
    found = paired(differences({name: [0.0, 1.0, 2.0] for name in "abcdefgh"}))
    assert found.low < 0.4
    assert found.high > 1.6


def test_both_tables_use_the_same_test():
    """The summary of a comparison and the analysis of effects must have one p-value, also where it is drawn."""
    generator = np.random.default_rng(0)
    names = [f"l{number:02d}" for number in generator.permutation(24)]  # more than the patterns that are counted
    rows = [
        {"method": method, "arm": method, "language": name, "seed": seed, "score": generator.normal(0.2 * place, 1)}
        for place, method in enumerate(("full", "static"))
        for name in names
        for seed in range(3)
    ]
    scores = pd.DataFrame(rows)
    summary = tables.compared(scores, "static", "full")
    methods = fm.analysis.effect(scores, seed=5).more["methods"].iloc[0]
    assert 0 < summary["p"] < 0.5
    assert methods.p == pytest.approx(summary["p"])
    assert methods.difference == pytest.approx(summary["difference"])


def test_equal_scores_are_ties():
    """Rounding of equal means must not make a language won, or a seed agree."""
    third = differences({"fi": [0.1, 0.2, -0.3], "ja": [1.0, 1.0, 1.0]})
    found = paired(third)
    assert third["fi"].mean() != 0  # what rounding leaves
    assert found.languages_better == 1
    assert found.p == 1.0
