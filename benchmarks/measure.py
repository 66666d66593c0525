"""Measuring on a machine that is not quiet: interleaved runs and pairwise ratios; bytes are counted, not timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["Ratio", "Side", "compare", "saved_bytes"]


@dataclass(frozen=True)
class Side:
    """What is timed, and what is done before it, untimed: clearing its own gradients, as training does."""

    run: Callable[[], object]
    reset: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Ratio:
    """Time of the baseline over time of ours, pair by pair: above 1 is faster than the baseline."""

    median: float
    low: float  # first quartile
    high: float  # third quartile
    baseline_ms: float
    ours_ms: float
    pairs: int


def compare(
    baseline: Side,
    ours: Side,
    seconds: float,
    warm_up: int = 2,
) -> Ratio:
    """Run the two sides A B A B for about `seconds`, at least seven pairs, and report quartiles of the ratios.

    The speed of such machines moves by a factor of two within a minute; two runs side by side see the same speed.
    """

    def timed(side: Side) -> float:
        side.reset()
        start = time.perf_counter()
        side.run()
        return time.perf_counter() - start

    for _ in range(warm_up):
        timed(baseline)
        timed(ours)
    times: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while len(times) < 7 or time.perf_counter() < end:
        # Whoever runs second finds other things in the cache: take turns.
        first, second = (baseline, ours) if len(times) % 2 == 0 else (ours, baseline)
        a, b = timed(first), timed(second)
        times.append((a, b) if len(times) % 2 == 0 else (b, a))
    ratios = sorted(a / b for a, b in times)
    low, median, high = statistics.quantiles(ratios, n=4)
    return Ratio(
        median=median,
        low=low,
        high=high,
        baseline_ms=1e3 * statistics.median(a for a, _ in times),
        ours_ms=1e3 * statistics.median(b for _, b in times),
        pairs=len(times),
    )


def saved_bytes(forward: Callable[[], torch.Tensor], not_counted: list[torch.Tensor]) -> int:
    """Bytes that a forward pass keeps for its backward pass.

    Counts the storage of every tensor that autograd saves, once each, except those of `not_counted` (parameters and
    masks, which are there anyway).
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in not_counted}
    storages: dict[int, int] = {}
    kept: list[torch.Tensor] = []  # a freed storage's address would be given out again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    total = sum(storages.values())
    del output
    return total
