"""Dealing out jobs to processes, on one machine or on several that share a folder; no process is in charge.

A job is done when its ``result.json`` is there, and being done by whoever holds the lock on its folder. Locks are the
operating system's: they go when a process ends, however it ends, so a killed worker's job is free for the next one,
which goes on from the job's last checkpoint.
"""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from fastmask.compare.plan import Job, Plan
from fastmask.files import HeldError, held, read_json, remove_leftovers, write_text

__all__ = ["RESULT_FILE", "is_done", "read_result", "work", "write_result"]

RESULT_FILE = "result.json"
WAIT = 1.0  # seconds between looks at jobs that others are doing


def is_done(plan: Plan, job: Job | str) -> bool:
    """Whether a job's result is there."""
    return (plan.folder(job) / RESULT_FILE).is_file()


def read_result(plan: Plan, job: Job | str) -> dict[str, Any]:
    """The result of a job that is done.

    Raises:
        FileError: it is damaged.
    """
    result: dict[str, Any] = read_json(plan.folder(job) / RESULT_FILE)
    return result


def write_result(plan: Plan, job: Job, result: dict[str, Any]) -> None:
    """Mark a job as done, whole or not at all."""
    text = json.dumps(result, indent=1, ensure_ascii=False)
    write_text(plan.folder(job) / RESULT_FILE, text, follow=False)


def work(plan: Plan, run: Callable[[Job], dict[str, Any]]) -> None:
    """Do jobs until all are done, by this process or by others.

    Args:
        plan: whose jobs.
        run: does one job and returns its result; called again for the same job after a process was killed in it.
    """
    while todo := [job for job in plan.jobs if not is_done(plan, job)]:
        ready = (job for job in todo if job.needs is None or is_done(plan, job.needs))
        if not any(_done_here(plan, job, run) for job in ready):
            time.sleep(WAIT)


def _done_here(plan: Plan, job: Job, run: Callable[[Job], dict[str, Any]]) -> bool:
    """Do the job if nobody else is doing it."""
    folder = plan.folder(job)
    for place in (folder.parent, folder):
        if place.is_symlink():
            raise OSError(errno.ELOOP, "is a link (expected a folder of the comparison)", str(place))
    with ExitStack() as stack:
        try:
            stack.enter_context(held(folder))
        except HeldError:
            return False
        remove_leftovers(folder)
        if not is_done(plan, job):  # it may have become so before we held the lock
            write_result(plan, job, run(job))
        return True
