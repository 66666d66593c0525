"""Running one case at one setting: prove, time, count, and make rows of it."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import torch

from benchmarks.cases import CASES, case_of
from benchmarks.compiling import require_compiler
from benchmarks.machine import described
from benchmarks.measure import Ratio, ratio_of, rounds
from benchmarks.memory import available_bytes
from benchmarks.row import Row
from benchmarks.setting import DoesNotFitError, Setting
from fastmask.errors import unknown

__all__ = ["Job", "Measured", "measure", "see"]

LEAST_ROUNDS = 7


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


@dataclass
class Measured:
    """Rows of one job, and the milliseconds of every round behind them; rows that were stored have none."""

    job: Job
    rows: list[Row]
    times: dict[str, dict[str, list[float]]]  # part -> implementation -> rounds
    notes: list[str] = field(default_factory=list)

    def ratio(self, of: str, to: str, part: str) -> Ratio:
        """Time of implementation `to` over that of `of`, round by round."""
        return ratio_of(self.times[part][to], self.times[part][of])

    def has(self, implementations: Sequence[str], part: str) -> bool:
        """Whether each of them has a row."""
        return set(implementations) <= {row.implementation for row in self.rows if row.part == part}

    def row(self, implementation: str, part: str) -> Row:
        """One row."""
        return next(row for row in self.rows if (row.implementation, row.part) == (implementation, part))


def see(job: Job) -> None:
    """See that a job can be done, before anything is built.

    Raises:
        KeyError: an unknown case, unit, shape, implementation or part.
        DoesNotFitError: parts of the setting do not go together, or need more memory than there is.
        ValueError: what the case cannot do.
        RuntimeError: no compiler where one is needed.
    """
    setting, case = job.setting, case_of(job.setting.case)
    case.refuse(setting)
    for what, given, known in (("implementation", job.names, case.implementations), ("part", job.parts, case.parts)):
        for name in given or ():
            if name not in known:
                raise unknown(f"{what} of the case {setting.case!r}", name, known)
    if setting.compiled:
        if "compiled" not in case.can:
            able = [name for name, other in CASES.items() if "compiled" in other.can]
            raise ValueError(f"the case {setting.case!r} has no compiled form (those that have: {', '.join(able)})")
        require_compiler(setting.device)
    if setting.dtype != "float32" and "bfloat16" not in case.can:
        able = [name for name, other in CASES.items() if "bfloat16" in other.can]
        raise ValueError(f"the case {setting.case!r} runs in float32 (those with {setting.dtype}: {', '.join(able)})")
    if setting.device != "cpu" and "cuda" not in case.can:
        raise DoesNotFitError(f"the case {setting.case!r} is measured on a CPU (expected --device cpu)")
    names = job.names if job.names is not None else case.implementations
    applying = [name for name in names if case.why_not(setting, name) is None]
    needed, free = case.memory_needed(setting, applying), available_bytes(setting.torch_device)
    if free is not None and needed > free:
        raise DoesNotFitError(
            f"{setting.words()} takes about {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free: "
            "expected fewer languages, a smaller shape, or fewer implementations (--implementations)"
        )


def measure(job: Job, seconds: float, say: Callable[[str], None] = lambda text: None) -> Measured:
    """Build a case, prove every implementation equal to the reference, and time its parts.

    Args:
        job: what; `see` is asked first.
        seconds: for each part, once everything is warm; at least `LEAST_ROUNDS` rounds are run.
        say: told what is going on.

    Raises:
        RuntimeError: an implementation is wrong; nothing is timed.
        KeyError, ValueError: see `see`.
    """
    see(job)
    setting = job.setting
    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    if setting.compiled:
        torch._dynamo.reset()  # what other settings compiled counts against this one's limit
    case = case_of(setting.case)(setting, job.names)
    say("checking")
    case.check()
    times: dict[str, dict[str, list[float]]] = {}
    for part in job.parts or case.parts:
        say(f"timing {part}")
        sides = case.sides(part)
        runs = list(sides.values())
        found = rounds(runs, setting.torch_device, seconds, warm_up=case.warm_up, least=case.least or LEAST_ROUNDS)
        times[part] = dict(zip(sides, found, strict=True))
        for side in runs:
            side.reset()
    saved, peaks = case.saved(), case.peaks() if job.peaks else {}
    masks, ideals = case.mask_bytes(), {name: case.ideal_of(name) for name in case.chosen}
    notes = [*case.notes, *case.findings(times)]
    rows = _rows(job, case.baseline, times, ideals, (saved, peaks, masks), "; ".join(notes))
    del case, sides, runs
    gc.collect()
    return Measured(job, rows, times, notes)


def _rows(
    job: Job,
    baseline: str,
    times: dict[str, dict[str, list[float]]],
    ideals: dict[str, float | None],
    counted: tuple[dict[str, int], dict[str, int], int | None],
    note: str,
) -> list[Row]:
    setting, (saved, peaks, masks) = job.setting, counted
    machine, rows = described(setting.torch_device), []
    for part, by_name in times.items():
        for name, own in by_name.items():
            ratio = ratio_of(by_name[baseline], own)
            low, median, high = _quartiles(own)
            rows.append(
                Row(
                    **asdict(setting),
                    part=part,
                    implementation=name,
                    baseline=baseline,
                    median_ms=median,
                    low_ms=low,
                    high_ms=high,
                    ratio=ratio.median,
                    ratio_low=ratio.low,
                    ratio_high=ratio.high,
                    ideal=ideals[name],
                    share=None if (own_ideal := ideals[name]) is None else ratio.median / own_ideal,
                    examples_per_s=1e3 * setting.batch / median,
                    saved_mib=_mib(saved.get(name)),
                    peak_mib=_mib(peaks.get(name)),
                    masks_mib=_mib(masks),
                    rounds=len(own),
                    noisy=ratio.noisy,
                    note=note if name == baseline else "",
                    **machine,  # type: ignore[arg-type]
                )
            )
    return rows


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def _mib(size: int | None) -> float | None:
    return None if size is None else size / 2**20
