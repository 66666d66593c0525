"""The work of a report as jobs that run side by side in several processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any

import torch

from fastmask.reports.sections import Section, Skipped

__all__ = ["Done", "Job", "Options", "Plan", "do_all"]

EXPECTED = (ValueError, KeyError, OSError, RuntimeError, ImportError, ArithmeticError)


@dataclass(frozen=True)
class Options:
    """What holds for every analysis.

    Attributes:
        seed: of the sentences that are drawn, and of permutations and random masks.
        sentences: of each language; None: as many as each analysis takes by itself.
        data: folder of the treebanks; None: that of the run.
        device: where to compute.
    """

    seed: int = 0
    sentences: int | None = None
    data: str | None = None
    device: str = "auto"


@dataclass(frozen=True)
class Job:
    """Something to compute.

    Attributes:
        name: for messages.
        work: what does it; can be pickled, as can what it returns.
        cost: about how many seconds it takes, for the order of the jobs and the time that is left.
    """

    name: str
    work: Callable[[], Any]
    cost: float = 1.0


def in_order(answers: Sequence[Any]) -> list[Section]:
    """The sections that the jobs returned, a list each, one after the other."""
    return [section for answer in answers for section in answer]


@dataclass(frozen=True)
class Plan:
    """One analysis of one study.

    Attributes:
        jobs: what there is to compute.
        finish: makes the sections out of the answers of the jobs that went well, in their order.
        skipped: what of it cannot be done.
    """

    jobs: Sequence[Job]
    finish: Callable[[list[Any]], list[Section]] = in_order
    skipped: Sequence[Skipped] = field(default_factory=list)


@dataclass(frozen=True)
class Done:
    """The outcome of a job: its answer, or what it failed of, after so many seconds."""

    answer: Any
    error: str | None
    seconds: float


def do_all(jobs: Sequence[Job], workers: int, strict: bool = False) -> Iterator[tuple[int, Done]]:
    """Do all jobs, the long ones first; yields the position and the outcome of each as it is done.

    Args:
        jobs: to do.
        workers: processes; with one, this one does the work.
        strict: an error ends everything, with its traceback.
    """
    order = sorted(range(len(jobs)), key=lambda at: -jobs[at].cost)
    workers = min(workers, len(jobs))
    threads = max(1, (os.cpu_count() or 1) // max(1, workers))
    if workers <= 1:
        for at in order:
            yield at, _do(jobs[at], strict)
        return
    context = multiprocessing.get_context("spawn")  # a forked process inherits threads in an unknown state
    with ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(threads,)) as pool:
        try:
            waiting = {pool.submit(_do, jobs[at], strict): at for at in order}
            for future in as_completed(waiting):
                yield waiting[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _do(job: Job, strict: bool) -> Done:
    began = time.perf_counter()
    try:
        answer, error = job.work(), None
    except EXPECTED as raised:
        if strict:
            raise
        answer, error = None, str(raised) or type(raised).__name__
    return Done(answer, error, time.perf_counter() - began)


def _begin(threads: int) -> None:
    """Be a worker: as many threads as cores are left, and no life beyond that of the process that asked for it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # that process is interrupted, and ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
