"""The command line of `python -m benchmarks`."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from benchmarks import against, tables
from benchmarks import row as rows_file
from benchmarks.cases import CASES
from benchmarks.grid import SWEPT, jobs_of, values_of
from benchmarks.machine import ROOT, described, one_line
from benchmarks.plans import PLANS, placed
from benchmarks.row import Row, setting_of
from benchmarks.running import Job, Measured, measure, see
from benchmarks.setting import DTYPES, SHAPES, UNITS, DoesNotFitError, Setting
from benchmarks.targets import GROWTHS, TARGETS, Growth, Reading, Target
from fastmask.errors import unknown

__all__ = ["main"]

SECONDS = 20.0
JUDGED = ("targets", "growth")  # plans whose measurements are held against what is asked for
EPILOG = """examples:
  python -m benchmarks                                  the quick plan, five minutes
  python -m benchmarks targets                          what must hold; fails where something falls short
  python -m benchmarks encoder --density 1,0.75,0.5,0.25,0.1 --present 1,8 --batch 16 --csv runs/encoder.csv
  python -m benchmarks op --unit neurons,blocks64,weights --parts forward,dW --threads 1,2
  python -m benchmarks --from runs/encoder.csv --pictures runs/pictures
  python -m benchmarks targets --from benchmarks/results/targets.csv
  python -m benchmarks quick --csv runs/new.csv --compare benchmarks/results/quick.csv"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command: 0 if all is well, 1 where a target is missed or something has become slower, 2 on bad input."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options, list(sys.argv[1:] if arguments is None else arguments))
    except (ValueError, KeyError, OSError, RuntimeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Subnetworks against the dense model and against other ways to mask it, each proven equal first.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", nargs="*", help="a plan, or cases; see --list (default: the plan quick)")
    parser.add_argument("--list", action="store_true", help="list plans, cases, shapes and units")
    sweep = parser.add_argument_group("the settings of cases; several values, with commas, make a sweep")
    defaults = {field.name: field.default for field in fields(Setting)}
    for name in SWEPT:
        sweep.add_argument(f"--{name}", metavar="A,B", help=f"default: {_default(name, defaults[name])}")
    sweep.add_argument("--compile", action="store_true", help="run every implementation under torch.compile")
    sweep.add_argument("--implementations", metavar="A,B", help="default: all that apply")
    sweep.add_argument("--parts", metavar="A,B", help="default: all of the case")
    sweep.add_argument(
        "--peaks", action="store_true", help="also count the most that each implementation holds at once"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for each part (default: {SECONDS:g})")
    parser.add_argument(
        "--threads", help="CPU threads; several values: one process each (default: all cores, at most 2)"
    )
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: a GPU if there is one"
    )
    parser.add_argument("--csv", type=Path, help="write the rows here, as they come")
    parser.add_argument("--resume", action="store_true", help="go on with the CSV file: leave out what it holds")
    parser.add_argument("--from", dest="stored", type=Path, help="measure nothing: take the rows of this CSV file")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="draw the rows")
    parser.add_argument("--compare", type=Path, metavar="CSV", help="hold the ratios against those of another run")
    parser.add_argument(
        "--update-readme", type=Path, nargs="?", const=ROOT / "README.md", metavar="FILE",
        help="put a table of the rows between the two marks in the README",
    )  # fmt: skip
    return parser


def _default(name: str, general: Any) -> str:
    special = {case: kind.defaults[name] for case, kind in CASES.items() if name in kind.defaults}
    texts = [f"{case} {value}" for case, value in special.items() if value != general]
    return f"{general}" + (f" ({', '.join(texts)})" if texts else "")


def _run(options: argparse.Namespace, arguments: list[str]) -> int:
    if options.list:
        _list()
        return 0
    stored = None if options.compare is None else rows_file.read(options.compare)  # before anything is measured
    if options.update_readme is not None and tables.BEGIN not in options.update_readme.read_text(encoding="utf-8"):
        raise ValueError(f"{options.update_readme} has no line {tables.BEGIN!r}: the table goes below it")
    good = True
    if options.stored is not None:
        if options.csv or len(options.what) > 1 or not set(options.what) <= set(JUDGED):
            raise ValueError("--from measures nothing: leave --csv out, and what to measure, but for targets or growth")
        rows = rows_file.read(options.stored)
        tables.print_rows(rows)
        if options.what and not rows:
            raise ValueError(f"{options.stored} holds no rows: nothing can be held against {options.what[0]}")
        for plan in options.what:
            good = _judged(plan, rows[0].threads, rows[0].device, {}, rows)
    elif len(threads := _threads(options.threads)) > 1:
        rows, good = _one_process_each(threads, options, arguments)
    else:
        rows, good = _measured(options, threads[0])
    for line in tables.break_evens(rows):
        print(line)
    if options.pictures is not None:
        from benchmarks.pictures import draw

        for path in draw(rows, options.pictures):
            print(f"drawn: {path}")
    if options.update_readme is not None:
        tables.update_readme(options.update_readme, rows)
        print(f"table written into {options.update_readme}")
    if stored is not None:
        good = against.print_changes(against.changes(stored, rows), options.compare) and good
    return 0 if good else 1


def _measured(options: argparse.Namespace, threads: int) -> tuple[list[Row], bool]:
    """Measure what was asked for; the rows, and whether all targets are reached."""
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    jobs, plan = _jobs(options, threads, device)
    rows = _stored_rows(options)
    done = {setting_of(row) for row in rows} if options.resume else set()
    measured: dict[Job, Measured] = {}
    say = _Progress(len(jobs))
    failed = False
    for number, job in enumerate(jobs, 1):
        if job.setting in done:
            continue
        say.begin(number, job.setting.words())
        try:
            found = measure(job, options.seconds, say.doing)
        except DoesNotFitError as error:
            say.note(f"left out: {error}")
            continue
        except RuntimeError as error:
            if len(jobs) == 1:
                raise
            say.note(f"FAILED: {error}")  # one wrong implementation loses no other measurement
            failed = True
            continue
        measured[job] = found
        rows += found.rows
        if options.csv is not None:
            rows_file.append(options.csv, found.rows)
        say.end()
        tables.print_rows(found.rows)
    print(one_line(described(torch.device(device)), threads))
    if plan not in JUDGED:
        return rows, not failed
    return rows, _judged(plan, threads, device, measured, rows) and not failed


def _judged(plan: str, threads: int, device: str, measured: dict[Job, Measured], rows: Sequence[Row]) -> bool:
    """Print what is asked for and what was found, now or in stored rows; whether all of it is reached."""
    read: list[tuple[Target | Growth, Reading | None]] = []
    wanted: list[Target | Growth] = [*(TARGETS if plan == "targets" else []), *GROWTHS]
    stored = tables.by_setting(rows)
    for target in wanted:
        jobs = [placed(job, threads, device) for job in target.jobs]
        found = [measured.get(job) or Measured(job, stored.get(job.setting, []), {}) for job in jobs]
        read.append((target, target.reading(found) if all(map(target.is_in, found)) else None))
    tables.print_targets(read)
    return all(reading is not None and target.reached(reading) for target, reading in read)


def _jobs(options: argparse.Namespace, threads: int, device: str) -> tuple[list[Job], str | None]:
    """What to measure, in order, and the plan's name if it is one."""
    words = options.what or ["quick"]
    swept = {name: values_of(name, getattr(options, name)) for name in SWEPT if getattr(options, name) is not None}
    names = None if options.implementations is None else tuple(options.implementations.split(","))
    parts = None if options.parts is None else tuple(options.parts.split(","))
    for word in words:
        if word not in PLANS and word not in CASES:
            raise unknown("plan or case", word, [*PLANS, *CASES])
    plans = [word for word in words if word in PLANS]
    if plans and len(words) > 1:
        raise ValueError(f"{plans[0]!r} is a plan and stands alone (given: {' '.join(words)})")
    if plans:
        if swept or names or parts or options.compile or options.peaks:
            raise ValueError(f"the plan {plans[0]!r} has settings of its own; settings can be given with cases")
        jobs = []
        for job in (placed(job, threads, device) for job in PLANS[plans[0]]()):
            try:
                see(job)
            except DoesNotFitError as error:
                print(f"left out: {error}", file=sys.stderr)
            else:
                jobs.append(job)
        return jobs, plans[0]
    fixed = {"compiled": options.compile, "threads": threads, "device": device}
    jobs, left_out = jobs_of(words, swept, fixed, names, parts, options.peaks)
    for line in left_out:
        print(line, file=sys.stderr)
    return jobs, None


def _stored_rows(options: argparse.Namespace) -> list[Row]:
    """The rows that the CSV file holds already."""
    if options.csv is None:
        if options.resume:
            raise ValueError("--resume needs --csv: the file to go on with")
        return []
    if not options.csv.is_file() or options.csv.stat().st_size == 0:
        return []
    if not options.resume:
        raise ValueError(f"{options.csv} is there already: add --resume to go on with it, or name another file")
    return rows_file.read(options.csv)


def _threads(text: str | None) -> list[int]:
    if text is None:
        return [min(2, os.cpu_count() or 1)]
    return values_of("threads", text)


def _one_process_each(threads: list[int], options: argparse.Namespace, arguments: list[str]) -> tuple[list[Row], bool]:
    """A process for each number of threads: PyTorch's pool cannot shrink within one."""
    _stored_rows(options)
    rows: list[Row] = []
    good = True
    with tempfile.TemporaryDirectory() as folder:
        for count in threads:
            csv = options.csv or Path(folder) / "rows.csv"
            own = ["--threads", str(count), "--csv", str(csv), *(["--resume"] if csv.is_file() else [])]
            kept = _without(arguments, ("--threads", "--csv", "--pictures", "--compare", "--update-readme", "--resume"))
            done = subprocess.run([sys.executable, "-m", "benchmarks", *kept, *own], cwd=os.getcwd(), check=False)
            if done.returncode == 2:
                raise RuntimeError(f"the process with {count} threads failed")
            good = good and done.returncode == 0
            rows = rows_file.read(csv)
    return rows, good


def _without(arguments: Sequence[str], names: Sequence[str]) -> list[str]:
    """The arguments without some options and their values."""
    kept: list[str] = []
    skipping = False
    for argument in arguments:
        if argument.startswith("--"):
            skipping = argument.split("=")[0] in names
        if not skipping:
            kept.append(argument)
    return kept


class _Progress:
    """Lines on standard error: what is running, and what became of it."""

    def __init__(self, count: int) -> None:
        self.count = count

    def begin(self, number: int, what: str) -> None:
        """A measurement begins."""
        print(f"[{number}/{self.count}] {what}", end="", file=sys.stderr, flush=True)

    def doing(self, what: str) -> None:
        """What it does at the moment."""
        print(f" ... {what}", end="", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """It ends with this."""
        print(f"\n  {text}", file=sys.stderr, flush=True)

    def end(self) -> None:
        """It ends well."""
        print(file=sys.stderr, flush=True)


def _list() -> None:
    """Print what there is."""
    print("plans:")
    about: dict[str, Callable[[], list[Job]]] = PLANS
    for name, make in about.items():
        print(f"  {name:<10} {(make.__doc__ or '').strip().splitlines()[0]}")
    print("cases:")
    for name, case in CASES.items():
        print(f"  {name:<10} {(case.__doc__ or '').strip().splitlines()[0]}")
        print(f"  {'':<10} implementations: {', '.join(case.implementations)}")
        print(f"  {'':<10} parts: {', '.join(case.parts)}; units: {', '.join(case.units)}")
    print(f"shapes: {', '.join(f'{n} ({s.hidden}/{s.ffn}, {s.heads} heads)' for n, s in SHAPES.items())}")
    print(f"units:  {', '.join(UNITS)}")
    print(f"dtypes: {', '.join(DTYPES)}")
