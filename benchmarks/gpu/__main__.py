"""`python -m benchmarks.gpu`: check the kernels on this machine's GPU, then measure them; see the package."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks.gpu import gate
from benchmarks.gpu.report import Row, describe, file_name, table, write
from benchmarks.gpu.setup import REAL, TINY, Measurement, Setup

ROOT = Path(__file__).resolve().parents[2]
# What is worth most comes first: each section is printed and written as it ends.
SECTIONS = ("ceilings", "units", "bert", "encoder", "blocks", "bits", "launches", "compiled", "layouts", "sweep")
TURNS_SECONDS = 45  # in which programs that take turns must have ended, compiling included
SECTION_SECONDS = 170  # after which a section is taken to hang
WARM_UP_PROCESSES, WARM_UP_SECONDS = 8, 60
RESERVE = 20  # seconds that a sweep leaves unused
STICKY = 3  # exit code: the GPU is in an error state, which only a new process gets out of


def main(arguments: list[str] | None = None) -> int:
    """Gate, measurements, table."""
    options = _options(arguments)
    if options.section:
        return run_section(options)
    if options.warm_up:
        from benchmarks.gpu.sweep import warm_up

        share, shares = (int(part) for part in options.warm_up.split("/"))
        warm_up(TINY if options.dry_run else REAL, share, shares)
        return 0
    if not torch.cuda.is_available() and not options.dry_run:
        print("no GPU here: nothing to check, nothing to measure")
        return 0

    start, machine = time.monotonic(), describe(ROOT)
    tested = not (options.no_tests or options.dry_run)
    # A red test does not stop what can still be learned; the rows say that they are unchecked.
    green = tested and all(
        [
            gate.repeatable(ROOT, min(TURNS_SECONDS, options.seconds)),
            gate.green(ROOT, min(options.gate_seconds, start + options.seconds - time.monotonic())),
        ]
    )
    warning = "" if green else f"UNCHECKED: {'a test failed' if tested else 'the tests did not run'}. "
    rows: list[Row] = []
    for section in options.only or SECTIONS:
        if section == "sweep" and options.quick:
            continue
        left = start + options.seconds - time.monotonic()
        found = measure(section, min(SECTION_SECONDS, left), options.dry_run)
        rows += found
        machine["seconds"] = round(time.monotonic() - start)
        print(f"{section}: done at {machine['seconds']} s. {warning}", table(found), sep="\n", flush=True)
        if not options.dry_run:
            write(options.out / file_name(machine["gpu"]), machine, rows, green)
    heading = f"{warning}x: dense's time over ours, or ours over dense's where the goal is <=; ms: theirs->ours"
    print(" ".join(f"{k} {v}" for k, v in machine.items() if v is not None), heading, table(rows), sep="\n")
    short = any(row.reached is False for row in rows)
    wrong = (tested and not green) or any(row.error for row in rows)
    return 1 if wrong or (options.strict and short) else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON file")
    parser.add_argument("--quick", action="store_true", help="no sweep over block sizes")
    parser.add_argument("--no-tests", action="store_true", help='skip the gate; the results are marked "unchecked"')
    parser.add_argument("--strict", action="store_true", help="exit code 1 if a goal is missed")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="these sections alone")
    parser.add_argument("--seconds", type=float, default=480, help="for everything, tests included (default: 480)")
    parser.add_argument("--gate-seconds", type=float, default=180, help="time limit of the tests (default: 180)")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes in Triton's interpreter; nothing is written")
    # What the command runs itself in, one process for each section:
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--warm-up", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


# ---- the process that measures


def run_section(options: argparse.Namespace) -> int:
    """Run one section's measurements from the `first` on; a line of JSON for each beginning and each row."""
    setup = TINY if options.dry_run else REAL
    setup = replace(setup, sweep_seconds=min(setup.sweep_seconds, options.seconds - RESERVE))
    measurements = measurements_of(options.section, setup)
    with options.rows.open("a", encoding="utf-8") as file:

        def say(**line: object) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        for number, measurement in enumerate(measurements[options.first :], options.first):
            say(begins=measurement.name, number=number)
            try:
                for row in measurement.run():
                    say(row=asdict(row))
            except Exception as error:
                say(row=asdict(Row(measurement.name, error=f"{type(error).__name__}: {error}")))
                if not _device_is_well():
                    return STICKY
    return 0


def measurements_of(section: str, setup: Setup) -> list[Measurement]:
    """The measurements of a section; Triton is imported here, so that the interpreter can be asked for before."""
    if section == "sweep":
        from benchmarks.gpu.sweep import sweep

        return sweep(setup)
    from benchmarks.gpu import encoder, layers, small

    modules = {"units": layers, "blocks": layers, "bits": layers, "bert": encoder, "encoder": encoder}
    module = modules.get(section, encoder if section == "compiled" else small)
    found: list[Measurement] = getattr(module, section)(setup)
    return found


def _device_is_well() -> bool:
    if not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


# ---- the process that waits for it


def measure(section: str, seconds: float, dry_run: bool) -> list[Row]:
    """The rows of one section; what a measurement that crashed or hung leaves behind is begun anew after it."""
    end, first, rows = time.monotonic() + seconds, 0, []
    env = gate.environment(ROOT)
    if dry_run:
        env |= {"TRITON_INTERPRET": "1", "FASTMASK_BACKEND": "triton"}
    command = [sys.executable, "-m", "benchmarks.gpu", *(["--dry-run"] if dry_run else [])]
    if section == "sweep" and seconds < 3 * RESERVE:
        return [Row("sweep", note=f"left out: {seconds:.0f} s left")]
    if section == "sweep":
        _compile_ahead(command, env, end)
    while True:
        left = end - time.monotonic()
        if left <= 0:
            return [*rows, Row(section, error="out of time" if first == 0 else f"out of time after {first}")]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows"
            arguments = ["--section", section, "--first", str(first), "--rows", str(path), "--seconds", str(left)]
            code: int | None
            try:
                done = subprocess.run(
                    [*command, *arguments], cwd=ROOT, env=env, timeout=left, capture_output=True, text=True, check=False
                )
                code, said = done.returncode, done.stderr
            except subprocess.TimeoutExpired:
                code, said = None, ""
            lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        rows += [Row(**line["row"]) for line in lines if "row" in line]
        if code == 0:
            return rows
        begun = [(line["number"], line["begins"]) for line in lines if "begins" in line]
        if not begun:
            return [*rows, Row(section, error=_last_line(said) or "did not start in time")]
        number, name = begun[-1]
        if code != STICKY:  # else its row says what happened
            rows.append(Row(name, error="took too long" if code is None else f"crashed: {_last_line(said)}"))
        first = number + 1


def _compile_ahead(command: list[str], env: dict[str, str], end: float) -> None:
    """Let several processes fill Triton's cache; what they do not manage is compiled when it is measured."""
    until = min(time.monotonic() + WARM_UP_SECONDS, end - 30)
    n = WARM_UP_PROCESSES
    running = [
        subprocess.Popen(
            [*command, "--warm-up", f"{share}/{n}"], cwd=ROOT, env=env, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for share in range(n)
    ]  # fmt: skip
    for process in running:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


if __name__ == "__main__":
    sys.exit(main())
