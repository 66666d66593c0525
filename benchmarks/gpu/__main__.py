"""`python -m benchmarks.gpu`: check the kernels on this machine's GPU, then measure them; see the package."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import row, tables
from benchmarks.gpu import gate
from benchmarks.gpu.predicted import predicted_ms
from benchmarks.gpu.sections import SECTIONS, TARGETS, tiny
from benchmarks.gpu.worker import Worker
from benchmarks.machine import ROOT
from benchmarks.row import Row
from benchmarks.running import Job, measure
from benchmarks.targets import placed

TURNS_SECONDS = 45  # in which programs that take turns must have ended, compiling included
GATE_SECONDS = 180  # of all tests, and at most half of what is left
JOB_SECONDS = 90  # after which a job is taken to hang
PART_SECONDS = 1.0  # of timing; checking and compiling take longer
COUNT_SECONDS = 60


def main(arguments: list[str] | None = None) -> int:
    """Gate, sections, what must hold; 1 if a test or a measurement failed."""
    options = _options(arguments)
    if options.dry_run:  # for the process that measures
        os.environ.update({"TRITON_INTERPRET": "1", "FASTMASK_BACKEND": "triton"})
    elif not torch.cuda.is_available():
        print("no GPU here: nothing to check, nothing to measure")
        return 0
    start = time.monotonic()
    end = start + options.seconds
    tested = not (options.no_tests or options.dry_run)
    # A red test does not stop what can still be learned; the rows say that they are unchecked.
    green = tested and all([gate.repeatable(ROOT, min(TURNS_SECONDS, options.seconds)), _green(end)])
    warning = "" if green else f" UNCHECKED: {'a test failed' if tested else 'the tests did not run'}."
    rows: list[Row] = []
    failed: list[str] = []
    with Worker(measure) as worker:
        for section in options.only or SECTIONS:
            found, wrong = _measured(worker, SECTIONS[section], end, options.dry_run)
            found = [replace(own, checked=green) for own in found]
            rows, failed = rows + found, failed + wrong
            print(f"==== {section}: done at {time.monotonic() - start:.0f} s.{warning}\n")
            tables.print_rows(found, TARGETS)
            if section == "launches":
                print(_counted(min(COUNT_SECONDS, end - time.monotonic())))
            print("\n".join(wrong), flush=True)
            if rows and not options.dry_run:
                row.write(options.out / file_name(rows[0].machine.processor), rows)
    reached = tables.print_targets(TARGETS, rows)
    tables.print_sources(rows)
    print(f"on paper: milliseconds on an H200 by benchmarks/gpu/predicted.py.{warning}", *failed, sep="\n")
    return 1 if failed or (tested and not green) or (options.strict and not reached) else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the CSV file")
    parser.add_argument("--seconds", type=float, default=480, help="for everything, tests included (default: 480)")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="these sections alone")
    parser.add_argument("--no-tests", action="store_true", help="skip the gate; the rows are marked as unchecked")
    parser.add_argument("--strict", action="store_true", help="exit code 1 if a target is missed")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes in Triton's interpreter; nothing is written")
    return parser.parse_args(arguments)


def _green(end: float) -> bool:
    return gate.green(ROOT, min(GATE_SECONDS, (end - time.monotonic()) / 2))


def _measured(worker: Worker[list[Row]], jobs: list[Job], end: float, dry_run: bool) -> tuple[list[Row], list[str]]:
    """The rows of a section with what is predicted of them, and a line on each job that failed."""
    found, wrong = [], []
    for job in jobs:
        limit = min(JOB_SECONDS, end - time.monotonic())
        try:
            if limit <= 0:
                raise RuntimeError("out of time")
            here = tiny(job) if dry_run else placed(job, job.setting.threads, "cuda")
            found += worker(here, 0.0 if dry_run else PART_SECONDS, limit=limit)
        except RuntimeError as error:
            wrong.append(f"FAILED {job.setting.words()}: {error}")
    return [replace(own, predicted_ms=predicted_ms(own.setting, own.part, own.implementation)) for own in found], wrong


def _counted(seconds: float) -> str:
    """What the launch recorder counts: the table of `benchmarks.gpu.recorded`, which no interpreter may replace."""
    env = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "FASTMASK_BACKEND")}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu.recorded"]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=env, timeout=max(0.0, seconds), capture_output=True, text=True, check=False
        )
    except subprocess.TimeoutExpired:
        return f"launches were not counted in {seconds:.0f} s\n"
    return done.stdout if done.returncode == 0 else f"launches were not counted: {done.stderr[-300:]}\n"


def file_name(gpu: str) -> str:
    """A GPU's name as a file name: "NVIDIA H200" -> "nvidia-h200.csv"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".csv"


if __name__ == "__main__":
    sys.exit(main())
