"""`fastmask evaluate`: scores of a finished run."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence

from fastmask.cli.inputs import RUN
from fastmask.cli.options import add_data, output_file
from fastmask.cli.report import examples_of, print_scores, scored, stream_beside
from fastmask.files import check_writable, write_text
from fastmask.settings import items_of
from fastmask.training.config import TrainConfig
from fastmask.training.run_folder import data_of

__all__ = ["add_options", "run", "which_data"]


def add_options(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("run", metavar="RUN", type=RUN, help="folder of a finished run")
    add("--split", default="test", choices=("train", "dev", "test"), help="which part of the data")
    scores = "also write the scores to this file (-: standard output)"
    add("--json", metavar="FILE", type=output_file, help=scores)
    add_data(parser)


def run(options: argparse.Namespace) -> None:
    """Score every language; one that the run was not trained on is read by the full network."""
    from fastmask.training.engine import device_of
    from fastmask.training.run_folder import load_run

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


def which_data(config: TrainConfig, run: str, options: argparse.Namespace) -> tuple[str, list[str]]:
    """The data and the languages to read: those given, else those of the run."""
    if options.data is None:
        data, languages, _ = data_of(config, run)
    else:
        data, languages = options.data, config.language_list
    given = items_of(",".join(options.languages or []))
    return data, given or languages or config.task_class.languages(data, config.task_settings)
