"""The numbers of a comparison's tables, by hand."""

from __future__ import annotations

import dataclasses
import io
import math
from pathlib import Path

import pytest

from fastmask.analysis.statistics import holm, t_of_mean
from fastmask.cli import report as cli_report
from fastmask.cli.compare import print_tables
from fastmask.compare import report
from fastmask.compare.plan import CompareConfig, Hypothesis, Plan, arms_of
from fastmask.compare.report import page_tables
from fastmask.compare.tables import COLUMNS, cells_table, compared, decisions, scores_table, summary_table

# arm -> language -> LAS of seeds 0 and 1
LAS = {
    "full": {"fi": (40.0, 42.0), "ja": (20.0, 20.0), "ta": (30.0, 31.0)},
    "random": {"fi": (39.0, 41.0), "ja": (21.0, 21.0), "ta": (30.0, 30.0)},
    "static": {"fi": (42.0, 42.0), "ja": (23.0, 21.0), "ta": (30.0, 33.0)},
}
PLAN = Plan(Path("out"), "data", CompareConfig("a", "b", seeds=2), {}, arms_of(LAS, ["none", "fomaml"]))


def results(las=LAS, end=""):
    return {
        (seed, arm + end): {
            "seconds": 10.0 + seed,
            "density": None if arm == "full" else {"heads": 0.5},
            "scores": [
                {"language": language, "condition": "adapted", "support_set": number, "score": values[seed] + shift}
                for language, values in by_language.items()
                for number, shift in enumerate((-1.0, 1.0))  # support sets, whose mean counts
            ],
        }
        for arm, by_language in las.items()
        for seed in (0, 1)
    }


def tables_of(cells):
    return scores_table(cells).assign(choice="own"), cells_table(cells)


def summary(cells):
    return summary_table(PLAN, scores_table(cells)).set_index("arm")


def test_differences_are_paired_by_language_and_seed():
    """The difference, its p-values, its wins and its spread over seeds, by hand."""
    found = compared(scores_table(results()), "static", "full")
    # fi: +2, 0; ja: +3, +1; ta: 0, +2  ->  by language 1, 2, 1; by seed 5/3, 1
    assert found["difference"] == pytest.approx(4 / 3)
    assert [found[name] for name in ("languages", "languages_better", "seeds", "seeds_agree")] == [3, 3, 2, 2]
    assert found["p_languages"] == pytest.approx(2 / 8)  # all of one sign: 2 of the 2^3 sign patterns
    assert found["p_seeds"] == pytest.approx(t_of_mean([5 / 3, 1.0]))
    worse = compared(scores_table(results()), "static", "full", sign=-1)
    assert worse["difference"] == pytest.approx(-4 / 3)
    assert (worse["languages_better"], worse["p"]) == (0, pytest.approx(found["p"]))


def test_a_hypothesis_can_be_about_some_languages():
    """It is tested on those alone, and the table names them."""
    wanted = {"arm": "static", "over": "full", "condition": "adapted"}
    hypotheses = {"all": Hypothesis(**wanted), "two": Hypothesis(**wanted, languages=["fi", "ta"])}
    plan = dataclasses.replace(PLAN, hypotheses=hypotheses)
    scores, cells = tables_of(results())
    found = decisions(plan, scores).set_index("hypothesis")
    assert found.loc["all", "difference"] == pytest.approx(4 / 3)
    assert found.loc["two", ["difference", "languages"]].tolist() == [1.0, 2]  # fi +2, 0; ta 0, +2
    rows = dict(page_tables(plan, scores, cells))["what was decided, score"]
    assert [row["condition"] for row in rows] == ["adapted", "adapted (fi, ta)"]


def test_agreement_of_masks_stands_beside_chance():
    """What the masks that an arm started from have in common: of draws, of languages, and by chance."""
    found = results()
    for (_, arm), result in found.items():
        agreement = {"draws": None, "languages": 0.8, "chance": 0.5}
        result["agreement"] = {} if arm == "full" else {"heads": agreement}
    tables = dict(page_tables(PLAN, *tables_of(found)))
    assert tables["agreement of the masks that were found, mean Jaccard"] == [
        {"arm": arm, "heads of languages": "0.80", "heads by chance": "0.50"} for arm in ("random", "static")
    ]
    assert not any(title.startswith("agreement") for title in dict(page_tables(PLAN, *tables_of(results()))))


def test_the_summary_holds_means_deviations_and_corrected_p_values():
    """Means are over languages, deviations over seeds, and p-values are corrected for every test of the page."""
    table = summary(results())
    # full by seed: 30, 31
    assert table.loc["full", "score"] == pytest.approx(30.5)
    assert table.loc["full", "deviation"] == pytest.approx(math.sqrt(0.5))
    assert math.isnan(table.loc["full", "over_full"])
    assert table.loc["random", "over_full"] == pytest.approx(-1 / 6)  # by language -1, 1, -0.5
    assert table.loc["static", "over_random"] == pytest.approx(1.5)  # by language 2, 1, 1.5
    assert table.loc["static", "low_random"] < 1.5 < table.loc["static", "high_random"]
    assert table.loc["static", "wins_random"] == "3/3"
    raw = [table.loc[arm, f"uncorrected_p_{other}"] for arm, other in (("static", "full"), ("random", "full"))]
    raw.append(table.loc["static", "uncorrected_p_random"])
    corrected = [table.loc[arm, f"p_{other}"] for arm, other in (("static", "full"), ("random", "full"))]
    corrected.append(table.loc["static", "p_random"])
    assert corrected == holm(raw)
    assert raw[0] == max(0.25, t_of_mean([5 / 3, 1.0]))


def test_meta_learning_is_compared_with_its_own_full_network():
    """A subnetwork with meta-learning is not credited with what meta-learning alone does."""
    shifted = {m: {lang: tuple(v + 5 for v in vs) for lang, vs in by.items()} for m, by in LAS.items()}
    table = summary(results() | results(shifted, "-fomaml"))
    assert table.loc["static-fomaml", "over_full"] == pytest.approx(4 / 3)
    assert table.loc["full-fomaml", "over_full"] == pytest.approx(5.0)
    assert math.isnan(table.loc["random-fomaml", "over_random"])


def test_cells_that_are_missing_leave_gaps():
    """A comparison can be looked at before its end, and nothing is counted that is not there."""
    some = {key: value for key, value in results().items() if key != (1, "static") and key[1] != "random"}
    table = summary(some)
    assert table.loc["static", "seeds"] == 1
    assert table.loc["static", "over_full"] == pytest.approx(5 / 3)
    assert math.isnan(table.loc["static", "p_full"])  # one seed says nothing of others
    assert math.isnan(table.loc["random", "score"])
    assert math.isnan(table.loc["static", "over_random"])


def test_cells_keep_their_cost():
    """Time and density of a cell are in the table."""
    cells = cells_table(results()).set_index(["arm", "seed"])
    assert cells.loc[("static", 1), "seconds"] == 11.0
    assert cells.loc[("static", 1), "live_heads"] == 0.5
    assert math.isnan(cells.loc[("full", 0), "live_heads"])


def test_what_was_decided():
    """A hypothesis holds, does not hold, or is open, by its own family of tests, in both directions."""
    names = [f"l{number}" for number in range(8)]

    def cells(gains):
        """Arm -> gain over full in each of four seeds, a little different by language."""
        full = {name: 40.0 + place for place, name in enumerate(names)}
        return {
            (seed, arm): {
                "scores": [
                    {
                        "language": name,
                        "condition": "seen",
                        "score": full[name] + gain[seed] + (arm != "full") * place / 100,
                    }
                    for place, name in enumerate(names)
                ]
            }
            for arm, gain in {"full": [0] * 4, **gains}.items()
            for seed in range(4)
        }

    arms = {"full": {"method": "full"}, **{name: {} for name in ("better", "worse", "lucky", "same", "near")}}
    gains = {
        "better": [1.0, 1.1, 0.9, 1.2],
        "worse": [-1.0, -1.1, -0.9, -1.2],
        "lucky": [8.0, 0.1, -0.1, 0.0],
        "same": [0.01, -0.08, 0.02, -0.07],
        "near": [-0.3, -0.25, -0.35, -0.3],
    }
    hypotheses = {name: Hypothesis(arm=name, over="full", condition="seen") for name in gains}
    hypotheses["not worse"] = Hypothesis(arm="near", over="full", condition="seen", more_than=-0.5)
    plan = Plan(Path("out"), "data", CompareConfig("a", "b", seeds=4), {}, arms, hypotheses=hypotheses, zone=0.2)
    found = decisions(plan, scores_table(cells(gains))).set_index("hypothesis")
    assert found.verdict.to_dict() == {
        "better": "holds",
        "worse": "does not hold",
        "lucky": "open",
        "same": "no difference that matters (within ±0.2)",
        "near": "does not hold",
        "not worse": "holds",
    }
    assert found.difference["not worse"] == pytest.approx(found.difference["near"])
    assert list(found.p) == holm(list(found.uncorrected_p))
    missing = {key: value for key, value in cells(gains).items() if key[1] != "better"}
    some = decisions(plan, scores_table(missing)).set_index("hypothesis")
    assert some.verdict["better"] == "not measured"
    # A hypothesis that is not measured yet is a test all the same.
    assert (some.p.dropna() >= found.p[some.p.dropna().index]).all()
    assert (some.p["worse"], found.p["worse"]) == pytest.approx((6 * some.uncorrected_p["worse"],) * 2)
    one_seed = {key: value for key, value in cells(gains).items() if key[0] == 0}
    assert set(decisions(plan, scores_table(one_seed)).verdict) == {"open"}
    assert decisions(dataclasses.replace(plan, hypotheses={}), scores_table(cells(gains))).empty


def test_numbers_stay_whole_where_a_table_has_little_room(tmp_path, monkeypatch):
    """Words are folded in a narrow terminal; no digit of a difference, interval or p-value is cut off."""
    las = {arm: {f"l{n}": (values["fi"][0] + n, values["fi"][1] + n) for n in range(7)} for arm, values in LAS.items()}
    hypotheses = {
        "subnetworks transfer better": Hypothesis(arm="static", over="full", condition="adapted"),
        "by which units they have": Hypothesis(arm="static", over="random", condition="adapted"),
    }
    plan = dataclasses.replace(PLAN, out=tmp_path, hypotheses=hypotheses, zone=0.3)
    scores = scores_table(results(las)).assign(choice="own", subnetwork="own", steps=0, words=9)
    known = scores[list(COLUMNS)], cells_table(results(las))
    rows = [row for _, of_table in page_tables(plan, *known) for row in of_table]
    words = ("hypothesis", "arm", "over", "condition", "verdict")
    numbers = {number for row in rows for name, text in row.items() if name not in words for number in text.split()}
    for width in (90, 130):
        monkeypatch.setattr(cli_report, "WIDTH", width)
        file = io.StringIO()
        print_tables(plan, file, known)
        printed = file.getvalue()
        assert max(map(len, printed.partition("Scores: mean")[0].splitlines())) <= width
        assert [text for text in numbers if text not in printed] == []
    of_another = (scores["arm"] == "static") & (scores["seed"] == 1) & (scores["language"] == "l3")
    with pytest.raises(ValueError, match=r"static of seed 1 and full of seed 0 differ in l3 \(adapted\)"):
        print_tables(plan, file, (known[0][~of_another], known[1]))


def test_a_lower_perplexity_is_drawn_as_a_gain():
    """The picture of gains is positive where the summary is."""
    scores = scores_table(results())
    up, down = (
        report._draw_gains(dataclasses.replace(PLAN, training=training), scores) for training in ({}, {"task": "lm"})
    )
    gains, losses = (figure.axes[0].images[0].get_array() for figure in (up, down))
    assert [label.get_text() for label in up.axes[0].get_yticklabels()] == ["random", "static"]
    assert gains[1].tolist() == [1.0, 2.0, 1.0, pytest.approx(4 / 3, abs=0.05)]  # static of fi, ja, ta and their mean
    assert (gains == -losses).all()


def test_the_picture_pairs_arms_by_seed():
    """An arm that has fewer seeds is set against these seeds of the full network, and says how many it has."""
    some = {key: value for key, value in results().items() if key != (1, "static")}
    figure = report._draw_gains(PLAN, scores_table(some))
    assert figure.axes[0].images[0].get_array()[1, 0] == 2.0  # fi, 42 against 40
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["random", "static (1 seed)"]
    some = {key: value for key, value in results().items() if key != (1, "full")}  # nor is there more to pair with
    figure = report._draw_gains(PLAN, scores_table(some))
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["random (1 seed)", "static (1 seed)"]


def test_no_picture_without_gains():
    alone = {key: value for key, value in results().items() if key[1] == "full"}
    assert report._draw_gains(PLAN, scores_table(alone)) is None
