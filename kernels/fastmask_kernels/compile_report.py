"""`python -m fastmask_kernels.compile_report`: what the compiler makes of every kernel that is launched, without a GPU.

What is launched is not listed by hand: `benchmarks.gpu.recorded`, in a checkout, runs the gate and the sections of
`make gpu` on a stub (`recorder`). One row for each variant (kernel, block sizes, dtypes, flags, hints) of each chip:

- `regs`: registers of one thread. `stack`: bytes of its stack frame. `spill`: bytes stored / loaded because registers
  ran out, each such instruction counted once, as ptxas does.
- `fit`: programs that a multiprocessor holds at a time, by registers and shared memory.
- `shared`: KiB of shared memory that the launch asks for / that the chip allows one program.
- `tensor cores`: tensor-core instructions of the whole kernel, and how many.

Not a timing: nothing here runs. The exit status is 1 if a kernel spills, has a stack, lacks tensor-core instructions,
asks for more shared memory than there is, or fits a multiprocessor less often than its table of block sizes says (lines
FAILED); 2 if the report cannot be made. Lines WARNING are what ptxas calls a potential performance loss, as when it
runs tensor-core instructions one by one; they leave the exit status alone.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import triton

from fastmask_kernels.chips import CHIPS
from fastmask_kernels.compiling import Build, build, dots, operand_bits, resident, step_flops
from fastmask_kernels.configs import expected_residents
from fastmask_kernels.recorder import Variant

__all__ = ["LAUNCHED", "Row", "collect", "failures", "main", "report", "table", "warnings"]

LAUNCHED = "benchmarks.gpu.recorded"


@dataclass(frozen=True)
class Row:
    """One variant, compiled; `build` is None and `error` says why where that failed."""

    kernel: str
    config: str
    dtypes: str
    target: str
    bits: int
    tensor_cores: bool
    build: Build | None
    error: str | None = None
    num_warps: int = 4
    expected: int = 0

    @property
    def resident(self) -> int | None:
        """Programs that a multiprocessor holds at a time; None if it does not compile."""
        return None if self.build is None else resident(self.build, self.num_warps, CHIPS[self.target])


def collect(targets: Sequence[str], module: str = LAUNCHED, kernel: str = "", quick: bool = False) -> list[Variant]:
    """What `variants(chip)` of a module gives for each of `targets`, where its description contains `kernel`.

    `quick`: of those that share kernel, flags and precision, with odd sizes or without, the one with the largest tile,
    which needs most registers.
    """
    variants = importlib.import_module(module).variants
    found = [variant for target in targets for variant in variants(target) if kernel in str(variant)]
    if not quick:
        return found
    largest: dict[tuple[object, ...], tuple[tuple[int, ...], Variant]] = {}
    for variant in found:
        flags = [(k, v) for k, v in sorted(variant.constexprs.items()) if isinstance(v, bool | str)]
        master = "*fp32" in variant.source.signature.values()  # float32 weights under half precision, say
        kind = (variant.chip, variant.kernel, operand_bits(variant), master, bool(variant.unhinted), *flags)
        size = (step_flops(variant), variant.num_stages, len(variant.unhinted))
        if kind not in largest or size > largest[kind][0]:
            largest[kind] = size, variant
    return [variant for _, variant in largest.values()]


_variants: list[Variant] = []  # of the report that is being made: worker processes inherit them; they cannot be pickled


def report(variants: Sequence[Variant]) -> list[Row]:
    """Compile all variants, in as many processes as there are cores."""
    _variants[:] = variants
    jobs = range(len(variants))
    rows = _compile_all(jobs, os.cpu_count() or 1)
    for job in jobs:
        if job not in rows:  # a compiler crashed and took the others' processes along: one after the other, then
            rows |= _compile_all([job], 1) or {job: _row(job, crashed=True)}
    return [rows[job] for job in jobs]


def _compile_all(jobs: Sequence[int], workers: int) -> dict[int, Row]:
    """The rows of positions in `_variants`; those that were not reached when a process died are missing."""
    rows: dict[int, Row] = {}
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        pending = {}
        with contextlib.suppress(BrokenProcessPool):
            for job in jobs:
                pending[pool.submit(_row, job)] = job
        for done in as_completed(pending):
            with contextlib.suppress(BrokenProcessPool):
                row = rows[pending[done]] = done.result()
                print(f"[{len(rows)}/{len(jobs)}] {row.kernel} {row.target}", file=sys.stderr)
    return rows


def _row(index: int, crashed: bool = False) -> Row:
    variant = _variants[index]
    flags = ("G", "SLOTS", "GROUP")  # small numbers that say nothing of a tile
    sizes = [f"{k}={v}" for k, v in variant.constexprs.items() if isinstance(v, int) and not isinstance(v, bool)]
    pointers = [kind[1:] for kind in variant.source.signature.values() if kind.startswith("*")]
    launch = variant.num_warps, variant.num_stages
    expected = expected_residents(variant.source.fn.__name__, variant.chip, variant.constexprs, *launch)
    row = Row(
        kernel=str(variant),
        config=" ".join([*(s for s in sizes if not s.startswith(flags)), "w{} s{}".format(*launch)]),
        dtypes="+".join(dict.fromkeys(kind for kind in pointers if kind.startswith(("bf", "fp")))) or "-",
        target=variant.chip,
        bits=operand_bits(variant),
        tensor_cores=dots(variant),
        build=None,
        num_warps=variant.num_warps,
        expected=0 if variant.unhinted else expected,
    )
    if crashed:
        return replace(row, error="the compiler crashed")
    try:
        return replace(row, build=build(variant))
    except Exception as problem:
        # A compiler may raise anything; whatever it is belongs in the row, beside those that compiled.
        return replace(row, error=f"{type(problem).__name__}: {problem}")


def failures(rows: Sequence[Row]) -> list[str]:
    """What no kernel may have, one line for each."""
    return [f"{_what(row)}: {problem}" for row in rows for problem in _problems(row)]


def _what(row: Row) -> str:
    return f"{row.kernel} [{row.config}, {row.dtypes}] on {row.target}"


def _problems(row: Row) -> list[str]:
    chip, made = CHIPS[row.target], row.build
    if made is None:
        return [f"does not compile: {row.error}"]
    found = []
    if made.spill_stores or made.spill_loads or made.spill_instructions:
        found.append(f"spills {made.spill_stores} bytes of registers and loads {made.spill_loads}")
    if made.stack:
        found.append(f"has a stack frame of {made.stack} bytes")
    wanted = chip.tensor_16bit if row.bits == 16 else chip.tensor_32bit
    if row.tensor_cores and not any(name.startswith(wanted) for name in made.tensor):
        instead = ", ".join(made.tensor) or "none"
        found.append(f"has no {' or '.join(wanted)} instruction; tensor-core instructions: {instead}")
    if made.shared > chip.program_memory:
        found.append(f"asks for {made.shared} bytes of shared memory, the chip allows {chip.program_memory}")
    if made.tensor_memory > chip.tensor_memory:
        found.append(f"asks for {made.tensor_memory} columns of tensor memory, the chip has {chip.tensor_memory}")
    if row.resident is not None and row.resident < row.expected:
        found.append(f"lets a multiprocessor hold {row.resident} programs, its table says {row.expected}")
    return found


def warnings(rows: Sequence[Row]) -> list[str]:
    """What ptxas calls a potential performance loss, one line for each: for a person to judge."""
    return [f"{_what(row)}: {line}" for row in rows if row.build is not None for line in row.build.warnings]


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text, under a line of headings."""
    cells = [["kernel", "config", "dtype", "target", "regs", "stack", "spill", "fit", "shared", "tensor cores"]]
    for row in rows:
        made = row.build
        start = [row.kernel, row.config, row.dtypes, row.target]
        if made is None:
            cells.append([*start, *["-"] * 5, f"does not compile: {(row.error or '').splitlines()[0]}"])
            continue
        cells.append(
            [
                *start,
                str(made.registers),
                str(made.stack),
                f"{made.spill_stores}/{made.spill_loads}",
                str(row.resident),
                f"{made.shared / 1024:.0f}/{CHIPS[row.target].program_memory // 1024}",
                ", ".join(f"{n} {name}" for name, n in made.tensor.items()) or "none",
            ]
        )
    widths = [max(len(line[i]) for line in cells if len(line) > i + 1) for i in range(len(cells[0]) - 1)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, [*widths, 0], strict=True)).rstrip() for line in cells
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fastmask_kernels.compile_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--target", default=",".join(CHIPS), help="chips, separated by commas; default: %(default)s")
    parser.add_argument("--kernel", default="", help="only variants whose description contains this")
    parser.add_argument("--quick", action="store_true", help="of each kernel and set of flags the largest tile only")
    parser.add_argument("--json", metavar="FILE", help="write the rows, and what is wrong, to FILE as well")
    parser.add_argument("--module", default=LAUNCHED, help="whose variants(chip) to compile; default: %(default)s")
    options = parser.parse_args(arguments)
    targets = options.target.split(",")
    if unknown := [target for target in targets if target not in CHIPS]:
        parser.error(f"unknown target {', '.join(unknown)}; there are {', '.join(CHIPS)}")
    if triton.knobs.runtime.interpret:
        print("The report needs Triton's compiler; unset TRITON_INTERPRET, which replaces it.", file=sys.stderr)
        return 2
    try:
        variants = collect(targets, options.module, options.kernel, options.quick)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{options.module}.".startswith(f"{error.name}."):
            raise  # of something that the module imports
        where = "; it is part of a checkout of fastmask: run the report there" * (options.module == LAUNCHED)
        print(f"There is no module {options.module}{where}.", file=sys.stderr)
        return 2
    rows = report(variants)
    if not rows:
        print(f"No variant for {', '.join(targets)} has {options.kernel!r} in its description.", file=sys.stderr)
        return 2
    wrong, doubtful = failures(rows), warnings(rows)
    print(table(rows))
    if options.json:
        plain = {"triton": triton.__version__, "rows": [asdict(row) | {"resident": row.resident} for row in rows]}
        Path(options.json).write_text(json.dumps({**plain, "failures": wrong, "warnings": doubtful}))
    print(f"\n{len(rows)} compiled with Triton {triton.__version__}: {len(wrong)} failures, {len(doubtful)} warnings")
    for line in [*(f"WARNING {line}" for line in doubtful), *(f"FAILED {line}" for line in wrong)]:
        print(line)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
