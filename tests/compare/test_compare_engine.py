"""Jobs side by side: each is done once, after what it needs, and a comparison that was killed can be resumed."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from processes import fork_pools, start_process
from test_compare_kills import ARMS, COMPARISON, TRAINING

from fastmask.compare import plan as plans
from fastmask.compare.plan import (
    RESULT_FILE,
    CellFailedError,
    CompareConfig,
    Job,
    Plan,
    do,
    is_done,
    read_result,
    run_all,
    write_result,
)
from fastmask.files import HeldError, held, partial_name

LIMIT = 240.0  # seconds


def plan_in(folder: Path, data: Path, **training: Any) -> Plan:
    given = {**TRAINING, "model": str(data.parent / "encoder"), **training}
    plan = Plan(folder, str(data), CompareConfig(**COMPARISON), given, ARMS)
    plan.open()
    return plan


def in_processes(plan: Plan) -> None:
    run_all(plan, plan.jobs, 2, 1, lambda job, result: None)


def wait_for(what: Any) -> None:
    limit = time.monotonic() + LIMIT
    while not what():
        assert time.monotonic() < limit
        time.sleep(0.02)


def children_of(process: int) -> list[int]:
    """Worker processes of `process`, which the resource tracker of multiprocessing is not."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == process and b"spawn_main" in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:  # it ended meanwhile
                continue
    return found


def test_what_a_killed_process_did_not_tidy_goes(data: Path, tmp_path: Path) -> None:
    """Between a job's result and its end: checkpoints, or what was half deleted of them, would stay for good."""
    plan = plan_in(tmp_path / "out", data)
    for job in plan.jobs:
        write_result(plan, job, {"scores": []})
    checkpoint = plan.folder(plan.cells[0]) / "run" / "checkpoints" / "step-1"
    checkpoint.mkdir(parents=True)
    (masks,) = (plan.folder(job) for job in plan.jobs if job.kind == "masks")
    half = [partial_name(path, "old") for path in (checkpoint.parent, masks / "run")]
    for folder in half:
        (folder / "step-1").mkdir(parents=True)
    in_processes(plan)
    assert not checkpoint.parent.exists()
    assert not any(folder.exists() for folder in half)
    assert checkpoint.parents[1].exists()


def test_two_processes_do_each_job_once_and_not_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every job is reported once, the start before the cells that need it; a second call has nothing to do."""
    fork_pools(monkeypatch)
    plan, told = plan_in(tmp_path / "out", data), []
    run_all(plan, plan.jobs_for([]), 2, 1, lambda job, result: told.append((job.name, result)))
    assert sorted(name for name, _ in told) == sorted(job.name for job in plan.jobs)
    assert told[0][0] == "seed-0/start"
    assert all(read_result(plan, name) == result for name, result in told)
    run_all(plan, plan.jobs, 2, 1, lambda job, result: pytest.fail("it was done already"))


def test_a_job_that_is_done_meanwhile_is_not_done_again(tmp_path: Path) -> None:
    """What another process has written since is read, and nothing is trained."""
    plan = Plan(tmp_path, "nowhere", CompareConfig(**COMPARISON), {}, ARMS)
    folder = plan.folder(plan.jobs[0])
    folder.mkdir(parents=True)
    (folder / RESULT_FILE).write_text('{"by": "another"}')
    assert do(plan, plan.jobs[0]) == {"by": "another"}


def test_a_job_that_fails_is_named(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the job and says what it raised; the traceback is kept in a file until the job is done."""
    fork_pools(monkeypatch)
    plan = plan_in(tmp_path / "out", data)
    with pytest.raises(CellFailedError, match=r"seed-0/\S+: "):
        in_processes(dataclasses.replace(plan, data=str(tmp_path / "nowhere")))
    (failure,) = plan.out.glob("failed-*.txt")
    assert "does not exist (expected a folder of UD_* treebanks)" in failure.read_text()
    in_processes(plan)
    assert not list(plan.out.glob("failed-*.txt"))
    failure.write_text("left by a process that was killed between the result and this")
    in_processes(plan)
    assert not failure.exists()


def test_a_comparison_runs_once_at_a_time(data: Path, tmp_path: Path) -> None:
    """A second process on the same comparison is refused, and told the number of the first."""
    plan = plan_in(tmp_path / "out", data)
    write_result(plan, plan.jobs[0], {"scores": []})
    checkpoint = plan.folder(plan.jobs[0]) / "run" / "checkpoints" / "step-1"
    checkpoint.mkdir(parents=True)
    with held(plan.out), pytest.raises(HeldError, match=f"in use by process {os.getpid()}"):
        in_processes(plan)
    assert checkpoint.exists()  # a worker of the first one may be tidying there


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["a worker", "the parent"])
def test_killed_processes(whom: str, data: Path, tmp_path: Path) -> None:
    """A killed worker ends the comparison, a killed parent ends its workers, and the comparison can be resumed."""
    plan = plan_in(tmp_path / "out", data, steps=30)
    process = start_process(in_processes, plan, daemon=False)
    wait_for(lambda: is_done(plan, "seed-0/start"))
    workers = children_of(process.pid)
    assert workers
    os.kill(workers[0] if whom == "a worker" else process.pid, signal.SIGKILL)
    process.join(LIMIT)
    assert process.exitcode not in (None, 0)
    wait_for(lambda: not any(Path(f"/proc/{worker}/exe").exists() for worker in workers))
    in_processes(plan)
    assert all(is_done(plan, job) for job in plan.jobs)


def test_on_a_ray_cluster(data: Path, tmp_path: Path) -> None:
    """The same results by Ray as by processes; where Ray is not installed, the error says how to install it."""
    plan = plan_in(tmp_path / "out", data)
    try:
        import ray  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match=r"pip install -e '\.\[train,ray\]'"):
            run_all(plan, plan.jobs, 1, 1, lambda job, result: None, ray="local")
        return
    run_all(plan, plan.jobs, 1, 1, lambda job, result: None, ray="local")
    other = plan_in(tmp_path / "other", data)
    in_processes(other)
    for job in plan.cells:
        assert read_result(plan, job)["scores"] == read_result(other, job)["scores"]


def test_seeds_end_one_after_the_other(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs of a later seed wait for a free process, so a comparison that is stopped has whole seeds."""
    plan = plan_in(tmp_path / "out", data)

    @contextmanager
    def threads(workers: int, _: int) -> Any:
        with ThreadPoolExecutor(workers) as pool:
            yield pool

    def done_at_once(plan: Plan, job: Job) -> dict[str, Any]:
        write_result(plan, job, {})
        return {}

    monkeypatch.setattr(plans, "processes", threads)
    monkeypatch.setattr(plans, "do", done_at_once)
    plan = dataclasses.replace(plan, config=dataclasses.replace(plan.config, seeds=4))
    seeds: list[int] = []
    run_all(plan, plan.jobs, 1, 1, lambda job, result: seeds.append(job.seed))
    assert seeds == sorted(seeds)
    assert len(seeds) == len(plan.jobs)
