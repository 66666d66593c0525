"""`fastmask discover`: subnetworks of finished runs, over several draws of scoring sentences, in one file, and
`fastmask masks`: what such a file holds.

A language's subnetwork comes from the runs that have it: runs of one encoder on the same languages, or one run for
each language alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any, TextIO

from fastmask.cli.options import MASKS, RUN, add_data, add_settings, given_settings, output_file, which_data
from fastmask.cli.report import print_table, round_printer, stability_lines, stream_beside
from fastmask.compare.plan import FOUND_BY
from fastmask.discovery import VOTES, Draw, combine
from fastmask.files import check_writable, read_metadata
from fastmask.settings import ConfigError
from fastmask.subnetworks import Subnetworks
from fastmask.subnetworks.subnetworks import masks_file
from fastmask.tasks.task import Task
from fastmask.training.config import TrainConfig
from fastmask.training.engine import device_of
from fastmask.training.methods import draws_for, training_data
from fastmask.training.run_folder import load_run


def add_discover(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    add = parser.add_argument
    runs = "finished runs of one encoder, on the same or different languages"
    add("runs", nargs="+", metavar="RUN", type=RUN, help=runs)
    masks = "where to write the subnetworks (-: standard output)"
    add("--masks", metavar="FILE", type=output_file, default="masks.safetensors", help=masks)
    votes = "which units are kept of those that draws keep; most: as many as a draw keeps, those with the most votes"
    default = "most with a density, else majority"
    add("--combine", choices=VOTES, help=f"{votes} (default: {default})")
    settings = ("score", "units", "density", "tau", "score_sentences", "draws", "dev_sentences", "seed")
    add_settings(parser, only=settings, default="that of the run")
    add_data(parser)


def run_discover(options: argparse.Namespace) -> None:
    """Find, combine, check, save and show."""
    check_writable(options.masks)
    runs = _runs(options)
    draws: list[Draw] = []
    for folder, task, config, train, dev in runs:
        print(f"{folder}: {', '.join(train)}", file=sys.stderr)
        draws += draws_for(task, train, dev, config, round_printer(sys.stderr, config.tau, task.metric))
    config = runs[0][2]
    options.combine = options.combine or ("majority" if config.density is None else "most")
    subnets = combine(draws, options.combine)
    subnets.save(options.masks, {"made_from": json.dumps(_made_from(options, config, draws))})
    stream = stream_beside(options.masks)
    print_masks(subnets, stream)
    for line in (*stability_lines(draws), f"written to {options.masks}"):
        print(line, file=stream)


def _runs(options: argparse.Namespace) -> list[tuple[str, Task, TrainConfig, dict[str, Any], dict[str, Any]]]:
    """Folder, task, settings, training examples and dev rows of every run, once they are known to go together."""
    given = given_settings(options)
    loaded = {folder: load_run(folder, attached=False) for folder in options.runs}
    configs = {folder: dataclasses.replace(run.config, **given) for folder, run in loaded.items()}
    first, *others = loaded
    for other in others:
        # Head 3 of one run is head 3 of another if they started from the same weights.
        started = (loaded[folder].config for folder in (first, other))
        start, another = ((config.model, config.seed if config.model == "small" else None) for config in started)
        if start != another:
            raise ValueError(
                f"{first} and {other} did not start from the same weights (model {start[0]!r} and {another[0]!r}; "
                "'small' starts from its seed): their heads and neurons do not correspond and cannot be combined"
            )
        for name in ("score", "units", "density", *(("tau",) if configs[first].density is None else ())):
            mine, theirs = (getattr(configs[folder], name) for folder in (first, other))
            if mine != theirs:
                raise ConfigError(f"{name} is {mine} in {first}, {theirs} in {other} (expected one: give --{name})")
    runs = []
    for folder, run in loaded.items():
        data, languages = which_data(run.config, folder, options)
        datasets = run.task.load(data, languages, configs[folder].task_settings, optional=("dev", "test"))
        train = training_data(run.task, datasets, configs[folder])
        dev = {name: splits["dev"] for name, splits in datasets.items() if "dev" in splits}
        run.task.model.to(device_of(options.device))
        runs.append((folder, run.task, configs[folder], train, dev))
    return runs


def _made_from(options: argparse.Namespace, config: TrainConfig, draws: Sequence[Draw]) -> dict[str, Any]:
    """What the file says of how it was made: of what, by which vote of how many draws of a language, and how found."""
    most = max(Counter(name for draw in draws for name in draw.subnetworks.languages).values())
    by = [name for name in FOUND_BY if name != ("density" if config.density is None else "tau")]
    vote = None if most == 1 else options.combine
    return {"runs": options.runs, "vote": vote, **{name: getattr(config, name) for name in by}, "draws": most}


def add_masks(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    file = "file that `train` or `discover` wrote, or the folder of a run"
    parser.add_argument("file", metavar="FILE", type=MASKS, help=file)


def run_masks(options: argparse.Namespace) -> None:
    """Print the table."""
    print_masks(Subnetworks.load(options.file), sys.stdout)
    if made_from := read_metadata(masks_file(options.file)).get("made_from"):
        print(f"made from {made_from}")


def print_masks(subnets: Subnetworks, file: TextIO) -> None:
    """A row for each language: units kept, live heads of each layer, and its most similar other language."""
    overlap = subnets.overlap().fill_diagonal_(-1)
    rows = []
    for index, language in enumerate(subnets.languages):
        row = {"language": language}
        for kind, keep in subnets.units.items():
            row[f"{kind} of {keep[0].numel()}"] = str(int(keep[index].sum()))
            row[f"{kind} by layer"] = " ".join(str(n) for n in keep[index].sum(-1).tolist())
        for name, keep in (subnets.weights or {}).items():
            row[f"% of {name}"] = f"{keep[index].float().mean() * 100:.1f}"
        if len(subnets.languages) > 1:
            nearest = int(overlap[index].argmax())
            row["nearest (Jaccard)"] = f"{subnets.languages[nearest]} {overlap[index, nearest]:.2f}"
        rows.append(row)
    words = ("heads by layer", "neurons by layer", "nearest (Jaccard)")
    print_table(f"subnetworks of {len(subnets.languages)} languages", rows, file, left=words)
