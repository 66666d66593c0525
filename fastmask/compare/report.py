"""What a comparison leaves: tables as CSV, ``summary.md`` and ``gains.png``."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from fastmask.analysis.drawing import SIGNED, heatmap, new_figure
from fastmask.analysis.statistics import p_text
from fastmask.compare.plan import BASELINES, CONDITIONS, Plan, is_done, read_result
from fastmask.compare.tables import (
    AGREEMENT,
    COLUMNS,
    by_language_and_seed,
    cells_table,
    decisions,
    scores_table,
    summary_table,
)
from fastmask.files import FileError, replace_file, write_text
from fastmask.tasks.task import heading
from fastmask.training.config import Budget

SCORES_FILE, CELLS_FILE = "results.csv", "cells.csv"

NOTE = (
    "Scores: mean over languages, with its standard deviation over seeds. over full, over random: difference of the "
    "means over languages in points, more is better, then its 95% interval (bootstrap over languages and seeds). Each "
    "arm is compared with the arm of that method that has the other settings in common with it. p: the larger of that "
    "of a sign-flip test over languages (of n languages never below 2^(1-n)) and that of a t-test over seeds, then "
    "corrected (Holm) over all tests of these tables; none with a single seed. won: languages where the row is better."
)
DECIDED = (
    "What the plan set out to decide. p is corrected over these hypotheses alone: they were written down before the "
    "runs. A hypothesis holds, or does not, where p is at most 0.05; else it is open. p crossed: of one t-test over "
    "languages and seeds together (two-way layout, Satterthwaite's degrees of freedom), not corrected, for comparison."
)

Tables = tuple[pd.DataFrame, pd.DataFrame]


# ---- reading


def load_results(plan: Plan) -> dict[tuple[int, str], dict[str, Any]]:
    """(seed, arm) -> result, of every cell that is done; raises FileError where one is damaged."""
    return {(job.seed, job.arm): read_result(plan, job) for job in plan.cells if is_done(plan, job)}


def read_tables(folder: Path) -> Tables:
    """Every score, and every cell, of a comparison of which only the tables were kept; raises FileError for others."""
    return _read(folder / SCORES_FILE, COLUMNS), _read(
        folder / CELLS_FILE, ("seed", "arm", "day", "made_by", "seconds")
    )


TEXTS = ("arm", "language", "condition", "choice", "subnetwork")  # columns of tables


def _read(file: Path, needed: Sequence[str]) -> pd.DataFrame:
    try:
        # Names as text, whatever they look like: nan is the code of a language.
        table = pd.read_csv(file, keep_default_na=False, na_values=[""], dtype=dict.fromkeys(TEXTS, str))
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise FileError(file, f"{error} (expected a table of a comparison)") from error
    if missing := [name for name in needed if name not in table.columns]:
        raise FileError(file, f"no column {', '.join(missing)} (expected a table of a comparison)")
    return table


def load_tables(plan: Plan, known: Tables | None = None) -> Tables:
    """Every score, and every cell, of the cells that are done; of the folder's tables where only those were kept.

    `known` are tables of cells of this plan that were done elsewhere. One that is done here, too, is taken from here.
    """
    results = load_results(plan)
    if known is None and not results and (plan.out / SCORES_FILE).is_file():
        return read_tables(plan.out)
    tables = scores_table(results), cells_table(results)
    if known is None:
        return tables
    order = {(job.seed, job.arm): number for number, job in enumerate(plan.cells)}
    _check_budget(plan, *known)
    scores, cells = _joined(tables[0], known[0], order), _joined(tables[1], known[1], order)
    _check_alike(scores)
    return scores, cells


def cells_of(table: pd.DataFrame) -> list[tuple[int, str]]:
    """(seed, arm) of each row of a table."""
    return [] if table.empty else list(zip(table["seed"], table["arm"], strict=True))


def _check_budget(plan: Plan, scores: pd.DataFrame, cells: pd.DataFrame) -> None:
    """See that known cells took the steps that the plan says."""
    seen = scores.loc[scores["condition"] == "seen", "language"].nunique()
    for cell in cells[cells["arm"].isin(plan.arms)].to_dict("records") if seen else ():
        budget = Budget.of(plan.configs[cell["arm"]], seen)
        for name in ("outer_steps", "gradient_passes", "sentences"):
            if name in cell and cell[name] != (planned := getattr(budget, name)):
                raise ValueError(
                    f"the known cell {cell['arm']} of seed {cell['seed']} has {cell[name]:,} {name.replace('_', ' ')}, "
                    f"the plan {planned:,} (expected known cells to be of this plan)"
                )


def _check_alike(scores: pd.DataFrame) -> None:
    """See that every cell was scored on the same languages; others are of another comparison."""
    of_conditions = scores[scores["condition"].isin(CONDITIONS)]
    first: tuple[Any, set[str]] | None = None
    for cell, rows in of_conditions.groupby(["seed", "arm"], sort=False):
        languages = {f"{name} ({where})" for name, where in zip(rows["language"], rows["condition"], strict=True)}
        first = first or (cell, languages)
        if differ := sorted(languages ^ first[1]):
            (seed, arm), (other_seed, other_arm) = cell, first[0]
            raise ValueError(
                f"cells were scored on different languages: {arm} of seed {seed} and {other_arm} of seed {other_seed} "
                f"differ in {', '.join(differ[:4])} (expected known cells to be of this plan)"
            )


def _joined(own: pd.DataFrame, other: pd.DataFrame, order: Mapping[tuple[int, str], int]) -> pd.DataFrame:
    """The rows of two tables by the order of cells; of a cell that is in both, those of `own`."""
    mine = set(cells_of(own))
    rest = other[[cell in order and cell not in mine for cell in cells_of(other)]]
    table = pd.concat([part for part in (own, rest) if not part.empty] or [own], ignore_index=True)
    places = np.argsort([order[cell] for cell in cells_of(table)], kind="stable")
    return table.iloc[places].reset_index(drop=True)


# ---- writing


def write_report(plan: Plan, command: str | None = None, known: Tables | None = None) -> list[Path]:
    """Write the tables and the picture of the cells that are done, here or as `known`; returns the files."""
    scores, cells = load_tables(plan, known)
    texts = {
        SCORES_FILE: scores.to_csv(index=False),
        CELLS_FILE: cells.to_csv(index=False),
        "summary.csv": summary_table(plan, scores).to_csv(index=False, float_format="%.4g"),
        "summary.md": _markdown(plan, scores, cells, command),
    }
    for name, text in texts.items():
        write_text(plan.out / name, text)
    files = [plan.out / name for name in texts]
    if (figure := _draw_gains(plan, scores)) is not None:
        files.append(plan.out / "gains.png")
        replace_file(files[-1], partial(figure.savefig, dpi=120, format="png"))
    return files


def _markdown(plan: Plan, scores: pd.DataFrame, cells: pd.DataFrame, command: str | None) -> str:
    days, hours = sorted(set(cells["day"])), cells["seconds"].sum() / 3600
    lines = [f"# {plan.question or 'Comparison'}", ""]
    if command:
        lines += ["```", command, "```", ""]
    when = f"plan of {plan.date}, runs of " if plan.date else ""
    lines += [
        f"{when}{' to '.join(dict.fromkeys((days[0], days[-1])))}; {'; '.join(dict.fromkeys(cells['made_by']))}; "
        f"{len(cells)} cells, {hours:.2f} hours of all workers together, the shared starts not counted.",
        "",
        *([DECIDED, ""] if plan.hypotheses else []),
        NOTE,
    ]
    for title, rows in page_tables(plan, scores, cells):
        lines += ["", f"## {title}", "", *markdown_table(list(rows[0]), [list(row.values()) for row in rows])]
    settings = yaml.safe_dump(plan.settings, sort_keys=False, allow_unicode=True, width=110)
    lines += ["", "## plan", "", "```", settings.rstrip(), "```"]
    return "\n".join(lines) + "\n"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table in which every cell reads as it is."""
    escaped = ([re.sub(r"([\\`*_\[\]<>&|~$])", r"\\\1", cell) for cell in row] for row in (header, *rows))
    first, *rest = (f"| {' | '.join(row)} |" for row in escaped)
    return [first, f"|{' --- |' * len(header)}", *rest]


# ---- the tables of a page, as text


def page_tables(plan: Plan, scores: pd.DataFrame, cells: pd.DataFrame) -> list[tuple[str, list[dict[str, str]]]]:
    """(title, rows) of every table of a page, each row column -> text."""
    name, tables = _metric(scores), []
    decided = decisions(plan, scores)
    if len(decided):
        tables.append((f"what was decided, {name}", [_decision_row(row) for row in decided.itertuples()]))
    summary = summary_table(plan, scores)
    for condition, what in CONDITIONS.items():
        done = summary[(summary["condition"] == condition) & (summary["seeds"] > 0)]
        if len(done):
            counted = done["seeds"].nunique() > 1
            tables.append((f"{name}, {what}", [_summary_row(row, name, counted) for _, row in done.iterrows()]))
    chosen = scores[scores["condition"].isin(("zero-shot", "chosen", "other choice"))]
    if chosen["choice"].nunique() > 1:
        means = chosen.groupby(["arm", "choice"])["score"].mean().unstack()[list(chosen["choice"].unique())]
        title = f"{name} of unseen languages by choice of subnetwork, nothing updated"
        tables.append((title, _rows_by_arm(plan, means, dict.fromkeys(means, ".2f"))))
    counts = ("outer steps", "gradient passes", "sentences", "words per second", "training seconds", "scoring seconds")
    formats = {"live heads": ".0%", "live neurons": ".0%", **dict.fromkeys(counts, ",.0f")}
    named = cells.rename(columns=lambda column: column.replace("_", " "))
    costs = named.groupby("arm")[[column for column in formats if column in named]].mean()
    tables.append(("cost of a cell, mean over seeds", _rows_by_arm(plan, costs, formats)))
    columns = [name for name in cells if name.endswith(tuple(AGREEMENT.values()))]
    agreement = cells.groupby("arm")[columns].mean().dropna(how="all").dropna(how="all", axis=1)
    if agreement.size:
        agreement = agreement.rename(columns=lambda name: name.replace("_", " "))
        rows = _rows_by_arm(plan, agreement, dict.fromkeys(agreement, ".2f"))
        tables.append(("agreement of the masks that were found, mean Jaccard", rows))
    return tables


def _metric(scores: pd.DataFrame) -> str:
    """What tables call the score that decides; it may depend on the labels of the task (of spans it is F1)."""
    own = [name for name in scores.columns if name not in COLUMNS]
    return heading(own[0]) if own else "score"


def _rows_by_arm(plan: Plan, table: pd.DataFrame, formats: Mapping[str, str]) -> list[dict[str, str]]:
    """A row for each arm that is in the index of a table of numbers."""
    arms = [arm for arm in plan.arms if arm in table.index]
    return [{"arm": arm} | {name: _number(table.loc[arm, name], formats[name]) for name in table} for arm in arms]


def _decision_row(row: Any) -> dict[str, str]:
    by = f" by more than {row.more_than:+g}" if row.more_than else ""
    return {
        "hypothesis": row.hypothesis,
        "arm": row.arm,
        "over": f"{row.over}{by}",
        "condition": row.condition + (f" ({', '.join(row.only)})" if row.only else ""),
        "difference": _number(row.difference, "+.2f"),
        "95% interval": _interval(row.low, row.high),
        "languages better": f"{row.languages_better}/{row.languages}",
        "p languages": _p(row.p_languages),
        "p seeds": _p(row.p_seeds),
        "p crossed": _p(row.p_crossed),
        "p": _p(row.p),
        "verdict": row.verdict,
    }


def _summary_row(row: Any, name: str, counted: bool) -> dict[str, str]:
    deviation = _number(row["deviation"])
    cells = {"arm": row["arm"], **({"seeds": str(row["seeds"])} if counted else {})}
    cells[name] = _number(row["score"]) + (f" ± {deviation}" if deviation else "")
    for other in BASELINES:
        interval = _interval(row[f"low_{other}"], row[f"high_{other}"])
        cells[f"over {other}"] = f"{row[f'over_{other}']:+.2f} ({interval})" if interval else ""
        cells[f"p {other}"] = _p(row[f"p_{other}"])
        cells[f"won {other}"] = row[f"wins_{other}"]
    return cells


def _interval(low: float, high: float) -> str:
    return "" if math.isnan(low) else f"{low:+.2f} to {high:+.2f}"


def _p(value: float) -> str:
    return "" if math.isnan(value) else p_text(value)


def _number(value: float, form: str = ".2f") -> str:
    return "" if math.isnan(value) else format(value, form)


# ---- the picture


def _draw_gains(plan: Plan, scores: pd.DataFrame) -> Any:
    """How much better each arm is than the arm of method `full` that it is compared with, by language; or None.

    Training languages, then unseen ones after their steps, each followed by their mean. Arms are paired by seed, and
    languages weigh the same, as in the summary.
    """
    sign, groups = 1 if plan.task.higher_is_better else -1, {}
    seeds: dict[str, set[int]] = {arm: set() for arm in plan.baselines["full"]}  # that an arm and its baseline share
    for condition, what in (("seen", "training languages"), ("adapted", "unseen languages, adapted")):
        part = scores[scores["condition"] == condition]
        pairs = plan.baselines["full"].items()
        apart = {arm: by_language_and_seed(part, arm) - by_language_and_seed(part, full) for arm, full in pairs}
        for arm, of_arm in apart.items():
            seeds[arm] |= set(of_arm.dropna().index.get_level_values("seed"))
        gains = {arm: sign * of_arm.groupby("language").mean() for arm, of_arm in apart.items()}
        table = pd.DataFrame(gains).T.reindex(columns=list(dict.fromkeys(part["language"])))
        if table.notna().any(axis=None):
            groups[what] = table.assign(mean=table.mean(axis=1))
    if not groups:
        return None
    table = pd.concat(groups.values(), axis=1).dropna(how="all").round(1) + 0.0  # no -0.0
    names = [
        arm if len(seeds[arm]) == plan.config.seeds else f"{arm} ({len(seeds[arm])} seed{'s' * (len(seeds[arm]) > 1)})"
        for arm in table.index
    ]
    limit = float(np.nanquantile(table.abs(), 0.95)) or 1.0  # one language far apart must not take all the colours
    figure = new_figure(1.5 + 0.36 * table.shape[1], 1.2 + 0.29 * len(table))
    axis = figure.subplots()
    scale: dict[str, Any] = {"colours": SIGNED, "low": -limit, "high": limit, "numbers": "{:+.1f}"}
    heatmap(axis, table, names, list(table.columns), **scale, written=max(table.shape))
    end = -0.5
    for what, group in groups.items():
        axis.text(end + group.shape[1] / 2, -0.65, what, ha="center", va="bottom", fontsize=9)
        end += group.shape[1]
        axis.axvline(end - 1, color="white", linewidth=1)
        axis.axvline(end, color="white", linewidth=5)
    axis.spines[:].set_visible(False)
    axis.set_title(f"Gain over the full network in {_metric(scores)}, mean over seeds", fontsize=11, pad=20)
    return figure
