"""Pictures of rows: speed against density, break-even maps, memory, and growth with languages, tokens and width.

Each row goes into every picture that its run has the points for: a run over densities gives curves, one over densities
and languages (or tokens) a map as well. Colours and markers are those of the analyses.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.row import Row, setting_of
from benchmarks.setting import SHAPES
from fastmask.analysis.drawing import COLOURS, GREY, MARKERS, SIGNED, new_figure

__all__ = ["draw"]

# The colour of an implementation is the same in all pictures.
_ORDER = ("fastmask", "full", "multiply", "loop", "stack", "gating", "compact", "grouped", "dense", "bsr")
_LABELS = {
    "density": "share of the units that a language owns",
    "present": "languages of the batch",
    "languages": "languages that masks are held for",
    "tokens": "tokens of an example",
    "shape": "width of the model",
}
LANGUAGES = (("present", {"present", "batch", "languages"}), ("languages", {"languages"}))  # what varies with them
_OF_SETTING = ("case", "shape", "layers", "unit", "density", "languages", "present", "batch", "tokens", "dtype")


def draw(rows: Sequence[Row], folder: str | Path) -> list[Path]:
    """Draw what the rows are enough for, as PNG files; returns their paths.

    Raises:
        ValueError: nothing varies in these rows, so that there is nothing to draw.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    drawn: list[Path] = []

    def save(figure: Any, name: str) -> None:
        path = target / (re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-") + ".png")
        figure.savefig(path, dpi=150)
        drawn.append(path)

    for group in _groups(rows, {"density"}):
        if _varies(group, "density", 3):
            save(_speed_over_density(group), f"density {_name(group, 'density')}")
            if any(row.saved_mib or row.peak_mib for row in group):
                save(_memory(group), f"memory {_name(group, 'density')}")
    for axis, tied in (LANGUAGES[0], ("tokens", {"tokens"})):
        for group in _groups(rows, {"density", *tied}):
            if _varies(group, "density", 2) and _varies(group, axis, 2):
                save(
                    _break_even(_one_of_each(group, axis, "density"), axis),
                    f"break-even {axis} {_name(group, 'density', *tied)}",
                )
    for axis, tied in (*LANGUAGES, ("tokens", {"tokens"}), ("shape", {"shape"})):
        for group in _groups(rows, tied):
            if _varies(group, axis, 3):
                save(_growth(_one_of_each(group, axis), axis), f"growth {axis} {_name(group, *tied)}")
    if not drawn:
        raise ValueError(
            "nothing to draw: expected rows at three densities, or three numbers of languages or tokens, else alike"
        )
    return drawn


def _one_of_each(group: Sequence[Row], *over: str) -> list[Row]:
    """The rows of the smallest batch and fewest masks where several differ in nothing else that is drawn."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in sorted(group, key=lambda row: (row.batch, row.languages)):
        found.setdefault((row.implementation, *(_value(row, name) for name in over)), row)
    return list(found.values())


# ---- the pictures


def _speed_over_density(group: Sequence[Row]) -> Any:
    """One curve for each implementation, quartiles as a band, and the line that FLOPs alone would give."""
    figure = new_figure(6.4, 4.4)
    axis = figure.add_subplot()
    ideal = sorted({(row.density, row.ideal) for row in group if row.implementation == "fastmask" and row.ideal})
    axis.plot(*zip(*ideal, strict=True), color=GREY, linestyle="--", label="ideal: by FLOPs alone")
    axis.axhline(1, color="black", linewidth=1, label=f"{group[0].baseline} = 1")
    _curves(axis, group, "density", lambda row: (row.ratio, row.ratio_low, row.ratio_high), without_baseline=True)
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter(_plain)
    axis.set_xlim(1.02, 0)
    axis.set_xlabel(_LABELS["density"])
    axis.set_ylabel(f"throughput, {group[0].baseline} = 1")
    axis.set_title(_title(group, "density"), fontsize=9)
    axis.legend(fontsize=8)
    return figure


def _memory(group: Sequence[Row]) -> Any:
    """Bytes over density: what is kept for the backward pass, and the most at once."""
    kinds = [("saved_mib", "kept for the backward pass, MiB"), ("peak_mib", "most at once, MiB")]
    kinds = [(name, label) for name, label in kinds if any(getattr(row, name) for row in group)]
    figure = new_figure(5.2 * len(kinds) + 0.8, 4.2)
    for number, (name, label) in enumerate(kinds, 1):
        axis = figure.add_subplot(1, len(kinds), number)
        counted = [row for row in group if getattr(row, name) is not None]
        _curves(axis, counted, "density", lambda row, name=name: (getattr(row, name),) * 3)  # type: ignore[misc]
        axis.set_xlim(1.02, 0)
        axis.set_ylim(bottom=0)
        axis.set_xlabel(_LABELS["density"])
        axis.set_ylabel(label)
        axis.legend(fontsize=8)
    figure.suptitle(_title(group, "density"), fontsize=9)
    return figure


def _break_even(group: Sequence[Row], over: str) -> Any:
    """Our speed over the baseline's for each density and each value of `over`; the line is where it begins to pay."""
    ours = {(getattr(row, over), row.density): row.ratio for row in group if row.implementation == "fastmask"}
    xs, ys = (sorted({key[i] for key in ours}) for i in (1, 0))
    xs = xs[::-1]
    values = np.array([[ours.get((y, x), np.nan) for x in xs] for y in ys])
    reach = max(0.1, float(np.nanmax(np.abs(np.log2(values)))))
    figure = new_figure(max(5.0, 1.6 + 0.75 * len(xs)), 1.9 + 0.5 * len(ys))  # a title needs the width
    axis = figure.add_subplot()
    image = axis.imshow(
        np.log2(values), cmap=f"{SIGNED}_r", vmin=-reach, vmax=reach, aspect="auto", origin="lower",
        interpolation="nearest",
    )  # fmt: skip
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            strong = abs(np.log2(value)) > 0.7 * reach
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color="w" if strong else "k")
    if len(xs) > 1 and len(ys) > 1 and np.nanmin(values) < 1 < np.nanmax(values):
        axis.contour(np.log2(values), levels=[0.0], colors="black", linewidths=2)
    axis.set_xticks(range(len(xs)), [f"{x:g}" for x in xs])
    axis.set_yticks(range(len(ys)), [f"{y:g}" for y in ys])
    axis.set_xlabel(_LABELS["density"])
    axis.set_ylabel(_LABELS[over])
    bar = figure.colorbar(image, ax=axis)
    bar.ax.yaxis.set_major_formatter(lambda power, _: f"{2**power:.2g}x")
    bar.set_label(f"speed, {group[0].baseline} = 1")
    axis.set_title(_title(group, "density", over) + "\nblack line: break-even", fontsize=9)
    return figure


def _growth(group: Sequence[Row], over: str) -> Any:
    """Time relative to the baseline, and bytes of the masks, against a number of languages."""
    with_masks = any(row.masks_mib for row in group)
    figure = new_figure(10.4 if with_masks else 6.0, 4.2)
    axis = figure.add_subplot(1, 2 if with_masks else 1, 1)
    axis.axhline(1, color="black", linewidth=1, label=f"{group[0].baseline} = 1")
    inverse: Callable[[Row], tuple[float, float, float]] = lambda row: (  # noqa: E731
        1 / row.ratio, 1 / row.ratio_high, 1 / row.ratio_low,
    )  # fmt: skip
    _curves(axis, group, over, inverse, without_baseline=True)
    axis.set_ylabel(f"time, {group[0].baseline} at the same size = 1")
    axis.set_ylim(bottom=0)
    axes = [axis]
    if with_masks:
        masks = figure.add_subplot(1, 2, 2)
        _curves(masks, [row for row in group if row.implementation == "fastmask"], over, lambda r: (r.masks_mib,) * 3)
        masks.set_ylabel("masks of all languages, MiB")
        masks.set_yscale("log")
        masks.yaxis.set_major_formatter(lambda mib, _: f"{mib:g}")
        axes.append(masks)
    for each in axes:
        each.set_xscale("log")
        values = sorted({_value(row, over) for row in group})
        each.set_xticks(values, [f"{value:g}" for value in values], minor=False)
        each.minorticks_off()
        each.set_xlabel(_LABELS[over])
        each.legend(fontsize=8)
    figure.suptitle(_title(group, over), fontsize=9)
    return figure


def _curves(
    axis: Any,
    group: Sequence[Row],
    over: str,
    values: Callable[[Row], tuple[Any, Any, Any]],
    without_baseline: bool = False,
) -> None:
    """A curve of (median, low, high) for each implementation."""
    names = sorted({row.implementation for row in group}, key=_rank)
    for name in names:
        own = sorted((row for row in group if row.implementation == name), key=lambda row: _value(row, over))
        if without_baseline and own[0].implementation == own[0].baseline:
            continue
        xs = [_value(row, over) for row in own]
        middle, low, high = zip(*(values(row) for row in own), strict=True)
        number = _rank(name)[0] % len(COLOURS)
        colour, marker = COLOURS[number], MARKERS[number]
        axis.plot(
            xs, middle, color=colour, marker=marker, markersize=4.5, label=name, linewidth=2 if number == 0 else 1.3
        )
        axis.fill_between(xs, low, high, color=colour, alpha=0.18, linewidth=0)


def _value(row: Row, over: str) -> float:
    """Where a row lies on an axis; of a shape its width."""
    return SHAPES[row.shape].hidden if over == "shape" else getattr(row, over)


def _rank(name: str) -> tuple[int, str]:
    return (_ORDER.index(name) if name in _ORDER else len(_ORDER), name)


# ---- groups


def _groups(rows: Sequence[Row], free: set[str]) -> list[list[Row]]:
    """Rows that are alike but for implementation and the fields in `free`."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        rest = {name: value for name, value in vars(setting_of(row)).items() if name not in free}
        found.setdefault((row.part, *rest.values()), []).append(row)
    return [group for group in found.values() if any(row.implementation == "fastmask" for row in group)]


def _varies(group: Sequence[Row], name: str, least: int) -> bool:
    return len({getattr(row, name) for row in group}) >= least


def _title(group: Sequence[Row], *varied: str) -> str:
    row = group[0]
    alike = [name for name in _OF_SETTING if name not in varied and not _varies(group, name, 2)]
    words = [str(getattr(row, name)) if name in _WORDS else f"{name} {getattr(row, name):g}" for name in alike]
    extra = ["compiled"] if row.compiled else []
    where = f"{row.processor}, {row.threads} thread{'s' * (row.threads > 1)}, {row.date}"
    return "\n".join([*textwrap.wrap(", ".join([*words, row.part, *extra]), 72), where])


_WORDS = ("case", "shape", "unit", "dtype")


def _name(group: Sequence[Row], *varied: str) -> str:
    row = group[0]
    alike = [name for name in _OF_SETTING if name not in varied and not _varies(group, name, 2)]
    words = [str(getattr(row, name)) if name in _WORDS else f"{name[0]}{getattr(row, name):g}" for name in alike]
    return "-".join([*words, row.part, f"{row.threads}t", *(["compiled"] if row.compiled else [])])


def _plain(value: float, _: int) -> str:
    return f"{value:g}x"
