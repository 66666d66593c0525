"""The tables of a comparison: one row per score, one per cell, the summary of each condition, and what was decided.

Every test is that of `statistics.paired`: an arm's scores of a language are averaged over support sets first, and a
difference must hold over languages and over seeds. p-values are corrected (Holm) over all tests of the page that they
stand on; hypotheses that the plan names are a family of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from fastmask.analysis.statistics import SURE, holm, paired
from fastmask.compare.plan import BASELINES, CONDITIONS, Plan

COLUMNS = (
    "seed", "arm", "language", "condition", "choice", "subnetwork", "support_set", "steps", "score", "words",
)  # fmt: skip
"""Of a row of scores, beside the task's own scores; see `fastmask.compare.scoring.Scorer.scores`."""

AGREEMENT = {"draws": "of_draws", "languages": "of_languages", "chance": "by_chance"}
"""Of masks, mean Jaccard similarities (`fastmask.discovery.Stability`): the ends of the names of their columns."""

Results = Mapping[tuple[int, str], Mapping[str, Any]]
"""(seed, arm) -> what the cell's ``result.json`` holds."""


def scores_table(results: Results) -> pd.DataFrame:
    """One row per score: seed, arm, and what `Scorer.scores` says of it, each of its "scores" as a column."""
    rows = [
        {"seed": seed, "arm": arm}
        | {name: value for name, value in score.items() if name != "scores"}
        | score.get("scores", {})
        for (seed, arm), result in results.items()
        for score in result["scores"]
    ]
    return pd.DataFrame(rows)


def cells_table(results: Results) -> pd.DataFrame:
    """One row per cell: its day, budget, time and speed, and how much the masks agree that it started from."""
    rows = [
        {"seed": seed, "arm": arm}
        | {name: value for name, value in result.items() if name not in ("scores", "density", "agreement")}
        | {f"live_{kind}": share for kind, share in (result["density"] or {}).items()}
        | {
            f"{kind}_{AGREEMENT[what]}": value
            for kind, agreement in result.get("agreement", {}).items()
            for what, value in agreement.items()
            if value is not None
        }
        for (seed, arm), result in results.items()
    ]
    return pd.DataFrame(rows)


def by_language_and_seed(scores: pd.DataFrame, arm: str) -> pd.Series:
    """The score of an arm by (language, seed), mean over support sets."""
    return scores[scores["arm"] == arm].groupby(["language", "seed"])["score"].mean()


NOT_COMPARED: dict[str, Any] = {
    **dict.fromkeys(("difference", "low", "high", "p_languages", "p_seeds", "p_crossed", "p"), np.nan),
    **dict.fromkeys(("languages", "languages_better", "seeds", "seeds_agree"), 0),
}
"""What `compared` returns where there is nothing in common."""


def compared(scores: pd.DataFrame, arm: str, other: str, sign: int = 1, more_than: float = 0.0) -> dict[str, Any]:
    """`arm` against `other`, as `statistics.paired`, over the languages and seeds that both have.

    `scores` are rows of one condition. `sign` is -1 if a lower score is better: positive differences are gains then,
    too. What is tested, and counted, is whether they are more than `more_than`.
    """
    differences = sign * (by_language_and_seed(scores, arm) - by_language_and_seed(scores, other)).dropna()
    if differences.empty:
        return NOT_COMPARED
    found = paired(differences - more_than)
    return {**found, **{name: found[name] + more_than for name in ("difference", "low", "high")}}


def summary_table(plan: Plan, scores: pd.DataFrame) -> pd.DataFrame:
    """One row per condition and arm: the score (mean and deviation over seeds), and how it differs from `BASELINES`.

    Of each ``over_full``, its interval, its p-values, and ``p_full``, corrected over all tests of the table.
    """
    sign = 1 if plan.task.higher_is_better else -1
    rows: list[dict[str, Any]] = []
    for condition in CONDITIONS:
        of_condition = scores[scores["condition"] == condition]
        if of_condition.empty:
            continue
        for arm in plan.arms:
            by_seed = by_language_and_seed(of_condition, arm).groupby("seed").mean()
            row: dict[str, Any] = {"condition": condition, "arm": arm, "seeds": len(by_seed)}
            row["score"] = float(by_seed.mean()) if len(by_seed) else np.nan
            row["deviation"] = float(by_seed.std(ddof=1)) if len(by_seed) > 1 else np.nan
            for baseline, of_arms in plan.baselines.items():
                found = compared(of_condition, arm, of_arms[arm], sign) if arm in of_arms else NOT_COMPARED
                values = {"over": found["difference"], "uncorrected_p": found["p"]}
                values |= {name: found[name] for name in ("low", "high", "p_languages", "p_seeds")}
                values["wins"] = f"{found['languages_better']}/{found['languages']}" if found["languages"] else ""
                row |= {f"{name}_{baseline}": value for name, value in values.items()}
            rows.append(row)
    table = pd.DataFrame(rows)
    tests = [f"uncorrected_p_{baseline}" for baseline in BASELINES]
    corrected = np.reshape(holm(table[tests].to_numpy().T.ravel()), (len(BASELINES), -1))
    return table.assign(**{f"p_{baseline}": corrected[number] for number, baseline in enumerate(BASELINES)})


def decisions(plan: Plan, scores: pd.DataFrame) -> pd.DataFrame:
    """One row for each hypothesis of the plan: the difference, its interval, its p-values, and what they say.

    ``p`` is the larger of the p-values over languages and over seeds, corrected over the hypotheses. A hypothesis
    "holds" where p <= 0.05 and the difference is on its side, "does not hold" where it is on the other, and is "open"
    else; a difference whose whole interval lies within the plan's `zone` around 0 means nothing, however sure it is
    (with a single seed there is no p-value, and no such interval).
    """
    sign = 1 if plan.task.higher_is_better else -1
    rows: list[dict[str, Any]] = []
    for name, wanted in plan.hypotheses.items():
        of_condition = scores[scores["condition"] == wanted.condition]
        if wanted.languages:
            of_condition = of_condition[of_condition["language"].isin(wanted.languages)]
        found = compared(of_condition, wanted.arm, wanted.over, sign, wanted.more_than)
        rows.append({"hypothesis": name, **wanted.model_dump(exclude={"languages"}), "only": wanted.languages, **found})
    table = pd.DataFrame(rows).rename(columns={"p": "uncorrected_p"})
    if len(table):
        # One that is not measured yet counts as a test: a p-value must not grow when the rest of the plan is done.
        unknown = table["uncorrected_p"].isna()
        table["p"] = np.where(unknown, np.nan, holm(table["uncorrected_p"].fillna(1.0).tolist()))
        table["verdict"] = [_verdict(row, plan.zone) for row in table.itertuples()]
    return table


def _verdict(row: Any, zone: float) -> str:
    if np.isnan(row.difference):
        return "not measured"
    if not np.isnan(row.p) and zone and row.more_than == 0 and -zone <= row.low and row.high <= zone:
        return f"no difference that matters (within ±{zone:g})"
    if not row.p <= SURE:
        return "open"
    return "holds" if row.difference > row.more_than else "does not hold"
