"""`fastmask train`: from settings to a trained run and a table."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastmask.cli.options import FILE, add_settings, add_task_settings, given_settings
from fastmask.cli.report import examples_of, model_of, print_scores, print_sizes, round_printer, scored, stability_lines
from fastmask.discovery import Draw
from fastmask.files import check_writable, write_text
from fastmask.settings import ConfigError
from fastmask.subnetworks import Subnetworks
from fastmask.tasks.task import Splits, Task
from fastmask.training.config import Budget, TrainConfig
from fastmask.training.engine import device_of
from fastmask.training.loop import train
from fastmask.training.methods import check_subnetworks, subnetworks_of
from fastmask.training.run_folder import CONFIG_FILE, RESULTS_FILE, check_out, data_of

# Of the demonstration, whose sentences are short: with fewer of them, masks would have too few tokens to save anything.
EMBEDDED = {"steps": 450, "batch_size": 64}
FILES = {
    RESULTS_FILE: "this table",
    "metrics.jsonl": "loss and dev scores",
    "model": "the model",
    "masks.safetensors": "subnetworks",
    "dynamic.safetensors": "how the subnetworks changed",
}


def add_train(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    parser.add_argument("--config", metavar="FILE", type=FILE, help="YAML file of settings, which options override")
    add_settings(parser)
    add_task_settings(parser, arguments)


def run_train(options: argparse.Namespace) -> None:
    """Train, score every language with the full network and with its subnetwork, and say where everything is.

    Of several processes (`torchrun`, `accelerate launch`) the first one scores and speaks.
    """
    config = _config(options)
    check_out(config)  # before anything is written or computed
    check_writable(Path(config.out, CONFIG_FILE))
    data, languages, others = data_of(config, config.out)
    task_class, settings = config.task_class, config.task_settings
    first = os.environ.get("RANK", "0") == "0"
    if config.data is None and first:
        print(f"no --data given: training on the embedded artificial languages ({data})", file=sys.stderr)
    datasets = task_class.load(data, languages, settings, optional=("dev", "test"))
    task = task_class.build(config, datasets)
    check_subnetworks(task, config, datasets)
    tests: dict[str, Any] = {}
    if first:  # what cannot be scored is said before training
        unseen = task_class.load(data, others, settings, splits=("test",)) if others else {}
        tests = examples_of(task, {**datasets, **unseen}, "test")
        _print_start(task, config, datasets)
    on_round = round_printer(sys.stderr, config.tau, task.metric) if first else None

    def show_agreement(draws: list[Draw]) -> None:
        for line in stability_lines(draws) if first else ():
            tqdm.write(line, file=sys.stderr)

    where = "before training began"
    try:
        result = train(task, datasets, config, lambda point: subnetworks_of(point, on_round, show_agreement))
        where = f"after step {config.steps}"
        if not first:
            return
        print("scoring the test sets", file=sys.stderr)
        rows = scored(result.task, result.subnetworks, tests)
    except KeyboardInterrupt as error:
        again = shlex.join(["fastmask", "train", "--out", config.out, "--resume"])
        raise KeyboardInterrupt(f"{str(error) or where}; to resume from the last checkpoint: {again}") from None
    speed = _training_speed(result.history, config)
    report = {
        "settings": dataclasses.asdict(config),
        "training_words_per_second": speed,
        "budget": dataclasses.asdict(result.budget),
        "test": [dataclasses.asdict(row) for row in rows],
    }
    folder = Path(config.out)
    write_text(folder / RESULTS_FILE, json.dumps(report, indent=1))
    print_scores(rows, task, sys.stdout)
    print(f"spent: {result.budget}")
    names = {"full_network": "on the full network", "subnetworks": "with subnetworks", "episodes": "in episodes"}
    if speed:
        parts = [f"{value:,.0f} {task.token_word}/s {names[name]}" for name, value in speed.items()]
        print(f"training: {', '.join(parts)}")
    print(f"run: {folder.resolve()}")
    print(f"     {', '.join(f'{name} ({what})' for name, what in FILES.items() if (folder / name).exists())}")


def _config(options: argparse.Namespace) -> TrainConfig:
    """The settings of the run that is resumed or of a file, under those given on the command line."""
    given = given_settings(options)
    started = Path(given.get("out", TrainConfig.out), CONFIG_FILE)
    file = options.config or (started if given.get("resume") and started.is_file() else None)
    if file == started:
        given["out"] = os.fspath(started.parent)  # where it is now, whatever its settings say
    if given.get("resume") and file is None and "data" not in given:
        raise ConfigError(
            f"{given.get('out', TrainConfig.out)} holds no run (expected the folder of one, to resume it)"
        )
    base = TrainConfig.load(file) if file else TrainConfig()
    values = {**dataclasses.asdict(base), **given}
    known = base.task_options if values["task"] == base.task else {}  # else they are of another task
    values["task_options"] = {**known, **given.get("task_options", {})}
    if "masks" in given and values["method"] in ("full", "vector"):
        raise ConfigError(f"--masks is given, and method {values['method']!r} trains no subnetworks (expected another)")
    found_by = [name for name in ("tau", "density", "units", "score", "draws") if name in given]
    if "masks" in given and found_by:
        raise ConfigError(
            f"--masks and --{found_by[0]} are both given (expected one: masks of a file are not looked for)"
        )
    if values["data"] is None and file is None:
        values |= {name: value for name, value in EMBEDDED.items() if name not in given}
    if values["masks"] and values["languages"] is None and values["method"] != "full":
        values["languages"] = ",".join(Subnetworks.load(values["masks"]).languages)
    return TrainConfig.from_dict(values)


def _print_start(task: Task, config: TrainConfig, datasets: Splits) -> None:
    """What is about to be done, on what and where, before it takes long."""
    device = device_of(config.device)
    threads = f", {config.threads or torch.get_num_threads()} threads" if device.type == "cpu" else ""
    model, checkpoint = model_of(task, config)
    kept = -(-config.steps // (config.checkpoint_every or config.steps))
    need = checkpoint * (1 + (config.keep_checkpoints or kept))
    print(
        f"{config.task}, method {config.method}, {model} on {device}{threads}; "
        f"checkpoints take up to {need / 1e9:.1f} GB in {config.out}",
        file=sys.stderr,
    )
    print_sizes(datasets, task.example_word, config.train_sentences)
    print(f"  {Budget.of(config, len(datasets))}", file=sys.stderr)


def _training_speed(history: list[dict[str, Any]], config: TrainConfig) -> dict[str, float]:
    """Median words/s of training before and after the switch to subnetworks or episodes."""
    switch, after = config.switch_step, "subnetworks" if config.meta == "none" else "episodes"
    speeds: dict[str, list[float]] = {"full_network": [], after: []}
    for record in history:
        if "words_per_second" in record:
            before = switch is None or record["step"] <= switch
            speeds["full_network" if before else after].append(record["words_per_second"])
    return {name: statistics.median(values) for name, values in speeds.items() if values}
