"""Running one case at one setting: prove, time, count, and make rows of it; in one process or in several.

The speed of a machine that is not quiet moves by tens of percent within a minute. So sides run in turn, and what counts
is the ratio of two runs of the same round.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import CASES
from benchmarks.cases.case import DENSE, Case, Side
from benchmarks.row import SPREADS, Job, Row, Spread, this_machine
from fastmask import workers

MIB = 2**20
MOST_ROUNDS = {"cpu": 2000, "cuda": 200}
HEAD_START = 20_000_000  # clock cycles (about 10 ms) in which the host queues work before the device begins


def measure(job: Job, seconds: float) -> list[Row]:
    """Build a case, prove every implementation equal to the reference (RuntimeError if one is not), and time its parts.

    `seconds` are for each part, once everything is warm; with 0, to see that it runs, there are two rounds.
    """
    CASES[job.setting.case].refuse(job)
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
    sides = case.sides(what)
    if how == "graph":
        sides = _as_graphs(case, sides)
    clock = "cpu" if how == "host-time" else device
    measured = rounds(list(sides.values()), clock, seconds, warm_up=2, least=case.least if seconds else 2)
    times, machine = dict(zip(sides, measured, strict=True)), this_machine(device)
    kept = {name: size / MIB for name, size in case.kept().items()}
    masks = sum(mask.nbytes for mask in case.masks.values()) / MIB
    for name, own in times.items():
        # Of pairs of runs of one round.
        speeds = (Spread.of([a / b for a, b in zip(times[base], own, strict=True)]) for base in DENSE)
        ms, peak = Spread.of(own), peak_bytes(sides[name], device) / MIB if peaks and not how else None
        note = "; ".join(case.notes) if name == DENSE[0] else ""
        found.append(
            Row(
                case.setting, part, name, ms, *speeds, case.ideal(name), kept.get(name), peak, masks,
                tokens_per_s=1e3 * case.tokens / ms.middle, rounds=len(own), processes=1, predicted_ms=None,
                checked=None, note=note, machine=machine,
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


def measure_in(processes: int, job: Job, seconds: float) -> list[Row]:
    """As `measure`; several times, in fresh processes one after the other, and `merged`."""
    if processes == 1:
        return measure(job, seconds)
    runs = []
    for _ in range(processes):
        with workers.processes(1, job.setting.threads) as fresh:
            runs.append(fresh.submit(measure, job, seconds).result())
    return merged(runs)


def merged(runs: Sequence[Sequence[Row]]) -> list[Row]:
    """Of the rows of several processes the medians, with their range."""
    found = []
    for same in zip(*runs, strict=True):
        changes: dict[str, Any] = {name: sum(getattr(row, name) for row in same) for name in ("rounds", "processes")}
        for name in SPREADS:
            values = [getattr(row, name).middle for row in same]
            changes[name] = Spread(statistics.median(values), min(values), max(values))
        changes["tokens_per_s"] = statistics.median(row.tokens_per_s for row in same)
        found.append(replace(same[0], **changes))
    return found


def rounds(sides: Sequence[Side], clock: str, seconds: float, warm_up: int = 3, least: int = 2) -> list[list[float]]:
    """Run all sides in turn, A B C C B A ..., for about `seconds`; the milliseconds of each, one for each round.

    Whoever runs second finds other things in the cache, so they change places. Each is run `warm_up` times before, and
    in `least` rounds, however long they take.

    The clock "cpu" takes the time until a call returns, "cuda" that of the device between the beginning and the end of
    a run: the host queues runs ahead, so its own time counts only where it is slower, as in training.
    """
    for side in sides:
        for _ in range(warm_up):
            side.once()
    _wait()
    start = time.perf_counter()
    for side in sides:
        side.once()
    _wait()
    fitting = round(seconds / max(time.perf_counter() - start, 1e-6))
    if clock == "cuda":
        torch.cuda._sleep(HEAD_START)
    taken: list[list[Callable[[], float]]] = [[] for _ in sides]
    for number in range(min(max(fitting, least), MOST_ROUNDS[clock])):
        for i in range(len(sides)) if number % 2 == 0 else reversed(range(len(sides))):
            sides[i].reset()
            taken[i].append(_timed(sides[i].run, clock))
    _wait()
    return [[milliseconds() for milliseconds in own] for own in taken]


def _timed(run: Callable[[], object], clock: str) -> Callable[[], float]:
    """Run once; what is returned tells the milliseconds, on a GPU once it has done what was queued."""
    if clock == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        return lambda: begin.elapsed_time(end)
    start = time.perf_counter()
    run()
    milliseconds = 1e3 * (time.perf_counter() - start)
    return lambda: milliseconds


def _wait() -> None:
    """Until the GPU, if there is one, has done what was queued."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def captured(side: Side) -> Side:
    """A side as a CUDA graph, which running it replays; RuntimeError if it cannot be captured."""
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            side.once()
    torch.cuda.synchronize()
    side.reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        side.run()
    return Side(graph.replay)


def peak_bytes(side: Side, device: str) -> int:
    """Most memory that a run takes beyond what there was before; its results are dropped.

    The allocator's count (on a CPU by the profiler) of the second of two runs: scratch memory that stays is left out.
    """
    side.once()
    side.reset()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        side.run()
        torch.cuda.synchronize()
        highest = torch.cuda.max_memory_allocated() - before
    else:
        with _silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            result = side.run()
        del result
        events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        highest = max(itertools.accumulate((event.nbytes() for event in events), initial=0))
    side.reset()
    return highest


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing on standard error: the profiler greets there, and warns, below Python."""
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)
