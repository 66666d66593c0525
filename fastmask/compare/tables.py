"""The tables of a comparison: one row per score, one per cell, and the summary with its significance tests.

The tests are over languages (`analysis.paired`): a cell's scores of a language are averaged over support sets and seeds
first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from fastmask.analysis.paired import Paired, paired_by_language
from fastmask.analysis.statistics import holm

__all__ = ["CONDITIONS", "baseline_of", "cells_table", "compared", "scores_table", "summary_table"]

CONDITIONS = {
    "seen": "training languages, each with its own subnetwork",
    "zero-shot": "unseen languages, without a sentence of them: the union of all subnetworks",
    "chosen": "unseen languages, the subnetwork chosen on the support set, nothing updated",
    "adapted": "unseen languages, after the gradient steps on the support set",
}


def scores_table(results: Mapping[tuple[int, str, str], Mapping[str, Any]]) -> pd.DataFrame:
    """One row per score: seed, method, meta, and what `Scorer.scores` says of it, each of its "scores" as a column.

    Args:
        results: (seed, method, meta) -> what the cell's ``result.json`` holds.
    """
    rows = [
        {"seed": seed, "method": method, "meta": meta}
        | {name: value for name, value in score.items() if name != "scores"}
        | score.get("scores", {})
        for (seed, method, meta), result in results.items()
        for score in result["scores"]
    ]
    return pd.DataFrame(rows)


def cells_table(results: Mapping[tuple[int, str, str], Mapping[str, Any]]) -> pd.DataFrame:
    """One row per cell: its budget, time and speed."""
    return pd.DataFrame(
        {
            "seed": seed,
            "method": method,
            "meta": meta,
            **{name: value for name, value in result.items() if name not in ("scores", "density")},
            **{f"live_{kind}": share for kind, share in (result["density"] or {}).items()},
        }
        for (seed, method, meta), result in results.items()
    )


def baseline_of(cell: tuple[str, str], baseline: str) -> tuple[str, str]:
    """What a cell (method, meta) is compared with: `baseline` with the same meta-learning, itself with none."""
    method, meta = cell
    return baseline, "none" if method == baseline else meta


def compared(scores: pd.DataFrame, cell: tuple[str, str], other: tuple[str, str], sign: int = 1) -> Paired | None:
    """`cell` against `other`, each (method, meta), over the languages and seeds that both have.

    Args:
        scores: rows of one condition.
        cell: method and meta.
        other: the same of what it is compared with.
        sign: -1 if a lower score is better; positive differences are gains then, too.

    Returns:
        None where they have none in common.
    """
    mine, theirs = (_by_language_and_seed(scores, which) for which in (cell, other))
    differences = sign * (mine - theirs).dropna()
    return None if differences.empty else paired_by_language(differences)


def summary_table(
    scores: pd.DataFrame, cells: Sequence[tuple[str, str]], condition: str, sign: int = 1
) -> pd.DataFrame:
    """One row per cell: the score (mean and deviation over seeds), and how it differs from `full` and from `random`.

    A cell is compared with `full` of the same meta-learning (`full` with meta-learning: with `full` without), and where
    its masks mean something also with `random` of the same meta-learning. ``p_full`` and ``p_random`` are corrected for
    the number of cells in this table (Holm), ``uncorrected_p_full`` and ``uncorrected_p_random`` are not.

    Args:
        scores: of `scores_table`.
        cells: (method, meta), in the order of the rows.
        condition: one of `CONDITIONS`.
        sign: see `compared`.
    """
    scores = scores[scores["condition"] == condition]
    rows: list[dict[str, Any]] = []
    for method, meta in cells:
        by_seed = _by_language_and_seed(scores, (method, meta)).groupby("seed").mean()
        row: dict[str, Any] = {"method": method, "meta": meta, "seeds": len(by_seed)}
        row["score"] = float(by_seed.mean()) if len(by_seed) else np.nan
        row["deviation"] = float(by_seed.std(ddof=1)) if len(by_seed) > 1 else np.nan
        for baseline in ("full", "random"):
            other = baseline_of((method, meta), baseline)
            pointless = other == (method, meta) or (baseline == "random" and method in ("full", "random"))
            found = None if pointless else compared(scores, (method, meta), other, sign)
            row[f"over_{baseline}"] = found.difference if found else np.nan
            row[f"p_{baseline}"] = found.p if found else np.nan
            row[f"wins_{baseline}"] = f"{found.wins}/{len(found.by_language)}" if found else ""
            row[f"seeds_{baseline}"] = found.by_seed if found else ()
        rows.append(row)
    table = pd.DataFrame(rows)
    for baseline in ("full", "random"):
        table[f"uncorrected_p_{baseline}"] = table[f"p_{baseline}"]
        tested = table[f"p_{baseline}"].notna()
        table.loc[tested, f"p_{baseline}"] = holm(table.loc[tested, f"p_{baseline}"].tolist())
    return table


def _by_language_and_seed(scores: pd.DataFrame, cell: tuple[str, str]) -> pd.Series:
    """The score of a cell by (language, seed), mean over support sets."""
    method, meta = cell
    chosen = scores[(scores["method"] == method) & (scores["meta"] == meta)]
    return chosen.groupby(["language", "seed"])["score"].mean()
