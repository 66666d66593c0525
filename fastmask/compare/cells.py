"""Doing the jobs of a comparison: the shared start of a seed, its subnetworks, and cells trained from there and scored.

A job is done when its ``result.json`` is there. One that was killed leaves a run with checkpoints, and goes on from
there when the comparison is started again.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib
import os
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers

from fastmask import files
from fastmask.compare.plan import Job, Plan, is_done, read_result, write_result
from fastmask.compare.scoring import Scorer
from fastmask.files import held
from fastmask.processor import processor
from fastmask.settings import ConfigError, items_of
from fastmask.subnetworks import Subnetworks
from fastmask.tasks.task import Splits, Task
from fastmask.training import run_folder
from fastmask.training.batches import episode_sampler
from fastmask.training.config import Budget, TrainConfig
from fastmask.training.loop import TrainResult, train
from fastmask.training.methods import SwitchPoint, check_subnetworks, subnetworks_of, training_data
from fastmask.workers import processes

RUN = "run"  # the folder of a job's training run, in the job's
WAIT = 10.0  # seconds for a process of a comparison that was killed to notice it

Result = dict[str, Any]


# ---- all jobs


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
                    files.write_text(plan.out / f"failed-{job.name.replace('/', '-')}.txt", text)
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
    remote, here = ray.remote(num_cpus=threads, max_retries=0)(_do_in), os.getcwd()
    try:
        yield SimpleNamespace(submit=lambda _, plan, job: remote.remote(here, plan, job).future())
    finally:
        ray.shutdown()  # stops what is still running


def _do_in(folder: str, plan: Plan, job: Job) -> Result:
    """`do` where relative paths are meant from: workers of a cluster start wherever it was started."""
    if os.path.isdir(folder):  # else all paths are absolute, or the job says which is missing
        os.chdir(folder)
    return do(plan, job)


_runners: dict[Path, Runner] = {}  # of this process: data is read once for all of its jobs


def do(plan: Plan, job: Job) -> Result:
    """Do one job in this process, unless its result is there; HeldError where another process does it and goes on."""
    folder = plan.folder(job)
    with held(folder, wait=WAIT), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* are left out")  # `Runner.check` has said it, once for all jobs
        files.remove_leftovers(folder)
        runner = _runners.setdefault(plan.out, Runner(plan))
        if not is_done(plan, job):
            write_result(plan, job, runner.run(job))
        runner.tidy(job)
        return read_result(plan, job)


# ---- one job


class Runner:
    """Does the jobs of a plan one after the other; the data is read once."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def run(self, job: Job) -> Result:
        """Do a job, from its last checkpoint if it was begun before; returns what its ``result.json`` holds."""
        began, day = time.perf_counter(), datetime.date.today().isoformat()
        resumed = run_folder.latest(self.plan.folder(job) / RUN) is not None
        result = self._cell(job) if job.kind == "cell" else self._shared(job)
        seconds = round(time.perf_counter() - began, 1)
        return {"day": day, "made_by": _made_by(), "seconds": seconds, "resumed": resumed, **result}

    def tidy(self, job: Job) -> None:
        """Remove what nobody needs once the result of a job is there; a cell's model stays where it is asked for."""
        run = self.plan.folder(job) / RUN
        if job.kind == "masks" or (job.kind == "cell" and not self.plan.config.keep_models):
            files.remove_tree(run)
        elif job.kind == "cell":
            files.remove_tree(run_folder.folder_of(run))

    def check(self) -> dict[str, str]:
        """See that data and settings fit, before anything is trained; returns what is read -> its digest."""
        for name in ("train", "unseen"):
            if not items_of(getattr(self.plan.config, name)):
                raise ConfigError(f"{name} names no language (expected codes or treebank names, as in en,UD_Czech-CAC)")
        scorer = self.scorer  # reads all data, before a model is built
        masked = any(config.method != "full" for config in self.plan.configs.values())
        nearest = masked and self.plan.config.choose == "nearest"
        tasks: dict[str, tuple[Task, dict[str, Any]]] = {}  # of each start of the first seed, and what it trains on
        for job in self.plan.jobs:
            config = self.plan.train_config(job, self.plan.folder(job))
            if job.kind == "start" and job.seed == 0:
                task = self._task(config)
                train = training_data(task, self.datasets, config)
                task.check(train)
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

    def _task(self, config: TrainConfig) -> Task:
        return config.task_class.build(config, self.datasets)

    def _train(self, job: Job, discover: Callable[[SwitchPoint], Subnetworks] = subnetworks_of) -> TrainResult:
        """The job's run, which goes on from its start, and ends as one that was not shared would."""
        config = self.plan.train_config(job, self.plan.folder(job) / RUN)
        needed = [self.plan.folder(name) for name in job.needs]
        if needed[1:]:
            config = dataclasses.replace(config, masks=str(needed[1] / run_folder.MASKS_FILE))
        start = run_folder.folder_of(needed[0] / RUN, config.shared_steps) if needed else None
        return train(self._task(config), self.datasets, config, discover, progress=False, origin=start)

    def _shared(self, job: Job) -> Result:
        """Train the full network up to the switch, where the run stays; of masks, find what arms start from there."""
        found: list[Subnetworks] = []

        def stop(point: SwitchPoint) -> Subnetworks:
            found.extend([subnetworks_of(point)] if job.kind == "masks" else [])
            raise _StoppedError

        with suppress(_StoppedError):
            self._train(job, stop)
        if job.kind == "start":
            return {}
        files.replace_file(self.plan.folder(job) / run_folder.MASKS_FILE, found[0].save)
        return {"density": _density(found[0])}

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
            "scores": scores,
        }


class _StoppedError(Exception):
    """Ends a run at the switch."""


def _made_by() -> str:
    import fastmask

    versions = {"fastmask": fastmask.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return f"{processor()}, {', '.join(f'{name} {version}' for name, version in versions.items())}"


def _density(subnetworks: Subnetworks) -> dict[str, float]:
    """Share of live units, mean over the languages."""
    return {kind: float(share.mean()) for kind, share in subnetworks.density.items()}
