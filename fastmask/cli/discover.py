"""`fastmask discover`: subnetworks of finished runs, over several draws of scoring sentences, in one file.

A language's subnetwork comes from the runs that have it: runs of one encoder on the same languages, or one run for
each language alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastmask.cli.inputs import RUN
from fastmask.cli.masks import print_masks
from fastmask.cli.options import add_data, add_settings, given_settings, output_file
from fastmask.cli.report import round_printer, stability_lines, stream_beside
from fastmask.discovery import VOTES
from fastmask.files import check_writable
from fastmask.settings import ConfigError
from fastmask.training.config import TrainConfig

if TYPE_CHECKING:
    from fastmask.discovery import Draw
    from fastmask.subnetworks import Subnetworks
    from fastmask.tasks.task import Task

__all__ = ["add_options", "run"]


def add_options(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Add the command's options."""
    add = parser.add_argument
    runs = "finished runs of one encoder, on the same languages or others"
    add("runs", nargs="+", metavar="RUN", type=RUN, help=runs)
    masks = "where to write the subnetworks (-: standard output)"
    add("--masks", metavar="FILE", type=output_file, default="masks.safetensors", help=masks)
    votes = "vote of the draws; with a density, the units with the most votes are kept, whatever this is"
    add("--combine", choices=tuple(VOTES), default="majority", help=votes)
    settings = ("score", "units", "density", "tau", "score_sentences", "draws", "dev_sentences", "seed")
    add_settings(parser, only=settings, default="that of the run")
    add_data(parser)


@dataclasses.dataclass(frozen=True)
class _Run:
    """A finished run with all that discovery reads."""

    folder: str
    task: Task
    config: TrainConfig
    train: Mapping[str, Any]
    dev: Mapping[str, Any]


def run(options: argparse.Namespace) -> None:
    """Find, combine, check, save and show."""
    from fastmask.discovery import combine
    from fastmask.training.methods import draws_for

    check_writable(options.masks)
    runs = _runs(options)
    config = runs[0].config
    draws: list[Draw] = []
    for one in runs:
        print(f"{one.folder}: {', '.join(one.train)}", file=sys.stderr)
        show = round_printer(sys.stderr, config.tau, one.task.metric)
        draws += draws_for(one.task, one.train, one.dev, one.config, show)
    subnets = combine(draws, options.combine, config.density)
    made_from = _made_from(options, config, draws, subnets)
    subnets.save(options.masks, {"made_from": json.dumps(made_from)})
    stream = stream_beside(options.masks)
    print_masks(subnets, stream)
    print(_kept(made_from, draws), file=stream)
    for line in stability_lines(draws):
        print(line, file=stream)
    print(f"written to {options.masks}", file=stream)


def _runs(options: argparse.Namespace) -> list[_Run]:
    """Load every run, and see before anything is computed that their subnetworks can be combined."""
    from fastmask.cli.evaluate import which_data
    from fastmask.training.engine import device_of
    from fastmask.training.run_folder import load_run

    given = given_settings(options)
    if {"tau", "density"} <= given.keys():
        raise ConfigError("--tau and --density are both given (expected one: a density is kept whatever tau is)")
    if "tau" in given:
        given["density"] = None  # else that of the run would count
    loaded = {folder: load_run(folder, attached=False) for folder in options.runs}
    _check_comparable({folder: run.config for folder, run in loaded.items()})
    runs = []
    for folder, run in loaded.items():
        config = dataclasses.replace(run.config, **given)
        data, languages = which_data(run.config, folder, options)
        datasets = run.task.load(data, languages, config.task_settings, optional=("dev", "test"))
        train = {name: run.task.training_examples(splits["train"], name) for name, splits in datasets.items()}
        dev = {name: splits["dev"] for name, splits in datasets.items() if "dev" in splits}
        run.task.model.to(device_of(options.device))
        runs.append(_Run(folder, run.task, config, train, dev))
    first = runs[0]
    for other in runs[1:]:
        for name in ("score", "units", "density", *(("tau",) if first.config.density is None else ())):
            values = getattr(first.config, name), getattr(other.config, name)
            if values[0] != values[1]:
                raise ConfigError(
                    f"{name} is {values[0]} in {first.folder} and {values[1]} in {other.folder} "
                    f"(expected the same: give --{name})"
                )
    return runs


def _check_comparable(configs: dict[str, TrainConfig]) -> None:
    """See that head 3 of one run is head 3 of the others: they must have started from the same weights."""
    first, *others = configs
    for other in others:
        start, another = ((c.model, c.seed if c.model == "small" else None) for c in (configs[first], configs[other]))
        if start != another:
            raise ValueError(
                f"{first} and {other} did not start from the same weights (model {start[0]!r} and {another[0]!r}; "
                "'small' starts from its seed): their heads and neurons do not correspond and cannot be combined"
            )


def _made_from(
    options: argparse.Namespace, config: TrainConfig, draws: Sequence[Draw], subnets: Subnetworks
) -> dict[str, Any]:
    """What the file says of how it was made: of what, by which vote of how many draws of a language, what is kept."""
    from fastmask.discovery import stability

    asked = {"tau": config.tau} if config.density is None else {"density": config.density}
    most = max(Counter(name for draw in draws for name in draw.subnetworks.languages).values())
    vote = None if most == 1 else options.combine if config.density is None else "most votes"
    kept = {
        kind: {name: round(float(share), 4) for name, share in zip(subnets.languages, shares, strict=True)}
        for kind, shares in subnets.density.items()
    }
    found = {"runs": options.runs, "draws": most, "vote": vote, "units": config.units}
    more = {"score": config.score, "score_sentences": config.score_sentences, "kept": kept}
    if sum(len(draw.subnetworks.languages) for draw in draws) > 1:
        agree = {kind: dataclasses.asdict(numbers) for kind, numbers in stability(draws).items()}
        more["stability"] = {
            kind: {name: None if value is None else round(value, 4) for name, value in numbers.items()}
            for kind, numbers in agree.items()
        }
    return {**found, **asked, **more}


def _kept(made_from: Mapping[str, Any], draws: Sequence[Draw]) -> str:
    """One line: how much is kept, by which vote, and how much each draw kept."""
    parts = []
    for kind, shares in made_from["kept"].items():
        mean = sum(shares.values()) / len(shares)
        of_draws = [float(draw.subnetworks.density[kind].mean()) for draw in draws]
        low, high = min(of_draws), max(of_draws)
        each = f"{low:.1%}" if f"{low:.1%}" == f"{high:.1%}" else f"{low:.1%} to {high:.1%}"
        parts.append(f"{mean:.1%} of {kind}" + (f" (each draw {each})" if len(draws) > 1 else ""))
    how = {None: "", "most votes": f", those with the most votes of {made_from['draws']} draws"}
    text = how.get(made_from["vote"], f", by {made_from['vote']} of {made_from['draws']} draws")
    return f"kept, mean over languages: {' and '.join(parts)}{text}"
