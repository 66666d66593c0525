"""The numbers of a comparison's tables, by hand."""

from __future__ import annotations

import math

import pytest

from fastmask.compare.tables import cells_table, compared, scores_table, summary_table

# method -> language -> LAS of seeds 0 and 1
LAS = {
    "full": {"fi": (40.0, 42.0), "ja": (20.0, 20.0), "ta": (30.0, 31.0)},
    "random": {"fi": (39.0, 41.0), "ja": (21.0, 21.0), "ta": (30.0, 30.0)},
    "static": {"fi": (42.0, 42.0), "ja": (23.0, 21.0), "ta": (30.0, 33.0)},
}


def results(las=LAS, meta="none"):
    return {
        (seed, method, meta): {
            "seconds": 10.0 + seed,
            "density": None if method == "full" else {"heads": 0.5},
            "scores": [
                {"language": language, "condition": "adapted", "support_set": number, "score": values[seed] + shift}
                for language, values in by_language.items()
                for number, shift in enumerate((-1.0, 1.0))  # support sets, whose mean counts
            ],
        }
        for method, by_language in las.items()
        for seed in (0, 1)
    }


def test_differences_are_paired_by_language_and_averaged_over_seeds():
    """The difference, its p-value, its wins or its spread over seeds is wrong."""
    found = compared(scores_table(results()), ("static", "none"), ("full", "none"))
    # fi: +2, 0; ja: +3, +1; ta: 0, +2  ->  by language 1, 2, 1; by seed 5/3, 1
    assert found.difference == pytest.approx(4 / 3)
    assert found.by_seed == pytest.approx((5 / 3, 1.0))
    assert (found.wins, len(found.by_language)) == (3, 3)
    assert found.p == pytest.approx(2 / 8)  # all of one sign: 2 of the 2^3 sign patterns


def test_seeds_do_not_pass_for_languages():
    """Each seed enters the test as if it were another language: differences look surer than they are."""
    scores = scores_table(results())
    twice = scores_table(results() | {(seed + 2, m, meta): r for (seed, m, meta), r in results().items()})
    pair = ("static", "none"), ("full", "none")
    assert compared(twice, *pair).p == compared(scores, *pair).p


def test_the_summary_holds_means_deviations_and_corrected_p_values():
    """A mean is taken over the wrong axis, or p-values are not corrected for the number of cells."""
    order = [("full", "none"), ("static", "none"), ("random", "none")]
    table = summary_table(scores_table(results()), order, "adapted").set_index("method")
    # full by seed: 30, 31
    assert table.loc["full", "score"] == pytest.approx(30.5)
    assert table.loc["full", "deviation"] == pytest.approx(math.sqrt(0.5))
    assert math.isnan(table.loc["full", "over_full"])
    assert table.loc["random", "over_full"] == pytest.approx(-1 / 6)  # by language -1, 1, -0.5
    assert table.loc["static", "over_random"] == pytest.approx(1.5)  # by language 2, 1, 1.5
    assert table.loc["static", "p_random"] == pytest.approx(0.25)  # alone: nothing to correct
    assert table.loc["static", "p_full"] == pytest.approx(0.5)  # Holm over static and random
    assert table.loc["static", "uncorrected_p_full"] == pytest.approx(0.25)
    assert table.loc["static", "wins_random"] == "3/3"


def test_meta_learning_is_compared_with_its_own_full_network():
    """A subnetwork with meta-learning is credited with what meta-learning alone does."""
    shifted = {m: {lang: tuple(v + 5 for v in vs) for lang, vs in by.items()} for m, by in LAS.items()}
    scores = scores_table(results() | results(shifted, "fomaml"))
    order = [(m, meta) for meta in ("none", "fomaml") for m in LAS]
    table = summary_table(scores, order, "adapted").set_index(["method", "meta"])
    assert table.loc[("static", "fomaml"), "over_full"] == pytest.approx(4 / 3)
    assert table.loc[("full", "fomaml"), "over_full"] == pytest.approx(5.0)
    assert math.isnan(table.loc[("random", "fomaml"), "over_random"])


def test_cells_that_are_missing_leave_gaps():
    """A comparison that is looked at before its end fails, or counts what is not there."""
    some = {key: value for key, value in results().items() if key[:2] != (1, "static") and key[1] != "random"}
    order = [("full", "none"), ("static", "none"), ("random", "none")]
    table = summary_table(scores_table(some), order, "adapted").set_index("method")
    assert table.loc["static", "seeds"] == 1
    assert table.loc["static", "over_full"] == pytest.approx(5 / 3)
    assert math.isnan(table.loc["random", "score"])
    assert math.isnan(table.loc["static", "over_random"])


def test_cells_keep_their_cost():
    """Time or density of a cell goes missing."""
    cells = cells_table(results()).set_index(["method", "seed"])
    assert cells.loc[("static", 1), "seconds"] == 11.0
    assert cells.loc[("static", 1), "live_heads"] == 0.5
    assert math.isnan(cells.loc[("full", 0), "live_heads"])
