"""A comparison that is killed at any rename, fsync or delete, and that is run again, ends the same.

The long form (``-m slow``) kills at every one of these calls; the short one at a few.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from kills import die_before
from processes import FORKSERVER, start_process
from toy_run import metrics

from fastmask.compare.plan import CompareConfig, Plan, Runner, arms_of, do, is_done
from fastmask.files import LOCK_FILES

TRAINING = {
    "steps": 6, "batch_size": 4, "density": 0.5, "score_sentences": 4, "dev_sentences": 2, "eval_every": 0,
    "checkpoint_every": 2, "threads": 1, "update_every": 2, "update_sentences": 2, "inner_steps": 1,
    "support_sentences": 1, "query_sentences": 1,
}  # fmt: skip
COMPARISON = {
    "train": "qaa,qab", "unseen": "qad", "seeds": 1, "shots": 2,
    "support_sets": 1, "adapt_steps": 1, "adapt_lr": 1e-3, "adapt_encoder_lr": 1e-3, "test_sentences": 2,
}  # fmt: skip
ARMS = arms_of(["static", "dynamic"], ["none"])
TIMES = ("seconds", "training_seconds", "scoring_seconds", "words_per_second", "resumed")
TIMES += ("day",)
WAIT = 300  # seconds


def plan_in(folder: Path, data: Path) -> Plan:
    return Plan(
        folder, str(data), CompareConfig(**COMPARISON), {**TRAINING, "model": str(data.parent / "encoder")}, ARMS
    )


def be_a_worker(plan: Plan, number: int | None, count: Any) -> None:
    torch.set_num_threads(1)
    assert Runner(plan).scorer  # the data are read, and their cache is written
    die_before(number, count)
    for job in plan.jobs:
        do(plan, job)


def one_worker(plan: Plan, number: int | None = None) -> int:
    """Let a process do a comparison, which is perhaps killed. How many calls."""
    count = FORKSERVER.Value("i", 0)
    worker = start_process(be_a_worker, plan, number, count)
    worker.join(WAIT)
    assert worker.exitcode == (0 if number is None else -9)
    return count.value


@pytest.fixture(scope="module")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, int]:
    plan = plan_in(tmp_path_factory.mktemp("unbroken") / "out", data)
    plan.open()
    return plan, one_worker(plan)


def assert_same(plan: Plan, unbroken: Plan) -> None:
    """Results, weights, masks and metrics of every cell are those of a comparison that was not killed."""
    for job in plan.jobs:
        assert is_done(plan, job)
        mine, theirs = (
            {k: v for k, v in json.loads((p.folder(job) / "result.json").read_text()).items() if k not in TIMES}
            for p in (plan, unbroken)
        )
        assert mine == theirs
        for path in unbroken.folder(job).rglob("*.safetensors"):
            if "checkpoints" not in path.parts:
                ours, others = load_file(plan.folder(job) / path.relative_to(unbroken.folder(job))), load_file(path)
                assert ours.keys() == others.keys()
                assert all(torch.equal(ours[name], others[name]) for name in others)
        if job.kind != "masks":  # their run is not kept
            assert metrics(plan.folder(job) / "run") == metrics(unbroken.folder(job) / "run")
    assert names_in(plan.out) == names_in(unbroken.out)


def names_in(folder: Path) -> set[Path]:
    """What lies in a folder, but for who held parts of it: of a process killed with nothing left to do, that stays."""
    return {path.relative_to(folder) for path in folder.rglob("*") if path.name not in LOCK_FILES}


def kill_and_run_again(number: int, folder: Path, data: Path, unbroken: Plan) -> None:
    plan = plan_in(folder, data)
    plan.open()
    one_worker(plan, number)
    one_worker(plan)
    assert_same(plan, unbroken)


def test_killed_at_some_calls(data: Path, unbroken: tuple[Plan, int], tmp_path: Path) -> None:
    """A comparison whose process is killed ends with the results of one that was not."""
    plan, calls = unbroken
    for number in sorted(random.Random(0).sample(range(1, calls + 1), 2)):
        kill_and_run_again(number, tmp_path / str(number), data, plan)


@pytest.mark.slow
def test_killed_at_every_call(data: Path, unbroken: tuple[Plan, int], tmp_path: Path) -> None:
    """The same, at every rename, fsync and delete."""
    plan, calls = unbroken
    print(f"compare: {calls} calls")
    for number in range(1, calls + 1):
        kill_and_run_again(number, tmp_path / str(number), data, plan)
