"""`fastmask discover`: subnetworks of finished runs, over several seeds, in one file."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from fastmask.cli.masks import print_masks
from fastmask.cli.options import given_settings
from fastmask.cli.report import round_printer
from fastmask.files import check_writable, replace_file
from fastmask.training.config import TrainConfig

__all__ = ["run"]


def run(options: argparse.Namespace) -> None:
    """Find, combine, save and show."""
    from fastmask.cli.evaluate import data_of
    from fastmask.discovery import combine
    from fastmask.training.build import encode_training_data
    from fastmask.training.data import load_training_data
    from fastmask.training.device import device_of
    from fastmask.training.finished import load_run
    from fastmask.training.methods import discover_for_parser

    if options.seeds < 1:
        raise ValueError(f"--seeds is {options.seeds} (expected at least 1)")
    target = Path(options.masks)
    check_writable(target)
    found = []
    loaded = {folder: load_run(folder, attached=False) for folder in options.runs}
    _check_comparable({folder: run.config for folder, run in loaded.items()})
    prepared = {}
    for folder, run in loaded.items():  # all of them before the first one is worked on
        config = dataclasses.replace(run.config, **given_settings(options))
        datasets = load_training_data(*data_of(run.config, folder, options))
        train = encode_training_data(run.parser, datasets, config.max_length)
        prepared[folder] = config, train, {code: splits["dev"] for code, splits in datasets.items() if "dev" in splits}
    for folder, run in loaded.items():
        config, train, dev = prepared[folder]
        run.parser.to(device_of(options.device))
        for seed in range(config.seed, config.seed + options.seeds):
            print(f"{folder}, seed {seed}", file=sys.stderr)
            found.append(discover_for_parser(run.parser, train, dev, config, seed, round_printer(sys.stderr)))
    subnets = combine(found, options.combine)
    made_from = {"runs": options.runs, "seeds": options.seeds, "combine": options.combine, **given_settings(options)}
    replace_file(target, lambda path: subnets.save(path, {"made_from": json.dumps(made_from)}))
    print_masks(subnets, sys.stdout)
    print(f"written to {target}")


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
