"""Running one case at one setting: prove, time, count, and make rows of it; in one process or in several."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.cases import CASES, DENSE, Case
from benchmarks.measure import Side, captured, peak_bytes, rounds
from benchmarks.row import SPREADS, Row, Spread, this_machine
from benchmarks.setting import Setting
from fastmask import workers

__all__ = ["Job", "measure", "measure_in", "merged"]


@dataclass(frozen=True)
class Job:
    """What is to be measured.

    Attributes:
        setting: at which setting.
        names: implementations; none: all that apply.
        parts: of the case; none: all.
        peaks: whether to count the most that each implementation holds at once, which takes a run under the profiler.
    """

    setting: Setting
    names: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    peaks: bool = False

    def on(self, threads: int, device: str) -> Job:
        """The same on so many threads of a CPU, or on another device."""
        return replace(self, setting=replace(self.setting, threads=threads, device=device))

    def refuse(self) -> None:
        """See that it can be done; nothing is built. Raises as `Case.refuse` does."""
        CASES[self.setting.case].refuse(self.setting, self.names, self.parts)


def measure(job: Job, seconds: float) -> list[Row]:
    """Build a case, prove every implementation equal to the reference, and time its parts.

    Args:
        job: what.
        seconds: for each part, once everything is warm; the case says how many rounds are run at least, and with 0
            seconds, to see that it runs, there are two.

    Raises:
        RuntimeError: an implementation is wrong; nothing is timed.
        KeyError, ValueError: see `Job.refuse`.
    """
    job.refuse()
    torch.set_num_threads(job.setting.threads)
    torch.manual_seed(0)
    if job.setting.compiled:
        torch._dynamo.reset()  # what other settings compiled counts against this one's limit
        torch._dynamo.config.recompile_limit = 64  # rivals and parts are compiled from the same lines
    case = CASES[job.setting.case](job.setting, job.names)
    case.check()
    return [row for part in job.parts or case.parts for row in _rows(case, part, seconds, job.peaks)]


def _rows(case: Case, part: str, seconds: float, peaks: bool) -> list[Row]:
    (what, _, how), device, found = part.partition(" "), case.setting.device, []
    sides = _as_graphs(case, case.sides(what)) if how == "graph" else case.sides(what)
    clock = "cpu" if how == "host-time" else device
    measured = rounds(list(sides.values()), clock, seconds, warm_up=2, least=case.least if seconds else 2)
    times, kept, machine = dict(zip(sides, measured, strict=True)), case.kept(), this_machine(device)
    masks = sum(mask.nbytes for mask in case.masks.values())
    for name, own in times.items():
        ms, (over_dense, over_full) = Spread.of(own), (_over(times[base], own) for base in DENSE)
        peak = peak_bytes(sides[name], device) if peaks and not how else None
        note = "; ".join(case.notes) if name == DENSE[0] else ""
        found.append(
            Row(
                case.setting, part, name, ms, over_dense, over_full, case.ideal(name), _mib(kept.get(name)),
                _mib(peak), _mib(masks), tokens_per_s=1e3 * case.tokens / ms.middle, rounds=len(own),
                processes=1, predicted_ms=None, checked=None, note=note, machine=machine,
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


def _over(base: Sequence[float], own: Sequence[float]) -> Spread:
    """The speed over another implementation, of pairs of runs of one round."""
    return Spread.of([a / b for a, b in zip(base, own, strict=True)])


def _mib(size: int | None) -> float | None:
    return None if size is None else size / 2**20


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
        for name in SPREADS:
            values = [getattr(row, name).middle for row in same]
            changes[name] = Spread(statistics.median(values), min(values), max(values))
        changes["tokens_per_s"] = statistics.median(row.tokens_per_s for row in same)
        changes |= {name: sum(getattr(row, name) for row in same) for name in ("rounds", "processes")}
        found.append(replace(same[0], **changes))
    return found
