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
    "NOISY", "Ratio", "Side", "compare", "on_gpu", "quartile_ratios", "quartiles", "ratio_of", "rounds", "wait",
]  # fmt: skip

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


def on_gpu(device: torch.device) -> bool:
    """Whether device events, graphs and memory counters are there."""
    return device.type == "cuda"


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile, never outside of what was seen."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def quartile_ratios(baseline: Sequence[float], ours: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile of baseline[i] / ours[i]."""
    return quartiles([a / b for a, b in zip(baseline, ours, strict=True)])


def ratio_of(baseline: Sequence[float], ours: Sequence[float]) -> Ratio:
    """The ratio of two sides' milliseconds, as `rounds` returns them."""
    low, median, high = quartile_ratios(baseline, ours)
    return Ratio(median, low, high, statistics.median(baseline), statistics.median(ours), len(ours))


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
    wait(device)
    start = time.perf_counter()
    for side in sides:
        side.reset()
        side.run()
    wait(device)
    if not on_gpu(device):
        return _host_times(sides, seconds, least)
    count = int(seconds / max(time.perf_counter() - start, 1e-6))
    return _device_times(sides, min(max(count, least), MOST_ROUNDS_ON_GPU))


def compare(baseline: Side, ours: Side, device: torch.device, seconds: float, least: int | None = None) -> Ratio:
    """Time of the baseline over time of ours, round by round: above 1 is faster than the baseline."""
    return ratio_of(*rounds([baseline, ours], device, seconds, least=least))


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


def wait(device: torch.device) -> None:
    """Until the device has done what was queued."""
    if on_gpu(device):
        torch.cuda.synchronize()
