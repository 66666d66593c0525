"""Several processes that do a comparison's jobs on this machine, and one that watches them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from fastmask.compare.plan import Job, Plan
from fastmask.compare.queue import is_done, read_result, work
from fastmask.files import write_text

__all__ = ["CellFailedError", "run_all"]

POLL = 0.5  # seconds


class CellFailedError(RuntimeError):
    """A job that raised; the message names it and what it raised. What is done stays done."""


def run_all(plan: Plan, workers: int, threads: int, on_done: Callable[[Job, dict[str, Any]], None]) -> None:
    """Do all jobs in `workers` processes; jobs that other machines do in the same folder are waited for.

    Args:
        plan: opened.
        workers: number of processes.
        threads: CPU threads of each.
        on_done: called with each job that was done while this function ran, and its result.

    Raises:
        CellFailedError: one of the processes failed; the others were stopped, and go on from their last checkpoint when
            the comparison is run again.
    """
    waiting = [job for job in plan.jobs if not is_done(plan, job)]
    if not waiting:
        return
    context = multiprocessing.get_context("spawn")  # a forked process inherits threads in an unknown state
    processes, ends = [], []
    try:
        for _ in range(min(workers, len(waiting))):
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(plan, threads, theirs), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            ends.append(mine)
        while waiting:
            for job in [job for job in waiting if is_done(plan, job)]:
                waiting.remove(job)
                on_done(job, read_result(plan, job))
            for process, end in zip(processes, ends, strict=True):
                if end.poll():
                    with contextlib.suppress(EOFError):
                        raise CellFailedError(end.recv())
                if process.exitcode not in (None, 0):
                    raise CellFailedError(f"a worker ended with exit code {process.exitcode}")
            time.sleep(POLL)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _work(plan: Plan, threads: int, failures: Connection) -> None:
    """Be one worker."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    from fastmask.compare.cells import Runner

    torch.set_num_threads(threads)
    runner, doing = Runner(plan), "reading the data"

    def run(job: Job) -> dict[str, Any]:
        nonlocal doing
        doing = job.name
        return runner.run(job)

    try:
        work(plan, run)
    except Exception as error:
        with contextlib.suppress(OSError):  # the disk may be full: that is said, too
            write_text(plan.out / f"failed-{doing.replace('/', '-')}.txt", traceback.format_exc(), follow=False)
        failures.send(f"{doing}: {type(error).__name__}: {error}")


def _end_with_parent() -> None:
    """Nobody is left to stop a worker whose parent was killed; the next comparison goes on from its checkpoint."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
