"""A comparison: its arms, its settings, what is to be tested, its jobs with what each needs, and doing them.

An *arm* is a way to train: settings that differ from those that all arms share. Everything of one seed starts from the
same full network, trained in mixed batches for the first `discover_at` share of the steps (job ``seed-0/start``); the
subnetworks are found in it once (``seed-0/masks``); and each cell, ``seed-0/static-fomaml`` say, goes on from there
exactly as an unbroken run of `fastmask train` with the arm's settings would. Arms that differ in what comes before the
switch, or in how subnetworks are found, have starts and masks of their own.

A job is done when its ``result.json`` is there. One that was killed leaves a run with checkpoints, and goes on from
there when the comparison is started again.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib
import json
import os
import re
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from fastmask import files
from fastmask.compare.scoring import Scorer
from fastmask.discovery import Draw, stability
from fastmask.errors import unknown
from fastmask.files import held, is_leftover, read_json, read_yaml, write_text, write_yaml
from fastmask.processor import processor
from fastmask.records import Record
from fastmask.settings import ConfigError, Settings, flat, items_of, named_errors, setting
from fastmask.subnetworks import Subnetworks
from fastmask.tasks.task import Splits, Task, TaskSettings
from fastmask.training import run_folder
from fastmask.training.batches import episode_sampler
from fastmask.training.config import Budget, TrainConfig
from fastmask.training.loop import TrainResult, train
from fastmask.training.methods import SwitchPoint, check_subnetworks, subnetworks_of, training_data
from fastmask.unseen import CHOICES, OPTIMIZERS
from fastmask.workers import processes

SETTINGS_FILE, RESULT_FILE, INPUTS_FILE = "compare.yaml", "result.json", "inputs.json"
RUN = "run"  # the folder of a job's training run, in the job's
WAIT = 10.0  # seconds for a process of a comparison that was killed to notice it
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

Result = dict[str, Any]

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
    languages: list[str] = Field(default_factory=list)  # codes, as tables show them; all of the condition if none


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

    def failure(self, job: Job) -> Path:
        """Where the traceback of a job that failed is, until the job is done."""
        return self.out / f"failed-{job.name.replace('/', '-')}.txt"

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


def read_result(plan: Plan, job: Job | str) -> Result:
    """The result of a job that is done; see `Runner.run`. Raises FileError if it is damaged."""
    result: Result = read_json(plan.folder(job) / RESULT_FILE)
    return result


def write_result(plan: Plan, job: Job, result: Result) -> None:
    """Mark a job as done, whole or not at all."""
    write_text(plan.folder(job) / RESULT_FILE, json.dumps(result, indent=1, ensure_ascii=False))


# ---- doing all jobs


class CellFailedError(RuntimeError):
    """A job that raised; the message names it and what it raised. What is done stays done."""


def run_all(
    plan: Plan, jobs: Sequence[Job], workers: int, threads: int, on_done: Callable[..., None], ray: str | None = None
) -> None:
    """Do the jobs that are not done; a job starts when those it needs are done, and `on_done` gets it and its result.

    `workers` processes of this machine do them, or a Ray cluster at the address `ray`, whose machines see the folder of
    the plan under the same name. Each job has `threads` CPUs. One that fails, or is killed, stops the others
    (CellFailedError). HeldError: somebody is running this comparison already.
    """
    with ExitStack() as stack:
        stack.enter_context(held(plan.out))  # before anything is touched that workers of another call may be tidying
        for job in jobs:
            if is_done(plan, job):  # whoever did it may have been killed before this
                with held(plan.folder(job), wait=WAIT):
                    Runner(plan).tidy(job)
        waiting = [job for job in jobs if not is_done(plan, job)]
        if not waiting:
            return
        engine = processes(min(workers, len(waiting)), threads) if ray is None else _ray(ray, threads)
        pool = stack.enter_context(engine)
        running: dict[Future[Result], Job] = {}
        while waiting or running:
            # Not all that can start: on this machine seeds then end one after the other, and not all at the end.
            room = workers - len(running) if ray is None else len(waiting)
            for job in [job for job in waiting if all(is_done(plan, name) for name in job.needs)][:room]:
                waiting.remove(job)
                running[pool.submit(do, plan, job)] = job
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                try:
                    result = future.result()
                except BrokenProcessPool:
                    raise CellFailedError(f"{job.name}: a worker was killed") from None
                except Exception as error:
                    text = "".join(traceback.format_exception(error))
                    write_text(plan.failure(job), text)
                    raise CellFailedError(f"{job.name}: {type(error).__name__}: {error}") from error
                on_done(job, result)


@contextmanager
def _ray(address: str, threads: int) -> Iterator[Any]:
    """A Ray cluster as an executor."""
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise ImportError("Ray is not installed: in a checkout, pip install -e '.[train,ray]'", name="ray") from error
    ray.init(address=address, log_to_driver=False, logging_level="error")
    remote, here = ray.remote(num_cpus=threads, max_retries=0)(do), os.getcwd()
    try:
        yield SimpleNamespace(submit=lambda _, plan, job: remote.remote(plan, job, here).future())
    finally:
        ray.shutdown()  # stops what is still running


_runners: dict[Path, Runner] = {}  # of this process: data is read once for all of its jobs


def do(plan: Plan, job: Job, at: str = ".") -> Result:
    """Do one job in this process, unless its result is there; HeldError where another process does it and goes on.

    Relative paths are meant from the folder `at`: workers of a cluster start wherever it was started.
    """
    if os.path.isdir(at):  # else all paths are absolute, or the job says which is missing
        os.chdir(at)
    folder = plan.folder(job)
    with held(folder, wait=WAIT), warnings.catch_warnings():
        # `Runner.check` has said it, once for all jobs.
        warnings.filterwarnings("ignore", ".* are left out|fewer training rows")
        runner = _runners.setdefault(plan.out, Runner(plan))
        if not is_done(plan, job):
            files.remove_leftovers(folder)
            write_result(plan, job, runner.run(job))
        runner.tidy(job)
        return read_result(plan, job)


# ---- doing one job


@dataclass
class Runner:
    """Does the jobs of a plan one after the other; the data is read once."""

    plan: Plan

    def run(self, job: Job) -> Result:
        """Do a job, from its last checkpoint if it was begun before; returns what its ``result.json`` holds."""
        began, day = time.perf_counter(), datetime.date.today().isoformat()
        resumed = run_folder.latest(self.plan.folder(job) / RUN) is not None
        result = self._cell(job) if job.kind == "cell" else self._shared(job)
        seconds = round(time.perf_counter() - began, 1)
        return {"day": day, "made_by": _made_by(), "seconds": seconds, "resumed": resumed, **result}

    def tidy(self, job: Job) -> None:
        """Remove what nobody needs once the result of a job is there; a cell's model stays where it is asked for.

        Whoever did this before may have been killed at any moment. The caller holds the job's folder.
        """
        self.plan.failure(job).unlink(missing_ok=True)
        folder = self.plan.folder(job)
        run = folder / RUN
        for place in (folder, run):
            files.remove_leftovers(place)
        if job.kind == "masks" or (job.kind == "cell" and not self.plan.config.keep_models):
            files.remove_tree(run)
        elif job.kind == "cell":
            files.remove_tree(run_folder.folder_of(run))

    def check(self, on_model: Callable[[Task, TrainConfig], None] = lambda *_: None) -> dict[str, str]:
        """See that data and settings fit, before anything is trained; returns what is read -> its digest.

        Every model that a start trains is built for that, and `on_model` called with it.
        """
        for name in ("train", "unseen"):
            if not items_of(getattr(self.plan.config, name)):
                raise ConfigError(f"{name} names no language (expected codes or treebank names, as in en,UD_Czech-CAC)")
        scorer = self.scorer  # reads all data, before a model is built
        for name, hypothesis in self.plan.hypotheses.items():
            tested = scorer.seen if hypothesis.condition == "seen" else scorer.unseen
            for language in hypothesis.languages:
                if language not in tested:
                    raise ConfigError(f"hypothesis {name}: {unknown('language', language, tested)}")
        masked = any(config.method != "full" for config in self.plan.configs.values())
        nearest = masked and self.plan.config.choose == "nearest"
        tasks: dict[str, tuple[Task, dict[str, Any]]] = {}  # of each start of the first seed, and what it trains on
        for job in self.plan.jobs:
            config = self.plan.train_config(job, self.plan.folder(job))
            if job.kind == "start" and job.seed == 0:
                task = config.task_class.build(config, self.datasets)
                train = training_data(task, self.datasets, config)
                task.check(train)
                on_model(task, config)
                scorer.check(task, nearest)
                tasks[job.name] = task, train
            if job.kind == "cell":
                task, train = tasks[job.needs[0].replace(f"seed-{job.seed}/", "seed-0/")]
                check_subnetworks(task, config, train)
                if config.meta != "none":
                    Budget.of(config, len(train))
                    episode_sampler(config, train)
        task, train = next(iter(tasks.values()))
        test = {name: task.examples(rows) for name, rows in scorer.tests.items()}
        parts = {"training": train, "test": test}
        return {f"{kind} data of {name}": task.digest(of[name]) for kind, of in parts.items() for name in of}

    @cached_property
    def datasets(self) -> Splits:
        """The training languages' splits."""
        return self.plan.load(self.plan.config.train, optional=("dev", "test"))

    @cached_property
    def scorer(self) -> Scorer:
        """The test sentences of all languages and the support sets of the unseen ones: the same for every arm."""
        return Scorer(self.plan, self.datasets)

    def _train(self, job: Job, discover: Callable[[SwitchPoint], Subnetworks] = subnetworks_of) -> TrainResult:
        """The job's run, which goes on from its start, and ends as one that was not shared would."""
        config = self.plan.train_config(job, self.plan.folder(job) / RUN)
        needed = [self.plan.folder(name) for name in job.needs]
        if needed[1:]:
            config = dataclasses.replace(config, masks=str(needed[1] / run_folder.MASKS_FILE))
        start = run_folder.folder_of(needed[0] / RUN, config.shared_steps) if needed else None
        return train(
            config.task_class.build(config, self.datasets),
            self.datasets,
            config,
            discover,
            progress=False,
            origin=start,
        )

    def _shared(self, job: Job) -> Result:
        """Train the full network up to the switch, where the run stays; of masks, find what arms start from there."""
        found: list[Subnetworks] = []
        agreement: dict[str, Any] = {}

        def note(draws: list[Draw]) -> None:
            if sum(len(draw.subnetworks.languages) for draw in draws) > 1:
                agreement.update((kind, dataclasses.asdict(of)) for kind, of in stability(draws).items())

        def stop(point: SwitchPoint) -> Subnetworks:
            found.extend([subnetworks_of(point, on_draws=note)] if job.kind == "masks" else [])
            raise _StoppedError

        with suppress(_StoppedError):
            self._train(job, stop)
        if job.kind == "start":
            return {}
        files.replace_file(self.plan.folder(job) / run_folder.MASKS_FILE, found[0].save)
        return {"density": _density(found[0]), "agreement": agreement}

    def _cell(self, job: Job) -> Result:
        """Go on from the start of the seed, then score."""
        began, config = time.perf_counter(), self.plan.train_config(job, self.plan.folder(job) / RUN)
        trained = self._train(job)
        scored = time.perf_counter()
        # In the precision of training. No copies of weights are kept: adapting changes them.
        half = config.precision == "bf16"
        with torch.autocast(trained.task.device.type, torch.bfloat16, enabled=half, cache_enabled=False):
            scores = self.scorer.scores(trained.task, trained.subnetworks, config)
        later = [record for record in trained.history if record["step"] > config.shared_steps]
        speeds = [record["words_per_second"] for record in later if "words_per_second" in record]
        return {
            "training_seconds": round(scored - began, 1),
            "scoring_seconds": round(time.perf_counter() - scored, 1),
            "outer_steps": trained.budget.outer_steps,
            "gradient_passes": trained.budget.gradient_passes,
            "sentences": trained.budget.sentences,
            "words_per_second": round(statistics.median(speeds), 1),
            "density": None if trained.subnetworks is None else _density(trained.subnetworks),
            "agreement": read_result(self.plan, job.needs[1]).get("agreement", {}) if job.needs[1:] else {},
            "scores": scores,
        }


class _StoppedError(Exception):
    """Ends a run at the switch."""


def _made_by() -> str:
    import transformers  # here: commands that only read plans need not wait for it

    import fastmask

    versions = {"fastmask": fastmask.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return f"{processor()}, {', '.join(f'{name} {version}' for name, version in versions.items())}"


def _density(subnetworks: Subnetworks) -> dict[str, float]:
    """Share of live units, mean over the languages."""
    return {kind: float(share.mean()) for kind, share in subnetworks.density.items()}
