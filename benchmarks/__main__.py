"""`python -m benchmarks`: subnetworks measured against the dense network and other ways to mask it."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from benchmarks import row, tables
from benchmarks.cases import CASES
from benchmarks.measure import measure_in
from benchmarks.row import ROOT, Job, Row, Setting
from benchmarks.targets import QUICK, TARGETS
from fastmask.errors import unknown

PLANS = {"quick": QUICK, "targets": list(dict.fromkeys(target.job for target in TARGETS))}
SWEPT = [field for field in fields(Setting) if field.name not in ("case", "compiled", "threads", "device")]
EPILOG = """examples:
  python -m benchmarks --processes 3 --update-readme    what the README shows
  python -m benchmarks targets                          what must hold; fails where something falls short
  python -m benchmarks encoder --density 0.1,0.25,0.5,0.75,1 --present 1,8 --batch 16 --csv runs/encoder.csv
  python -m benchmarks --from runs/encoder.csv --pictures runs/pictures
  python -m benchmarks targets --from benchmarks/results/targets.csv
  python -m benchmarks --csv runs/new.csv --compare benchmarks/results/quick.csv"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command: 0 if all is well, 1 where a target is missed or something has become slower, 2 on bad input."""
    options = _parser().parse_args(arguments)
    try:
        before = None if options.compare is None else row.read(options.compare)  # before anything is measured
        if options.stored is None:
            rows = _measured(options)
        else:
            rows = row.read(options.stored)
            tables.print_rows(rows, TARGETS)
        tables.print_sources(rows)
        good = tables.print_targets(TARGETS, rows) if options.what == "targets" else True
        for path in tables.draw(rows, options.pictures) if options.pictures else ():
            print(f"drawn: {path}")
        if options.update_readme is not None:
            tables.update_readme(options.update_readme, rows)
        if before is not None:
            good = tables.print_changes(before, rows, options.compare) and good
    except (ValueError, KeyError, OSError, RuntimeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if good else 1


def _parser() -> argparse.ArgumentParser:
    cases = "\n".join(
        f"  {name}: {', '.join(case.implementations)}; parts {', '.join(case.parts)}; units {', '.join(case.units)}"
        for name, case in CASES.items()
    )
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Subnetworks against the dense network and other ways to mask it, each proven equal first.",
        epilog=f"cases:\n{cases}\n\n{EPILOG}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", nargs="?", default="quick", help="quick, targets, or a case (default: quick)")
    sweep = parser.add_argument_group("the settings of a case; several values, with commas, make a sweep")
    several = {"type": lambda text: tuple(item.strip() for item in text.split(",")), "default": (), "metavar": "A,B"}
    for field in SWEPT:
        sweep.add_argument(f"--{field.name}", **several, help=f"default: {field.default}, or the case's")
    sweep.add_argument("--compile", action="store_true", help="run every implementation under torch.compile")
    sweep.add_argument("--implementations", **several, help="beside dense and full; default: all that apply")
    sweep.add_argument("--parts", **several, help="default: all")
    sweep.add_argument("--peaks", action="store_true", help="also count the most that is held at once")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each part (default: 20)")
    parser.add_argument("--processes", type=int, default=1, help="repeat in so many processes; medians and range")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU (default: 2)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--csv", type=Path, help="write the rows here, as they come")
    parser.add_argument("--from", dest="stored", type=Path, metavar="CSV", help="measure nothing: take these rows")
    parser.add_argument("--compare", type=Path, metavar="CSV", help="hold the rows against those of another run")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="draw the rows")
    parser.add_argument(
        "--update-readme", type=Path, nargs="?", const=ROOT / "README.md", metavar="FILE",
        help="put the table of the README between its two marks",
    )  # fmt: skip
    return parser


def _measured(options: argparse.Namespace) -> list[Row]:
    if options.csv is not None and options.csv.exists():
        raise ValueError(f"{options.csv} is there already: name another file")
    if options.processes < 1:
        raise ValueError(f"--processes {options.processes}: expected at least 1")
    jobs = _jobs(options)
    for job in jobs:
        CASES[job.setting.case].refuse(job)
    rows: list[Row] = []
    for number, job in enumerate(jobs, 1):
        print(f"[{number}/{len(jobs)}] {job.setting.words()}", file=sys.stderr, flush=True)
        found = measure_in(options.processes, job, options.seconds)
        rows += found
        if options.csv is not None:
            row.write(options.csv, rows)
        tables.print_rows(found, TARGETS)
    return rows


def _jobs(options: argparse.Namespace) -> list[Job]:
    """What to measure, in order: a plan, or every combination of a case's settings."""
    given = {field.name: texts for field in SWEPT if (texts := getattr(options, field.name))}
    names, parts = options.implementations, options.parts
    if options.what in PLANS:
        if given or names or parts or options.compile or options.peaks:
            raise ValueError(f"the plan {options.what!r} has settings of its own; they can be given with a case")
        return [job.on(options.threads, options.device) for job in PLANS[options.what]]
    if options.what not in CASES:
        raise unknown("plan or case", options.what, [*PLANS, *CASES])
    swept: dict[str, list[Any]] = {name: [value] for name, value in CASES[options.what].defaults.items()}
    for name, texts in given.items():
        try:
            swept[name] = [get_type_hints(Setting)[name](text) for text in texts]
        except ValueError:
            raise ValueError(f"--{name}: {', '.join(texts)!r} is not a number") from None
    fixed = {"compiled": options.compile, "threads": options.threads, "device": options.device}
    return [
        Job(Setting(options.what, **dict(zip(swept, values, strict=True)), **fixed), names, parts, options.peaks)
        for values in itertools.product(*swept.values())
    ]


if __name__ == "__main__":
    sys.exit(main())
