"""The pages of results agree with the scores they are made of, and the plan came before the runs."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pandas as pd
import pytest

from fastmask.compare.plan import Plan, is_done
from fastmask.compare.report import write_report
from fastmask.settings import items_of

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
TABLES = ("results.csv", "cells.csv")
TUNED_ON = {"hr", "te"}
FOLDERS = sorted(file.parent for file in RESULTS.glob("*/results.csv"))
folders = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
NUMBER = re.compile(r"(?<![\w.-])[+-]?\d+\.\d\d(?![\w.])")


def plan_of(folder: Path, out: Path) -> Plan:
    return Plan.read(folder / "plan.yaml", out)


@folders
def test_the_summary_is_that_of_the_scores(folder, tmp_path):
    """All tables, tests and intervals of a page come out the same from the scores beside it."""
    for name in TABLES:
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    plan = plan_of(folder, tmp_path)
    assert not any(is_done(plan, job) for job in plan.jobs)
    write_report(plan)
    assert (tmp_path / "summary.md").read_text() == (folder / "summary.md").read_text()


@folders
def test_the_page_says_what_the_summary_says(folder):
    """Every score and difference in a page's text stands in its summary, or in a table that was made beside it."""
    sources = [folder / "summary.md", *(file for file in folder.glob("*.csv") if file.name not in TABLES)]
    known = {float(number) for file in sources for number in NUMBER.findall(file.read_text())}
    said = NUMBER.findall(folder.with_suffix(".md").read_text())
    assert said
    assert not [number for number in said if float(number) not in known]


def test_the_curve_is_that_of_the_scores():
    """The table of scores beside speeds comes out the same from the tables that it joins."""
    folder = RESULTS / "3-density"
    found = runpy.run_path(str(folder / "curve.py"))["joined"]().round(2)
    assert found.to_csv(index=False, float_format="%.2f") == (folder / "curve.csv").read_text()


def test_the_small_treebanks_are_those_of_the_scores():
    """The means of the languages that are small come out the same from the scores beside them."""
    scores = pd.read_csv(RESULTS / "5-unequal" / "results.csv")
    seen = scores[scores["condition"] == "seen"].pivot_table(
        index="arm", columns="language", values="score", sort=False
    )
    table = pd.DataFrame({"en": seen["en"], "mean of the seven small": seen.drop(columns="en").mean(axis=1)})
    assert table.to_csv(float_format="%.2f") == (RESULTS / "5-unequal" / "small.csv").read_text()


def test_the_readme_says_what_the_summaries_say():
    """Every score with a deviation in the README stands in the summary of a page."""
    said = re.findall(r"\d+\.\d\d ± \d+\.\d\d", (RESULTS.parents[1] / "README.md").read_text())
    summary = "".join(file.read_text() for file in RESULTS.glob("*/summary.md"))
    assert said
    assert not [score for score in said if score not in summary]


@folders
def test_the_plan_is_older_than_the_runs(folder, tmp_path):
    """Nothing was decided after it was seen: the plan has a date, and no run is from before it."""
    days = pd.read_csv(folder / "cells.csv")["day"]
    assert "" != plan_of(folder, tmp_path).date <= days.min()


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*/plan.yaml")), ids=lambda file: file.parent.name)
def test_settings_are_tuned_on_other_languages_than_tested(file, tmp_path):
    """Plans that choose settings see the two languages kept for it, and all others see neither of them."""
    languages = set(items_of(plan_of(file.parent, tmp_path).config.unseen))
    assert languages == TUNED_ON if file.parent.name.startswith("0-") else not languages & TUNED_ON
