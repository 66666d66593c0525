"""What a report is made of: training runs and comparisons of many, their models, and examples to run these on."""

from __future__ import annotations

import datetime
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fastmask.compare.plan import SETTINGS_FILE, Plan
from fastmask.compare.report import SCORES_FILE, cells_of, load_tables, read_tables
from fastmask.files import StrPath, read_json, read_tensors
from fastmask.models import attach
from fastmask.settings import items_of
from fastmask.subnetworks import Subnetworks
from fastmask.tasks.task import Splits, Task, heading
from fastmask.training import run_folder
from fastmask.training.config import TrainConfig
from fastmask.training.engine import device_of
from fastmask.training.run_folder import CONFIG_FILE, MASKS_FILE, data_of

if TYPE_CHECKING:
    from fastmask.reports.page import Part

CONTROLS = ("random", "permuted", "shuffled", "shared", "vector")
"""Methods whose masks are made to be compared with, and not analysed where there are others."""
BASELINE, CONTROL = "full", "random"  # methods, variants of these alone, and columns of the cross-evaluation
BATCH = 16  # examples that are computed at once, in an order that has nothing to do with their length
Row = Mapping[str, Any]


class SkipError(ValueError):
    """An analysis does not apply; the message says why."""


@dataclass(frozen=True)
class Options:
    """What holds for every analysis."""

    seed: int = 0  # of the sentences that are drawn, and of permutations and random masks
    sentences: int | None = None  # of each language; None: as many as each analysis takes by itself
    data: str | None = None  # folder of the treebanks; None: that of the run
    device: str = "auto"  # where to compute
    strict: bool = False  # an error ends everything, instead of being listed among what was skipped


@dataclass(frozen=True)
class Run:
    """One finished training run."""

    folder: Path
    config: TrainConfig
    variant: str  # the same for all seeds: of a comparison the arm, else method and meta-learning

    @property
    def kept(self) -> bool:
        """Whether its model is there; of a comparison only the scores may be."""
        return (self.folder / CONFIG_FILE).is_file()

    @property
    def tested(self) -> list[Any]:
        """What `fastmask train` scored: rows with "language", "words", "full" and "own"; none where it did not."""
        file = self.folder / run_folder.RESULTS_FILE
        content: dict[str, Any] = read_json(file) if file.is_file() else {}
        return content.get("test") or []

    @property
    def masks(self) -> Subnetworks | None:
        """The run's subnetworks, None for method `full`."""
        file = self.folder / MASKS_FILE
        return Subnetworks.load(file) if file.is_file() else None


@dataclass(frozen=True)
class Study:
    """Runs that are put side by side."""

    title: str
    runs: tuple[Run, ...]  # the finished ones
    days: tuple[str, str] = ("", "")  # on which the first and the last was done
    missing: Mapping[str, str] = field(default_factory=dict)  # of a comparison: its other cells, and why
    scores: pd.DataFrame | None = None  # of a comparison: the rows of its ``results.csv``
    baselines: Mapping[str, Mapping[str, str]] | None = None  # "full" or "random" -> arm -> what it is compared with
    unseen: str = ""  # the languages that are only tested on, by commas
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # to show

    @property
    def kept(self) -> Study:
        """The same, of the runs whose models are there; SkipError where there is none."""
        runs = tuple(run for run in self.runs if run.kept)
        if not runs:
            raise SkipError("the comparison has no models here (--no-keep-models), and this takes more than scores")
        return replace(self, runs=runs)

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
        return list(dict.fromkeys(owning if self.scores is None else [*owning, *self.scores["language"]]))

    @property
    def metric(self) -> str:
        """What the score of the runs' task is called."""
        name = self.runs[0].config.task_class.metric
        if self.scores is not None:  # which tables have first behind the words; a task may choose it by its labels
            name = str(self.scores.columns[self.scores.columns.get_loc("words") + 1])
        elif rows := self.runs[0].tested:
            name = next(iter(rows[0]["full"]))
        return heading(name) + ("" if self.higher_is_better else " (lower is better)")

    @property
    def higher_is_better(self) -> bool:
        """Of that score."""
        return self.runs[0].config.task_class.higher_is_better

    @property
    def example_word(self) -> str:
        """What the runs' task calls examples: sentences, texts."""
        return self.runs[0].config.task_class.example_word

    @property
    def analysed(self) -> dict[str, list[Run]]:
        """The variants without the controls, where there are any others."""
        others = {name: runs for name, runs in self.variants.items() if runs[0].config.method not in CONTROLS}
        return others or self.variants

    @property
    def masked(self) -> dict[str, list[tuple[Run, Subnetworks]]]:
        """The analysed variants with subnetworks, of several alike the first; SkipError where there is none."""
        found: dict[str, list[tuple[Run, Subnetworks]]] = {}
        known: list[list[tuple[int, Subnetworks]]] = []
        for name, runs in self.analysed.items():
            if runs[0].config.method == "vector":  # every language owns everything
                continue
            own = [(run, masks) for run in runs if (masks := run.masks) is not None]
            if own and (by_seed := [(run.config.seed, masks) for run, masks in own]) not in known:
                found[name] = own
                known.append(by_seed)
        if not found:
            raise SkipError("no run has subnetworks (methods full and vector have none)")
        return found


# ---- folders


def studies_of(folders: Sequence[StrPath]) -> list[Study]:
    """The training runs among the folders as one study, and each comparison as one of its own.

    FileNotFoundError says what a folder is instead.
    """
    studies, runs = [], []
    for folder in {os.path.realpath(given): Path(given) for given in folders}.values():
        if (folder / SETTINGS_FILE).is_file():
            studies.append(_comparison(folder))
        elif (folder / CONFIG_FILE).is_file():
            run_folder.check_finished(folder)
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

    def plain(config: TrainConfig) -> str:
        meta = {"none": "", "fomaml": " + FOMAML"}.get(config.meta, f" + {config.meta.capitalize()}")
        return f"{config.method}{meta}"

    runs = []
    above = Path(os.path.commonpath([folder.resolve().parent for folder, _ in given]))
    labels = [folder.resolve().relative_to(above).as_posix() for folder, _ in given]
    for (folder, config), label in zip(given, labels, strict=True):
        alike = [other for where, other in given if where != folder and plain(other) == plain(config)]
        apart = any(other.seed == config.seed or config.differences(other).keys() - {"seed"} for other in alike)
        runs.append(Run(folder, config, f"{plain(config)} ({label})" if apart else plain(config)))
    shown = [demo for folder, config in given if config.data is None and (demo := config.task_class.demo(folder))]
    unseen = ",".join(shown[0][2]) if len(shown) == len(given) else ""
    settings = {folder.name: vars(config) for folder, config in given}
    done = [(folder / "model").stat().st_mtime for folder, _ in given]
    days = [datetime.date.fromtimestamp(time).isoformat() for time in (min(done), max(done))]
    return Study(", ".join(labels), tuple(runs), (days[0], days[1]), unseen=unseen, settings=settings)


def _comparison(folder: Path) -> Study:
    """A study of the cells of a comparison that are done, here or where others did them."""
    plan = Plan.stored(folder)
    scores, cells = load_tables(plan, read_tables(folder) if (folder / SCORES_FILE).is_file() else None)
    done = set(cells_of(cells))
    kept, others, missing = [], [], {}
    for job in plan.cells:
        run = plan.folder(job) / "run"
        if (job.seed, job.arm) not in done:
            missing[job.name] = "this cell is not done yet"
        elif not (run / CONFIG_FILE).is_file():
            others.append(Run(run, plan.settings_of(job.arm, job.seed, run), job.arm))
        else:
            run_folder.check_finished(run)
            kept.append(Run(run, TrainConfig.load(run / CONFIG_FILE), job.arm))
    if kept:  # else every analysis that needs a model says that there is none
        why = "the model of this cell is not here (--no-keep-models, --known)"
        missing |= {run.folder.parent.relative_to(folder).as_posix(): why for run in others}
    if not kept and not others:
        raise FileNotFoundError(f"the comparison in {folder} has no finished cell yet")
    settings = {"comparison": plan.settings["comparison"], "training": plan.training}
    settings |= {f"arm {arm}": own for arm, own in plan.arms.items()}
    days, runs = (cells["day"].min(), cells["day"].max()), (*kept, *others)
    return Study(folder.resolve().name, runs, days, missing, scores, plan.baselines, plan.config.unseen, settings)


# ---- models and examples


def load_data(run: Run, split: str | None, data: str | None = None, more: str = "") -> tuple[Splits, dict[str, str]]:
    """What has a split (None: any) of the languages that a run was trained on, and of `more`, by commas.

    Returns:
        Language -> split -> rows; and language, as it was asked for -> why there is nothing of it.
    """
    config = run.config
    if data is None and not run.kept:
        raise SkipError("a comparison that kept no models does not know where its data is: name it with --data")
    wanted: dict[str, Any] = {"splits": (split,)} if split else {"optional": ("train", "dev", "test")}
    splits: dict[str, Mapping[str, Any]] = {}
    missing: dict[str, str] = {}
    try:
        where, languages, _ = data_of(config, run.folder) if data is None else (data, config.language_list, [])
        languages = languages or config.task_class.languages(where, config.task_settings)
        for item in dict.fromkeys([*languages, *items_of(more)]):
            try:
                found = config.task_class.load(where, item, config.task_settings, **wanted)
                for name, of_language in found.items():
                    splits.setdefault(name, of_language)
            except KeyError:
                missing[item] = f"there is no data of it in {where}"
            except ValueError as error:
                missing[item] = str(error).splitlines()[0]
    except FileNotFoundError as error:
        raise SkipError(f"{error}: name the data with --data") from None
    return splits, missing


def drawn(splits: Splits, language: str, split: str, n: int, seed: int) -> list[Row]:
    """`n` examples of a language, in random order, the same for every run."""
    rows = splits[language][split]
    order = np.random.default_rng([seed, zlib.crc32(f"{language} {split}".encode())]).permutation(len(rows))
    return [rows[int(row)] for row in order[:n]]


def task_of(run: Run, options: Options, attached: bool = True) -> tuple[Task, Subnetworks | None]:
    """The model of a finished run and its subnetworks, attached or not; None for method `full`."""
    loaded = run_folder.load_run(run.folder, attached=attached)
    loaded.task.model.to(device_of(options.device))
    return loaded.task, loaded.subnetworks


def task_at(run: Run, checkpoint: Path, options: Options) -> tuple[Task, Subnetworks | None]:
    """The model as it was at a checkpoint, with the subnetworks of that moment attached (None before the switch)."""
    task, _ = task_of(run, options, attached=False)
    masks = checkpoint / MASKS_FILE
    # Before the switch a run of method vector has no vectors; without subnetworks attached, its model reads none.
    has_all = run.config.method != "vector" or masks.is_file()
    task.model.load_state_dict(read_tensors(checkpoint / run_folder.WEIGHTS)[0], strict=has_all)
    subnets = Subnetworks.load(masks) if masks.is_file() else None
    if subnets is not None:
        attach(task.encoder, subnets)
    return task, subnets


def batches_of(task: Task, rows: Sequence[Row], name: str, kind: str = "training") -> list[Any]:
    """Rows of language `name` in batches, in their order, without those that cannot be trained on.

    At most `BATCH` are in one, and of two rows or more at most half: two halves can be set against each other.
    """
    examples = task.training_examples(rows, name, kind)
    places = np.arange(len(examples))
    size = min(BATCH, -(-len(places) // 2))
    pieces = [places[first : first + size] for first in range(0, len(places), size)]
    return [task.collate(examples.select(piece)).to(task.device) for piece in pieces]


def rows_for(part: Part, run: Run, split: str, n: int, more: str = "") -> dict[str, list[Row]]:
    """At most `n` examples of each language that has the split, of those of the run and `more`."""
    options = part.options
    splits, missing = load_data(run, split, options.data, more)
    part.skip_all(missing)
    return {name: drawn(splits, name, split, options.sentences or n, options.seed) for name in splits}


def labelled(part: Part, task: Task, rows: Mapping[str, list[Row]]) -> dict[str, list[Row]]:
    """Those of the languages whose rows can be scored."""
    silent = [name for name, own in rows.items() if not task.has_answers(task.examples(own))]
    part.skip_all(dict.fromkeys(silent, f"none of its test {task.example_word} have labels that the model knows"))
    return {name: own for name, own in rows.items() if name not in silent}
