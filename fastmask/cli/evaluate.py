"""`fastmask evaluate`: official scores of a finished run."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path

from fastmask.cli.report import print_scores, scored, stream_beside
from fastmask.files import check_writable, write_text
from fastmask.training.config import TrainConfig

__all__ = ["data_of", "run"]


def run(options: argparse.Namespace) -> None:
    """Score every language; one that the run was not trained on is read by the full network."""
    from fastmask.tasks.data.treebanks import load_treebanks
    from fastmask.training.device import device_of
    from fastmask.training.finished import load_run

    if options.json:
        check_writable(options.json)
    loaded = load_run(options.run)
    data, languages = data_of(loaded.config, options.run, options)
    datasets = load_treebanks(data, languages, splits=(options.split,))
    sentences = {code: splits[options.split] for code, splits in datasets.items()}
    rows = scored(loaded.parser.to(device_of(options.device)), loaded.subnetworks, sentences)
    print_scores(rows, stream_beside(options.json), options.split)
    if options.json:
        write_text(options.json, json.dumps([dataclasses.asdict(row) for row in rows], indent=1))


def data_of(config: TrainConfig, run: str, options: argparse.Namespace) -> tuple[str | Path, str]:
    """The folder and the languages to read: those given, else those of the run."""
    from fastmask.training.data import data_of_run, training_languages

    data: str | Path = options.data
    languages = config.languages
    if options.data is None:
        data, languages = data_of_run(config, run)
    if not os.path.isdir(data):
        raise FileNotFoundError(f"no folder of treebanks at {data}" + ("" if options.data else " (of the run)"))
    return data, options.languages or languages or training_languages(data)
