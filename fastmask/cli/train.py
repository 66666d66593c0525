"""`fastmask train`: from settings to a trained run, a table and a picture."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from fastmask.cli.options import given_settings
from fastmask.cli.report import print_scores, print_summary, round_printer, scored
from fastmask.files import check_writable, write_text
from fastmask.literal import say
from fastmask.training.config import TrainConfig
from fastmask.training.run_folder import CONFIG_FILE, check_out

__all__ = ["run"]

RESULTS_FILE = "results.json"
EMBEDDED_STEPS = 600  # about a minute and a half on two cores


def run(options: argparse.Namespace) -> None:
    """Train, score every language with the full network and with its subnetwork, and say where everything is.

    Of several processes (`torchrun`, `accelerate launch`) the first one scores and speaks.
    """
    from fastmask.tasks.data import synthetic
    from fastmask.tasks.parsing.evaluation import prepare
    from fastmask.training.build import build_parser
    from fastmask.training.data import data_of_run, load_training_data
    from fastmask.training.loop import train
    from fastmask.training.methods import check_subnetworks, subnetworks_of

    config = _config(options)
    check_out(config)  # before anything is written or computed
    check_writable(Path(config.out, CONFIG_FILE))
    data, languages = data_of_run(config, config.out)
    first = os.environ.get("RANK", "0") == "0"
    if config.data is None and first:
        say(f"no --data given: training on the embedded artificial languages ({data})", sys.stderr)
    datasets = load_training_data(data, languages)
    parser = build_parser(config, datasets)
    check_subnetworks(parser, config, datasets)
    tests: dict[str, Any] = {}
    if first:  # what cannot be scored is said before training
        tests = {code: splits["test"] for code, splits in datasets.items() if "test" in splits}
        if config.data is None:
            tests |= _unseen(data, [code for code in synthetic.UNSEEN if code not in datasets])
        tests = {code: prepare(parser, rows) for code, rows in tests.items()}
    show = sys.stderr.isatty()
    on_round = round_printer(sys.stderr, config.tau) if first else None
    result = train(parser, datasets, config, lambda point: subnetworks_of(point, on_round), progress=show)
    if not first:
        return

    rows = scored(result.parser, result.subnetworks, tests)
    folder = Path(config.out)
    speed = _training_speed(result.history, config)
    report = {
        "settings": dataclasses.asdict(config),
        "training_words_per_second": speed,
        "budget": dataclasses.asdict(result.budget),
        "scouting_share": result.scouting_share,
        "test": [dataclasses.asdict(row) for row in rows],
    }
    write_text(folder / RESULTS_FILE, json.dumps(report, indent=1), follow=False)
    pictures = []
    if result.subnetworks is not None:
        from fastmask.cli.pictures import head_use

        pictures.append(folder / "head_use.png")
        head_use(result.subnetworks, pictures[0], follow=False)
    print_scores(rows, sys.stdout)
    print_summary(folder, speed, result.scouting_share, pictures, sys.stdout)


def _config(options: argparse.Namespace) -> TrainConfig:
    """The settings of the run that is resumed or of a file, under those given on the command line."""
    given = given_settings(options)
    started = Path(given.get("out", TrainConfig.out), CONFIG_FILE)
    file = options.config or (started if given.get("resume") and started.is_file() else None)
    if file == started:
        given["out"] = os.fspath(started.parent)  # where it is now, whatever its settings say
    base = TrainConfig.load(file) if file else TrainConfig()
    config = TrainConfig.from_dict({**dataclasses.asdict(base), **given})
    if config.data is None and file is None and "steps" not in given:
        config = dataclasses.replace(config, steps=EMBEDDED_STEPS)
    if config.data is not None and not os.path.isdir(config.data):
        raise FileNotFoundError(f"no folder of treebanks at {config.data}")
    return config


def _unseen(data: Any, languages: list[str]) -> dict[str, Any]:
    from fastmask.tasks.data.treebanks import load_treebanks

    return {code: splits["test"] for code, splits in load_treebanks(data, languages, splits=("test",)).items()}


def _training_speed(history: list[dict[str, Any]], config: TrainConfig) -> dict[str, float]:
    """Median words/s of training before and after the switch to subnetworks or episodes."""
    import statistics

    switch, after = config.switch_step, "subnetworks" if config.meta == "none" else "episodes"
    speeds: dict[str, list[float]] = {"full_network": [], after: []}
    for record in history:
        if "words_per_second" in record:
            before = switch is None or record["step"] <= switch
            speeds["full_network" if before else after].append(record["words_per_second"])
    return {name: statistics.median(values) for name, values in speeds.items() if values}
