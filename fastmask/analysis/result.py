"""What every analysis returns: a tidy table, a picture, and a caption that says what was computed on what."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from operator import methodcaller
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib import rc_context

from fastmask.errors import unknown
from fastmask.files import StrPath, replace_file

# Letters stay letters in an SVG, so that it is small and can be searched; the fonts are equally wide.
SVG = {"svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans", "Verdana"]}


@dataclass(frozen=True)
class Result:
    """One analysis.

    Attributes:
        name: of the analysis; files are named after it.
        table: one row for each thing that was measured.
        caption: what was computed, on what, with which n, against which control, and what to conclude.
        draw: makes the picture, a new `matplotlib.figure.Figure`; takes the extent where there is one.
        more: further tables by name, such as sums over the first one.
        extent: the largest absolute value on the picture's scale; NaN where the scale is always the same.
    """

    name: str
    table: pd.DataFrame
    caption: str
    draw: Callable[..., Any] = field(repr=False)
    more: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    extent: float = math.nan

    def figure(self, extent: float | None = None) -> Any:
        """A new `matplotlib.figure.Figure`, which needs no display and touches no global state of matplotlib.

        Args:
            extent: another one than the result's own, for equal scales side by side.
        """
        if math.isnan(self.extent):
            return self.draw()
        return self.draw(self.extent if extent is None else extent)

    def pictures(self, extent: float | None = None) -> dict[str, bytes]:
        """The picture as a PNG and as an SVG file without background; the same numbers make the same bytes."""
        figure, png, svg = self.figure(extent), BytesIO(), BytesIO()
        figure.savefig(png, dpi=150, format="png")
        with rc_context({**SVG, "svg.hashsalt": self.name}):  # names inside an SVG are random otherwise
            figure.savefig(svg, dpi=100, format="svg", metadata={"Date": None}, transparent=True)
        return {"png": png.getvalue(), "svg": svg.getvalue()}

    def tables(self) -> dict[str, pd.DataFrame]:
        """All tables by the names that their files have: the analysis's own, then the further ones."""
        return {self.name: self.table, **{f"{self.name}_{key}": table for key, table in self.more.items()}}

    def files(self, pictures: Mapping[str, bytes]) -> dict[str, bytes]:
        """The names and contents of its files: every table as CSV, and the pictures."""
        contents = {f"{name}.csv": table.to_csv(index=False).encode() for name, table in self.tables().items()}
        return contents | {f"{self.name}.{kind}": content for kind, content in pictures.items()}

    def save(self, folder: StrPath) -> list[Path]:
        """Write every table as CSV and the picture as PNG and SVG; returns the paths. Replaces files atomically.

        CSV files hold names as they are, to be read again; a spreadsheet takes one starting with ``=`` for a formula.
        """
        return write_files(Path(folder), self.files(self.pictures()))


def write_files(folder: Path, contents: Mapping[str, bytes]) -> list[Path]:
    """Write files by name, each replaced at once; returns the paths."""
    for name, content in contents.items():
        replace_file(folder / name, methodcaller("write_bytes", content))
    return [folder / name for name in contents]


def kind_of(masks: Any, units: str | None, kinds: Sequence[str] = ("heads", "neurons")) -> str:
    """Which of `kinds` is looked at: `units`, by default the first that `masks` have; KeyError if they do not."""
    known = [kind for kind in kinds if getattr(masks, kind) is not None]
    units = units or next(iter(known), kinds[0])
    if units not in known:
        raise unknown("masked part", units, known)
    return units


def span(counts: Iterable[int]) -> str:
    """The least and the largest of some counts: "64" or "60-64"."""
    least, largest = min(known := list(counts)), max(known)
    return f"{least}" if least == largest else f"{least}-{largest}"
