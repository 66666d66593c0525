"""What is printed: a table of rows, a table of targets, and the table of the README."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from benchmarks.cases import CASES
from benchmarks.measure import NOISY, break_even
from benchmarks.row import Row, setting_of
from benchmarks.setting import Setting
from benchmarks.targets import TARGETS, Growth, Reading, Target, reading_of_rows
from fastmask.files import write_text
from fastmask.terminal import LiteralConsole

__all__ = [
    "BEGIN",
    "END",
    "break_evens",
    "by_setting",
    "print_rows",
    "print_targets",
    "readme_table",
    "replace_between",
    "update_readme",
]

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
WIDTH = 150
COUNTED = {"saved_mib": "kept MiB", "peak_mib": "peak MiB"}
TOO_NOISY = "too noisy to conclude"


def print_rows(rows: Sequence[Row]) -> None:
    """One table for each setting: its implementations, part by part."""
    console = LiteralConsole(width=WIDTH)
    for setting, group in by_setting(rows).items():
        held = f"{setting.languages} language{'s' * (setting.languages > 1)} held"
        layers = f", {setting.layers} layers" if CASES[setting.case].layered else ""
        title = f"{setting.words()}; {held}{layers}; {setting.dtype}, {_threads(setting.threads)}"
        table = Table(title=title, title_justify="left", width=WIDTH)
        left = ("part", "implementation", "")
        names = (*left[:2], "ms", "quartiles", f"{group[0].baseline} / this", "quartiles", "ideal", "share")
        counted = [name for name in ("saved_mib", "peak_mib") if any(getattr(row, name) for row in group)]
        for name in (*names, *(COUNTED[name] for name in counted), ""):
            table.add_column(name, justify="left" if name in left else "right")
        for row in group:
            is_base = row.implementation == row.baseline
            table.add_row(
                row.part,
                row.implementation,
                f"{row.median_ms:.4g}",
                f"{row.low_ms:.4g}-{row.high_ms:.4g}",
                "" if is_base else f"{row.ratio:.3f}x",
                "" if is_base else f"{row.ratio_low:.2f}-{row.ratio_high:.2f}",
                "" if is_base or row.ideal is None else f"{row.ideal:.2f}x",
                "" if is_base or row.share is None else f"{row.share:.3f}",
                *(_mib(getattr(row, name)) for name in counted),
                "noisy" if row.noisy else "",
            )
        console.print(table)
        if any(row.noisy for row in group):
            console.print(f"noisy: quartiles more than {NOISY:.0%} of the median apart, {TOO_NOISY}", highlight=False)
        if group[0].note:
            console.print(group[0].note, style="dim", highlight=False)


def break_evens(rows: Sequence[Row]) -> list[str]:
    """From which density on each implementation is faster than its baseline, where rows cover three or more."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        alike = vars(setting_of(row)) | {"density": None}
        groups.setdefault((row.implementation, row.part, *alike.values()), []).append(row)
    lines = []
    for group in groups.values():
        own = sorted(group, key=lambda row: -row.density)
        if len({row.density for row in own}) < 3 or own[0].implementation == own[0].baseline or own[0].ideal is None:
            continue
        found = break_even([1 - row.density for row in own], [1 / row.ratio for row in own])
        when = "nowhere to its end" if found is None else f"from {1 - found:.0%} down"
        what = setting_of(own[0]).words().replace(f" at {own[0].density:.0%}", "")
        lines.append(f"{what}, {own[0].part}: {own[0].implementation} faster than {own[0].baseline} {when}")
    return lines


def print_targets(read: Sequence[tuple[Target | Growth, Reading | None]]) -> None:
    """What was asked for, what was measured, and whether that is enough; None: it could not be measured."""
    table = Table(title="targets", title_justify="left", width=WIDTH)
    for name in ("what", "as", "measured", "quartiles", "target", "", ""):
        table.add_column(name, justify="left" if name in ("what", "as", "") else "right")
    for target, reading in read:
        sign = ">=" if target.at_least else "<="
        kind = f"{target.metric}, exponent" if isinstance(target, Growth) else target.metric
        if reading is None:
            table.add_row(target.what, kind, "-", "", f"{sign} {target.bound:g}", "NOT MEASURED", "")
            continue
        spread = "" if reading.low is None or reading.high is None else f"{reading.low:.2f}-{reading.high:.2f}"
        verdict = "ok" if target.reached(reading) else "SHORT"
        noisy = TOO_NOISY if reading.noisy else ""
        table.add_row(target.what, kind, f"{reading.value:.3f}", spread, f"{sign} {target.bound:g}", verdict, noisy)
    LiteralConsole(width=WIDTH).print(table)


# ---- the README


def readme_table(rows: Sequence[Row]) -> str:
    """Markdown: one line for each setting and part in which fastmask ran, and a line on where the numbers come from.

    Raises:
        ValueError: no such row.
    """
    ours = [row for row in rows if row.implementation == "fastmask"]
    if not ours:
        raise ValueError("no row of fastmask among these measurements: there is nothing to show in the README")
    lines = ["| what | speed over dense | ideal | others | kept for backward | target |", "|---|---|---|---|---|---|"]
    for row in ours:
        same = [other for other in rows if other.part == row.part and setting_of(other) == setting_of(row)]
        base = next(other for other in same if other.implementation == row.baseline)
        others = [
            f"{other.implementation} {other.ratio:.2f}x" for other in same if other not in (row, base) and other.ratio
        ]
        kept = "" if not (row.saved_mib and base.saved_mib) else f"{row.saved_mib / base.saved_mib:.2f}x"
        noisy = f", {TOO_NOISY}" if row.noisy else ""
        measured = f"{row.ratio:.2f}x ({row.ratio_low:.2f}-{row.ratio_high:.2f}{noisy})"
        cells = [
            _what(row),
            measured,
            "" if row.ideal is None else f"{row.ideal:.2f}x",
            ", ".join(others),
            kept,
            _targets_of(row, same),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    first = ours[0]
    where = f"{first.processor}, {_threads(first.threads)}, PyTorch {first.torch}, {first.date}"
    about = (
        "Medians of pairwise ratios of interleaved runs, with quartiles. Ideal: what the FLOPs alone would give. "
        "Full: the whole network through fastmask, which multiplies matrices by whatever is fastest; a share of the "
        "ideal is taken of the faster of it and dense."
    )
    return "\n".join([*lines, "", f"{about} {where}."])


def _what(row: Row) -> str:
    part = "" if row.part == "forward+backward" else f", {row.part}"
    return setting_of(row).words() + part


def _targets_of(row: Row, same: Sequence[Row]) -> str:
    """The targets of a row that are held against its baseline."""
    found = []
    for target in TARGETS:
        moved = Setting.stored(vars(target.job.setting) | {"threads": row.threads, "device": row.device})
        if moved != setting_of(row) or (target.part, target.of) != (row.part, row.implementation):
            continue
        if target.against and not {other.implementation for other in same} & set(target.against):
            continue
        if target.metric in ("saved", "peak") and getattr(row, f"{target.metric}_mib") is None:
            continue
        words = {"share": f"{target.bound:g} of ideal", "saved": f"kept {target.bound:g}x"}
        text = words.get(target.metric, f"{target.metric} {target.bound:g}x")
        text += " over full too" if "full" in target.against else ""
        found.append(text if target.reached(reading_of_rows(target, same)) else f"{text}, **short**")
    return "; ".join(found)


def update_readme(path: str | os.PathLike[str], rows: Sequence[Row]) -> None:
    """Replace what stands between the two marks; raises as `replace_between` does, and as `readme_table` does."""
    replace_between(path, BEGIN, END, readme_table(rows))


def replace_between(path: str | os.PathLike[str], begin: str, end: str, new: str) -> None:
    """Replace what stands between two lines of a file, which is replaced at once.

    Raises:
        ValueError: the lines are missing, or in the wrong order; nothing is written.
    """
    target = Path(path)
    text = target.read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(
            f"{target} needs one line {begin!r} and, below it, one line {end!r}: the table goes between them"
        )
    before, rest = text.split(begin)
    _, after = rest.split(end)
    write_text(target, f"{before}{begin}\n{new}\n{end}{after}")


def by_setting(rows: Sequence[Row]) -> dict[Setting, list[Row]]:
    """The rows of each setting."""
    found: dict[Setting, list[Row]] = {}
    for row in rows:
        found.setdefault(setting_of(row), []).append(row)
    return found


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def _mib(size: float | None) -> str:
    return "" if size is None else f"{size:.4g}"
