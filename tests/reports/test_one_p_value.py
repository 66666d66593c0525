"""The tables of a comparison and of the report of it make one test of one difference."""

from __future__ import annotations

import numpy as np
import pytest
from whole_results import whole_result

from fastmask.compare.plan import CompareConfig, Plan, arms_of, write_result
from fastmask.compare.report import load_tables, write_report
from fastmask.compare.tables import summary_table
from fastmask.reports.analyses import effect
from fastmask.reports.page import Part
from fastmask.reports.runs import Run, Study, studies_of
from fastmask.training.config import TrainConfig

SHOWN = ("seen", "adapted", "zero-shot")  # in both


def same(plan: Plan, study: Study) -> None:
    """Differences, intervals and p-values of `summary.csv` are those of the report's tables."""
    found = Part(study, "effect")
    effect(found)
    tables = {section.title: section.result.more["methods"] for section in found.sections}
    summary = summary_table(plan, load_tables(plan)[0]).set_index(["condition", "arm"])
    count = 0
    for title, table in tables.items():
        condition, _, baseline = title.partition(", over ")
        for row in table.itertuples():
            mine = summary.loc[condition, row.method]
            values = [mine[f"{name}_{baseline}"] for name in ("over", "low", "high", "uncorrected_p")]
            assert values == pytest.approx([row.difference, row.low, row.high, row.p], nan_ok=True), (title, row)
            count += 1
    known = [summary.loc[list(SHOWN)][f"over_{baseline}"].notna().sum() for baseline in ("full", "random")]
    assert count == sum(known) > 0


def test_of_a_comparison_that_was_run(comparison):
    """The two files of one comparison agree."""
    same(Plan.stored(comparison), studies_of([comparison])[0])


@pytest.mark.parametrize(
    ("lost", "task"), [pytest.param(0, "parsing", marks=pytest.mark.slow), (5, "parsing"), (5, "lm")]
)
def test_of_made_scores(tmp_path, lost, task):
    """They do for every method, with meta-learning, while cells are still missing, and where lower is better."""
    arms = arms_of(["full", "static", "dynamic", "random"], ["none", "fomaml"])
    plan = Plan(tmp_path, "", CompareConfig(train="a,b", unseen="c,d", seeds=3), {"steps": 2, "task": task}, arms)
    generator = np.random.default_rng(0)
    done = [cell for number, cell in enumerate(plan.cells) if number % 7 >= lost or cell.arm == "full"]
    runs = []
    for number, cell in enumerate(done):
        scores = [
            {
                "language": f"l{place}",
                "condition": condition,
                "choice": "own",
                "support_set": None,
                "score": 50 + place + generator.normal(0.3 * (not cell.arm.startswith("full")), 0.4),
            }
            for condition in SHOWN
            for place in range(12)
            if (number + place) % 11 or not lost
        ]
        write_result(plan, cell, whole_result(scores))
        runs.append(Run(plan.folder(cell), TrainConfig(**arms[cell.arm], seed=cell.seed, task=task), cell.arm))
    same(plan, Study("made", tuple(runs), scores=load_tables(plan)[0], baselines=plan.baselines))


def test_a_page_can_be_made_again_from_its_scores(comparison, tmp_path):
    """Where only the tables of a comparison were kept, its page comes out as it was."""
    plan = Plan.stored(comparison)
    write_report(plan)
    for name in ("compare.yaml", "results.csv", "cells.csv"):
        (tmp_path / name).write_bytes((comparison / name).read_bytes())
    write_report(Plan.stored(tmp_path))
    assert (tmp_path / "summary.md").read_text() == (comparison / "summary.md").read_text()
