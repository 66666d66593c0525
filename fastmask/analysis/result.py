"""What every analysis returns: a tidy table, a picture, and a caption that says what was computed on what."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd

from fastmask.training.checkpoints import replace_file

__all__ = ["Result"]


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

    def save(self, folder: str | PathLike[str]) -> list[Path]:
        """Write every table as CSV and the picture as PNG and SVG; returns the paths. Replaces files atomically."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for name, table in {self.name: self.table, **{f"{self.name}_{k}": t for k, t in self.more.items()}}.items():
            written.append(folder / f"{name}.csv")
            replace_file(written[-1], lambda partial, table=table: table.to_csv(partial, index=False))  # type: ignore[misc]
        figure = self.figure()
        for ending in ("png", "svg"):
            written.append(folder / f"{self.name}.{ending}")
            replace_file(written[-1], lambda partial, kind=ending: figure.savefig(partial, dpi=150, format=kind))  # type: ignore[misc]
        return written
