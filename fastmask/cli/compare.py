"""`fastmask compare`: methods x meta-learning x seeds under one budget, as tables and pictures."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Any

from fastmask.cli.options import given_settings
from fastmask.compare.plan import CompareConfig, Job, Plan, check_languages
from fastmask.compare.report import print_tables, write_report
from fastmask.files import check_writable
from fastmask.literal import say
from fastmask.tasks.task import heading
from fastmask.terminal import LiteralConsole, console_of

__all__ = ["run"]


def run(options: argparse.Namespace) -> None:
    """Check everything, do what is not done yet, and show it."""
    from fastmask.compare.cells import Runner
    from fastmask.compare.engine import run_all

    if options.workers < 1:
        raise ValueError(f"--workers is {options.workers} (expected at least 1)")
    given = given_settings(options)
    own = {item.name for item in dataclasses.fields(CompareConfig)}
    config = CompareConfig.from_dict({name: value for name, value in given.items() if name in own})
    training = {name: value for name, value in given.items() if name not in own}
    plan = Plan(Path(options.out), options.data, config, training)
    check_writable(plan.out / "plan")
    check_languages(plan)
    Runner(plan).check()
    plan.open()
    threads = training.get("threads") or max(1, (os.cpu_count() or 1) // options.workers)
    progress = _Progress(plan)
    try:
        run_all(plan, options.workers, threads, progress.show, options.ray)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command goes on where it stopped") from None
    print_tables(plan, console_of(sys.stdout))
    files = write_report(plan, options.command_line)
    say(f"comparison: {plan.out.resolve()}")
    say(f"            {', '.join(file.name for file in files)}")


class _Progress:
    """One line for each job that is done."""

    def __init__(self, plan: Plan) -> None:
        from fastmask.compare.results import is_done

        self.total = len(plan.jobs)
        self.done = sum(is_done(plan, job) for job in plan.jobs)
        self.console = LiteralConsole(stderr=True, soft_wrap=True, highlight=False)
        self.began, self.mine = time.perf_counter(), 0
        if self.done:
            self.console.print(f"{self.done} of {self.total} jobs are done already")

    def show(self, job: Job, result: dict[str, Any]) -> None:
        self.done, self.mine = self.done + 1, self.mine + 1
        left = (time.perf_counter() - self.began) / self.mine * (self.total - self.done)
        scores = ", ".join(f"{name} {value:.2f}" for name, value in _means(result).items())
        what = f"{heading(next(iter(result['scores'][0]['scores'])))} {scores}" if scores else "the shared start"
        self.console.print(
            f"[{self.done}/{self.total}] {job.name}: {what}; {result['seconds']:.0f} s, about {left / 60:.0f} min left"
        )


def _means(result: dict[str, Any]) -> dict[str, float]:
    """Mean LAS of each condition."""
    from fastmask.compare.tables import CONDITIONS

    scores: dict[str, list[float]] = {}
    for score in result.get("scores", []):
        if score["condition"] in CONDITIONS:
            scores.setdefault(score["condition"], []).append(score["score"])
    return {condition: sum(values) / len(values) for condition, values in scores.items()}
