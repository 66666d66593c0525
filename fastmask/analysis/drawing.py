"""What the pictures share: colours that colour-blind readers can tell apart, figures without a display, labels.

Categories take the palette of Okabe and Ito (2008) and a marker each; amounts take matplotlib's "cividis", and signed
amounts "PuOr", both made for readers with a colour vision deficiency.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.text import Text

__all__ = ["AMOUNT", "COLOURS", "GREY", "MARKERS", "SIGNED", "WRITTEN", "heatmap", "label_points", "new_figure"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
GREY = "#777777"
AMOUNT = "cividis"
SIGNED = "PuOr"

WRITTEN = 14  # rows and columns up to which numbers fit into the cells of a heatmap


class LiteralFigure(Figure):
    """A figure whose texts are drawn as they are: names are other people's, and a `$` in them is no mathematics."""

    def draw(self, renderer: Any) -> None:
        """Draw; matplotlib calls it, also to lay the texts out."""
        for text in self.findobj(Text):
            text.set_parse_math(False)
        super().draw(renderer)


def new_figure(width: float, height: float) -> Any:
    """A `matplotlib.figure.Figure` of so many inches, laid out so that texts do not run into each other."""
    return LiteralFigure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06))


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
    """Draw a matrix with a name at each row and column; NaN stays white.

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
    axis.set_xticks(np.arange(len(columns) - 1) + 0.5, minor=True)
    axis.set_yticks(np.arange(len(rows) - 1) + 0.5, minor=True)
    axis.grid(which="minor", color="white", linewidth=0.6)
    axis.tick_params(which="minor", length=0)
    if numbers is not None and max(values.shape) <= WRITTEN:
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                red, green, blue, _ = image.cmap(image.norm(value))
                light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.55
                text = numbers.format(value)
                axis.text(column, row, text, ha="center", va="center", fontsize=8, color="black" if light else "white")
    return image


def label_points(axis: Any, x: Sequence[float], y: Sequence[float], names: Sequence[str], size: float = 8) -> None:
    """Write a name beside each point so that no two names, and no name and point, lie on each other.

    Each name in turn, the most crowded point first, takes the nearest of 16 directions at growing distances that is
    free, with a thin line back to its point where it had to go far. Call it last: limits and layout must be final.
    """
    from matplotlib.patheffects import withStroke

    figure = axis.figure
    figure.draw_without_rendering()
    renderer = figure._get_renderer()
    points = axis.transData.transform(np.column_stack([x, y])) if len(names) else np.zeros((0, 2))
    scale = figure.dpi / 72
    inside = axis.get_window_extent(renderer)
    taken = [(px - 3 * scale, py - 3 * scale, px + 3 * scale, py + 3 * scale) for px, py in points]
    crowd = np.sqrt(((points[:, None] - points[None]) ** 2).sum(2)) if len(points) else np.zeros((0, 0))
    for at in np.argsort(np.sort(crowd, axis=1)[:, :4].sum(1), kind="stable"):
        probe = axis.text(0, 0, names[at], fontsize=size, parse_math=False)
        extent = probe.get_window_extent(renderer)
        probe.remove()
        half = np.array([extent.width / 2 + 1.5 * scale, extent.height / 2 + 1 * scale])
        best, best_cost = points[at] + half, np.inf
        for radius in np.array([5, 9, 14, 20, 28, 38, 50, 65, 85]) * scale:
            for angle in np.arange(16) * np.pi / 8:
                way = np.array([np.cos(angle), np.sin(angle)])
                centre = points[at] + way * (radius + np.abs(way) * half)
                box = (*(centre - half), *(centre + half))
                cost = sum(_shared_area(box, other) for other in taken)
                cost += 1e6 * (not _within(box, (inside.x0, inside.y0, inside.x1, inside.y1)))
                if cost < best_cost:
                    best, best_cost = centre, cost
            if best_cost == 0:
                break
        taken.append((*(best - half), *(best + half)))
        far = np.hypot(*(best - points[at])) > np.hypot(*half) + 8 * scale
        axis.annotate(
            names[at],
            (x[at], y[at]),
            xytext=axis.transData.inverted().transform(best),
            textcoords="data",
            ha="center",
            va="center",
            fontsize=size,
            path_effects=[withStroke(linewidth=2, foreground="white")],  # error bars may pass below
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.5, "shrinkB": 3} if far else None,
        )


def _shared_area(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Area that two boxes (x0, y0, x1, y1) have in common."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _within(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] >= b[0] and a[1] >= b[1] and a[2] <= b[2] and a[3] <= b[3]
