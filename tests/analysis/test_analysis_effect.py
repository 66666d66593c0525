"""Effect of methods against cases computed by hand and a literal bootstrap."""

from __future__ import annotations

import numpy as np
import pytest

import fastmask as fm
from fastmask.analysis.statistics import bootstrap_interval, crossed_interval, holm, paired_sign_flip, t_of_mean


def rows(**scores):
    """Rows from method={language: [score of each seed]}."""
    return [
        {"method": method, "language": language, "seed": seed, "score": score}
        for method, languages in scores.items()
        for language, values in languages.items()
        for seed, score in enumerate(values)
    ]


def test_by_hand():
    """Differences are paired by language and seed; the p-value is that of the languages' mean differences."""
    scores = rows(
        full={"en": [60, 62], "hi": [40, 41]},
        static={"en": [61, 64], "hi": [40.5, 41.5]},
        random={"en": [59, 62], "hi": [38, 41]},
    )
    result = fm.analysis.effect(scores[::-1])  # whatever the order of the rows
    table = result.table.set_index(["method", "language"])
    assert table.difference["static", "en"] == 1.5
    assert table.difference["static", "hi"] == 0.5
    assert table.difference["random", "hi"] == -1
    assert table.score["static", "en"] == 62.5
    assert table.baseline["static", "en"] == 61
    assert set(table.verdict) == {"too few"}
    assert (table.low["static", "en"], table.high["static", "en"]) == (1, 2)
    methods = result.more["methods"].set_index("method")
    assert methods.difference["static"] == 1
    assert methods.p["static"] == max(paired_sign_flip([1.5, 0.5]), t_of_mean([1, 1])) == 0.5
    assert methods.p["random"] == max(paired_sign_flip([-0.5, -1]), t_of_mean([-1.5, 0]))
    assert (methods.low["static"], methods.high["static"]) == crossed_interval([[1, 2], [0.5, 0.5]])
    assert set(methods.languages) == {2}
    assert set(methods.verdict) == {"too few"}
    assert list(methods.p_holm) == holm(list(methods.p))
    assert methods.seeds_agree["static"] == 2
    assert methods.seeds_agree["random"] == 1
    assert methods.languages_better["static"] == 2


def test_each_method_against_its_own_baseline():
    """A method must be compared with the baseline that is given for it, and corrected for the tests that are made."""
    scores = rows(
        full={"en": [60, 62], "hi": [40, 41]},
        meta_full={"en": [50, 50], "hi": [30, 30]},
        meta_static={"en": [51, 51], "hi": [33, 33]},
    )
    methods = fm.analysis.effect(scores, {"meta_static": "meta_full", "meta_full": "full"}).more["methods"]
    assert list(zip(methods.method, methods.against, methods.difference, strict=True)) == [
        ("meta_full", "full", -10.75),
        ("meta_static", "meta_full", 2.0),
    ]
    assert list(methods.p_holm) == holm(list(methods.p))
    with pytest.raises(KeyError, match="unknown method 'fulll'"):
        fm.analysis.effect(scores, {"meta_static": "fulll"})
    with pytest.raises(ValueError, match="'full' is given as its own baseline"):
        fm.analysis.effect(scores, {"full": "full"})


def test_gaps():
    """A method must be compared over what it and its baseline both have, and nothing else."""
    scores = rows(
        full={"en": [60, 62], "hi": [40, 41], "fi": [50, 50]},
        half={"en": [61, 64], "hi": [40.5, 40]},
        other={"fi": [51, 52]},
        lone={"ja": [1, 2]},
    )
    scores = [row for row in scores if not (row["method"] == "half" and row["language"] == "hi" and row["seed"] == 1)]
    result = fm.analysis.effect(scores)
    methods = result.more["methods"].set_index("method")
    assert list(methods.index) == ["half", "other"]
    assert methods.difference["half"] == 1  # en 1.5, hi 0.5
    assert methods.languages.to_dict() == {"half": 2, "other": 1}
    assert list(result.table[result.table.method == "half"].language) == ["en", "hi"]
    assert result.pictures()["png"].startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="none of lone has a language and seed in common with its baseline"):
        fm.analysis.effect(scores, {"lone": "full"})


def test_verdicts():
    """Only a difference that exceeds its noise is called an effect."""
    generator = np.random.default_rng(0)
    noise = {name: list(generator.normal(50, 1, 6)) for name in "abcdefgh"}
    scores = rows(
        full=noise,
        better={name: [v + 1 + 0.01 * i for i, v in enumerate(values)] for name, values in noise.items()},
        worse={name: [v - 1 - 0.01 * i for i, v in enumerate(values)] for name, values in noise.items()},
        same={name: [v + (-1) ** i for i, v in enumerate(values)] for name, values in noise.items()},
        # Far better with one seed, and that in every language: significant over languages, not over seeds.
        lucky={name: [v + (0.01 if i else 9) for i, v in enumerate(values)] for name, values in noise.items()},
    )
    result = fm.analysis.effect(scores)
    verdicts = result.more["methods"].set_index("method").verdict.to_dict()
    assert verdicts == {"better": "better", "worse": "worse", "same": "inside noise", "lucky": "inside noise"}
    of_language = result.table.groupby("method").verdict.first().to_dict()
    assert (of_language["better"], of_language["worse"], of_language["same"]) == ("better", "worse", "inside noise")


def test_a_lower_score_can_be_better():
    """With perplexities, a method that lowers them gains, in every number and word."""
    generator = np.random.default_rng(1)
    noise = {name: list(generator.normal(50, 1, 6)) for name in "abcdefgh"}
    scores = rows(full=noise, low={name: [v - 1 - 0.1 * i for i, v in enumerate(of)] for name, of in noise.items()})
    found = fm.analysis.effect(scores, higher_is_better=False)
    assert (found.table.difference > 0).all()
    assert set(found.table.verdict) == {"better"}
    whole = found.more["methods"].iloc[0]
    assert (whole.verdict, whole.languages_better) == ("better", 8)
    mirrored = fm.analysis.effect([{**row, "score": -row["score"]} for row in scores])
    assert list(mirrored.table.difference) == list(found.table.difference)


def test_noise_is_rarely_called_an_effect_of_a_language():
    """Of the languages of a method, where nothing differs, any is called better or worse in few of many comparisons."""
    generator, alarms = np.random.default_rng(0), 0
    for _ in range(100):
        full, other = generator.normal(50, 1, (2, 14, 6))
        names = [f"l{place}" for place in range(14)]
        scores = rows(full=dict(zip(names, full, strict=True)), other=dict(zip(names, other, strict=True)))
        alarms += bool(set(fm.analysis.effect(scores).table.verdict) - {"inside noise"})
    assert alarms <= 10


def test_interval_is_that_of_the_pairs():
    """The interval is that of the paired differences, however far the seeds themselves spread."""
    scores = rows(full={"en": [10, 20, 30, 40, 50, 60]}, static={"en": [11, 21, 31, 41, 51, 61.5]})
    row = fm.analysis.effect(scores, seed=3).table.iloc[0]
    assert (row.low, row.high) == bootstrap_interval([1, 1, 1, 1, 1, 1.5], [3, 0, 0])
    assert row.verdict == "better"
    again = fm.analysis.effect(scores, seed=3).table.iloc[0]
    assert (again.low, again.high) == (row.low, row.high)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: [{k: v for k, v in row.items() if k != "seed"} for row in r], "seed missing"),
        (lambda r: [row for row in r if row["method"] == "full"], "no method besides the baseline"),
        (lambda r: [row for row in r if row["method"] != "full"], "unknown method 'full'"),
        (lambda r: [*r, r[0]], "several scores for"),
        (lambda r: [{**row, "score": float("nan")} for row in r], "finite scores"),
    ],
)
def test_bad_input(change, message):
    """Scores that are unpaired or not finite are refused."""
    good = rows(full={"en": [60, 62], "hi": [40, 41]}, static={"en": [61, 64], "hi": [40.5, 41.5]})
    with pytest.raises((ValueError, KeyError), match=message):
        fm.analysis.effect(change(good))
