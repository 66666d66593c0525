"""`--compare`: the same measurements in a stored run and in a new one, and what has changed beyond noise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.row import Row
from benchmarks.tables import aligned
from fastmask.literal import say

__all__ = ["print_changes", "verdict"]

LEAST = 0.03  # a change of the median by less says nothing


def verdict(before: Row | None, now: Row | None) -> str:
    """What has become of a measurement: slower or faster only where the spreads of the two runs do not overlap.

    Only speeds over dense are compared: times of two runs are of two states of the machine.
    """
    if before is None or now is None or before.over_dense is None or now.over_dense is None:
        return "new" if before is None else "missing"
    (old_low, old_high), (low, high) = before.over_dense.bounds, now.over_dense.bounds
    ratio = now.over_dense.middle / before.over_dense.middle
    if high < old_low and ratio < 1 - LEAST:
        return "slower"
    return "faster" if low > old_high and ratio > 1 + LEAST else ""


def print_changes(before: Sequence[Row], now: Sequence[Row], path: str | Path) -> bool:
    """Print what changed; true if nothing has become slower. Of a measurement that a run has twice, the last counts."""
    old, new = (
        {row.key: row for row in rows if row.over_dense is not None and row.implementation != "dense"}
        for rows in (before, now)
    )
    lines = [("what", "before", "now", "")]
    found = {key: verdict(old.get(key), new.get(key)) for key in {**new, **old}}
    for key, said in found.items():
        if said:
            setting, part, implementation = key
            speeds = [str(run[key].over_dense) if key in run else "" for run in (old, new)]
            lines.append((f"{setting.words()}: {part}, {implementation}", *speeds, said))
    if lines[1:]:
        say(aligned(f"against {path}", lines))
    both = len(set(old) & set(new))
    quiet = both - sum(said in ("slower", "faster") for said in found.values())
    say(f"{both} measurements in both runs, {quiet} of them unchanged within noise")
    return "slower" not in found.values()
