"""What finished runs are used for: `fastmask evaluate`, `fastmask predict` and `fastmask analyze`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastmask.cli.options import DATA, FILE, RUN, Input, add_data, add_device, output_file, which_data
from fastmask.cli.report import examples_of, print_scores, scored, stream_beside
from fastmask.files import check_writable, write_text
from fastmask.settings import items_of
from fastmask.training.engine import device_of
from fastmask.training.run_folder import load_run

if TYPE_CHECKING:
    from fastmask.reports.page import Part

ANALYSES = "effect,overlap,use,conflict,cross,specificity,typology,ablation,dynamics"


def add_evaluate(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    add = parser.add_argument
    add("run", metavar="RUN", type=RUN, help="folder of a finished run")
    add("--split", default="test", choices=("train", "dev", "test"), help="which part of the data")
    add("--json", metavar="FILE", type=output_file, help="also write the scores to this file (-: standard output)")
    add_data(parser)


def run_evaluate(options: argparse.Namespace) -> None:
    """Score every language; one that the run was not trained on is read by the full network."""
    if options.json:
        check_writable(options.json)
    loaded = load_run(options.run)
    task = loaded.task
    data, languages = which_data(loaded.config, options.run, options)
    splits = task.load(data, languages, loaded.config.task_settings, splits=(options.split,))
    task.model.to(device_of(options.device))
    rows = scored(task, loaded.subnetworks, examples_of(task, splits, options.split))
    print_scores(rows, task, stream_beside(options.json), options.split)
    if options.json:
        write_text(options.json, json.dumps([dataclasses.asdict(row) for row in rows], indent=1))


def add_predict(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    add = parser.add_argument
    add("run", metavar="RUN", type=RUN, help="folder of a finished run")
    add("input", metavar="INPUT", type=FILE, help="file of CoNLL-U (parsing, tags) or JSON lines, - for standard input")
    add("output", metavar="OUTPUT", type=output_file, help="file to write, - for standard output")
    add("--language", help="whose subnetwork to use; the full network if not given")
    add_device(parser)


def run_predict(options: argparse.Namespace) -> None:
    """Read one file with a language's subnetwork, or with the full network."""
    check_writable(options.output)
    loaded = load_run(options.run)
    task = loaded.task
    task.model.to(device_of(options.device))
    with task.reading(options.language):
        count = task.predict_file(options.input, options.output)
    print(f"{count} {task.example_word} written to {options.output}", file=stream_beside(options.output))


def add_analyze(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    add = parser.add_argument
    runs = Input("the folder of a finished run or of a comparison", folder=True)
    add("runs", nargs="+", metavar="RUN", type=runs, help="folders of finished runs, to be compared, or of comparisons")
    add("--what", metavar="LIST", default=ANALYSES, help="comma-separated list of analyses")
    add("--out", metavar="DIR", help="folder of the report (default: RUN/analysis, if there is one RUN)")
    add("--data", metavar="DIR", type=DATA, help="a folder, a file or a name on the Hub; that of the runs if not given")
    add("--sentences", type=int, metavar="N", help="sentences per language to run the model on (default: 64 to 128)")
    add("--seed", type=int, default=0, help="seed for the choice of sentences, random masks and permutations")
    add_device(parser)


def run_analyze(options: argparse.Namespace) -> None:
    """Analyze, and say where the report is and what is not in it."""
    from fastmask.reports import Options, make_report

    if options.sentences is not None and options.sentences < 2:
        raise ValueError(f"--sentences is {options.sentences} (expected at least 2)")
    if options.seed < 0:
        raise ValueError(f"--seed is {options.seed} (expected at least 0)")
    if not (what := items_of(options.what)):
        raise ValueError(f"--what names no analysis (expected some of {ANALYSES})")

    def show(part: Part) -> None:
        took = f"{part.seconds:.0f} s" if part.sections else "skipped"
        print(f"{part.study.title}, {part.analysis}: {took}", file=sys.stderr, flush=True)

    made = make_report(
        options.runs,
        what,
        options.out,
        Options(options.seed, options.sentences, options.data, options.device, options.debug),
        command=options.command_line,
        on_part=show,
    )
    for reason in made.skipped:
        print(f"skipped {reason}")
    print(f"report: {made.report.resolve()} ({made.sections} sections)")
