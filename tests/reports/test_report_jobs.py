"""Jobs in several processes: all done, the same as in one, and none left behind."""

from __future__ import annotations

import functools
import multiprocessing
import os
import time

import pytest

from fastmask.reports.jobs import Job, Options, do_all
from fastmask.reports.making import make_report


def square(number):
    return number**2, os.getpid()


def fail(message):
    raise ValueError(message)


def break_down():
    raise AssertionError("a bug")


def wait(seconds):
    time.sleep(seconds)


@pytest.mark.parametrize("workers", [1, 2])
def test_every_job_is_done_once(workers):
    """If this fails, an answer is lost or handed to another job, or an error of one ends them all."""
    jobs = [Job(f"{n}", functools.partial(square, n), cost=n) for n in range(4)]
    jobs.append(Job("bad", functools.partial(fail, "no such thing")))
    found = dict(do_all(jobs, workers))
    assert [found[at].answer[0] for at in range(4)] == [0, 1, 4, 9]
    assert found[4].answer is None
    assert found[4].error == "no such thing"
    processes = {found[at].answer[1] for at in range(4)}
    assert (os.getpid() in processes) == (workers == 1)


def test_long_jobs_come_first():
    """If this fails, the last process works alone for minutes."""
    jobs = [Job("a", functools.partial(square, 1), 1), Job("b", functools.partial(square, 2), 5)]
    assert [at for at, _ in do_all(jobs, 1)] == [1, 0]


def test_a_bug_is_no_reason_to_skip():
    """If this fails, a mistake in the code looks like a run that lacks something."""
    with pytest.raises(AssertionError, match="a bug"):
        list(do_all([Job("x", break_down)], 1))
    with pytest.raises(ValueError, match="oh"):
        list(do_all([Job("x", functools.partial(fail, "oh"))], 1, strict=True))


def test_workers_end_when_interrupted():
    """If this fails, Ctrl-C leaves processes that go on for minutes."""
    jobs = [Job("quick", functools.partial(square, 1), 9), *[Job("slow", functools.partial(wait, 300))] * 2]
    began = time.monotonic()

    def interrupted():
        for _ in do_all(jobs, 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert time.monotonic() - began < 100
    deadline = time.monotonic() + 20
    while multiprocessing.active_children():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_processes_make_the_same_report(static_run, tmp_path):
    """If this fails, a report depends on how many processes made it."""
    options = Options(sentences=4)
    for workers in (1, 2):
        make_report([static_run], None, tmp_path / str(workers), options, workers=workers)
    for path in (tmp_path / "1").iterdir():
        if path.suffix == ".csv":
            assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes(), path.name
