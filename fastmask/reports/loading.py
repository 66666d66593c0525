"""How a report loads a run: its model, as training left it or at a checkpoint, and examples to run it on."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastmask.files import read_tensors
from fastmask.models import attach
from fastmask.reports.folders import Run
from fastmask.reports.sections import Options, SkipError
from fastmask.settings import items_of
from fastmask.subnetworks import Subnetworks
from fastmask.tasks.task import Task
from fastmask.training.engine import device_of
from fastmask.training.run_folder import MASKS_FILE, WEIGHTS, data_of, load_run

__all__ = ["Data", "Row", "batches_of", "data_for", "score_of", "task_at", "task_of"]

BATCH = 16  # examples that are computed at once, in an order that has nothing to do with their length
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Data:
    """Rows of some languages.

    Attributes:
        splits: language -> split -> rows.
        missing: language, as it was asked for -> why there is nothing of it.
    """

    splits: Mapping[str, Mapping[str, Any]]
    missing: Mapping[str, str]

    def rows(self, language: str, split: str, n: int, seed: int) -> list[Row]:
        """`n` examples of a language, in random order, the same for every run."""
        loaded = self.splits[language][split]
        order = np.random.default_rng([seed, zlib.crc32(f"{language} {split}".encode())]).permutation(len(loaded))
        return [loaded[int(row)] for row in order[:n]]

    def every_row(self, language: str) -> list[Row]:
        """Every example of a language."""
        return [row for rows in self.splits[language].values() for row in rows]


def data_for(run: Run, split: str | None, data: str | None = None, more: str = "") -> Data:
    """What has a split of the languages that a run was trained on, and of `more` languages.

    Args:
        run: whose settings say where it is.
        split: that is needed, or None: any.
        data: another place.
        more: further languages, by commas.

    Raises:
        SkipError: there is no such place.
    """
    config = run.config
    wanted: dict[str, Any] = {"splits": (split,)} if split else {"optional": ("train", "dev", "test")}
    try:
        where, languages, _ = data_of(config, run.folder) if data is None else (data, config.language_list, [])
        languages = languages or config.task_class.languages(where, config.task_settings)
    except FileNotFoundError as error:
        raise SkipError(f"{error}: name the data with --data") from None
    splits: dict[str, Mapping[str, Any]] = {}
    missing: dict[str, str] = {}
    for item in dict.fromkeys([*languages, *items_of(more)]):
        try:
            for name, of in config.task_class.load(where, item, config.task_settings, **wanted).items():
                splits.setdefault(name, of)
        except FileNotFoundError as error:
            raise SkipError(f"{error}: name the data with --data") from None
        except KeyError:
            missing[item] = f"there is no data of it in {where}"
        except ValueError as error:
            missing[item] = str(error).splitlines()[0]
    return Data(splits, missing)


def task_of(run: Run, options: Options, attached: bool = True) -> tuple[Task, Subnetworks | None]:
    """The model of a finished run and its subnetworks, attached or not; None for method `full`."""
    loaded = load_run(run.folder, attached=attached)
    loaded.task.model.to(device_of(options.device))
    return loaded.task, loaded.subnetworks


def task_at(run: Run, checkpoint: Path, options: Options) -> tuple[Task, Subnetworks | None]:
    """The model as it was at a checkpoint, with the subnetworks of that moment attached (None before the switch).

    Raises:
        FileError: the checkpoint's weights are damaged, or not those of the run's model.
    """
    task, _ = task_of(run, options, attached=False)
    task.model.load_state_dict(read_tensors(checkpoint / WEIGHTS)[0])
    masks = checkpoint / MASKS_FILE
    subnets = Subnetworks.load(masks) if masks.is_file() else None
    if subnets is not None:
        attach(task.encoder, subnets)
    return task, subnets


def batches_of(task: Task, rows: Sequence[Row], name: str) -> list[Any]:
    """Rows of language `name` as batches of `BATCH`, in their order, without those that cannot be trained on.

    Raises:
        ValueError: none is left.
    """
    examples = task.training_examples(rows, name)
    places = np.arange(len(examples))
    pieces = [places[first : first + BATCH] for first in range(0, len(places), BATCH)]
    return [task.collate(examples.select(piece)).to(task.device) for piece in pieces]


def score_of(task: Task, rows: Sequence[Row], networks: Mapping[str, str | None]) -> dict[str, float]:
    """`Task.metric` of the rows under each of the attached subnetworks that are named, None: the full network."""
    examples, found = task.examples(rows), {}
    for name, network in networks.items():
        with task.reading(network):
            found[name] = task.score(examples, task.predict(examples))[task.metric]
    return found
