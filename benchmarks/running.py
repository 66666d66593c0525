"""Running one case at one setting: prove, time, count, and make rows of it; in one process or in several."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.cases import CASES, DENSE, Case
from benchmarks.machine import this_machine
from benchmarks.measure import Side, captured, quartiles, rounds
from benchmarks.memory import peak_bytes
from benchmarks.row import Row, Spread
from benchmarks.setting import Setting
from fastmask import workers

__all__ = ["Job", "measure", "measure_in", "merged", "see"]


@dataclass(frozen=True)
class Job:
    """What is to be measured.

    Attributes:
        setting: at which setting.
        names: implementations; None: all that apply.
        parts: of the case; None: all.
        peaks: whether to count the most that each implementation holds at once, which takes a run under the profiler.
    """

    setting: Setting
    names: tuple[str, ...] | None = None
    parts: tuple[str, ...] | None = None
    peaks: bool = False


def see(job: Job) -> Job:
    """The job, once it is seen that it can be done; nothing is built. Raises as `Case.refuse` does."""
    CASES[job.setting.case].refuse(job.setting, job.names or (), job.parts or ())
    return job


def measure(job: Job, seconds: float) -> list[Row]:
    """Build a case, prove every implementation equal to the reference, and time its parts.

    Args:
        job: what; `see` is asked first.
        seconds: for each part, once everything is warm; the case says how many rounds are run at least, and with 0
            seconds, to see that it runs, there are two.

    Raises:
        RuntimeError: an implementation is wrong; nothing is timed.
        KeyError, ValueError: see `see`.
    """
    setting = see(job).setting
    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    if setting.compiled:
        torch._dynamo.reset()  # what other settings compiled counts against this one's limit
        torch._dynamo.config.recompile_limit = 64  # rivals and parts are compiled from the same lines
    case = CASES[setting.case](setting, job.names)
    case.check()
    rows = [row for part in job.parts or case.parts for row in _rows(case, part, seconds, job.peaks)]
    kept = case.kept()
    return [replace(row, kept_mib=_mib(kept.get(row.implementation))) for row in rows]


def _rows(case: Case, part: str, seconds: float, peaks: bool) -> list[Row]:
    (name, _, how), device, found = part.partition(" "), case.setting.torch_device, []
    sides = _as_graphs(case, case.sides(name)) if how == "graph" else case.sides(name)
    clock = torch.device("cpu") if how == "host-time" else device
    measured = rounds(list(sides.values()), clock, seconds, warm_up=2, least=case.least if seconds else 2)
    times, machine = dict(zip(sides, measured, strict=True)), this_machine(device)
    for name, own in times.items():
        ms, over_dense, over_full = (
            _spread(values)
            for values in (own, *([a / b for a, b in zip(times[base], own, strict=True)] for base in DENSE))
        )
        peak = peak_bytes(sides[name].run, sides[name].reset, device) if peaks and not how else None
        note = "; ".join(case.notes) if name == DENSE[0] else ""
        found.append(
            Row(
                case.setting, part, name, ms, over_dense, over_full, case.ideal(name),
                kept_mib=None, peak_mib=_mib(peak), masks_mib=case.mask_bytes() / 2**20,
                tokens_per_s=1e3 * case.tokens / ms.middle, rounds=len(own), processes=1, checked=None,
                predicted_ms=None, note=note, machine=machine,
            )
        )  # fmt: skip
    for side in sides.values():
        side.reset()
    return found


def _as_graphs(case: Case, sides: dict[str, Side]) -> dict[str, Side]:
    """Those that can be captured; of the others, the dense ones excepted, a note says why not."""
    found = {}
    for name, side in sides.items():
        try:
            found[name] = captured(side)
        except RuntimeError as error:
            if name in DENSE:
                raise
            case.notes.append(f"without a graph of {name}: {str(error).splitlines()[0]}")
    return found


def _spread(values: Sequence[float]) -> Spread:
    low, middle, high = quartiles(values)
    return Spread(middle, low, high)


def measure_in(processes: int, job: Job, seconds: float) -> list[Row]:
    """As `measure`, in so many fresh processes, one after the other; see `merged`."""
    if processes == 1:
        return measure(job, seconds)
    runs = []
    for _ in range(processes):
        with workers.processes(1, job.setting.threads) as fresh:
            runs.append(fresh.submit(measure, job, seconds).result())
    return merged(runs)


def merged(runs: Sequence[Sequence[Row]]) -> list[Row]:
    """Of the rows of several processes the medians, with the least and the most of them."""
    found = []
    for same in zip(*runs, strict=True):
        changes: dict[str, Any] = {}
        for name in ("ms", "over_dense", "over_full"):
            values = [getattr(row, name).middle for row in same]
            changes[name] = Spread(statistics.median(values), min(values), max(values))
        changes["tokens_per_s"] = statistics.median(row.tokens_per_s for row in same)
        changes |= {name: sum(getattr(row, name) for row in same) for name in ("rounds", "processes")}
        found.append(replace(same[0], **changes))
    return found


def _mib(size: int | None) -> float | None:
    return None if size is None else size / 2**20
