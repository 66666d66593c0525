"""``summary.md`` and ``report.html`` print one p-value for one comparison."""

from __future__ import annotations

import html
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from whole_results import whole_result

from fastmask.analysis.statistics import p_text
from fastmask.compare.plan import CompareConfig, Plan
from fastmask.compare.report import load_results, write_report
from fastmask.compare.results import write_result
from fastmask.compare.tables import CONDITIONS, scores_table, summary_table
from fastmask.reports.analyses import chosen
from fastmask.reports.folders import NAMES, Run, Study, studies_of
from fastmask.reports.making import make_report
from fastmask.reports.page import Part, page
from fastmask.reports.scores import effect
from fastmask.reports.sections import Gathered, Options
from fastmask.training.config import TrainConfig

COMMITTED = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "compare"
SHOWN = ("seen", "adapted", "zero-shot")  # in both files


def of_summary(text):
    """(condition, variant) -> (difference to full, corrected p), as ``summary.md`` prints them."""
    found = {}
    for condition, title in CONDITIONS.items():
        section = text.partition(f"## LAS, {title}\n")[2].partition("\n## ")[0]
        for line in section.splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if len(cells) > 4 and cells[4] and cells[0] not in ("method", "---"):
                name = cells[0] if cells[1] == "none" else f"{cells[0]} + {NAMES[cells[1]]}"
                found[condition, name] = float(cells[3].partition(" ")[0]), cells[4]
    return found


def of_page(text):
    """The same of ``report.html``; differences have more digits there."""
    found = {}
    for condition in SHOWN:
        table = re.search(rf'<p class="note">effect-{condition}_methods</p>.*?</table>', text, re.DOTALL)
        if table is None:
            continue
        names = [html.unescape(name) for name in re.findall(r"<th(?: [^>]*)?>(?:<button[^>]*>)?(.*?)<", table[0])]
        for row in re.findall(r"<tr>(<td.*?)</tr>", table[0]):
            cells = [html.unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)]
            mine = dict(zip(names, cells, strict=True))
            found[condition, mine["method"]] = float(mine["difference"]), mine["p holm"]
    return found


def same(summary, report, conditions):
    """Whether both print the same p-values, and differences (to two decimals and four digits)."""
    assert report
    summary = {key: value for key, value in summary.items() if key[0] in conditions}
    assert {key: p for key, (_, p) in summary.items()} == {key: p for key, (_, p) in report.items()}
    for key, (difference, _) in summary.items():
        assert difference == pytest.approx(report[key][0], abs=0.006), key


def test_of_a_comparison_that_was_run(comparison, tmp_path):
    """If this fails, the two files of one comparison contradict each other."""
    plan = Plan(comparison, "", CompareConfig.from_dict(studies_of([comparison])[0].settings["comparison"]), {})
    write_report(plan)
    made = make_report([comparison], ["effect"], tmp_path / "out")
    same(of_summary((comparison / "summary.md").read_text()), of_page(made.report.read_text()), SHOWN)


@pytest.mark.parametrize("lost", [0, 5])
def test_of_made_scores(tmp_path, lost):
    """If this fails, they do for other methods, with meta-learning, or while cells are still missing."""
    config = CompareConfig(
        train="a,b", unseen="c,d", methods="full,static,dynamic,random", metas="none,fomaml", seeds=3
    )
    plan = Plan(tmp_path, "", config, {"steps": 2})
    generator = np.random.default_rng(0)
    cells = [job for job in plan.jobs if job.method is not None]
    done = [cell for number, cell in enumerate(cells) if number % 7 >= lost or cell.method == "full"]
    runs = []
    for number, cell in enumerate(done):
        scores = [
            {
                "language": f"l{place}",
                "condition": condition,
                "choice": "own",
                "support_set": None,
                "score": 50 + place + generator.normal(0.3 * (cell.method != "full"), 0.4),
            }
            for condition in SHOWN
            for place in range(12)
            if (number + place) % 11 or not lost
        ]
        write_result(plan, cell, whole_result(scores))
        run = Run(plan.folder(cell), TrainConfig(method=cell.method, meta=cell.meta, seed=cell.seed), "")
        name = cell.method if cell.meta == "none" else f"{cell.method} + {NAMES[cell.meta]}"
        (run.folder / "model").mkdir(exist_ok=True)
        (run.folder / "model").mkdir(exist_ok=True)  # the page shows its day
        runs.append(Run(run.folder, run.config, name))
    write_report(plan)
    scores = scores_table(load_results(plan))
    study = Study("made", tuple(runs), scores=scores)
    found = Gathered("effect", Options())
    effect(study, found)
    sections = found.sections()
    text = page([study], [Part(study, chosen(["effect"])[0], sections)], [], None)
    summary = of_summary((tmp_path / "summary.md").read_text())
    same(summary, of_page(text), SHOWN)
    assert 0.001 < min(float(p) for _, p in summary.values()) < 0.2
    assert max(float(p) for _, p in summary.values()) > 0.2


def test_of_the_committed_comparison():
    """If this fails, the README's numbers are contradicted by one of the files that it links to."""
    summary = (COMMITTED / "summary.md").read_text(encoding="utf-8")
    same(of_summary(summary), of_page((COMMITTED / "report.html").read_text(encoding="utf-8")), SHOWN)
    # And both can be made again from the scores beside them.
    scores = pd.read_csv(COMMITTED / "results.csv")
    cells = list(dict.fromkeys(zip(scores.method, scores.meta, strict=True)))
    again = {}
    for condition in CONDITIONS:
        for row in summary_table(scores, cells, condition).itertuples():
            if not np.isnan(row.p_full):
                name = row.method if row.meta == "none" else f"{row.method} + {NAMES[row.meta]}"
                again[condition, name] = round(row.over_full, 2), p_text(row.p_full)
    assert again == of_summary(summary)
    assert len(again) == 4 * 11
