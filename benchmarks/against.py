"""`--compare`: the same measurements in a stored run and in a new one, and what has changed beyond noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from benchmarks.row import Row, setting_of
from fastmask.terminal import LiteralConsole

__all__ = ["Change", "changes", "print_changes"]

LEAST = 0.03  # a change of the median by less says nothing


@dataclass(frozen=True)
class Change:
    """One measurement, before and now; one of the two is None where only the other run has it."""

    before: Row | None
    now: Row | None

    @property
    def verdict(self) -> str:
        """What has become of it: a regression or an improvement where the ratios' quartiles do not overlap, else ""."""
        if self.now is None:
            return "missing"
        if self.before is None:
            return "new"
        old, new = self.before, self.now
        if new.ratio_high < old.ratio_low and new.ratio < old.ratio * (1 - LEAST):
            return "regression"
        if new.ratio_low > old.ratio_high and new.ratio > old.ratio * (1 + LEAST):
            return "improvement"
        return ""


def changes(before: Sequence[Row], now: Sequence[Row]) -> list[Change]:
    """Pair the rows of two runs by case, part, implementation and setting; baselines, whose ratio is 1, are left out.

    Only ratios are compared: times of two runs are of two states of the machine. Of a measurement that a run has
    twice, the last counts.
    """
    old, new = ({row.key(): row for row in rows if row.implementation != row.baseline} for rows in (before, now))
    return [Change(old.get(key), new.get(key)) for key in {**new, **old}]


def print_changes(found: Sequence[Change], path: str | Path) -> bool:
    """Print what changed; true if nothing has become slower."""
    table = Table(title=f"against {path}", title_justify="left", width=150)
    for name in ("what", "before", "now", ""):
        table.add_column(name, justify="left" if name in ("what", "") else "right")
    for change in found:
        row = change.now or change.before
        if not change.verdict or row is None:
            continue
        what = f"{setting_of(row).words()}, {row.part}, {row.implementation}"
        table.add_row(what, _ratio(change.before), _ratio(change.now), change.verdict)
    both = [change for change in found if change.before is not None and change.now is not None]
    quiet = sum(not change.verdict for change in both)
    console = LiteralConsole(width=150)
    if table.row_count:
        console.print(table)
    console.print(f"{len(both)} measurements in both runs, {quiet} of them unchanged within noise", highlight=False)
    return all(change.verdict != "regression" for change in found)


def _ratio(row: Row | None) -> str:
    return "" if row is None else f"{row.ratio:.3f}x ({row.ratio_low:.2f}-{row.ratio_high:.2f})"
