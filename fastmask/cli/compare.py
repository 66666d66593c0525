"""`fastmask compare`: ways to train x seeds under one budget, as tables and pictures."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fastmask.cli.inputs import DATA, FILE, Input
from fastmask.cli.options import Joined, add_settings, add_task_settings, given_settings
from fastmask.cli.report import console_of
from fastmask.compare.plan import (
    CONDITIONS,
    FREE,
    RESERVED,
    CompareConfig,
    Job,
    Plan,
    arms_of,
    check_languages,
    is_done,
)
from fastmask.errors import unknown
from fastmask.files import check_writable
from fastmask.settings import ConfigError, items_of
from fastmask.tasks.task import heading
from fastmask.training.config import METAS, METHODS

__all__ = ["add_options", "run"]

TABLES = Input("a folder with results.csv and cells.csv", folder=True)


def add_options(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Add an option for every setting of a comparison and of its runs, and for those of the task."""
    add = parser.add_argument
    add("--data", required=True, type=DATA, help="a folder, a file or a name on the Hub")
    add("--out", required=True, help="folder of the comparison; the same command resumes where it stopped")
    clusters = "address of a Ray cluster to train cells on instead (auto, local, host:port; needs the extra ray)"
    add("--ray", metavar="ADDRESS", help=clusters)
    plan = "YAML file that says everything: arms, settings, hypotheses (as compare.yaml of a comparison)"
    add("--plan", metavar="FILE", type=FILE, help=plan)
    methods = f"which subnetworks to compare, out of {', '.join(METHODS)} (default: all but vector)"
    add("--methods", nargs="+", action=Joined, help=methods)
    metas = f"with which meta-learning, out of {', '.join(METAS)} (default: none fomaml)"
    add("--metas", nargs="+", action=Joined, help=metas)
    some = "only these arms now, as in full,static; their tables are shown, and the others can follow"
    add("--arms", nargs="+", action=Joined, help=some)
    known = "folder with results.csv and cells.csv of this plan: cells in them are not trained again"
    add("--known", metavar="FOLDER", type=TABLES, help=known)
    add("--workers", type=int, default=1, help="processes on this machine that train cells side by side")
    add_settings(parser, settings=CompareConfig, group="the comparison")
    add_settings(parser, without=RESERVED)
    add_task_settings(parser, arguments)


def run(options: argparse.Namespace) -> None:
    """Check everything, do what is not done yet, and show it."""
    from fastmask.compare.cells import Runner, run_all
    from fastmask.compare.report import print_tables, read_tables, write_report

    if options.workers < 1:
        raise ValueError(f"--workers is {options.workers} (expected at least 1)")
    plan = _plan(options)
    known = None if options.known is None else read_tables(Path(options.known))
    done = () if known is None else set(zip(known[1]["seed"], known[1]["arm"], strict=True))
    jobs = plan.jobs_for(_some_of("arms", items_of(options.arms or ""), tuple(plan.arms)), done)
    check_writable(plan.out / "plan")
    check_languages(plan)
    Runner(plan).check()
    plan.open()
    threads = plan.training.get("threads") or max(1, (os.cpu_count() or 1) // options.workers)
    progress = _Progress(plan, jobs)
    try:
        run_all(plan, jobs, options.workers, threads, progress.show, options.ray)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command resumes where it stopped") from None
    print_tables(plan, console_of(sys.stdout), known)
    files = write_report(plan, options.command_line, known)
    print(f"comparison: {plan.out.resolve()}")
    print(f"            {', '.join(file.name for file in files)}")


def _plan(options: argparse.Namespace) -> Plan:
    """The plan of a file, or that which the options say."""
    given = given_settings(options)
    if options.plan is not None:
        others = [*(given.keys() - set(FREE)), *(name for name in ("methods", "metas") if getattr(options, name))]
        if others:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(others))
            raise ConfigError(f"{names} given beside --plan, which says everything (expected no settings)")
        plan = Plan.read(options.plan, Path(options.out), options.data)
        return dataclasses.replace(plan, training={**plan.training, **given})
    own = {item.name for item in dataclasses.fields(CompareConfig)}
    config = CompareConfig.from_dict({name: value for name, value in given.items() if name in own})
    training = {name: value for name, value in given.items() if name not in own}
    methods, metas = (
        _some_of(name, items_of(getattr(options, name) or default), known)
        for name, default, known in (
            ("methods", ",".join(name for name in METHODS if name != "vector"), METHODS),
            ("metas", "none,fomaml", METAS),
        )
    )
    return Plan(Path(options.out), options.data, config, training, arms_of(methods, metas))


def _some_of(name: str, given: list[str], known: tuple[str, ...]) -> list[str]:
    for item in given:
        if item not in known:
            raise ConfigError(f"--{name}: {unknown('entry', item, known)}")
    return list(dict.fromkeys(given))


class _Progress:
    """One line for each job that is done."""

    def __init__(self, plan: Plan, jobs: Sequence[Job]) -> None:
        self.total = len(jobs)
        self.done = sum(is_done(plan, job) for job in jobs)
        self.began, self.mine = time.perf_counter(), 0
        if self.done:
            print(f"{self.done} of {self.total} jobs are done already", file=sys.stderr)

    def show(self, job: Job, result: dict[str, Any]) -> None:
        self.done, self.mine = self.done + 1, self.mine + 1
        left = (time.perf_counter() - self.began) / self.mine * (self.total - self.done)
        scores = ", ".join(f"{name} {value:.2f}" for name, value in _means(result).items())
        shared = {"start": "the shared start", "masks": "subnetworks"}.get(job.kind)
        what = shared or f"{heading(next(iter(result['scores'][0]['scores'])))} {scores}"
        took = f"{result['seconds']:.0f} s, about {left / 60:.0f} min left"
        print(f"[{self.done}/{self.total}] {job.name}: {what}; {took}", file=sys.stderr, flush=True)


def _means(result: dict[str, Any]) -> dict[str, float]:
    """Mean score of each condition."""
    scores = pd.DataFrame(result.get("scores", []), columns=["condition", "score"])
    means = scores.groupby("condition")["score"].mean()
    return {condition: means[condition] for condition in CONDITIONS if condition in means}
