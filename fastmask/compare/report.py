"""What a comparison leaves: tables as CSV, ``summary.md`` and pictures, and what it prints."""

from __future__ import annotations

import datetime
import math
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
from rich.table import Table

from fastmask.analysis.statistics import p_text
from fastmask.compare.pictures import draw_gains, draw_means
from fastmask.compare.plan import Plan
from fastmask.compare.results import RESULT_FILE, CellResult, Score, is_done
from fastmask.compare.tables import CONDITIONS, cells_table, scores_table, summary_table
from fastmask.files import read_json, write_text
from fastmask.literal import fenced, markdown_table
from fastmask.tasks.task import heading
from fastmask.terminal import LiteralConsole

__all__ = ["load_results", "print_tables", "write_report"]

NOTE = (
    "Scores: mean over languages, with its standard deviation over seeds. over full, over random: difference of the "
    "means over languages in points, more is better, in brackets that of each seed; full and random with the same "
    "meta-learning (full with meta-learning against plain full). p: paired sign-flip test over languages, each the "
    "mean over seeds and support sets; Holm-corrected over the rows of its column, not over columns and tables. won: "
    "languages in which the row is better."
)


def load_results(plan: Plan) -> dict[tuple[int, str, str], dict[str, Any]]:
    """(seed, method, meta) -> result, of every cell that is done.

    Raises:
        FileError: a result is damaged.
    """
    results = {}
    for job in plan.jobs:
        if job.method is not None and is_done(plan, job):
            result: CellResult = read_json(plan.folder(job) / RESULT_FILE, CellResult)
            results[job.seed, job.method, job.meta] = result.model_dump()
    return results


def write_report(plan: Plan, command: str | None = None) -> list[Path]:
    """Write the tables and pictures of the cells that are done; returns the files."""
    results = load_results(plan)
    scores, cells = scores_table(results), cells_table(results)
    order = _order(plan)
    files = [plan.out / name for name in ("results.csv", "cells.csv", "summary.csv", "summary.md", "means.png")]
    summary = pd.concat(
        [
            summary_table(scores, order, condition, _sign(plan)).assign(condition=condition)
            for condition in CONDITIONS
            if (scores["condition"] == condition).any()
        ]
    )
    for file, table, form in ((files[0], scores, None), (files[1], cells, "%.4g"), (files[2], summary, "%.4g")):
        write_text(file, table.to_csv(index=False, float_format=form), follow=False)
    write_text(files[3], _markdown(plan, scores, cells, command), follow=False)
    draw_means(scores, order, _metric(scores), files[4])
    for condition in ("seen", "adapted"):
        if (scores["condition"] == condition).any() and len(order) > 1:
            files.append(plan.out / f"gains-{condition}.png")
            draw_gains(scores, order, condition, _metric(scores), files[-1])
    return files


def print_tables(plan: Plan, console: LiteralConsole) -> None:
    """One table for each condition, and one of the cells' cost."""
    results = load_results(plan)
    for title, rows in _tables(plan, scores_table(results), cells_table(results)):
        table = Table(title=title)
        for name in rows[0]:
            table.add_column(name, justify="left" if name in ("method", "meta") else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row.values())
        console.print(table)
    console.print(NOTE, highlight=False)


def _metric(scores: pd.DataFrame) -> str:
    """What tables call the score that decides; it may depend on the labels of the task (of spans it is F1)."""
    own = [name for name in scores.columns if name not in ("seed", "method", "meta", *Score.model_fields)]
    return heading(own[0]) if own else "score"


def _tables(plan: Plan, scores: pd.DataFrame, cells: pd.DataFrame) -> list[tuple[str, list[dict[str, str]]]]:
    """(title, rows) of every table, each row column -> text."""
    tables = []
    name = _metric(scores)
    for condition, what in CONDITIONS.items():
        if (scores["condition"] == condition).any():
            summary = summary_table(scores, _order(plan), condition, _sign(plan))
            tables.append((f"{name}, {what}", [_summary_row(row, name) for _, row in summary.iterrows()]))
    choices = scores[scores["condition"].isin(("zero-shot", "chosen", "other choice"))]
    if choices["choice"].nunique() > 1:
        tables.append(
            (f"{name} of unseen languages by choice of subnetwork, nothing updated", _choice_rows(plan, choices))
        )
    tables.append(("cost of a cell, mean over seeds", _cost_rows(plan, cells)))
    return tables


def _summary_row(row: Any, name: str) -> dict[str, str]:
    cells = {
        "method": row["method"],
        "meta": row["meta"],
        name: f"{_number(row['score'])} ± {_number(row['deviation'])}",
    }
    for other in ("full", "random"):
        seeds = " ".join(f"{value:+.1f}" for value in row[f"seeds_{other}"])
        cells[f"over {other}"] = f"{row[f'over_{other}']:+.2f} ({seeds})" if seeds else ""
        cells[f"p {other}"] = "" if math.isnan(row[f"p_{other}"]) else p_text(row[f"p_{other}"])
        cells[f"won {other}"] = row[f"wins_{other}"]
    return cells


def _choice_rows(plan: Plan, scores: pd.DataFrame) -> list[dict[str, str]]:
    choices = list(dict.fromkeys(scores["choice"]))
    means = scores.groupby(["method", "meta", "choice"])["score"].mean()
    return [
        {"method": method, "meta": meta, **{c: _number(means.get((method, meta, c), math.nan)) for c in choices}}
        for method, meta in _order(plan)
        if (method, meta) in {key[:2] for key in means.index}
    ]


def _cost_rows(plan: Plan, cells: pd.DataFrame) -> list[dict[str, str]]:
    formats = {
        "live_heads": ".0%",
        "live_neurons": ".0%",
        "outer_steps": ",.0f",
        "sentences": ",.0f",
        "words_per_second": ",.0f",
        "training_seconds": ",.0f",
        "scoring_seconds": ",.0f",
    }
    present = [name for name in formats if name in cells]
    means = cells.groupby(["method", "meta"])[present].mean()
    return [
        {"method": cell[0], "meta": cell[1]}
        | {name.replace("_", " "): _number(means.loc[cell, name], formats[name]) for name in present}
        for cell in _order(plan)
        if cell in means.index
    ]


def _markdown(plan: Plan, scores: pd.DataFrame, cells: pd.DataFrame, command: str | None) -> str:
    import fastmask

    hours = cells["seconds"].sum() / 3600
    lines = ["# Comparison", ""]
    if command:
        lines += [*fenced(command), ""]
    lines += [
        f"{datetime.date.today()}, {platform.machine()}, fastmask {fastmask.__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}; {len(cells)} cells, {hours:.2f} hours of all workers together, "
        "the shared starts not counted.",
        "",
        NOTE,
    ]
    for title, rows in _tables(plan, scores, cells):
        lines += ["", f"## {title}", "", *markdown_table(list(rows[0]), [list(row.values()) for row in rows])]
    return "\n".join(lines) + "\n"


def _sign(plan: Plan) -> int:
    return 1 if plan.task.higher_is_better else -1


def _order(plan: Plan) -> Sequence[tuple[str, str]]:
    return [(job.method, job.meta) for job in plan.jobs if job.method is not None and job.seed == 0]


def _number(value: float, form: str = ".2f") -> str:
    return "" if math.isnan(value) else format(value, form)
