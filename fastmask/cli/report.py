"""What several commands print: tables of scores, and rounds and agreement of pruning."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from fastmask.discovery import Draw, Round, stability
from fastmask.files import STDOUT
from fastmask.subnetworks import Subnetworks
from fastmask.tasks.data.language_codes import same_language
from fastmask.tasks.task import Splits, Task, heading, treebanks_of

if TYPE_CHECKING:
    from fastmask.training.config import TrainConfig

WIDTH = 130  # of tables that do not go to a terminal


def console_of(file: TextIO) -> Console:
    """Where tables go, as wide as the terminal, or `WIDTH` columns in a file or a pipe; nothing in a name is markup."""
    return Console(file=file, width=None if file.isatty() else WIDTH, markup=False, emoji=False, highlight=False)


Cells = Mapping[str, str]  # of a row, by column


def print_table(
    title: str, rows: Sequence[Cells], file: TextIO, left: Sequence[str] = (), last: Cells | None = None
) -> None:
    """Print a table; the first column, and those in `left`, are words, others numbers. `last` stands below a line.

    Where there is little room, words are folded, but no number is.
    """
    table = Table(title=title)
    for number, name in enumerate(rows[0] if rows else ()):
        if number == 0 or name in left:
            table.add_column(name, overflow="fold")
        else:
            widest = max((len(part) for row in rows for part in row[name].split()), default=None)
            table.add_column(name, justify="right", min_width=widest, overflow="fold")
    for row in rows:
        table.add_row(*row.values())
    if last is not None:
        table.add_section()
        table.add_row(*last.values())
    console_of(file).print(table)


def model_of(task: Task, config: TrainConfig) -> tuple[str, int]:
    """A model and its size in words, and the bytes of a checkpoint: weights, and two moments of those trained."""
    size = sum(parameter.numel() for parameter in task.model.parameters())
    frozen = {p for table in task.input_embeddings() for p in table.parameters()} if config.freeze_embeddings else ()
    left = sum(parameter.numel() for parameter in frozen)
    of_them = f", {(size - left) / 1e6:.1f} M of them trained" if frozen else ""
    return f"model {config.model} ({size / 1e6:.1f} M parameters{of_them})", 12 * size - 8 * left


def print_sizes(splits: Splits, word: str, limit: int | None = None) -> None:
    """How many examples there are of each language, on standard error; at most `limit` of them are trained on."""
    for name, of_language in splits.items():
        most = limit or len(of_language.get("train", ()))
        some = f"{most:,} of " if most < len(of_language.get("train", ())) else ""
        sizes = ", ".join(f"{some * (split == 'train')}{len(rows):,} {split}" for split, rows in of_language.items())
        banks = dict.fromkeys(bank for rows in of_language.values() for bank in treebanks_of(rows))
        of = f" ({', '.join(banks)})" if banks else ""
        print(f"  {name}{of}: {sizes} {word}", file=sys.stderr)


def stream_beside(target: str | None) -> TextIO:
    """Where a command prints that also writes to the file `target`: not between the lines of that file."""
    return sys.stderr if target == STDOUT else sys.stdout


@dataclass(frozen=True)
class Row:
    """Scores of one language, or of one of its treebanks; None without a subnetwork.

    Of scores the one that decides comes first; `part` is one of several treebanks.
    """

    language: str
    part: str | None
    examples: int
    words: int
    full: dict[str, float]
    own: dict[str, float] | None = None


def examples_of(task: Task, splits: Splits, split: str) -> dict[str, dict[str | None, Any]]:
    """Language -> treebank -> `Examples` of one split, where there is one; a single treebank is called None."""
    found: dict[str, dict[str | None, Any]] = {}
    for language, of in splits.items():
        if split not in of:
            continue
        rows: Any = of[split]
        banks = list(rows["treebank"]) if "treebank" in getattr(rows, "column_names", ()) else []
        parts: dict[str | None, Any] = {None: rows}
        if len(names := list(dict.fromkeys(banks))) > 1:  # which a code may join
            parts = {name: rows.select([i for i, bank in enumerate(banks) if bank == name]) for name in names}
        there = task.scorable({bank or language: task.examples(part) for bank, part in parts.items()}, split)
        found[language] = {bank: there[bank or language] for bank in parts if (bank or language) in there}
    return found


def scored(task: Task, subnets: Subnetworks | None, tests: Mapping[str, Mapping[str | None, Any]]) -> list[Row]:
    """Score every language with the full network, and with its subnetwork (attached to the task) where it has one."""
    rows = []
    for language, part, examples in ((name, part, of) for name, parts in tests.items() for part, of in parts.items()):
        name = None if subnets is None else same_language(language, subnets.languages)
        own = None if name is None else task.scored(examples, name)
        size = len(examples), int(examples.lengths.sum())
        rows.append(Row(language, part, *size, task.scored(examples, None), own))
    return rows


def print_scores(rows: Sequence[Row], task: Task, file: TextIO, split: str = "test") -> None:
    """The table of a run: full network beside subnetworks, and their means over the languages that have one."""
    names = list(rows[0].full) if rows else [task.metric]

    def mean(whose: str, found: Sequence[Mapping[str, float]]) -> dict[str, str]:
        means = {name: fmean(scores[name] for scores in found) if found else math.nan for name in names}
        return {f"{whose} {heading(name)}": "-" if math.isnan(m) else f"{m:.2f}" for name, m in means.items()}

    def of_languages(scores: Callable[[Row], dict[str, float] | None]) -> list[dict[str, float]]:
        """The scores of each language that has some, mean over its treebanks."""
        found: dict[str, list[dict[str, float]]] = {}
        for row in rows:
            if (of_row := scores(row)) is not None:
                found.setdefault(row.language, []).append(of_row)
        return [{name: fmean(each[name] for each in of) for name in names} for of in found.values()]

    own, table = of_languages(lambda row: row.own), []
    for row in rows:
        called = row.language if row.part is None else f"{row.language} {row.part}"
        cells = {"language": called if row.own is not None or not own else f"{called} (no subnetwork)"}
        cells |= mean("full", [row.full]) | mean("subnet", [] if row.own is None else [row.own])
        table.append(cells)
    counted = of_languages(lambda row: row.full if row.own is not None or not own else None)
    last = {"language": f"mean of {len(counted)}"} | mean("full", counted) | mean("subnet", own)
    title = f"{' / '.join(map(heading, names))} on the {split} sets{', percent' if task.percent else ''}"
    print_table(title, table, file, last=last if len(counted) > 1 else None)


def round_printer(file: TextIO, tau: float, metric: str) -> Callable[[Round], None]:
    """A function that prints one line for each round of pruning down to `tau` (or to a density)."""

    def show(found: Round) -> None:
        counts = [f"{n} {kind}" for kind, n in found.units.items()]
        line = f"  {found.language} round {found.number}: {', '.join(counts)}"
        if found.by_loss:
            line += f"  loss on the scoring examples {found.value:.3f}"
            if found.number == 0:
                line += f" (no dev score to go by; the loss may rise by {-math.log(tau):.3f})"
        elif found.value is not None:
            line += f"  dev {heading(metric)} {found.value:.2f}"
        stopped = "" if found.kept else "  too far: back to the round before"
        tqdm.write(f"{line}{stopped}", file=file)  # above the bar of a run

    return show


def stability_lines(draws: Sequence[Draw]) -> list[str]:
    """For each kind of unit, how much draws agree within a language and between languages; none for a single mask."""
    if sum(len(draw.subnetworks.languages) for draw in draws) < 2:
        return []
    lines = []
    for kind, found in stability(draws).items():
        parts = {"draws of one language": found.draws, "of two languages": found.languages, "by chance": found.chance}
        known = [f"{what} {value:.2f}" for what, value in parts.items() if value is not None]
        lines.append(f"agreement of {kind} (mean Jaccard): {', '.join(known)}")
    return lines
