"""Doing one job: the shared start of a seed, its subnetworks, or one cell trained from there and scored."""

from __future__ import annotations

import dataclasses
import datetime
import statistics
import time
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
import transformers

from fastmask.compare.branch import branch
from fastmask.compare.plan import Job, Plan
from fastmask.compare.scoring import Scorer
from fastmask.files import remove_tree, replace_file
from fastmask.processor import processor
from fastmask.subnetworks import Subnetworks
from fastmask.tasks.task import Splits, Task
from fastmask.training.config import TrainConfig
from fastmask.training.episodes import Budget, episode_sampler
from fastmask.training.loop import TrainResult, train
from fastmask.training.methods import SwitchPoint, check_subnetworks, subnetworks_of
from fastmask.training.run_folder import MASKS_FILE, folder_of, latest

__all__ = ["RUN", "Runner"]

RUN = "run"  # the folder of a job's training run, in the job's


class Runner:
    """Does the jobs of a plan one after the other; the data is read once."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def run(self, job: Job) -> dict[str, Any]:
        """Do a job, from its last checkpoint if it was begun before; returns what its ``result.json`` holds."""
        began, origin = time.perf_counter(), {"day": datetime.date.today().isoformat(), "made_by": _made_by()}
        resumed = latest(self.plan.folder(job) / RUN) is not None
        result = {"start": self._start, "masks": self._masks, "cell": self._cell}[job.kind](job)
        return {**origin, "seconds": round(time.perf_counter() - began, 1), "resumed": resumed, **result}

    def tidy(self, job: Job) -> None:
        """Remove what nobody needs once the result of a job is there; a cell's model stays where it is asked for."""
        run = self.plan.folder(job) / RUN
        if job.kind == "masks" or (job.kind == "cell" and not self.plan.config.keep_models):
            remove_tree(run)
        elif job.kind == "cell":
            remove_tree(folder_of(run))

    def check(self) -> None:
        """See that data and settings fit, before anything is trained.

        Raises:
            ValueError: a language with too few sentences, an episode that asks for more than there is, and the like.
        """
        masked = any(config.method != "full" for config in self.plan.configs.values())
        nearest = masked and self.plan.config.choose == "nearest"
        tasks: dict[str, tuple[Task, dict[str, Any]]] = {}  # of each start of the first seed, and what it trains on
        for job in self.plan.jobs:
            config = self.plan.train_config(job, self.plan.folder(job))
            if job.kind == "start" and job.seed == 0:
                task = self._task(config)
                train = {name: task.training_examples(splits["train"], name) for name, splits in self.datasets.items()}
                task.check(train)
                self.scorer.check(task, nearest)
                tasks[job.name] = task, train
            if job.kind == "cell":
                task, train = tasks[job.needs[0].replace(f"seed-{job.seed}/", "seed-0/")]
                check_subnetworks(task, config, train)
                if config.meta != "none":
                    Budget.of(config, len(train))
                    episode_sampler(config, train)

    @cached_property
    def datasets(self) -> Splits:
        """The training languages' splits."""
        return self.plan.load(self.plan.config.train, optional=("dev", "test"))

    @cached_property
    def scorer(self) -> Scorer:
        """The test sentences of all languages and the support sets of the unseen ones: the same for every arm."""
        unseen = self.plan.load(self.plan.config.unseen, optional=("train", "dev"))
        same = partial(self.plan.task.words_of, options=self.plan.task_settings)
        return Scorer(self.plan.config, self.plan.shots, self.datasets, unseen, same)

    def _task(self, config: TrainConfig) -> Task:
        return config.task_class.build(config, self.datasets)

    def _start(self, job: Job) -> dict[str, Any]:
        """Train the full network up to the switch."""
        self._to_the_switch(job, lambda point: None)
        return {}

    def _masks(self, job: Job) -> dict[str, Any]:
        """Find the subnetworks that arms start from, in the network of the start."""
        config = self.plan.train_config(job, self.plan.folder(job) / RUN)
        if latest(config.out) is None:
            branch(self.plan.folder(job.needs[0]) / RUN, config)
        found = self._to_the_switch(job, subnetworks_of)
        replace_file(self.plan.folder(job) / MASKS_FILE, found.save)
        return {"density": _density(found)}

    def _to_the_switch(self, job: Job, work: Callable[[SwitchPoint], Any]) -> Any:
        """Train up to the switch, or go on from there, and return what `work` makes of it; the run stays there."""
        config = self.plan.train_config(job, self.plan.folder(job) / RUN)

        def stop(point: SwitchPoint) -> Subnetworks:
            raise _StoppedError(work(point))

        try:
            train(self._task(config), self.datasets, config, stop, progress=False)
        except _StoppedError as stopped:
            return stopped.result
        raise RuntimeError(f"{config.out} ran to its end without coming to the switch")

    def _cell(self, job: Job) -> dict[str, Any]:
        """Go on from the start of the seed, then score."""
        start, *masks = map(self.plan.folder, job.needs)
        config = self.plan.train_config(job, self.plan.folder(job) / RUN)
        if masks:
            config = dataclasses.replace(config, masks=str(masks[0] / MASKS_FILE))
        if latest(config.out) is None:
            branch(start / RUN, config)
        began = time.perf_counter()
        trained = train(self._task(config), self.datasets, config, progress=False)
        scored = time.perf_counter()
        scores = self.scorer.scores(trained.task, trained.subnetworks, config)
        return {
            "training_seconds": round(scored - began, 1),
            "scoring_seconds": round(time.perf_counter() - scored, 1),
            **_spent(config, trained),
            "density": None if trained.subnetworks is None else _density(trained.subnetworks),
            "scores": scores,
        }


def _made_by() -> str:
    """Processor and versions."""
    import fastmask

    versions = {"fastmask": fastmask.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return f"{processor()}, {', '.join(f'{name} {version}' for name, version in versions.items())}"


def _spent(config: TrainConfig, trained: TrainResult) -> dict[str, Any]:
    """Budget and speed of a run."""
    budget = trained.budget
    speeds = [
        record["words_per_second"]
        for record in trained.history
        if "words_per_second" in record and record["step"] > config.shared_steps
    ]
    return {
        "outer_steps": budget.outer_steps,
        "gradient_passes": budget.gradient_passes,
        "sentences": budget.sentences,
        "words_per_second": round(statistics.median(speeds), 1),
        "scouting_share": trained.scouting_share,
    }


class _StoppedError(Exception):
    """Carries a result out of a run that ends at the switch."""

    def __init__(self, result: Any) -> None:
        super().__init__("stopped at the switch")
        self.result = result


def _density(subnetworks: Subnetworks) -> dict[str, float]:
    """Share of live units, mean over the languages."""
    return {kind: float(share.mean()) for kind, share in subnetworks.density.items()}
