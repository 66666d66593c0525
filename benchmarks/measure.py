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

__all__ = ["NOISY", "Side", "captured", "on_gpu", "quartiles", "rounds"]

MOST_ROUNDS, MOST_ROUNDS_ON_GPU = 2000, 200
NOISY = 0.10  # of the median: where the quartiles of a ratio lie farther apart, it says too little
_HEAD_START = 20_000_000  # clock cycles (about 10 ms) in which the host queues work before the device begins


@dataclass(frozen=True)
class Side:
    """What is timed, and what is done before it, untimed: clearing its own gradients, as training does."""

    run: Callable[[], object]
    reset: Callable[[], object] = lambda: None


def on_gpu(device: torch.device) -> bool:
    """Whether device events, graphs and memory counters are there."""
    return device.type == "cuda"


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile, never outside of what was seen."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def rounds(
    sides: Sequence[Side], device: torch.device, seconds: float, warm_up: int = 3, least: int = 2
) -> list[list[float]]:
    """Run all sides in turn, A B C C B A ..., for about `seconds`; the milliseconds of each, one for each round.

    On a GPU the device's own time between the beginning and the end of a run. The host queues runs ahead, so its own
    time counts only where it is slower than the device, as in training.

    Args:
        sides: what is run; whoever runs second finds other things in the cache, so they change places.
        device: whose clock counts: where they run, or the CPU for the time until a call returns.
        seconds: for all rounds together, warm-up not counted.
        warm_up: untimed runs of each side before the first round.
        least: rounds that are run however long they take.
    """
    for side in sides:
        for _ in range(warm_up):
            side.reset()
            side.run()
    _wait()
    start = time.perf_counter()
    for side in sides:
        side.reset()
        side.run()
    _wait()
    if not on_gpu(device):
        return _host_times(sides, seconds, least)
    count = int(seconds / max(time.perf_counter() - start, 1e-6))
    return _device_times(sides, min(max(count, least), MOST_ROUNDS_ON_GPU))


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


def _wait() -> None:
    """Until the GPU, if there is one, has done what was queued."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def captured(side: Side) -> Side:
    """A side as a CUDA graph, which running it replays.

    Raises:
        RuntimeError: it cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            side.reset()
            side.run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    side.reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        side.run()
    return Side(graph.replay)
