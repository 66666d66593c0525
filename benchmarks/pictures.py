"""The picture of a sweep: speed over our dense against density, one line for each number of languages in a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.row import Row
from fastmask.analysis.drawing import COLOURS, GREY, MARKERS, new_figure

__all__ = ["draw", "lines_of"]


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw what the rows are enough for, as PNG files; returns their paths.

    Raises:
        ValueError: there are nowhere three densities that are else alike.
    """
    groups: dict[object, list[Row]] = {}
    for row in rows:
        if row.implementation == "fastmask" and row.over_full is not None:
            alike = replace(row.setting, density=1.0, languages=1, present=1, batch=1)
            groups.setdefault((alike, row.part), []).append(row)
    drawn = [_drawn(own, folder) for own in groups.values() if lines_of(own)]
    if not drawn:
        raise ValueError("nothing to draw: expected rows of fastmask and full at three densities, else alike")
    return drawn


def lines_of(rows: Sequence[Row]) -> dict[tuple[int, int], list[Row]]:
    """By languages of the batch and examples, the rows of three densities and more, from sparse to dense."""
    found: dict[tuple[int, int], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row.setting.present, row.setting.batch, row.setting.density)):
        found.setdefault((row.setting.present, row.setting.batch), []).append(row)
    return {key: own for key, own in found.items() if len({row.setting.density for row in own}) >= 3}


def _drawn(rows: Sequence[Row], folder: Path) -> Path:
    setting, machine, figure = rows[0].setting, rows[0].machine, new_figure(6.4, 4.4)
    axis = figure.add_subplot()
    for number, ((present, batch), own) in enumerate(lines_of(rows).items()):
        densities = [row.setting.density for row in own]
        if number == 0:
            axis.plot(densities, [row.ideal for row in own], color=GREY, linestyle="--", label="by FLOPs alone")
        label = f"{present} language{'s' * (present > 1)}, {batch} examples"
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        speeds = [row.over_full for row in own if row.over_full is not None]
        axis.plot(densities, [speed.middle for speed in speeds], color=colour, marker=marker, label=label)
        _, lows, highs = zip(*speeds, strict=True)
        axis.fill_between(densities, lows, highs, color=colour, alpha=0.18, linewidth=0)
    axis.axhline(1, color="black", linewidth=1, label="the full network through fastmask")
    axis.set_xlim(0, 1)
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axis.set_xlabel("share of the units that each language owns")
    axis.set_ylabel("speed over our dense")
    unit = {"both": "heads and neurons", "weights": "single weights"}.get(setting.unit, setting.unit)
    what = f"{setting.case} of {setting.shape} width, {unit}, {rows[0].part}, {setting.tokens} tokens an example"
    where = f"{setting.dtype}, {setting.threads} thread(s), {machine.processor}, {machine.date}"
    axis.set_title(f"How much faster a subnetwork is than the full network\n{what}\n{where}", fontsize=9)
    axis.legend(fontsize=8)
    folder.mkdir(parents=True, exist_ok=True)
    kind = "-compiled" if setting.compiled else ""
    name = f"{setting.case}-{setting.shape}-{setting.unit}-{rows[0].part}-{setting.tokens}-{setting.dtype}{kind}"
    figure.savefig(folder / f"{name}.png", dpi=150)
    return folder / f"{name}.png"
