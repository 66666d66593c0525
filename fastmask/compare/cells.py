"""Doing one job: the shared start of a seed, or one cell trained from there and scored."""

from __future__ import annotations

import dataclasses
import statistics
import time
from functools import cached_property, partial
from typing import Any

from fastmask.compare.branch import branch
from fastmask.compare.plan import Job, Plan
from fastmask.compare.scoring import Scorer
from fastmask.files import remove_tree, replace_file
from fastmask.subnetworks import Subnetworks
from fastmask.tasks.task import Splits, Task
from fastmask.training import checkpoints
from fastmask.training.config import TrainConfig
from fastmask.training.episodes import Budget, episode_sampler
from fastmask.training.loop import TrainResult, train
from fastmask.training.methods import SwitchPoint, check_subnetworks, subnetworks_of
from fastmask.training.run_folder import is_finished

__all__ = ["MASKS_FILE", "RUN", "Runner"]

RUN = "run"  # the folder of a job's training run, in the job's
MASKS_FILE = checkpoints.MASKS


class Runner:
    """Does the jobs of a plan one after the other; the data is read once."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def run(self, job: Job) -> dict[str, Any]:
        """Do a job, from its last checkpoint if it was begun before; returns what its ``result.json`` holds."""
        began = time.perf_counter()
        resumed = checkpoints.latest(self.plan.folder(job) / RUN) is not None
        result = self._start(job) if job.method is None else self._cell(job)
        return {"seconds": round(time.perf_counter() - began, 1), "resumed": resumed, **result}

    def check(self) -> None:
        """See that data and settings fit, before anything is trained.

        Raises:
            ValueError: a language with too few sentences, an episode that asks for more than there is, and the like.
        """
        configs = [self.plan.train_config(job, self.plan.folder(job)) for job in self.plan.jobs]
        task = self._task(configs[0])
        train = {name: task.training_examples(splits["train"], name) for name, splits in self.datasets.items()}
        task.check(train)
        self.scorer.check(task)
        for config in configs:
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
        """The test sentences of all languages and the support sets of the unseen ones: the same for every cell."""
        unseen = self.plan.load(self.plan.config.unseen, optional=("train", "dev"))
        config = self.plan.train_config(self.plan.jobs[0], self.plan.out)
        same = partial(config.task_class.words_of, options=config.task_settings)
        return Scorer(self.plan.config, self.datasets, unseen, same)

    def _task(self, config: TrainConfig) -> Task:
        return config.task_class.build(config, self.datasets)

    def _start(self, job: Job) -> dict[str, Any]:
        """Train the full network up to the switch, and find the subnetworks that the masked methods start from."""
        config = self.plan.train_config(job, self.plan.folder(job) / RUN)

        def find(point: SwitchPoint) -> Subnetworks:
            raise _FoundError(subnetworks_of(point))

        try:
            train(self._task(config), self.datasets, config, find, progress=False)
        except _FoundError as found:
            masks = self.plan.folder(job) / MASKS_FILE
            replace_file(masks, found.subnetworks.save, follow=False)
            return {"density": _density(found.subnetworks)}
        raise RuntimeError(f"{config.out} ran to its end without looking for subnetworks")

    def _cell(self, job: Job) -> dict[str, Any]:
        """Go on from the start of the seed, then score."""
        assert job.needs is not None
        start = self.plan.folder(job.needs)
        config = self.plan.train_config(job, self.plan.folder(job) / RUN)
        if config.method != "full":
            config = dataclasses.replace(config, masks=str(start / MASKS_FILE))
        if checkpoints.latest(config.out) is None and not is_finished(config.out):
            branch(start / RUN, config)
        began = time.perf_counter()
        trained = train(self._task(config), self.datasets, config, progress=False)
        scored = time.perf_counter()
        scores = self.scorer.scores(trained.task, trained.subnetworks)
        result = {
            "training_seconds": round(scored - began, 1),
            "scoring_seconds": round(time.perf_counter() - scored, 1),
            **_spent(config, trained),
            "density": None if trained.subnetworks is None else _density(trained.subnetworks),
            "scores": scores,
        }
        remove_tree(checkpoints.folder_of(config.out))  # model and masks stay
        return result


def _spent(config: TrainConfig, trained: TrainResult) -> dict[str, Any]:
    """Budget and speed of a run."""
    budget = trained.budget
    speeds = [
        record["words_per_second"]
        for record in trained.history
        if "words_per_second" in record and record["step"] > config.shared_steps
    ]
    return {
        "outer_steps": budget.plain_steps + budget.episodes,
        "gradient_passes": budget.gradient_passes,
        "sentences": budget.sentences,
        "words_per_second": round(statistics.median(speeds), 1),
        "scouting_share": trained.scouting_share,
    }


class _FoundError(Exception):
    """Carries the subnetworks out of a run that ends where they are switched on."""

    def __init__(self, subnetworks: Subnetworks) -> None:
        super().__init__("stopped at the switch")
        self.subnetworks = subnetworks


def _density(subnetworks: Subnetworks) -> dict[str, float]:
    """Share of live units, mean over the languages."""
    return {kind: float(share.mean()) for kind, share in subnetworks.density.items()}
