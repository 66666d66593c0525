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
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {target}: there is no folder {target.parent}")
    found = []
    for folder in options.runs:
        run = load_run(folder, attached=False)
        config = dataclasses.replace(run.config, **given_settings(options))
        data, languages = data_of(run.config, folder, options)
        datasets = load_training_data(data, languages)
        run.parser.to(device_of(options.device))
        train = encode_training_data(run.parser, datasets, config.max_length)
        dev = {code: splits["dev"] for code, splits in datasets.items() if "dev" in splits}
        for seed in range(config.seed, config.seed + options.seeds):
            print(f"{folder}, seed {seed}", file=sys.stderr)
            found.append(discover_for_parser(run.parser, train, dev, config, seed, round_printer(sys.stderr)))
    subnets = combine(found, options.combine)
    made_from = {"runs": options.runs, "seeds": options.seeds, "combine": options.combine, **given_settings(options)}
    subnets.save(target, {"made_from": json.dumps(made_from)})
    print_masks(subnets, sys.stdout)
    print(f"written to {target}")
