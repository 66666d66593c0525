"""Timing, in this one place: sides run in turn, and what counts is the ratio of two runs of the same round.

The speed of a machine that is not quiet moves by tens of percent within a minute. Two runs side by side see the same
speed, so ratios are taken round by round, and their quartiles say how far they can be trusted. On a GPU device events
measure a run, on a CPU the host's clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

__all__ = [
    "NOISY",
    "Ratio",
    "Side",
    "break_even",
    "captured",
    "compare",
    "host_compare",
    "on_gpu",
    "quartile_ratios",
    "ratio_of",
    "rounds",
]

LEAST_ROUNDS_ON_GPU, MOST_ROUNDS_ON_GPU = 11, 200
LEAST_ROUNDS, MOST_ROUNDS = 2, 2000  # on a CPU
NOISY = 0.10  # of the median: where the quartiles of a ratio lie farther apart, it says too little
_HEAD_START = 20_000_000  # clock cycles (about 10 ms) in which the host queues work before the device begins


@dataclass(frozen=True)
class Side:
    """What is timed, and what is done before it, untimed: clearing its own gradients, as training does."""

    run: Callable[[], object]
    reset: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Ratio:
    """Time of the baseline over time of ours, round by round: above 1 is faster than the baseline."""

    median: float
    low: float  # first quartile
    high: float  # third quartile
    baseline_ms: float
    ours_ms: float
    pairs: int

    @property
    def noisy(self) -> bool:
        """Whether the machine was too noisy to conclude: the quartiles differ by more than `NOISY` of the median."""
        return self.high - self.low > NOISY * self.median


def on_gpu(device: torch.device) -> bool:
    """Whether device events, graphs and memory counters are there."""
    return device.type == "cuda"


def quartile_ratios(baseline: Sequence[float], ours: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile of baseline[i] / ours[i]."""
    ratios = [a / b for a, b in zip(baseline, ours, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")  # never outside what was seen
    return low, median, high


def ratio_of(baseline: Sequence[float], ours: Sequence[float]) -> Ratio:
    """The ratio of two sides' milliseconds, as `rounds` returns them."""
    low, median, high = quartile_ratios(baseline, ours)
    return Ratio(median, low, high, statistics.median(baseline), statistics.median(ours), len(ours))


def break_even(sparsities: Sequence[float], times: Sequence[float]) -> float | None:
    """The sparsity from which on time over the baseline's stays at most 1, interpolated; None if it never does."""
    if times[-1] > 1:
        return None
    last_above = max((i for i, time in enumerate(times) if time > 1), default=None)
    if last_above is None:
        return sparsities[0]
    (s0, t0), (s1, t1) = ((sparsities[i], times[i]) for i in (last_above, last_above + 1))
    return s0 + (s1 - s0) * (t0 - 1) / (t0 - t1)


def rounds(
    sides: Sequence[Side], device: torch.device, seconds: float, warm_up: int = 3, least: int | None = None
) -> list[list[float]]:
    """Run all sides in turn, A B C C B A ..., for about `seconds`; the milliseconds of each, one for each round.

    On a GPU the device's own time between the beginning and the end of a run. The host queues runs ahead, so its own
    time counts only where it is slower than the device, as in training.

    Args:
        sides: what is run; whoever runs second finds other things in the cache, so they change places.
        device: where they run.
        seconds: for all rounds together, warm-up not counted.
        warm_up: untimed runs of each side before the first round.
        least: rounds that are run however long they take; default 2, on a GPU 11.
    """
    least = least or (LEAST_ROUNDS_ON_GPU if on_gpu(device) else LEAST_ROUNDS)
    for side in sides:
        for _ in range(warm_up):
            side.reset()
            side.run()
    _wait(device)
    start = time.perf_counter()
    for side in sides:
        side.reset()
        side.run()
    _wait(device)
    if not on_gpu(device):
        return _host_times(sides, seconds, least)
    count = int(seconds / max(time.perf_counter() - start, 1e-6))
    return _device_times(sides, min(max(count, least), MOST_ROUNDS_ON_GPU))


def compare(baseline: Side, ours: Side, device: torch.device, seconds: float, least: int | None = None) -> Ratio:
    """Time of the baseline over time of ours, round by round: above 1 is faster than the baseline."""
    return ratio_of(*rounds([baseline, ours], device, seconds, least=least))


def host_compare(baseline: Side, ours: Side, device: torch.device, seconds: float, runs: int = 20) -> Ratio:
    """As `compare`, but the host's own time to launch a run: nobody waits for the device meanwhile."""
    least = LEAST_ROUNDS_ON_GPU if on_gpu(device) else LEAST_ROUNDS
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while len(times[0]) < 1 + least or time.perf_counter() < end:
        for side, found in zip((baseline, ours), times, strict=True):
            side.run()
            _wait(device)
            start = time.perf_counter()
            for _ in range(runs):
                side.run()
            found.append(1e3 * (time.perf_counter() - start) / runs)
            _wait(device)
    return ratio_of(*(found[1:] for found in times))  # the first round is a warm-up


def captured(step: Callable[[], object], reset: Callable[[], object] = lambda: None) -> Side:
    """A forward and backward pass as a CUDA graph; running the side replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            reset()
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return Side(graph.replay)


def _in_turn(count: int, number: int) -> Sequence[int]:
    """The order of the sides in one round: forth, then back."""
    return range(count) if number % 2 == 0 else range(count - 1, -1, -1)


def _device_times(sides: Sequence[Side], count: int) -> list[list[float]]:
    torch.cuda._sleep(_HEAD_START)
    events = []
    for number in range(count):
        for i in _in_turn(len(sides), number):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            sides[i].reset()
            start.record()
            sides[i].run()
            end.record()
            events.append((i, start, end))
    torch.cuda.synchronize()
    times: list[list[float]] = [[] for _ in sides]
    for i, start, end in events:
        times[i].append(start.elapsed_time(end))
    return times


def _host_times(sides: Sequence[Side], seconds: float, least: int) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in sides]
    end, number = time.perf_counter() + seconds, 0
    while number < least or (number < MOST_ROUNDS and time.perf_counter() < end):
        for i in _in_turn(len(sides), number):
            sides[i].reset()
            start = time.perf_counter()
            sides[i].run()
            times[i].append(1e3 * (time.perf_counter() - start))
        number += 1
    return times


def _wait(device: torch.device) -> None:
    if on_gpu(device):
        torch.cuda.synchronize()
