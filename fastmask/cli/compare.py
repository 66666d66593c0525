"""`fastmask compare`: ways to train x seeds under one budget, as tables and pictures."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, TextIO

from fastmask.cli.options import DATA, FILE, Input, add_settings, add_task_settings, given_settings
from fastmask.cli.report import model_of, print_sizes, print_table
from fastmask.compare import plan as plans
from fastmask.compare.plan import RESERVED, CompareConfig, Job, Plan, Runner, run_all
from fastmask.errors import unknown
from fastmask.files import check_writable
from fastmask.settings import ConfigError, items_of
from fastmask.tasks.task import heading
from fastmask.training.config import METAS, METHODS, Budget, TrainConfig
from fastmask.training.engine import device_of

if TYPE_CHECKING:
    from fastmask.compare.report import Tables


def add_compare(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    add = parser.add_argument
    add("--data", required=True, type=DATA, help="a folder, a file or a name on the Hub")
    add("--out", required=True, help="folder of the comparison; the same command resumes where it stopped")
    clusters = "address of a Ray cluster to train cells on instead (auto, local, host:port; needs the extra ray)"
    add("--ray", metavar="ADDRESS", help=clusters)
    plan = "YAML file with the whole plan: arms, settings, hypotheses (like compare.yaml of a comparison)"
    add("--plan", metavar="FILE", type=FILE, help=plan)
    methods = f"which subnetworks to compare, out of {', '.join(METHODS)} (default: all but vector)"
    add("--methods", nargs="+", help=methods)
    add("--metas", nargs="+", help=f"with which meta-learning, out of {', '.join(METAS)} (default: none fomaml)")
    some = "train only these arms now, as in full,static; the tables show them, and the others can follow"
    add("--arms", nargs="+", help=some)
    known = "folder with results.csv and cells.csv of this plan: cells in them are not trained again"
    tables = Input("a folder with results.csv and cells.csv", folder=True)
    add("--known", metavar="FOLDER", type=tables, help=known)
    add("--workers", type=int, default=1, help="processes on this machine that train cells side by side")
    add_settings(parser, CompareConfig, group="the comparison")
    add_settings(parser, only=[item.name for item in dataclasses.fields(TrainConfig) if item.name not in RESERVED])
    add_task_settings(parser, arguments)


def run_compare(options: argparse.Namespace) -> None:
    """Check everything, do what is not done yet, and show it."""
    from fastmask.compare.report import cells_of, load_tables, read_tables, write_report

    if options.workers < 1:
        raise ValueError(f"--workers is {options.workers} (expected at least 1)")
    plan = _plan(options)
    known = None if options.known is None else read_tables(Path(options.known))
    if known is not None:
        load_tables(plan, known)  # what does not fit the plan is said before anything is trained
    done = () if known is None else set.intersection(*(set(cells_of(table)) for table in known))
    jobs = plan.jobs_for(_some_of(options, "arms", plan.arms, default=()), done)
    check_writable(plan.out / "plan")
    threads = plan.training.get("threads") or max(1, (os.cpu_count() or 1) // options.workers)
    _open(plan, jobs, options, threads)
    try:
        run_all(plan, jobs, options.workers, threads, _progress(plan, jobs), options.ray)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command resumes where it stopped") from None
    print_tables(plan, sys.stdout, known)
    files = write_report(plan, options.command_line, known)
    print(f"comparison: {plan.out.resolve()}")
    print(f"            {', '.join(file.name for file in files)}")


def _open(plan: Plan, jobs: Sequence[Job], options: argparse.Namespace, threads: int) -> None:
    """See that everything fits, and say what is about to be done, on what and where, before it takes long."""
    runner, models, kinds = Runner(plan), dict[str, int](), Counter(job.kind for job in jobs)
    plan.open(runner.check(lambda task, config: models.update([model_of(task, config)])))
    where = (
        f"on {device_of(plan.training.get('device', 'auto'))}, workers: {options.workers}, threads of each: {threads}"
    )
    if options.ray is not None:
        where = f"on the Ray cluster {options.ray}, CPUs of each job: {threads}"
    # A start keeps two checkpoints, a job at work up to four, and a cell its weights: at most a third of one.
    kept = 2 * kinds["start"] + 4 * min(options.workers, len(jobs)) + plan.config.keep_models * kinds["cell"] / 3
    print(
        f"{plan.task.name}, {kinds['cell']} cells of {len({job.arm for job in jobs})} arms ({len(jobs)} jobs), "
        f"{', '.join(models)}, {where}; takes up to {kept * max(models.values()) / 1e9:.1f} GB in {plan.out}",
        file=sys.stderr,
    )
    sizes = {name: {**of, "test": runner.scorer.seen[name]} for name, of in runner.datasets.items()}
    for name, pool in runner.scorer.unseen.items():
        sizes[f"{name}, unseen"] = {"support": pool.support, "test": pool.test}
    print_sizes(sizes, plan.task.example_word, plan.training.get("train_sentences"))
    for budget in dict.fromkeys(str(Budget.of(config, len(runner.datasets))) for config in plan.configs.values()):
        print(f"  a cell: {budget}", file=sys.stderr)


def print_tables(plan: Plan, file: TextIO, known: Tables | None = None) -> None:
    """What was decided, one table for each condition, and one of the cells' cost."""
    from fastmask.compare.report import NOTE, load_tables, page_tables

    for title, rows in page_tables(plan, *load_tables(plan, known)):
        print_table(title, rows, file, left=("arm", "over", "verdict", "condition"))
    print(NOTE, file=file)


def _plan(options: argparse.Namespace) -> Plan:
    """The plan of a file, or that which the options say."""
    given = given_settings(options)
    if options.plan is not None:
        others = [name for name, value in given.items() if name not in plans.FREE and value is not None]
        others += [name for name in ("methods", "metas") if getattr(options, name)]
        if others:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(others))
            raise ConfigError(f"{names} given beside --plan, which says everything (expected no settings)")
        plan = Plan.read(options.plan, Path(options.out), options.data)
        return dataclasses.replace(plan, training={**plan.training, **given})
    own = {item.name for item in dataclasses.fields(CompareConfig)}
    config = CompareConfig.from_dict({name: value for name, value in given.items() if name in own})
    training = {name: value for name, value in given.items() if name not in own}
    methods = _some_of(options, "methods", METHODS, default=[name for name in METHODS if name != "vector"])
    metas = _some_of(options, "metas", METAS, default=["none", "fomaml"])
    return Plan(Path(options.out), options.data, config, training, plans.arms_of(methods, metas))


def _some_of(options: argparse.Namespace, name: str, known: Collection[str], default: Sequence[str]) -> list[str]:
    """The names that an option lists, each once."""
    given = items_of(",".join(getattr(options, name) or default))
    for item in given:
        if item not in known:
            raise ConfigError(f"--{name}: {unknown('entry', item, known)}")
    return list(dict.fromkeys(given))


def _progress(plan: Plan, jobs: Sequence[Job]) -> Callable[[Job, dict[str, Any]], None]:
    """A function that prints one line for each job that is done."""
    before = sum(plans.is_done(plan, job) for job in jobs)
    began, mine = time.perf_counter(), 0
    if before:
        print(f"{before} of {len(jobs)} jobs are done already", file=sys.stderr)

    def show(job: Job, result: dict[str, Any]) -> None:
        nonlocal mine
        mine += 1
        left = (time.perf_counter() - began) / mine * (len(jobs) - before - mine)
        what = {"start": "the shared start", "masks": "subnetworks"}.get(job.kind)
        if what is None:
            scores = defaultdict(list)
            for row in result["scores"]:
                scores[row["condition"]].append(row["score"])
            means = ", ".join(f"{name} {fmean(scores[name]):.2f}" for name in plans.CONDITIONS if name in scores)
            what = f"{heading(next(iter(result['scores'][0]['scores'])))} {means}"
        took = f"{result['seconds']:.0f} s, about {left / 60:.0f} min left"
        print(f"[{before + mine}/{len(jobs)}] {job.name}: {what}; {took}", file=sys.stderr, flush=True)

    return show
