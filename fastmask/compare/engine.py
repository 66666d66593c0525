"""Doing the jobs of a comparison side by side, by an engine that exists: processes of this machine, or a Ray cluster.

A job is done when its ``result.json`` is there. Whoever is killed in a job leaves a run with checkpoints, from which
the job goes on when the comparison is started again.
"""

from __future__ import annotations

import importlib
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from fastmask.compare.plan import Job, Plan
from fastmask.compare.results import is_done, read_result, write_result
from fastmask.files import held, remove_leftovers, write_text
from fastmask.workers import processes

__all__ = ["CellFailedError", "do", "run_all"]

Result = dict[str, Any]
Submit = Callable[[Job], "Future[Result]"]
WAIT = 10.0  # seconds for a process of a comparison that was killed to notice it


class CellFailedError(RuntimeError):
    """A job that raised; the message names it and what it raised. What is done stays done."""


def run_all(
    plan: Plan,
    jobs: Sequence[Job],
    workers: int,
    threads: int,
    on_done: Callable[[Job, Result], None],
    ray: str | None = None,
) -> None:
    """Do the jobs that are not done; a job starts when that which it needs is done.

    Args:
        plan: opened.
        jobs: of the plan, with what they need.
        workers: processes on this machine.
        threads: CPU threads of each.
        on_done: called with each job that was done while this function ran, and its result.
        ray: address of a Ray cluster ("auto", "local", a host and port) whose machines see the folder of the plan under
            the same name; each job asks for `threads` CPUs, and `workers` does not count. Needs the package ``ray``.

    Raises:
        HeldError: somebody is running this comparison already.
        CellFailedError: a job failed, or a process was killed; the others are stopped, and go on from their last
            checkpoint when the comparison is run again.
        ImportError: Ray is asked for and not installed.
    """
    waiting = [job for job in jobs if not is_done(plan, job)]
    if not waiting:
        return
    engine = _processes(plan, min(workers, len(waiting)), threads) if ray is None else _ray(plan, threads, ray)
    with held(plan.out), engine as submit:
        running: dict[Future[Result], Job] = {}
        while waiting or running:
            for job in [job for job in waiting if all(is_done(plan, name) for name in job.needs)]:
                waiting.remove(job)
                running[submit(job)] = job
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                on_done(job, _result(plan, job, future))


def _result(plan: Plan, job: Job, future: Future[Result]) -> Result:
    try:
        return future.result()
    except BrokenProcessPool:
        raise CellFailedError(f"{job.name}: a worker was killed") from None
    except Exception as error:
        text = "".join(traceback.format_exception(error))
        write_text(plan.out / f"failed-{job.name.replace('/', '-')}.txt", text)
        raise CellFailedError(f"{job.name}: {type(error).__name__}: {error}") from error


_runners: dict[str, Any] = {}  # of this process: data is read once for all of its jobs


def do(plan: Plan, job: Job) -> Result:
    """Do one job in this process, unless its result is there, and write its result, whole or not at all.

    Raises:
        HeldError: another process is doing it, and does not end.
    """
    from fastmask.compare.cells import Runner

    folder = plan.folder(job)
    with held(folder, wait=WAIT):
        remove_leftovers(folder)
        runner = _runners.setdefault(os.fspath(plan.out), Runner(plan))
        if not is_done(plan, job):
            write_result(plan, job, runner.run(job))
        runner.tidy(job)
        return read_result(plan, job)


@contextmanager
def _processes(plan: Plan, workers: int, threads: int) -> Iterator[Submit]:
    with processes(workers, threads) as pool:
        yield lambda job: pool.submit(do, plan, job)


@contextmanager
def _ray(plan: Plan, threads: int, address: str) -> Iterator[Submit]:
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise ImportError(
            "--ray is given, but Ray is not installed: in a checkout of fastmask, pip install -e '.[train,ray]'",
            name="ray",
        ) from error
    ray.init(address=address, log_to_driver=False, logging_level="error")
    remote = ray.remote(num_cpus=threads, max_retries=0)(do)
    try:
        yield lambda job: remote.remote(plan, job).future()
    finally:
        ray.shutdown()  # stops what is still running
