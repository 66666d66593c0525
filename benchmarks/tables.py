"""What is shown, in plain text: rows, what targets came to, what has changed; the README's table; a picture."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.baselines import EXPLAINED
from benchmarks.row import Row, Spread
from benchmarks.targets import PASS, QUICK, Target
from fastmask.files import write_text

LEAST = 0.03  # a change of the median by less says nothing
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"


def aligned(title: str, lines: Sequence[Iterable[str]]) -> str:
    """Under the title the names of columns (without those that are empty); text to the left, numbers to the right."""
    columns = []
    for name, *cells in zip(*lines, strict=True):
        if any(cells):
            width = max(map(len, (name, *cells)))
            numbers = all(cell[:1].isdigit() or cell in ("", "-") for cell in cells)
            columns.append([cell.rjust(width) if numbers else cell.ljust(width) for cell in (name, *cells)])
    return "\n".join([title, *("  " + "  ".join(row).rstrip() for row in zip(*columns, strict=True))])


def print_rows(rows: Sequence[Row], targets: Sequence[Target] = ()) -> None:
    """One table for each setting and part."""
    for (setting, part), alike in itertools.groupby(rows, lambda row: (row.setting, row.part)):
        group = list(alike)
        where = f", {setting.threads} thread(s)" if setting.device == "cpu" else ""
        title = f"{setting.words()}: {part}; {setting.languages} languages held{where}"
        cells = [_cells(row, group, targets) for row in group]
        print(aligned(title, [cells[0], *(own.values() for own in cells)]))
        print(f"  {group[0].note}\n" if group[0].note else "")


def _cells(row: Row, group: Sequence[Row], targets: Sequence[Target]) -> dict[str, str]:
    """What a table says of a row, by column."""
    asked = [target for target in targets if target.asks(row)]
    verdicts = [target.verdict(group)[1] for target in asked]
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


def print_sources(rows: Sequence[Row]) -> None:
    """What the implementations of rows are, and where the numbers come from."""
    for name in [name for name in EXPLAINED if any(row.implementation == name for row in rows)]:
        print(f"{name:>9}: {EXPLAINED[name]}")
    for where in dict.fromkeys(f"{_how(row)} {_where(row)}, commit {row.machine.commit}" for row in rows):
        print(where)


def print_targets(targets: Sequence[Target], rows: Sequence[Row]) -> bool:
    """What must hold, what was measured, and whether that is enough; true if all of it is."""
    lines = [("what", "measured", "target", "")]
    for target in targets:
        value, verdict = target.verdict(rows)
        part = f", {target.part}" if len(target.job.parts) > 1 else ""
        what = f"{target.job.setting.words()}: {target.of}{part}"
        lines.append((what, "-" if value is None else f"{value:.3f}", target.words, verdict))
    print(aligned("what must hold", lines))
    return all(said == PASS for *_, said in lines[1:])


def verdict(before: Spread | None, now: Spread | None) -> str:
    """What has become of a speed over dense: slower or faster only where the spreads of the two runs do not overlap."""
    if before is None or now is None:
        return "new" if before is None else "missing"
    ratio = now.middle / before.middle
    if now.high < before.low and ratio < 1 - LEAST:
        return "slower"
    return "faster" if now.low > before.high and ratio > 1 + LEAST else ""


def print_changes(before: Sequence[Row], now: Sequence[Row], path: Path) -> bool:
    """Print what changed; true if nothing has become slower. Of a measurement that a run has twice, the last counts."""
    old, new = (
        {row.key: row.over_dense for row in rows if row.over_dense is not None and row.implementation != "dense"}
        for rows in (before, now)
    )
    found = {key: verdict(old.get(key), new.get(key)) for key in {**new, **old}}
    lines = [("what", "before", "now", "")]
    for key, said in found.items():
        if said:
            what = f"{key[0].words()}: {key[1]}, {key[2]}"
            lines.append((what, str(old.get(key, "")), str(new.get(key, "")), said))
    if lines[1:]:
        print(aligned(f"against {path}", lines))
    both, quiet = len(set(old) & set(new)), list(found.values()).count("")
    print(f"{both} measurements in both runs, {quiet} of them unchanged within noise")
    return "slower" not in found.values()


def update_readme(path: Path, rows: Sequence[Row]) -> None:
    """Put our rows at the settings of `QUICK` between two lines of a Markdown file; write nothing if any is missing."""
    lines = ["| half of the heads and neurons, float32, two CPU threads | over our dense | over PyTorch's | ideal | "
             "activations kept, over PyTorch's |", "|---|---|---|---|---|"]  # fmt: skip
    for job, name in zip(QUICK, ("four BERT-base layers", "the same"), strict=True):
        setting = job.setting
        found = {row.implementation: row for row in rows if row.setting == setting}
        if not {"dense", "full", "fastmask"} <= set(found):
            raise ValueError(f"no measurement of {setting.words()} with 2 threads: the README shows it")
        ours, kept = found["fastmask"], found["dense"].kept_mib
        languages = "one language" if setting.present == 1 else f"{setting.present} languages in one batch"
        what = f"{name}, {languages}, {setting.batch} x {setting.tokens} tokens"
        memory = f"{ours.kept_mib / kept:.2f}x" if ours.kept_mib and kept else ""
        lines.append(f"| {what} | {ours.over_full} | {ours.over_dense} | {ours.ideal:.2f}x | {memory} |")
    about = (
        f"Forward and backward, {_where(ours)}. {_how(ours)} *Our dense* is the full network through `fastmask`, with "
        "the same matrix products; masks are random. [How it is measured, and against what else](docs/benchmarks.md)."
    )
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{path} needs one line {BEGIN!r} and, below it, one {END!r}: the table goes between them")
    block = "\n".join([BEGIN, *lines, "", *textwrap.wrap(about, 118), END])
    write_text(path, text.partition(BEGIN)[0] + block + text.partition(END)[2])


def _how(row: Row) -> str:
    several = f"Medians of {row.processes} processes, range in brackets."
    return several if row.processes > 1 else "Medians of interleaved runs of one process, quartiles in brackets."


def _where(row: Row) -> str:
    return f"{row.machine.processor}, PyTorch {row.machine.torch}, {row.machine.date}"


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw speed over our dense against density, a line for each size of batch, as PNG files; returns their paths."""
    groups: dict[object, list[Row]] = {}
    for row in rows:
        if row.implementation == "fastmask" and row.over_full is not None:
            alike = replace(row.setting, density=1.0, languages=1, present=1, batch=1)
            groups.setdefault((alike, row.part), []).append(row)
    drawn = [_drawn(lines, folder) for own in groups.values() if (lines := lines_of(own))]
    if not drawn:
        raise ValueError("nothing to draw: expected rows of fastmask and full at three densities, else alike")
    return drawn


def lines_of(rows: Sequence[Row]) -> dict[tuple[int, int], list[Row]]:
    """By languages of the batch and examples, the rows of three densities and more, from sparse to dense."""
    found: dict[tuple[int, int], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row.setting.present, row.setting.batch, row.setting.density)):
        found.setdefault((row.setting.present, row.setting.batch), []).append(row)
    return {key: own for key, own in found.items() if len({row.setting.density for row in own}) >= 3}


def _drawn(lines: Mapping[tuple[int, int], Sequence[Row]], folder: Path) -> Path:
    from fastmask.analysis.drawing import COLOURS, GREY, MARKERS, new_figure

    figure = new_figure(6.4, 4.4)
    axis = figure.add_subplot()
    for number, ((present, batch), own) in enumerate(lines.items()):
        densities = [row.setting.density for row in own]
        if number == 0:
            axis.plot(densities, [row.ideal for row in own], color=GREY, linestyle="--", label="by FLOPs alone")
        label = f"{present} language{'s' * (present > 1)}, {batch} examples"
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        speeds, lows, highs = zip(*(row.over_full for row in own), strict=True)
        axis.plot(densities, speeds, color=colour, marker=marker, label=label)
        axis.fill_between(densities, lows, highs, color=colour, alpha=0.18, linewidth=0)
    axis.axhline(1, color="black", linewidth=1, label="the full network through fastmask")
    axis.set(xlim=(0, 1), xlabel="share of the units that each language owns", ylabel="speed over our dense")
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    setting, part, machine = own[0].setting, own[0].part, own[0].machine
    unit = {"both": "heads and neurons", "weights": "single weights"}.get(setting.unit, setting.unit)
    what = f"{setting.case} of {setting.shape} width, {unit}, {part}, {setting.tokens} tokens an example"
    where = f"{setting.dtype}, {setting.threads} thread(s), {machine.processor}, {machine.date}"
    axis.set_title(f"How much faster a subnetwork is than the full network\n{what}\n{where}", fontsize=9)
    axis.legend(fontsize=8)
    folder.mkdir(parents=True, exist_ok=True)
    kind = "-compiled" if setting.compiled else ""
    name = f"{setting.case}-{setting.shape}-{setting.unit}-{part}-{setting.tokens}-{setting.dtype}{kind}.png"
    figure.savefig(folder / name, dpi=150)
    return folder / name
