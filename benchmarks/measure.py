"""Time and memory of what runs, in this one place.

The speed of a machine that is not quiet moves by tens of percent within a minute. So sides run in turn, and what counts
is the ratio of two runs of the same round: they see the same speed. Bytes are counted.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Side", "captured", "peak_bytes", "rounds", "saved_bytes"]

MOST_ROUNDS = {"cpu": 2000, "cuda": 200}
_HEAD_START = 20_000_000  # clock cycles (about 10 ms) in which the host queues work before the device begins


@dataclass(frozen=True)
class Side:
    """What is timed, and what is done before it, untimed: clearing its own gradients, as training does."""

    run: Callable[[], object]
    reset: Callable[[], object] = lambda: None

    def once(self) -> None:
        """Reset, then run, untimed."""
        self.reset()
        self.run()


def rounds(sides: Sequence[Side], clock: str, seconds: float, warm_up: int = 3, least: int = 2) -> list[list[float]]:
    """Run all sides in turn, A B C C B A ..., for about `seconds`; the milliseconds of each, one for each round.

    Args:
        sides: what is run; whoever runs second finds other things in the cache, so they change places.
        clock: "cpu" takes the time until a call returns. "cuda" takes the device's between the beginning and the end of
            a run: the host queues runs ahead, so its own time counts only where it is slower, as in training.
        seconds: for all rounds together, warm-up not counted.
        warm_up: untimed runs of each side before the first round.
        least: rounds that are run however long they take.
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
        torch.cuda._sleep(_HEAD_START)
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
    """A side as a CUDA graph, which running it replays.

    Raises:
        RuntimeError: it cannot be captured.
    """
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


# ---- memory


def saved_bytes(forward: Callable[[], Tensor], not_counted: Sequence[Tensor]) -> int:
    """Bytes that a forward pass keeps for its backward pass.

    Counts the storage of every tensor that autograd saves, once each, except those of `not_counted` (parameters and
    masks, which are there anyway).
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in not_counted}
    storages: dict[int, int] = {}
    kept: list[Tensor] = []  # a freed storage's address would be given out again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor.detach())
        return tensor.detach()  # a saved output itself would hold the graph that holds it, for good

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output
    return sum(storages.values())


def peak_bytes(side: Side, device: str) -> int:
    """Most memory that a run takes beyond what there was before; its results are dropped.

    On a GPU the allocator's own count; on a CPU the running sum of what PyTorch's allocator reports to the profiler.
    The run is the second of two: scratch memory that outlives a call was there before.
    """
    side.once()
    side.reset()
    if device == "cpu":
        found = _host_peak(side)
    else:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        side.run()
        torch.cuda.synchronize()
        found = torch.cuda.max_memory_allocated() - before
    side.reset()
    return found


def _host_peak(side: Side) -> int:
    from torch.profiler import ProfilerActivity, profile

    with _silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        result = side.run()
    del result
    held = highest = 0
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
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
