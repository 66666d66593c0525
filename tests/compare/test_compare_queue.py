"""Dealing out jobs: each is done once, after what it needs, and a killed worker's job is done by another."""

from __future__ import annotations

import os
import signal
import time

from processes import start_process

from fastmask.compare.plan import CompareConfig, Job, Plan
from fastmask.compare.queue import is_done, read_result, work, write_result


def plan_in(out) -> Plan:
    return Plan(out, "data", CompareConfig(train="qaa,qab", unseen="qad", seeds=2, methods="full,static"), {})


def do(plan: Plan, job: Job) -> dict[str, object]:
    """Note who did it, after a moment in which others look for work."""
    assert job.needs is None or is_done(plan, job.needs)
    with open(plan.out / "log", "a") as log:
        log.write(f"{job.name}\n")
    time.sleep(0.05)
    return {"by": os.getpid()}


def be_a_worker(plan: Plan) -> None:
    work(plan, lambda job: do(plan, job))


def hang_in(plan: Plan, name: str) -> None:
    """A worker that never comes back from one job."""

    def run(job: Job) -> dict[str, object]:
        if job.name == name:
            (plan.folder(job) / "begun").touch()
            time.sleep(600)
        return do(plan, job)

    work(plan, run)


def test_several_workers_do_each_job_once(tmp_path):
    """Two processes train the same cell, or a cell starts before the run that it goes on from is there."""
    plan = plan_in(tmp_path)
    workers = [start_process(be_a_worker, plan) for _ in range(3)]
    for worker in workers:
        worker.join(300)
        assert worker.exitcode == 0
    names = [job.name for job in plan.jobs]
    assert sorted((tmp_path / "log").read_text().split()) == sorted(names)
    assert {read_result(plan, name)["by"] for name in names} <= {worker.pid for worker in workers}


def test_a_killed_workers_job_is_done_by_the_next(tmp_path):
    """A job whose worker was killed stays claimed for ever, and the comparison never ends."""
    plan = plan_in(tmp_path)
    name = "seed-0/static-none"
    killed = start_process(hang_in, plan, name)
    deadline = time.monotonic() + 120
    while not (plan.folder(name) / "begun").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    assert not is_done(plan, name)
    be_a_worker(plan)
    assert all(is_done(plan, job) for job in plan.jobs)


def test_what_is_done_is_not_done_again(tmp_path):
    """A comparison that is started again trains everything again."""
    plan = plan_in(tmp_path)
    for job in plan.jobs[:-1]:
        write_result(plan, job, {"by": "before"})
    be_a_worker(plan)
    assert (tmp_path / "log").read_text().split() == [plan.jobs[-1].name]
