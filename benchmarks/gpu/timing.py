"""Interleaved timing: device events on a GPU, a host clock elsewhere (for trying the code out)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from benchmarks.measure import Ratio, Side

__all__ = ["captured", "compare", "host_compare", "on_gpu", "peak_bytes", "quartile_ratios", "rounds"]

LEAST_ROUNDS, MOST_ROUNDS = 11, 200
_HEAD_START = 20_000_000  # clock cycles (about 10 ms) in which the host queues work before the device begins


def on_gpu(device: torch.device) -> bool:
    """Whether device events, graphs and memory counters are there."""
    return device.type == "cuda"


def quartile_ratios(baseline: Sequence[float], ours: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile of baseline[i] / ours[i]."""
    ratios = [a / b for a, b in zip(baseline, ours, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")  # never outside what was seen
    return low, median, high


def rounds(sides: Sequence[Side], device: torch.device, seconds: float, warm_up: int = 3) -> list[list[float]]:
    """Run all sides in turn, A B C C B A ..., for about `seconds`; the milliseconds of each, one for each round.

    On a GPU the device's own time between the beginning and the end of a run. The host queues runs ahead, so its own
    time counts only where it is slower than the device, as in training.
    """
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
    count = int(seconds / max(time.perf_counter() - start, 1e-6))
    count = min(max(count, _least(device)), MOST_ROUNDS)
    timed = _device_times if on_gpu(device) else _host_times
    return timed(sides, count)


def compare(baseline: Side, ours: Side, device: torch.device, seconds: float) -> Ratio:
    """Time of the baseline over time of ours, pair by pair: above 1 is faster than the baseline."""
    return _ratio(*rounds([baseline, ours], device, seconds))


def host_compare(baseline: Side, ours: Side, device: torch.device, seconds: float, runs: int = 20) -> Ratio:
    """As `compare`, but the host's own time to launch a run: nobody waits for the device meanwhile."""
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while len(times[0]) < 1 + _least(device) or time.perf_counter() < end:
        for side, found in zip((baseline, ours), times, strict=True):
            side.run()
            _wait(device)
            start = time.perf_counter()
            for _ in range(runs):
                side.run()
            found.append(1e3 * (time.perf_counter() - start) / runs)
            _wait(device)
    return _ratio(*(found[1:] for found in times))  # the first round is a warm-up


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


def peak_bytes(step: Callable[[], object], reset: Callable[[], object] = lambda: None) -> int:
    """Most memory that a run takes beyond what there was before; its results are dropped. GPU only."""
    reset()
    step()
    reset()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    found = torch.cuda.max_memory_allocated() - before
    reset()
    return found


def _least(device: torch.device) -> int:
    return LEAST_ROUNDS if on_gpu(device) else 2


def _ratio(baseline: Sequence[float], ours: Sequence[float]) -> Ratio:
    low, median, high = quartile_ratios(baseline, ours)
    return Ratio(median, low, high, statistics.median(baseline), statistics.median(ours), len(ours))


def _in_turn(sides: Sequence[Side], count: int) -> list[int]:
    forth = list(range(len(sides)))
    return [i for number in range(count) for i in (forth if number % 2 == 0 else reversed(forth))]


def _device_times(sides: Sequence[Side], count: int) -> list[list[float]]:
    torch.cuda._sleep(_HEAD_START)
    events = []
    for i in _in_turn(sides, count):
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


def _host_times(sides: Sequence[Side], count: int) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in sides]
    for i in _in_turn(sides, count):
        sides[i].reset()
        start = time.perf_counter()
        sides[i].run()
        times[i].append(1e3 * (time.perf_counter() - start))
    return times


def _wait(device: torch.device) -> None:
    if on_gpu(device):
        torch.cuda.synchronize()
