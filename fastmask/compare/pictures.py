"""Pictures of a comparison: every arm's mean with its seeds, and each language's gain over `full`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fastmask.analysis.drawing import new_figure
from fastmask.compare.plan import Plan
from fastmask.compare.tables import by_language_and_seed, conditions_in
from fastmask.files import replace_file

__all__ = ["draw_gains", "draw_means"]

COLOURS = {"none": "#0072B2", "fomaml": "#D55E00", "reptile": "#009E73"}  # Okabe and Ito: told apart by all eyes
NAMES = {"none": "plain", "fomaml": "FOMAML", "reptile": "Reptile"}


def draw_means(plan: Plan, scores: pd.DataFrame, name: str, path: Path) -> None:
    """Mean score over languages of every arm: a dot for each seed, a bar for their mean; one panel per condition."""
    shown = conditions_in(scores)
    metas = {arm: config.meta for arm, config in plan.configs.items()}
    figure = new_figure(1.2 + 0.42 * len(plan.arms) * len(shown), 4.2)
    for position, condition in enumerate(shown):
        axis = figure.add_subplot(1, len(shown), position + 1)
        part = scores[scores["condition"] == condition]
        named: set[str] = set()
        for x, arm in enumerate(plan.arms):
            by_seed = by_language_and_seed(part, arm).groupby("seed").mean()
            if by_seed.empty:
                continue
            colour, label = COLOURS[metas[arm]], None if metas[arm] in named else NAMES[metas[arm]]
            named.add(metas[arm])
            axis.plot([x] * len(by_seed), by_seed, "o", color=colour, markersize=4, alpha=0.7)
            axis.plot([x - 0.25, x + 0.25], [by_seed.mean()] * 2, color=colour, linewidth=2.5, label=label)
        axis.set_xticks(range(len(plan.arms)), list(plan.arms), rotation=40, ha="right")
        axis.set_title(condition)
        axis.grid(axis="y", alpha=0.3)
        if position == 0:
            axis.set_ylabel(f"{name}, mean over languages")
            if len(set(metas.values())) > 1:
                axis.legend(frameon=False)
    _save(figure, path)


def draw_gains(plan: Plan, scores: pd.DataFrame, baseline: str, condition: str, name: str, path: Path) -> None:
    """Score of every arm minus that of the arm `baseline`, by language; mean over seeds and support sets."""
    part = scores[scores["condition"] == condition]
    means = part.groupby(["arm", "language"])["score"].mean().unstack("language")
    languages = list(dict.fromkeys(part["language"]))
    rows = [arm for arm in plan.arms if arm != baseline]
    gains = (means - means.loc[baseline]).reindex(rows)[languages].to_numpy()
    figure = new_figure(2.6 + 0.55 * len(languages), 1.6 + 0.34 * len(rows))
    axis = figure.add_subplot()
    limit = max(1.0, float(np.nanmax(np.abs(gains)))) if np.isfinite(gains).any() else 1.0
    image = axis.imshow(gains, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto")
    for (row, column), value in np.ndenumerate(gains):
        if np.isfinite(value):
            dark = abs(value) > 0.65 * limit
            colour = "white" if dark else "black"
            axis.text(column, row, f"{value:+.1f}", ha="center", va="center", fontsize=8, color=colour)
    axis.set_xticks(range(len(languages)), languages)
    axis.set_yticks(range(len(rows)), rows)
    axis.set_title(f"{name} over {baseline}, {condition}")
    figure.colorbar(image, ax=axis, label=f"{name} points")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    replace_file(path, lambda partial: figure.savefig(partial, dpi=150, format="png"))
