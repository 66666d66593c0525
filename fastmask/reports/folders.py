"""What the folders are that a report is made of: training runs, and comparisons of many."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd

from fastmask.compare.plan import SETTINGS_FILE, Plan, is_done
from fastmask.compare.report import load_results
from fastmask.compare.tables import scores_table
from fastmask.subnetworks import Subnetworks
from fastmask.tasks.task import heading
from fastmask.training.config import TrainConfig
from fastmask.training.run_folder import CONFIG_FILE, MASKS_FILE, check_finished

__all__ = ["CONTROLS", "Run", "Study", "studies_of", "variant_name"]

CONTROLS = ("random", "permuted", "shuffled", "shared", "vector")
"""Methods whose masks are made to be compared with, and not analysed where there are others."""


@dataclass(frozen=True)
class Run:
    """One finished training run.

    Attributes:
        folder: of the run.
        config: its settings.
        variant: what it is called beside others, the same for all seeds: of a comparison the arm, else its method and
            meta-learning.
    """

    folder: Path
    config: TrainConfig
    variant: str

    @property
    def masks(self) -> Subnetworks | None:
        """The run's subnetworks, None for method `full`."""
        file = self.folder / MASKS_FILE
        return Subnetworks.load(file) if file.is_file() else None

    @property
    def finished(self) -> datetime.date:
        """The day on which the model was written."""
        return datetime.date.fromtimestamp((self.folder / "model").stat().st_mtime)


@dataclass(frozen=True)
class Study:
    """Runs that are put side by side.

    Attributes:
        title: a comparison's folder, or the runs'.
        runs: the finished ones, by variant and seed.
        unfinished: names of those that are not, of a comparison.
        scores: of a comparison: the rows of its ``results.csv`` (seed, arm, language, condition, score, ...).
        baselines: of a comparison: method "full" or "random" -> arm -> the arm that it is compared with.
        unseen: the languages that are only tested on, as they are named in the settings.
        settings: to show.
    """

    title: str
    runs: tuple[Run, ...]
    unfinished: tuple[str, ...] = ()
    scores: pd.DataFrame | None = None
    baselines: Mapping[str, Mapping[str, str]] | None = None
    unseen: str = ""
    settings: Mapping[str, Any] | None = None

    @property
    def variants(self) -> dict[str, list[Run]]:
        """Variant -> its runs, by seed."""
        found: dict[str, list[Run]] = {}
        for run in self.runs:
            found.setdefault(run.variant, []).append(run)
        return {name: sorted(runs, key=lambda run: run.config.seed) for name, runs in found.items()}

    @property
    def languages(self) -> list[str]:
        """Those that have subnetworks or scores."""
        owning = [name for run in self.runs if (masks := run.masks) is not None for name in masks.languages]
        scored = [] if self.scores is None else list(self.scores["language"])
        return list(dict.fromkeys(owning + scored))

    @property
    def metric(self) -> str:
        """What the score of the runs' task is called."""
        task = self.runs[0].config.task_class
        return heading(task.metric) + ("" if task.higher_is_better else " (lower is better)")

    @property
    def analysed(self) -> dict[str, list[Run]]:
        """The variants without the controls, where there are any others."""
        others = {name: runs for name, runs in self.variants.items() if runs[0].config.method not in CONTROLS}
        return others or self.variants

    @property
    def masked(self) -> dict[str, list[tuple[Run, Subnetworks]]]:
        """The analysed variants that have subnetworks, with them; of several with the same ones the first."""
        found: dict[str, list[tuple[Run, Subnetworks]]] = {}
        for name, runs in self.analysed.items():
            with_masks = [(run, masks) for run in runs if (masks := run.masks) is not None]
            mine = [(run.config.seed, masks) for run, masks in with_masks]
            known = [[(run.config.seed, masks) for run, masks in others] for others in found.values()]
            if with_masks and mine not in known:
                found[name] = with_masks
        return found


def variant_name(method: str, meta: str) -> str:
    """What a method with a kind of meta-learning is called."""
    return method if meta == "none" else f"{method} + {'FOMAML' if meta == 'fomaml' else meta.capitalize()}"


def studies_of(folders: Sequence[str | PathLike[str]]) -> list[Study]:
    """The training runs among the folders as one study, and each comparison as one of its own.

    Raises:
        FileNotFoundError: no such folder, neither a run nor a comparison, a run that has not finished, or a comparison
            without a finished cell.
    """
    studies, runs = [], []
    for folder in {os.path.realpath(given): Path(given) for given in folders}.values():
        if (folder / SETTINGS_FILE).is_file():
            studies.append(_comparison(folder))
        elif (folder / CONFIG_FILE).is_file():
            check_finished(folder)
            runs.append((folder, TrainConfig.load(folder / CONFIG_FILE)))
        elif not folder.is_dir():
            raise FileNotFoundError(f"no run at {folder}: there is no such folder")
        else:
            inside = [name for name in ("run", "final") if (folder / name / CONFIG_FILE).is_file()]
            hint = f"; did you mean {folder / inside[0]}?" if inside else ""
            raise FileNotFoundError(
                f"{folder} holds neither a run of `fastmask train` ({CONFIG_FILE}) nor a comparison of "
                f"`fastmask compare` ({SETTINGS_FILE}){hint}"
            )
    return ([_alone(runs)] if runs else []) + studies


def _alone(given: Sequence[tuple[Path, TrainConfig]]) -> Study:
    """A study of runs that were trained one by one."""
    runs = []
    above = Path(os.path.commonpath([folder.resolve().parent for folder, _ in given]))
    labels = [folder.resolve().relative_to(above).as_posix() for folder, _ in given]
    for (folder, config), label in zip(given, labels, strict=True):
        name = variant_name(config.method, config.meta)
        alike = [other for where, other in given if where != folder and variant_name(other.method, other.meta) == name]
        if any(other.seed == config.seed or config.differences(other).keys() - {"seed", "masks"} for other in alike):
            name = f"{name} ({label})"
        runs.append(Run(folder, config, name))
    shown = [demo for folder, config in given if config.data is None and (demo := config.task_class.demo(folder))]
    unseen = ",".join(shown[0][2]) if len(shown) == len(given) else ""
    return Study(", ".join(labels), tuple(runs), unseen=unseen)


def _comparison(folder: Path) -> Study:
    """A study of the cells of a comparison that are done."""
    plan = Plan.stored(folder)
    runs, unfinished = [], []
    for job in plan.cells:
        run = plan.folder(job) / "run"
        if is_done(plan, job) and (run / CONFIG_FILE).is_file():
            check_finished(run)
            runs.append(Run(run, TrainConfig.load(run / CONFIG_FILE), job.arm))
        else:
            unfinished.append(job.name)
    if not runs:
        raise FileNotFoundError(f"the comparison in {folder} has no finished cell yet")
    scores = scores_table(load_results(plan))
    settings = {"comparison": plan.settings["comparison"], "training": plan.training}
    settings |= {f"arm {arm}": own for arm, own in plan.arms.items()}
    return Study(
        folder.resolve().name, tuple(runs), tuple(unfinished), scores, plan.baselines, plan.config.unseen, settings
    )
