"""The one test of a method against another: over languages, by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import fastmask as fm
from fastmask.analysis.paired import paired_by_language
from fastmask.analysis.statistics import paired_sign_flip
from fastmask.compare.tables import compared


def differences(by_language):
    """A series over (language, seed), from language -> one difference for each seed."""
    values = {(name, seed): value for name, of_seeds in by_language.items() for seed, value in enumerate(of_seeds)}
    return pd.Series(values).rename_axis(["language", "seed"])


def test_by_hand():
    """Each language must count once, whatever its number of seeds, and each seed once beside it."""
    found = paired_by_language(differences({"fi": [2, 0], "ja": [3, 1], "ta": [-1, np.nan]}))
    assert found.by_language == (1, 2, -1)
    assert found.p == paired_sign_flip([1, 2, -1]) == 0.75
    assert found.by_seed == pytest.approx((4 / 3, 0.5))
    assert found.difference == pytest.approx(2 / 3)
    assert (found.wins, found.seeds_agree) == (2, 2)
    with pytest.raises(ValueError, match="given none"):
        paired_by_language(differences({"fi": [np.nan]}))


def test_more_seeds_are_not_more_languages():
    """Ten copies of a seed must leave p, the interval and the verdict as they are: they are no new languages."""
    gains = {name: [gain] for name, gain in zip("abcdefg", (0.5, 0.4, 0.6, 0.2, 0.3, 0.1, -0.2), strict=True)}

    def effect(copies):
        rows = [
            {"method": method, "language": name, "seed": seed, "score": 50 + (method == "static") * gain[0]}
            for method in ("full", "static")
            for name, gain in gains.items()
            for seed in range(copies)
        ]
        return fm.analysis.effect(rows).more["methods"].iloc[0]

    once, often = effect(1), effect(10)
    assert often.p == once.p == paired_sign_flip([gain[0] for gain in gains.values()]) == 4 / 64
    assert (often.low, often.high) == pytest.approx((once.low, once.high))
    assert (often.languages, often.verdict) == (once.languages, once.verdict) == (7, "inside noise")


def test_both_tables_use_the_same_test():
    """The summary of a comparison and the analysis of effects must have one p-value, also where it is drawn."""
    generator = np.random.default_rng(0)
    names = [f"l{number:02d}" for number in generator.permutation(24)]  # more than the patterns that are counted
    rows = [
        {"method": method, "meta": "none", "language": name, "seed": seed, "score": generator.normal(0.2 * place, 1)}
        for place, method in enumerate(("full", "static"))
        for name in names
        for seed in range(3)
    ]
    scores = pd.DataFrame(rows)
    summary = compared(scores, ("static", "none"), ("full", "none"))
    methods = fm.analysis.effect(scores, seed=5).more["methods"].iloc[0]
    assert 0 < summary.p < 0.5
    assert methods.p == summary.p
    assert methods.difference == pytest.approx(summary.difference)


def test_equal_scores_are_ties():
    """Rounding of equal means must not make a language won, or a seed agree."""
    third = differences({"fi": [0.1, 0.2, -0.3], "ja": [1.0, 1.0, 1.0]})
    found = paired_by_language(third)
    assert found.by_language[0] != 0  # what rounding leaves
    assert found.wins == 1
    assert found.p == 1.0
