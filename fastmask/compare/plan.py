"""What a comparison consists of: its arms, its settings, what is to be tested, and its jobs with what each needs.

An *arm* is a way to train: settings that differ from those that all arms share. Everything of one seed starts from the
same full network, trained in mixed batches for the first `discover_at` share of the steps (job ``seed-0/start``); the
subnetworks are found in it once (``seed-0/masks``); and each cell, ``seed-0/static-fomaml`` say, goes on from there
exactly as an unbroken run of `fastmask train` with the arm's settings would. Arms that differ in what comes before the
switch, or in how subnetworks are found, have starts and masks of their own.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import Field

from fastmask.errors import unknown
from fastmask.files import is_leftover, read_json, read_yaml, write_text, write_yaml
from fastmask.records import Record
from fastmask.settings import ConfigError, Settings, flat, named_errors, setting
from fastmask.tasks.task import Splits, Task, TaskSettings
from fastmask.training.config import TrainConfig
from fastmask.unseen import CHOICES, OPTIMIZERS

SETTINGS_FILE, RESULT_FILE, INPUTS_FILE = "compare.yaml", "result.json", "inputs.json"
RESERVED = ("data", "languages", "method", "meta", "masks", "out", "seed", "resume", "tensorboard", "keep_checkpoints")
"""Settings of training that the comparison itself decides; an arm may say `method`, `meta` and `masks`."""
OF_ARMS = ("method", "meta", "masks")
FREE = ("threads", "device")
"""Settings of training that the results do not depend on: a comparison may go on with others."""
AFTER_THE_SWITCH = {"checkpoint_every"} | {
    item.name for item in dataclasses.fields(TrainConfig) if item.metadata["group"] in ("subnetworks", "meta-learning")
}
"""Settings that the steps up to the switch do not depend on."""
FOUND_BY = ("score", "draws", "units", "density", "tau", "score_sentences")
"""Settings that subnetworks are found by, beside those of what comes before."""

BASELINES = ("full", "random")
"""Methods that every arm is compared with, as far as it makes sense."""

CONDITIONS = {
    "seen": "training languages, each with its own subnetwork",
    "zero-shot": "unseen languages, without a sentence of them: the union of all subnetworks",
    "chosen": "unseen languages, the subnetwork chosen on the support set, nothing updated",
    "adapted": "unseen languages, after the gradient steps on the support set",
}


@dataclass
class CompareConfig(Settings):
    """Settings of a comparison beside those of training, which its arms share."""

    train: str = setting(
        "", "comma-separated codes or treebank names of the training languages; needed without a plan", list=True
    )
    unseen: str = setting("", "languages that are only adapted to and tested on", list=True)
    seeds: int = setting(3, "number of seeds (0, 1, 2, ...)", low=1, high=1000)
    choose: str = setting("nearest", "how an unseen language gets its subnetwork before adaptation", choices=CHOICES)
    shots: int | None = setting(None, "sentences in a support set; support_sentences if not given", low=1)
    support_sets: int = setting(3, "random support sets per unseen language and seed", low=1)
    adapt_steps: int | None = setting(None, "steps on a support set; inner_steps of the arm if not given", low=1)
    adapt_optimizer: str = setting("sgd", "optimizer for adapting to a support set", choices=OPTIMIZERS)
    adapt_lr: float | None = setting(
        None, "learning rate outside the encoder; inner_lr of the arm (3e-5 with adamw) if not given", above=0
    )
    adapt_encoder_lr: float | None = setting(
        None, "learning rate of the encoder; inner_encoder_lr of the arm (3e-5 with adamw) if not given", low=0
    )
    test_sentences: int = setting(200, "test sentences per language, drawn once; 0: all", low=0)
    keep_models: bool = setting(True, "keep the trained model of each cell, for `fastmask analyze`")


class Hypothesis(Record):
    """What is to be decided: that `arm` is better than `over` by `more_than` points (below 0: not worse by as many)."""

    arm: str
    over: str
    condition: Literal["seen", "zero-shot", "chosen", "adapted"]
    more_than: float = 0.0


@dataclass(frozen=True)
class Job:
    """One unit of work, a folder in the comparison's."""

    name: str  # seed-0/start, seed-0/masks or seed-0/ARM
    seed: int
    kind: Literal["start", "masks", "cell"]
    arm: str  # whose settings it takes; of a start or masks the first of those that share it
    needs: tuple[str, ...] = ()  # the jobs that must be done first: a cell's start, then its masks


class _Stored(Record):
    """What ``compare.yaml``, and any file of a plan, holds."""

    question: str = ""
    date: Annotated[str, Field(pattern=r"^(\d{4}-\d\d-\d\d)?$")] = ""
    comparison: dict[str, Any]
    training: dict[str, Any]
    arms: dict[str, dict[str, Any]]
    hypotheses: dict[str, Hypothesis] = Field(default_factory=dict)
    zone: float = 0.0


@dataclass(frozen=True)
class Plan:
    """A comparison in a folder: ``compare.yaml`` holds all of it but where the data is."""

    out: Path
    data: str
    config: CompareConfig
    training: Mapping[str, Any]  # settings of every run in it, as given; the rest are the defaults
    arms: Mapping[str, Mapping[str, Any]]  # name -> the settings of training in which this arm differs
    question: str = ""  # what the comparison is for, in words
    date: str = ""  # of the plan, as 2026-11-29; its runs come after it
    hypotheses: Mapping[str, Hypothesis] = field(default_factory=dict)  # all else that tables show is description
    zone: float = 0.0  # differences of so many points mean nothing, whatever their p-value

    def __post_init__(self) -> None:
        for name in self.training:
            if name in RESERVED:
                raise ConfigError(f"{name} is a setting of single runs (a comparison decides it)")
        if not self.arms:
            raise ConfigError("arms is empty (expected at least one way to train)")
        for arm, settings in self.arms.items():
            if not re.fullmatch(r"[\w.+-]+", arm) or arm.startswith(".") or re.fullmatch(r"(start|masks)(-\d+)?", arm):
                raise ConfigError(f"an arm is called {arm!r} (expected letters, digits, - + . or _; not start, masks)")
            for name in settings:
                if name in RESERVED and name not in OF_ARMS:
                    raise ConfigError(f"arm {arm}: {name} is a setting of single runs (a comparison decides it)")
                if name in ("task", "task_options"):
                    raise ConfigError(f"arm {arm}: {name} must be the same for all arms")
            with named_errors(f"arm {arm}"):
                self.settings_of(arm)
        for name, hypothesis in self.hypotheses.items():
            for arm in (hypothesis.arm, hypothesis.over):
                if arm not in self.arms:
                    raise ConfigError(f"hypothesis {name}: {unknown('arm', arm, self.arms)}")

    # ---- its file

    @classmethod
    def read(cls, file: str | Path, out: Path, data: str = "") -> Plan:
        """The comparison that a file describes; errors name the file."""
        stored: _Stored = read_yaml(file, _Stored)
        with named_errors(file):
            config = CompareConfig.from_dict(stored.comparison)
            rest = stored.question, stored.date, stored.hypotheses, stored.zone
            return cls(out, data, config, stored.training, stored.arms, *rest)

    @classmethod
    def stored(cls, out: Path, data: str = "") -> Plan:
        """The comparison that a folder holds."""
        return cls.read(out / SETTINGS_FILE, out, data)

    @property
    def settings(self) -> dict[str, Any]:
        """What ``compare.yaml`` holds."""
        own = {name: getattr(self, name) for name in _Stored.model_fields if name != "comparison"}
        return _Stored(comparison=dataclasses.asdict(self.config), **own).model_dump()

    def open(self, inputs: Mapping[str, str] = MappingProxyType({})) -> None:
        """Write the settings, or see that the folder holds this very comparison; else raise `ConfigError`.

        `inputs` are what it reads, by name, and digests of that; cells of other data would be another comparison's.
        """
        self._open_settings()
        file = self.out / INPUTS_FILE
        known: dict[str, str] = read_json(file, dict[str, str]) if file.is_file() else dict(inputs)
        if inputs and (changed := sorted(dict(known.items() ^ inputs.items()))):
            what = f"{', '.join(changed[:4])} changed since (expected the same to go on with it, or a new folder)"
            raise ConfigError(f"{self.out} was begun with other data: {what}")
        if inputs and not file.is_file():
            write_text(file, json.dumps(known, indent=1) + "\n")

    def _open_settings(self) -> None:
        file, mine = self.out / SETTINGS_FILE, flat(self.settings, ".")
        if file.is_file():
            theirs = flat(Plan.stored(self.out).settings, ".")
            differences = [
                f"{re.sub('^(comparison|training)[.]', '', name)} was {theirs.get(name)!r} and is {mine.get(name)!r}"
                for name in sorted({*mine, *theirs} - {f"training.{free}" for free in FREE})
                if mine.get(name) != theirs.get(name)
            ]
            if differences:
                raise ConfigError(
                    f"{file} has other settings: {', '.join(differences)} "
                    "(expected the same to go on with it, or a new folder)"
                )
            return
        if self.out.is_dir() and not all(is_leftover(path.name) for path in self.out.iterdir()):
            raise ConfigError(f"out is {str(self.out)!r}, which is not empty and holds no comparison")
        write_yaml(file, self.settings)

    # ---- its arms and jobs

    @cached_property
    def configs(self) -> dict[str, TrainConfig]:
        """The settings of every arm, with the first seed."""
        return {arm: self.settings_of(arm) for arm in self.arms}

    def settings_of(self, arm: str, seed: int = 0, out: Path | None = None) -> TrainConfig:
        """The settings of an arm's run; raises ConfigError where they do not fit one another."""
        given = {**self.training, **self.arms[arm]}
        if isinstance(given.get("masks"), str):
            given["masks"] = given["masks"].replace("{seed}", str(seed))
        fixed = {"data": self.data, "languages": self.config.train, "seed": seed, "resume": True}
        return TrainConfig.from_dict({**given, **fixed, "out": str(out or self.out)})

    def train_config(self, job: Job, out: Path) -> TrainConfig:
        """The settings of the run that `job` trains in the folder `out`; a start, and masks, end at the switch."""
        config = self.settings_of(job.arm, job.seed, out)
        return config if job.kind == "cell" else dataclasses.replace(config, method="static", meta="none", masks=None)

    @cached_property
    def jobs(self) -> tuple[Job, ...]:
        """Every job: of each seed the starts, masks and cells. Seeds come one after the other."""
        return tuple(job for seed in range(self.config.seeds) for job in self._jobs_of(seed))

    def _jobs_of(self, seed: int) -> list[Job]:
        shared: dict[str, Job] = {}  # starts and masks, by the settings that they depend on
        cells = []

        def job_for(kind: Literal["start", "masks"], arm: str, key: str, *needs: str) -> str:
            if key not in shared:
                others = sum(job.kind == kind for job in shared.values())
                name = f"seed-{seed}/{kind}" + (f"-{others + 1}" if others else "")
                shared[key] = Job(name, seed, kind, arm, needs)
            return shared[key].name

        for arm, config in self.configs.items():
            before = {name: value for name, value in config.identity().items() if name not in AFTER_THE_SWITCH}
            key = repr((before, config.shared_steps))
            needs = [job_for("start", arm, key)]
            if config.method not in ("full", "vector") and config.masks is None:
                key = repr((key, [getattr(config, name) for name in FOUND_BY]))
                needs.append(job_for("masks", arm, key, *needs))
            cells.append(Job(f"seed-{seed}/{arm}", seed, "cell", arm, tuple(needs)))
        return [*sorted(shared.values(), key=lambda job: job.kind == "masks"), *cells]

    @property
    def cells(self) -> list[Job]:
        """The jobs that are arms of a seed."""
        return [job for job in self.jobs if job.kind == "cell"]

    def jobs_for(self, arms: Collection[str], known: Collection[tuple[int, str]] = ()) -> list[Job]:
        """The cells of some arms (of all if none is named) but those in `known`, (seed, arm); and what they need."""
        cells = [job for job in self.cells if (not arms or job.arm in arms) and (job.seed, job.arm) not in known]
        names = {name for cell in cells for name in (cell.name, *cell.needs)}
        return [job for job in self.jobs if job.name in names]

    def folder(self, job: Job | str) -> Path:
        """Where a job keeps its files."""
        return self.out / (job if isinstance(job, str) else job.name)

    def baseline(self, arm: str, method: str) -> str | None:
        """The arm of method `method` that differs least from `arm` in all else; None if there is none but itself.

        Arms of that method have the one with the fewest settings as their baseline.
        """
        mine = self.configs[arm]
        others = [name for name, config in self.configs.items() if config.method == method]
        if mine.method == method:
            first = min(others, key=lambda name: len(self.arms[name]))
            return None if first == arm else first
        return min(others, key=lambda name: len(mine.differences(self.configs[name]).keys() - {"method"}), default=None)

    @cached_property
    def baselines(self) -> dict[str, dict[str, str]]:
        """For each of `BASELINES`: arm -> the arm that it is compared with (with `random` not those of `full`)."""
        found: dict[str, dict[str, str]] = {method: {} for method in BASELINES}
        for arm, config in self.configs.items():
            for method, of_arms in found.items():
                other = self.baseline(arm, method)
                if other is not None and (method == "full" or config.method not in BASELINES):
                    of_arms[arm] = other
        return found

    # ---- its task and data

    @property
    def task(self) -> type[Task]:
        """The class of the task of every run."""
        return next(iter(self.configs.values())).task_class

    @property
    def task_settings(self) -> TaskSettings:
        """The task's settings, the same for all arms."""
        return next(iter(self.configs.values())).task_settings

    @property
    def shots(self) -> int:
        """Sentences in a support set, the same for all arms."""
        return self.config.shots or TrainConfig.from_dict(dict(self.training)).support_sentences

    def load(self, languages: str, **splits: Any) -> Splits:
        """Rows of some of the languages, see `Task.load`."""
        return self.task.load(self.data, languages, self.task_settings, **splits)


def arms_of(methods: Iterable[str], metas: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Every method with every kind of meta-learning, as arms: ``static``, ``static-fomaml``."""
    pairs = ((method, meta) for meta in metas for method in methods)
    return {of if meta == "none" else f"{of}-{meta}": {"method": of, "meta": meta} for of, meta in pairs}


def is_done(plan: Plan, job: Job | str) -> bool:
    """Whether a job's ``result.json`` is there."""
    return (plan.folder(job) / RESULT_FILE).is_file()


def read_result(plan: Plan, job: Job | str) -> dict[str, Any]:
    """The result of a job that is done; see `fastmask.compare.cells.Runner.run`. Raises FileError if it is damaged."""
    result: dict[str, Any] = read_json(plan.folder(job) / RESULT_FILE)
    return result


def write_result(plan: Plan, job: Job, result: dict[str, Any]) -> None:
    """Mark a job as done, whole or not at all."""
    write_text(plan.folder(job) / RESULT_FILE, json.dumps(result, indent=1, ensure_ascii=False))
