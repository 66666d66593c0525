"""Pictures of a comparison: every cell's mean with its seeds, and each language's gain over `full`."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fastmask.analysis.drawing import new_figure
from fastmask.compare.tables import CONDITIONS
from fastmask.files import replace_file

__all__ = ["draw_gains", "draw_means"]

COLOURS = {"none": "#0072B2", "fomaml": "#D55E00", "reptile": "#009E73"}  # Okabe and Ito: told apart by all eyes
NAMES = {"none": "plain", "fomaml": "FOMAML", "reptile": "Reptile"}


def draw_means(scores: pd.DataFrame, cells: Sequence[tuple[str, str]], name: str, path: str | PathLike[str]) -> None:
    """Mean score over languages of every cell: a dot for each seed, a bar for their mean; one panel per condition."""
    shown = [condition for condition in CONDITIONS if (scores["condition"] == condition).any()]
    methods, metas = (list(dict.fromkeys(cell[part] for cell in cells)) for part in (0, 1))
    figure = new_figure(1.2 + 0.55 * len(methods) * len(shown), 4.2)
    for position, condition in enumerate(shown):
        axis = figure.add_subplot(1, len(shown), position + 1)
        part = scores[scores["condition"] == condition]
        for number, meta in enumerate(metas):
            offset = (number - (len(metas) - 1) / 2) * 0.3
            for place, method in enumerate(methods):
                chosen = part[(part["method"] == method) & (part["meta"] == meta)]
                by_seed = chosen.groupby(["seed", "language"])["score"].mean().groupby("seed").mean()
                if by_seed.empty:
                    continue
                x = place + offset
                axis.plot([x] * len(by_seed), by_seed, "o", color=COLOURS[meta], markersize=4, alpha=0.7)
                label = NAMES[meta] if place == 0 else None
                axis.plot([x - 0.13, x + 0.13], [by_seed.mean()] * 2, color=COLOURS[meta], linewidth=2.5, label=label)
        axis.set_xticks(range(len(methods)), methods, rotation=40, ha="right")
        axis.set_title(condition)
        axis.grid(axis="y", alpha=0.3)
        if position == 0:
            axis.set_ylabel(f"{name}, mean over languages")
            if len(metas) > 1:
                axis.legend(frameon=False)
    _save(figure, path)


def draw_gains(
    scores: pd.DataFrame, cells: Sequence[tuple[str, str]], condition: str, name: str, path: str | PathLike[str]
) -> None:
    """Score of every cell less that of plain `full`, by language; mean over seeds and support sets."""
    part = scores[scores["condition"] == condition]
    means = part.groupby(["method", "meta", "language"])["score"].mean()
    languages = list(dict.fromkeys(part["language"]))
    rows = [cell for cell in cells if cell != ("full", "none")]
    gains = np.full((len(rows), len(languages)), np.nan)
    for row, (method, meta) in enumerate(rows):
        for column, language in enumerate(languages):
            keys = (method, meta, language), ("full", "none", language)
            if all(key in means.index for key in keys):
                gains[row, column] = means[keys[0]] - means[keys[1]]
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
    axis.set_yticks(range(len(rows)), [m if meta == "none" else f"{m} + {NAMES[meta]}" for m, meta in rows])
    axis.set_title(f"{name} over plain full, {condition}")
    figure.colorbar(image, ax=axis, label=f"{name} points")
    _save(figure, path)


def _save(figure: Any, path: str | PathLike[str]) -> None:
    target = Path(path)

    def write(partial: Path) -> Any:
        figure.savefig(partial, dpi=150, format=target.suffix.lstrip(".") or "png")

    replace_file(target, write, follow=False)
