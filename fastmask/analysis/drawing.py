"""What the pictures share: colours that colour-blind readers can tell apart, figures without a display, labels.

Categories take the palette of Okabe and Ito (2008) and a marker each; amounts take matplotlib's "cividis", and signed
amounts "PuOr", both made for readers with a colour vision deficiency.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from fastmask.analysis.language_families import families_of, family_colour

__all__ = [
    "AMOUNT", "COLOURS", "GREY", "MARKERS", "ON_LIGHT", "SIGNED", "WRITTEN", "bare", "colour_languages", "heatmap",
    "label_points", "legend_above", "new_figure",
]  # fmt: skip

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
GREY = "#777777"
ON_LIGHT = "#101010"
AMOUNT = "cividis"
SIGNED = "PuOr"

WRITTEN = 14  # rows and columns up to which numbers fit into the cells of a heatmap


def new_figure(width: float, height: float) -> Any:
    """A `matplotlib.figure.Figure` of so many inches, laid out so that texts do not run into each other."""
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06))


def bare(*axes: Any) -> None:
    """Take the frame above and to the right away."""
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)


def legend_above(axis: Any, ncols: int = 2) -> None:
    """A legend that lies on nothing that is drawn."""
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=ncols, fontsize=8, frameon=False)


def colour_languages(axis: Any, families: Mapping[str, str] | None = None) -> None:
    """Give the languages among the names at an axis the colour of their family, everywhere the same one.

    Args:
        axis: of matplotlib, with its names in place.
        families: language -> family; default the table of families.
    """
    for label in [*axis.get_xticklabels(), *axis.get_yticklabels()]:
        (family,) = families_of([label.get_text()], families).values()
        label.set_color(family_colour(family, "#000000"))


def heatmap(
    axis: Any,
    values: Any,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    colours: str = AMOUNT,
    low: float | None = None,
    high: float | None = None,
    numbers: str | None = "{:.2f}",
) -> Any:
    """Draw a matrix with a name at each row and column, languages in the colour of their family; NaN stays empty.

    Args:
        axis: of matplotlib.
        values: [rows, columns].
        rows: names, from the top.
        columns: names, from the left; upright where they would run into each other.
        colours: a colour map of matplotlib.
        low: the value of its first colour; default the smallest.
        high: the value of its last colour; default the largest.
        numbers: how to write the value into each cell, where there are few enough; None: not at all.

    Returns:
        The image, for a colour bar.
    """
    values = np.asarray(values, dtype=float)
    image = axis.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    axis.set_yticks(range(len(rows)), rows)
    wide = max((len(name) for name in columns), default=0)
    axis.set_xticks(range(len(columns)), columns, rotation=90 if len(columns) > WRITTEN or wide > 4 else 0)
    axis.tick_params(length=0)
    colour_languages(axis)
    if numbers is not None and max(values.shape) <= WRITTEN:
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                red, green, blue, _ = image.cmap(image.norm(value))
                colour = ON_LIGHT if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else "white"
                axis.text(column, row, numbers.format(value), ha="center", va="center", fontsize=8, color=colour)
    return image


def label_points(axis: Any, x: Sequence[float], y: Sequence[float], names: Sequence[str]) -> None:
    """Write a name beside each point so that no two names, and no name and point, lie on each other.

    Each name in turn, the most crowded point first, takes the nearest of 16 directions at growing distances that is
    free, with a thin line back to its point. Call it last: limits and layout must be final.
    """
    axis.figure.draw_without_rendering()
    renderer, scale = axis.figure._get_renderer(), axis.figure.dpi / 72
    frame = axis.get_window_extent(renderer)
    points = axis.transData.transform(np.column_stack([x, y]))
    corners = np.hstack([points - 3 * scale, points + 3 * scale])  # x0, y0, x1, y1 of what is taken
    crowd = np.sort(np.linalg.norm(points[:, None] - points[None], axis=2), axis=1)[:, :4].sum(1)
    turns = np.arange(16) * np.pi / 8
    ways = np.column_stack([np.cos(turns), np.sin(turns)])
    for at in np.argsort(crowd, kind="stable"):
        probe = axis.text(0, 0, names[at], fontsize=8)
        extent = probe.get_window_extent(renderer)
        probe.remove()
        half = np.array([extent.width / 2 + 1.5 * scale, extent.height / 2 + scale])
        radii = np.array([5, 9, 14, 20, 28, 38, 50, 65, 85])[:, None, None] * scale
        centres = (points[at] + ways * (radii + np.abs(ways) * half)).reshape(-1, 2)
        boxes = np.hstack([centres - half, centres + half])[:, None]
        shared = np.minimum(boxes, corners)[..., 2:] - np.maximum(boxes, corners)[..., :2]
        cost = shared.clip(0).prod(2).sum(1)
        cost += 1e6 * ((boxes[:, 0, :2] < frame.min) | (boxes[:, 0, 2:] > frame.max)).any(1)
        best = int(cost.argmin())
        corners = np.vstack([corners, boxes[best]])
        line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.5, "shrinkB": 3}
        (family,) = families_of([names[at]]).values()
        axis.annotate(
            names[at],
            (x[at], y[at]),
            xytext=axis.transData.inverted().transform(centres[best]),
            ha="center",
            va="center",
            fontsize=8,
            color=family_colour(family, "#000000"),
            arrowprops=line if best >= 2 * len(ways) else None,
        )
