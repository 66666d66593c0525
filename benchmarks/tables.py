"""What is printed: a table of rows with a column for each question, what targets came to, and the README's table.

Plain text: a machine with a GPU may have PyTorch and little else.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

from benchmarks.baselines import EXPLAINED
from benchmarks.row import Row
from benchmarks.targets import QUICK, Target, placed
from fastmask.files import write_text
from fastmask.literal import say

__all__ = [
    "BEGIN", "END", "aligned", "print_rows", "print_sources", "print_targets", "readme_table", "replace_between",
]  # fmt: skip

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
PASS = {True: "pass", False: "SHORT", None: "not measured"}


def aligned(title: str, lines: Sequence[Sequence[str]]) -> str:
    """A table: under the title the names of columns, then rows; text to the left, numbers to the right.

    A column that is empty in all rows is left out.
    """
    used = [column for column in zip(*lines, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in used]
    numbers = [all(cell[:1].isdigit() or cell in ("", "-") for cell in column[1:]) for column in used]
    rows = [
        "  ".join(
            cell.rjust(width) if n else cell.ljust(width) for cell, width, n in zip(row, widths, numbers, strict=True)
        )
        for row in zip(*used, strict=True)
    ]
    return "\n".join([title, *(f"  {row}".rstrip() for row in rows)])


def print_rows(rows: Sequence[Row], targets: Sequence[Target] = ()) -> None:
    """One table for each setting and part."""
    groups: dict[object, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.setting, row.part), []).append(row)
    for group in groups.values():
        first, setting = group[0], group[0].setting
        where = f", {setting.threads} thread(s)" if setting.device == "cpu" else ""
        title = f"{setting.words()}: {first.part}; {setting.languages} languages held{where}"
        cells = [_cells(row, group, targets) for row in group]
        say(aligned(title, [list(cells[0]), *(list(own.values()) for own in cells)]))
        say(f"  {first.note}\n" if first.note else "")


def print_sources(rows: Sequence[Row]) -> None:
    """What the implementations of rows are, and where the numbers come from."""
    for name in [name for name in EXPLAINED if any(row.implementation == name for row in rows)]:
        say(f"{name:>9}: {EXPLAINED[name]}")
    for where in dict.fromkeys(f"{_how(row)} {_where(row)}, commit {row.machine.commit}" for row in rows):
        say(where)


def _cells(row: Row, group: Sequence[Row], targets: Sequence[Target]) -> dict[str, str]:
    """What a table says of a row, by column."""
    asked = [target for target in targets if target.asks(row)]
    verdicts = [_judged(target, group)[1] for target in asked]
    return {
        "": row.implementation,
        "ms": f"{row.ms.middle:.4g}",
        "on paper": "" if row.predicted_ms is None else f"{row.predicted_ms:.4g}",
        "over torch dense": str(row.over_dense or ""),
        "over our dense": str(row.over_full or ""),
        "ideal": f"{row.ideal:.2f}x",
        "share of ideal": "" if row.share is None else f"{row.share:.2f}",
        "kept MiB": "" if row.kept_mib is None else f"{row.kept_mib:.4g}",
        "peak MiB": "" if row.peak_mib is None else f"{row.peak_mib:.4g}",
        "tokens/s": f"{row.tokens_per_s:.0f}",
        "target": "; ".join(target.words for target in asked),
        " ": "; ".join([*verdicts, *["noisy"] * row.noisy, *["unchecked"] * (row.checked is False)]),
    }


def print_targets(targets: Sequence[Target], rows: Sequence[Row]) -> bool:
    """What must hold, what was measured, and whether that is enough; true if all of it is."""
    lines, verdicts = [("what", "measured", "target", "")], []
    for target in targets:
        ours = next((row for row in rows if target.asks(row)), None)
        value, verdict = _judged(target, [row for row in rows if ours is not None and row.setting == ours.setting])
        part = f", {target.part}" if len(target.job.parts or ()) > 1 else ""
        what = f"{target.job.setting.words()}: {target.of}{part}"
        lines.append((what, "-" if value is None else f"{value:.3f}", target.words, verdict))
        verdicts.append(verdict)
    say(aligned("what must hold", lines))
    return set(verdicts) <= {PASS[True]}


def _judged(target: Target, rows: Sequence[Row]) -> tuple[float | None, str]:
    value = target.value(rows)
    return value, PASS[None if value is None else target.reached(value)]


def readme_table(rows: Sequence[Row]) -> str:
    """Markdown: our rows at the settings of `QUICK`, and a line on where the numbers come from.

    Raises:
        ValueError: one of them is missing.
    """
    lines = ["| half of the heads and neurons, float32, two CPU threads | over our dense | over PyTorch's | ideal | "
             "memory kept |", "|---|---|---|---|---|"]  # fmt: skip
    for job, name in zip(QUICK, ("BERT-base encoder", "the same"), strict=True):
        wanted = placed(job, 2, "cpu").setting
        found = {row.implementation: row for row in rows if row.setting == wanted}
        if not {"dense", "full", "fastmask"} <= set(found):
            raise ValueError(f"no measurement of {wanted.words()} with 2 threads: the README shows it")
        ours, kept = found["fastmask"], found["dense"].kept_mib
        languages = "one language" if wanted.present == 1 else f"{wanted.present} languages in one batch"
        cells = [
            f"{name}, {languages}, {wanted.batch} x {wanted.tokens} tokens",
            str(ours.over_full),
            str(ours.over_dense),
            f"{ours.ideal:.2f}x",
            f"{ours.kept_mib / kept:.2f}x" if ours.kept_mib and kept else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    about = (
        f"Forward and backward, {_where(ours)}. {_how(ours)} *Our dense* is the full network through `fastmask`, with "
        "the same matrix products. [How it is measured, and against what else](docs/benchmarks.md)."
    )
    return "\n".join([*lines, "", *textwrap.wrap(about, 118)])


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


def _how(row: Row) -> str:
    if row.processes > 1:
        return f"Medians of {row.processes} processes, in brackets the least and the most of them."
    return "Medians of interleaved runs of one process, quartiles in brackets."


def _where(row: Row) -> str:
    return f"{row.machine.processor}, PyTorch {row.machine.torch}, {row.machine.date}"
