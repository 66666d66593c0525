"""`fastmask analyze`: every analysis of runs and comparisons, as one page with its tables and pictures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastmask.cli.inputs import DATA, Input
from fastmask.cli.options import add_device
from fastmask.settings import items_of

if TYPE_CHECKING:
    from fastmask.reports.page import Part

__all__ = ["add_options", "run"]

RUNS = Input("the folder of a finished run or of a comparison", folder=True)
NAMES = "effect,overlap,heads,conflict,cross,typology,ablation,dynamics"


def add_options(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Add the command's options."""
    add = parser.add_argument
    runs = "folders of finished runs, put side by side, and of comparisons"
    add("runs", nargs="+", metavar="RUN", type=RUNS, help=runs)
    add("--what", metavar="LIST", default=NAMES, help="which analyses, by commas")
    add("--out", metavar="DIR", help="folder of the report (default: RUN/analysis, if there is one RUN)")
    add("--data", metavar="DIR", type=DATA, help="folder of UD treebanks; that of the runs if not given")
    add("--sentences", type=int, metavar="N", help="of each language, for what runs the model (default: 64 to 200)")
    add("--seed", type=int, default=0, help="of the draw of sentences, random masks and permutations")
    add_device(parser)


def run(options: argparse.Namespace) -> None:
    """Analyse, and say where the report is and what is not in it."""
    from fastmask.reports import Options, make_report

    if options.sentences is not None and options.sentences < 2:
        raise ValueError(f"--sentences is {options.sentences} (expected at least 2)")
    if options.seed < 0:
        raise ValueError(f"--seed is {options.seed} (expected at least 0)")
    if not (what := items_of(options.what)):
        raise ValueError(f"--what names no analysis (expected some of {NAMES})")
    made = make_report(
        options.runs,
        what,
        options.out,
        Options(options.seed, options.sentences, options.data, options.device, options.debug),
        command=options.command_line,
        on_part=_show,
    )
    for reason in made.skipped:
        print(f"skipped {reason}")
    print(f"report: {made.report.resolve()} ({made.sections} sections)")


def _show(part: Part) -> None:
    """One line for each analysis that is done."""
    what = f"{part.seconds:.0f} s" if part.sections else "skipped"
    print(f"{part.study.title}, {part.analysis}: {what}", file=sys.stderr, flush=True)
