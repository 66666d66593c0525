"""`python -m benchmarks.gpu`: check the kernels on this machine's GPU, then measure them; see the package."""

from __future__ import annotations

import argparse
import itertools
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import row, tables
from benchmarks.gpu import gate
from benchmarks.gpu.predicted import predicted_ms
from benchmarks.gpu.sections import SECTIONS, TARGETS, tiny
from benchmarks.measure import measure
from benchmarks.row import ROOT, Job, Row
from fastmask import workers

TURNS_SECONDS = 45  # in which programs that take turns must have ended, compiling included
GATE_SECONDS = 180  # of all tests, and at most half of what is left
JOB_SECONDS = 90  # after which a job is taken to hang
PART_SECONDS = 1.0  # of timing; checking and compiling take longer


def main(arguments: list[str] | None = None) -> int:
    """Gate, sections, what must hold; 1 if a test or a measurement failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the CSV file")
    parser.add_argument("--seconds", type=float, default=480, help="for everything, tests included (default: 480)")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="these sections alone")
    parser.add_argument("--no-tests", action="store_true", help="skip the gate; the rows are marked as unchecked")
    parser.add_argument("--strict", action="store_true", help="exit code 1 if a target is missed")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes in Triton's interpreter; nothing is written")
    options = parser.parse_args(arguments)
    if options.dry_run:  # for the process that measures
        os.environ.update({"TRITON_INTERPRET": "1", "FASTMASK_BACKEND": "triton"})
    elif not torch.cuda.is_available():
        print("no GPU here: nothing to check, nothing to measure")
        return 0
    start = time.monotonic()
    end = start + options.seconds
    green = tested = not (options.no_tests or options.dry_run)
    if tested:  # a red test does not stop what can still be learned; the rows say that they are unchecked
        repeatable = gate.repeatable(ROOT, min(TURNS_SECONDS, options.seconds))
        green = gate.green(ROOT, min(GATE_SECONDS, (end - time.monotonic()) / 2)) and repeatable
    warning = "" if green else f" UNCHECKED: {'a test failed' if tested else 'the tests did not run'}."
    sections = {section: SECTIONS[section] for section in options.only or SECTIONS}
    jobs = [job for section in sections.values() for job in section]
    jobs = [tiny(job) if options.dry_run else job.on(job.setting.threads, "cuda") for job in jobs]
    results = measured(jobs, 0.0 if options.dry_run else PART_SECONDS, end)
    rows, failed = [], []
    for section, own in sections.items():
        found, wrong = zip(*itertools.islice(results, len(own)), strict=True)
        new = [replace(one, checked=green) for rows_of_job in found for one in rows_of_job]
        rows += new
        failed += filter(None, wrong)
        print(f"==== {section}: done at {time.monotonic() - start:.0f} s.{warning}\n")
        tables.print_rows(new, TARGETS)
        print("\n".join(filter(None, wrong)), flush=True)
        if rows and not options.dry_run:  # "NVIDIA H200" -> nvidia-h200.csv
            name = re.sub(r"[^a-z0-9]+", "-", rows[0].machine.processor.lower()).strip("-")
            row.write(options.out / f"{name}.csv", rows)
    reached = tables.print_targets(TARGETS, rows)
    tables.print_sources(rows)
    print(f"on paper: milliseconds on an H200 by benchmarks/gpu/predicted.py.{warning}", *failed, sep="\n")
    return 1 if failed or (tested and not green) or (options.strict and not reached) else 0


def measured(jobs: Iterable[Job], seconds: float, end: float) -> Iterator[tuple[list[Row], str]]:
    """The rows of each job with what is predicted of them, and a line on what went wrong.

    A process of its own measures, and a new one after a kernel that crashes, hangs or breaks the GPU's state.
    """
    left = iter(jobs)
    for job in left:
        limit = 0.0
        try:
            with workers.processes(1, job.setting.threads) as process:
                for job in itertools.chain([job], left):  # noqa: B020
                    limit = min(JOB_SECONDS, end - time.monotonic())
                    if limit <= 0:
                        raise RuntimeError("out of time")
                    rows = process.submit(measure, job, seconds).result(limit)
                    yield [replace(one, predicted_ms=predicted_ms(*one.key)) for one in rows], ""
        except Exception as error:
            why = str(error).partition("\n")[0][:300] or f"took over {limit:.0f} s"
            yield [], f"FAILED {job.setting.words()}: {type(error).__name__}: {why}"


if __name__ == "__main__":
    sys.exit(main())
