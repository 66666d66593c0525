"""Rows of results, the printed table and the JSON file."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import commit_of
from benchmarks.measure import Ratio

__all__ = ["Row", "describe", "file_name", "row_of", "table", "write"]


@dataclass
class Row:
    """One line: `value` is held against `goal`, from above if `at_least`; either may be missing.

    `ideal` is the value if time followed the FLOPs; `tflops` counts the multiply-adds that the masks leave; `more`, and
    rows that are not `printed`, go to the file only.
    """

    what: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    unit: str = "x"
    goal: float | None = None
    at_least: bool = True
    ideal: float | None = None
    baseline: str = ""
    baseline_ms: float | None = None
    ours_ms: float | None = None
    tflops: float | None = None
    note: str = ""
    error: str = ""
    printed: bool = True
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def reached(self) -> bool | None:
        """Whether the goal is reached; None where there is no goal, or no value."""
        if self.goal is None or self.value is None:
            return None
        return self.value >= self.goal if self.at_least else self.value <= self.goal

    @property
    def verdict(self) -> str:
        """What the table says of it."""
        if self.error:
            return "FAILED"
        return {True: "ok", False: "SHORT", None: ""}[self.reached]


def row_of(what: str, ratio: Ratio, baseline: str, *, as_time: bool = False, **fields: Any) -> Row:
    """A row of a measured ratio: speed relative to the baseline, or, `as_time`, of `compare(ours, baseline)`: time."""
    ours_ms, baseline_ms = (ratio.baseline_ms, ratio.ours_ms) if as_time else (ratio.ours_ms, ratio.baseline_ms)
    flops = fields.pop("flops", None)
    return Row(
        what,
        ratio.median,
        ratio.low,
        ratio.high,
        baseline=baseline,
        baseline_ms=baseline_ms,
        ours_ms=ours_ms,
        at_least=not as_time,
        tflops=None if flops is None else flops / ours_ms / 1e9,
        more={"pairs": ratio.pairs, **fields.pop("more", {})},
        **fields,
    )


def _line(row: Row, details: int) -> str:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    quartiles = "" if row.low is None or row.high is None else f"{row.low:.2f}-{row.high:.2f}"
    value = "-" if row.value is None else f"{row.value:.3g}{row.unit}" if row.unit != "x" else f"{row.value:.2f}x"
    goal = "" if row.goal is None else f"{'>=' if row.at_least else '<='}{row.goal:g}"
    times = ""
    if row.ours_ms is not None:
        times = f"{number(row.baseline_ms, '.3g')}->{row.ours_ms:.3g}" if row.baseline_ms is not None else ""
        times = times or f"{row.ours_ms:.3g}"
    tail = row.error[: max(details, 60)] if row.error else row.note[:details]
    parts = [
        f"{row.what[:60]:<60}",
        f"{value:>9}",
        f"{quartiles:>10}",
        f"{number(row.ideal, '.2f'):>5}",
        f"{goal:>6}",
        f"{row.verdict:<6}",
        f"{times:>12}",
        f"{number(row.tflops, '.0f'):>5}",
        tail.replace("\n", " "),
    ]
    return " ".join(parts).rstrip()


def table(rows: Sequence[Row], limit: int = 9300) -> str:
    """The rows as text of at most `limit` characters: notes are cut first, then rows without a goal, then others."""
    rows = [row for row in rows if row.printed or row.error]
    names = ("what", "measured", "quartiles", "ideal", "goal", "", "ms", "TF/s")
    widths = (60, -9, -10, -5, -6, 6, -12, -5)
    head = " ".join(f"{n:<{w}}" if w > 0 else f"{n:>{-w}}" for n, w in zip(names, widths, strict=True)).rstrip()
    weight = [0 if row.error else 1 if row.goal is not None else 2 for row in rows]
    text = ""
    for details, worst in ((100, 2), (60, 2), (40, 2), (0, 2), (0, 1), (0, 0)):
        lines = [_line(row, details) for row, w in zip(rows, weight, strict=True) if w <= worst]
        left_out = len(rows) - len(lines)
        text = "\n".join([head, *lines, *([f"... {left_out} more rows in the file"] if left_out else [])])
        if len(text) <= limit:
            break
    return text[:limit]


def describe(root: Path) -> dict[str, Any]:
    """Machine, versions, commit and date."""
    import triton

    described: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "commit": commit_of(root),
        "date": date.today().isoformat(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        described["multiprocessors"] = properties.multi_processor_count
        described["memory_gib"] = round(properties.total_memory / 2**30)
    return described


def file_name(gpu: str) -> str:
    """A GPU's name as a file name: "NVIDIA H200" -> "nvidia-h200.json"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def write(path: Path, machine: dict[str, Any], rows: Sequence[Row], checked: bool) -> None:
    """Write the JSON file; `checked`, whether every test of the gate passed, stands with each row."""
    found = [asdict(row) | {"reached": row.reached, "checked": checked} for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine, "checked": checked, "rows": found}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
