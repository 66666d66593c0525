"""What only the GPU measurements time: a captured graph, the host's launches, and where a sweep breaks even."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from benchmarks.measure import Ratio, Side, on_gpu, ratio_of, wait

__all__ = ["break_even", "captured", "host_compare"]


def break_even(sparsities: Sequence[float], times: Sequence[float]) -> float | None:
    """The sparsity from which on time over the baseline's stays at most 1, interpolated; None if it never does."""
    if times[-1] > 1:
        return None
    last_above = max((i for i, time in enumerate(times) if time > 1), default=None)
    if last_above is None:
        return sparsities[0]
    (s0, t0), (s1, t1) = ((sparsities[i], times[i]) for i in (last_above, last_above + 1))
    return s0 + (s1 - s0) * (t0 - 1) / (t0 - t1)


def host_compare(baseline: Side, ours: Side, device: torch.device, seconds: float, runs: int = 20) -> Ratio:
    """As `compare`, but the host's own time to launch a run: nobody waits for the device meanwhile."""
    least = 11 if on_gpu(device) else 2
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while len(times[0]) < 1 + least or time.perf_counter() < end:
        for side, found in zip((baseline, ours), times, strict=True):
            side.run()
            wait(device)
            start = time.perf_counter()
            for _ in range(runs):
                side.run()
            found.append(1e3 * (time.perf_counter() - start) / runs)
            wait(device)
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
