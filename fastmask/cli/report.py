"""What the commands print: tables of scores, rounds of pruning, and where a run's files are."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from fastmask.files import STDOUT
from fastmask.tasks.task import heading

if TYPE_CHECKING:
    from fastmask.discovery import Draw, Quality, Round
    from fastmask.subnetworks import Subnetworks
    from fastmask.tasks.task import Splits, Task

__all__ = [
    "Row", "console_of", "examples_of", "print_scores", "print_summary", "round_printer", "scored", "stability_lines",
    "stream_beside",
]  # fmt: skip


WIDTH = 130  # of tables that do not go to a terminal


def console_of(file: TextIO) -> Console:
    """Where tables go, as wide as the terminal, or `WIDTH` columns in a file or a pipe; nothing in a name is markup."""
    return Console(file=file, width=None if file.isatty() else WIDTH, markup=False, emoji=False, highlight=False)


@dataclass(frozen=True)
class Row:
    """Scores of one language, or of one of its treebanks, and words (tokens) per second; None without a subnetwork.

    Attributes:
        language: whose test examples they are.
        part: which of its treebanks, where it has several.
        words: of the test examples.
        full: scores of the full network, the one that decides first.
        own: scores of its subnetwork.
    """

    language: str
    part: str | None
    words: int
    full: dict[str, float]
    full_words_per_second: float
    own: dict[str, float] | None = None
    words_per_second: float | None = None
    heads: int | None = None
    all_heads: int | None = None
    neurons: int | None = None
    all_neurons: int | None = None


def examples_of(task: Task, splits: Splits, split: str) -> dict[str, dict[str | None, Any]]:
    """Language -> treebank -> `Examples` of one split, where there is one.

    Where the examples of a language are not of several treebanks, which a code may join, None stands for all of them.
    """
    return {
        name: {part: task.examples(rows) for part, rows in _parts_of(of[split]).items()}
        for name, of in splits.items()
        if split in of
    }


def _parts_of(rows: Any) -> dict[str | None, Any]:
    distinct = list(rows.unique("treebank")) if "treebank" in getattr(rows, "column_names", ()) else []
    if len(distinct) < 2:
        return {None: rows}
    names = list(rows["treebank"])
    return {name: rows.select([i for i, own in enumerate(names) if own == name]) for name in distinct}


def scored(task: Task, subnets: Subnetworks | None, tests: Mapping[str, Mapping[str | None, Any]]) -> list[Row]:
    """Score every language with the full network, and with its subnetwork where it has one.

    Args:
        task: the subnetworks are attached to its encoder.
        subnets: None where there are none.
        tests: see `examples_of`.
    """
    rows = []
    for name, parts in tests.items():
        for part, examples in parts.items():
            words = int(examples.lengths.sum())
            full, speed = _scored(task, None, examples)
            own: dict[str, Any] = {}
            if subnets is not None and name in subnets.languages:
                scores, rate = _scored(task, name, examples)
                own = {"own": scores, "words_per_second": rate}
                for kind, keep in (("heads", subnets.heads), ("neurons", subnets.neurons)):
                    if keep is not None:
                        live = keep[subnets.index(name)]
                        own |= {kind: int(live.sum()), f"all_{kind}": live.numel()}
            rows.append(Row(name, part, words, full, speed, **own))
    return rows


def _scored(task: Task, name: str | None, examples: Any) -> tuple[dict[str, float], float]:
    """Scores by one network, and how many words it reads in a second; scoring itself is not counted."""
    with task.reading(name):
        start = time.perf_counter()
        predictions = task.predict(examples)
        seconds = time.perf_counter() - start
    return task.score(examples, predictions), float(examples.lengths.sum()) / max(seconds, 1e-9)


def print_scores(rows: Sequence[Row], task: Task, file: TextIO, split: str = "test") -> None:
    """The table of a run: full network beside subnetworks, and their means over the languages that have one."""
    unit = ", percent" if task.percent else ""
    names = list(rows[0].full) if rows else [task.metric]
    table = Table(title=f"{' / '.join(map(heading, names))} on the {split} sets{unit}")
    table.add_column("language", no_wrap=True)
    for whose in ("full", "subnet"):
        for name in names:
            table.add_column(f"{whose} {heading(name)}", justify="right", no_wrap=True)
    for name in ("heads", "neurons", f"full {task.token_word}/s", f"subnet {task.token_word}/s"):
        table.add_column(name, justify="right", no_wrap=name in ("heads", "neurons"))
    own = [row.own for row in rows if row.own is not None]
    for row in rows:
        called = row.language if row.part is None else f"{row.language} {row.part}"
        table.add_row(
            called if row.own is not None or not own else f"{called} (no subnetwork)",
            *(f"{row.full[name]:.2f}" for name in names),
            *(_number(None if row.own is None else row.own[name], ".2f") for name in names),
            _share(row.heads, row.all_heads),
            _share(row.neurons, row.all_neurons),
            f"{row.full_words_per_second:,.0f}",
            _number(row.words_per_second, ",.0f"),
        )
    counted = [row for row in rows if row.own is not None] or rows
    if len(counted) > 1:
        table.add_section()
        table.add_row(
            f"mean of {len(counted)}",
            *(f"{fmean(row.full[name] for row in counted):.2f}" for name in names),
            *(_number(fmean(scores[name] for scores in own) if own else None, ".2f") for name in names),
        )
    console_of(file).print(table)


def print_summary(folder: Path, speed: dict[str, float], words: str, scouting: float | None) -> None:
    """Training speed, the share of time that scouts took (method `dynamic`), and where everything is."""
    names = {"full_network": "on the full network", "subnetworks": "with subnetworks", "episodes": "in episodes"}
    if speed:
        parts = [f"{value:,.0f} {words}/s {names[name]}" for name, value in speed.items()]
        print(f"training: {', '.join(parts)}")
    if scouting is not None:
        print(f"updating the subnetworks took {scouting:.1%} of the time since they were switched on")
    files = [f"{name} {what}" for name, what in _FILES.items() if (folder / name).exists()]
    print(f"run: {folder.resolve()}")
    print(f"     {', '.join(files)}")


_FILES = {
    "results.json": "(this table)",
    "metrics.jsonl": "(loss and dev scores)",
    "model": "(the model)",
    "masks.safetensors": "(subnetworks)",
    "dynamic.safetensors": "(how the subnetworks changed)",
}


def round_printer(file: TextIO, tau: float, metric: str) -> Callable[[Round], None]:
    """A function that prints one line for each round of pruning down to `tau` (or to a density)."""

    def show(found: Round) -> None:
        counts = [f"{n} {kind}" for n, kind in ((found.heads, "heads"), (found.neurons, "neurons")) if n is not None]
        quality = _quality_text(found.quality, metric)
        if found.number == 0 and found.quality.loss is not None:
            quality += f" (no dev score to go by; the loss may rise by {-math.log(tau):.3f})"
        stopped = "" if found.kept else "  too far: back to the round before"
        parts = [f"  {found.language} round {found.number}: {', '.join(counts)}", *([quality] if quality else ())]
        tqdm.write(f"{'  '.join(parts)}{stopped}", file=file)  # above the bar of a run

    return show


def stability_lines(draws: Sequence[Draw]) -> list[str]:
    """For each kind of unit, how much draws agree within a language and between languages; none for a single mask."""
    from fastmask.discovery import stability

    if sum(len(draw.subnetworks.languages) for draw in draws) < 2:
        return []
    lines = []
    for kind, found in stability(draws).items():
        parts = [("draws of one language", found.draws), ("of two languages", found.languages)]
        known = [f"{what} {value:.2f}" for what, value in parts if value is not None]
        lines.append(f"agreement of {kind} (mean Jaccard): {', '.join([*known, f'by chance {found.chance:.2f}'])}")
    return lines


def stream_beside(target: str | None) -> TextIO:
    """Where a command prints that also writes to the file `target`: not between the lines of that file."""
    return sys.stderr if target == STDOUT else sys.stdout


def _quality_text(quality: Quality, metric: str) -> str:
    """What a number that pruning goes by is, and the number."""
    if quality.metric is not None:
        return f"dev {heading(metric)} {quality.metric:.2f}"
    return "" if quality.loss is None else f"loss on the scoring examples {quality.loss:.3f}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or math.isnan(value) else format(value, form)


def _share(live: int | None, total: int | None) -> str:
    return "-" if live is None or total is None else f"{live} of {total}"
