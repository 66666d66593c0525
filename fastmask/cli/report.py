"""What the commands print: tables of scores, rounds of pruning, and where a run's files are."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.table import Table

from fastmask.cli.options import STANDARD_OUTPUT
from fastmask.literal import say
from fastmask.terminal import console_of

if TYPE_CHECKING:
    from fastmask.discovery import Quality, Round
    from fastmask.subnetworks import Subnetworks
    from fastmask.tasks.parsing.parser import Parser

__all__ = ["Row", "print_scores", "print_summary", "quality_text", "round_printer", "scored", "stream_beside"]


@dataclass(frozen=True)
class Row:
    """Scores of one language, in percent, and words per second; None where it has no subnetwork."""

    language: str
    words: int
    full_las: float
    full_uas: float
    full_words_per_second: float
    las: float | None = None
    uas: float | None = None
    words_per_second: float | None = None
    heads: int | None = None
    all_heads: int | None = None
    neurons: int | None = None
    all_neurons: int | None = None

    @classmethod
    def of(cls, language: str, full: Any, own: Any | None, subnets: Subnetworks | None) -> Row:
        """From two `Evaluation`s and the subnetworks that the second one ran with."""
        row: dict[str, Any] = {
            "language": language,
            "words": full.scores.words,
            "full_las": full.las,
            "full_uas": full.uas,
            "full_words_per_second": full.words_per_second,
        }
        if own is not None and subnets is not None:
            index = subnets.index(language)
            row |= {"las": own.las, "uas": own.uas, "words_per_second": own.words_per_second}
            for kind, keep in (("heads", subnets.heads), ("neurons", subnets.neurons)):
                if keep is not None:
                    row |= {kind: int(keep[index].sum()), f"all_{kind}": keep[index].numel()}
        return cls(**row)


def scored(parser: Parser, subnets: Subnetworks | None, datasets: Mapping[str, Any]) -> list[Row]:
    """Score every language with the full network, and with its subnetwork where it has one.

    Args:
        parser: the subnetworks are attached to its encoder.
        subnets: None where there are none.
        datasets: rows of every language, or what `prepare` made of them.
    """
    from fastmask.tasks.parsing.evaluation import Prepared, evaluate, prepare

    rows = []
    for code, data in datasets.items():
        prepared = {code: data if isinstance(data, Prepared) else prepare(parser, data)}
        full, own = evaluate(parser, prepared, None if subnets is None else -1)[code], None
        if subnets is not None and code in subnets.languages:
            own = evaluate(parser, prepared, subnets.index(code))[code]
        rows.append(Row.of(code, full, own, subnets))
    return rows


def print_scores(rows: Sequence[Row], file: TextIO, split: str = "test") -> None:
    """The table of a run: full network beside subnetworks, and their means over the languages that have one."""
    table = Table(title=f"official LAS / UAS on the {split} sets, percent")
    for name in ("language", "full LAS", "full UAS", "subnet LAS", "subnet UAS", "heads", "neurons", "full words/s"):
        table.add_column(name, justify="left" if name == "language" else "right", no_wrap=True)
    table.add_column("subnet words/s", justify="right")
    masked = any(row.las is not None for row in rows)
    for row in rows:
        table.add_row(
            row.language if row.las is not None or not masked else f"{row.language} (no subnetwork)",
            f"{row.full_las:.2f}",
            f"{row.full_uas:.2f}",
            _number(row.las, ".2f"),
            _number(row.uas, ".2f"),
            _share(row.heads, row.all_heads),
            _share(row.neurons, row.all_neurons),
            f"{row.full_words_per_second:,.0f}",
            _number(row.words_per_second, ",.0f"),
        )
    own = [row for row in rows if row.las is not None] or list(rows)
    if len(own) > 1:
        table.add_section()
        table.add_row(
            f"mean of {len(own)}",
            f"{_mean([row.full_las for row in own]):.2f}",
            f"{_mean([row.full_uas for row in own]):.2f}",
            _number(_mean([row.las for row in own]), ".2f"),
            _number(_mean([row.uas for row in own]), ".2f"),
        )
    console_of(file).print(table)


def print_summary(
    folder: Path, speed: dict[str, float], scouting: float | None, pictures: Sequence[Path], file: TextIO
) -> None:
    """Training speed, the share of time that scouts took (method `dynamic`), and where everything is."""
    names = {"full_network": "on the full network", "subnetworks": "with subnetworks", "episodes": "in episodes"}
    console = console_of(file)
    if speed:
        parts = [f"{value:,.0f} words/s {names[name]}" for name, value in speed.items()]
        console.print(f"training: {', '.join(parts)}", highlight=False)
    if scouting is not None:
        console.print(f"updating the subnetworks took {scouting:.1%} of the time since they were switched on")
    files = [f"{name} {what}" for name, what in _FILES.items() if (folder / name).exists()]
    files += [f"{path.name} (heads by language and layer)" for path in pictures]
    console.print(f"run: {folder.resolve()}", highlight=False, soft_wrap=True)
    console.print(f"     {', '.join(files)}", highlight=False, soft_wrap=True)


_FILES = {
    "results.json": "(this table)",
    "metrics.jsonl": "(loss and dev scores)",
    "model": "(parser)",
    "masks.safetensors": "(subnetworks)",
    "dynamic.safetensors": "(how the subnetworks changed)",
}


def round_printer(file: TextIO, tau: float) -> Callable[[Round], None]:
    """A function that prints one line for each round of pruning down to `tau` (or to a density)."""

    def show(found: Round) -> None:
        counts = [f"{n} {kind}" for n, kind in ((found.heads, "heads"), (found.neurons, "neurons")) if n is not None]
        quality = quality_text(found.quality)
        if found.number == 0 and found.quality.loss is not None:
            quality += f" (there is no dev data; the loss may rise by {-math.log(tau):.3f})"
        stopped = "" if found.kept else "  too far: back to the round before"
        parts = [f"  {found.language} round {found.number}: {', '.join(counts)}", *([quality] if quality else ())]
        say(f"{'  '.join(parts)}{stopped}", file)

    return show


def stream_beside(target: str | None) -> TextIO:
    """Where a command prints that also writes to the file `target`: not between the lines of that file."""
    return sys.stderr if target == STANDARD_OUTPUT else sys.stdout


def quality_text(quality: Quality) -> str:
    """What a number that pruning goes by is, and the number."""
    if quality.metric is not None:
        return f"dev LAS {quality.metric:.2f}"
    return "" if quality.loss is None else f"loss on the scoring sentences {quality.loss:.3f}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or math.isnan(value) else format(value, form)


def _share(live: int | None, total: int | None) -> str:
    return "-" if live is None or total is None else f"{live} of {total}"


def _mean(values: Sequence[float | None]) -> float:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else math.nan
