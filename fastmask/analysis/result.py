"""What every analysis returns: a tidy table, a picture, and a caption that says what was computed on what."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd

from fastmask.files import replace_file

__all__ = ["FORMATS", "Result"]

FORMATS = ("png", "svg")


@dataclass(frozen=True)
class Result:
    """One analysis.

    Attributes:
        name: of the analysis; files are named after it.
        table: one row for each thing that was measured.
        caption: what was computed, on what, with which n, and against which control.
        more: further tables by name, such as sums over the first one.
        draw: makes the picture, a new `matplotlib.figure.Figure`.
    """

    name: str
    table: pd.DataFrame
    caption: str
    draw: Callable[[], Any] = field(repr=False)
    more: Mapping[str, pd.DataFrame] = field(default_factory=dict)

    def figure(self) -> Any:
        """A new `matplotlib.figure.Figure`, which needs no display and touches no global state of matplotlib."""
        return self.draw()

    def pictures(self) -> dict[str, bytes]:
        """The picture as the content of a PNG and of an SVG file; the same numbers make the same bytes."""
        from matplotlib import rc_context

        figure, found = self.figure(), {}
        with rc_context({"svg.hashsalt": self.name}):  # names inside an SVG are random otherwise
            for kind in FORMATS:
                content = BytesIO()
                figure.savefig(content, dpi=150, format=kind, metadata={"Date": None} if kind == "svg" else None)
                found[kind] = content.getvalue()
        return found

    def tables(self) -> dict[str, pd.DataFrame]:
        """All tables by the names that their files have: the analysis's own, then the further ones."""
        return {self.name: self.table, **{f"{self.name}_{key}": table for key, table in self.more.items()}}

    def save(self, folder: str | PathLike[str]) -> list[Path]:
        """Write every table as CSV and the picture as PNG and SVG; returns the paths. Replaces files atomically.

        CSV files hold names as they are, to be read again; a spreadsheet takes one starting with ``=`` for a formula.
        """
        folder, written = Path(folder), []
        for name, table in self.tables().items():
            written.append(folder / f"{name}.csv")
            replace_file(written[-1], lambda partial, table=table: table.to_csv(partial, index=False))  # type: ignore[misc]
        for kind, content in self.pictures().items():
            written.append(folder / f"{self.name}.{kind}")
            replace_file(written[-1], lambda partial, content=content: partial.write_bytes(content))  # type: ignore[misc]
        return written
