"""Bytes, which are counted, not timed: what a forward pass keeps, and the most that a run holds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measure import on_gpu

__all__ = ["cache_bytes", "peak_bytes", "saved_bytes"]


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
    total = sum(storages.values())
    del output
    return total


def peak_bytes(
    step: Callable[[], object], reset: Callable[[], object] = lambda: None, device: torch.device | None = None
) -> int:
    """Most memory that a run takes beyond what there was before; its results are dropped.

    On a GPU (also where no device is given) the allocator's own count; on a CPU the running sum of what PyTorch's
    allocator reports to the profiler. The run is the second of two: scratch memory that outlives a call was there
    before.
    """
    reset()
    step()
    reset()
    if device is not None and not on_gpu(device):
        return _host_peak(step, reset)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    found = torch.cuda.max_memory_allocated() - before
    reset()
    return found


def _host_peak(step: Callable[[], object], reset: Callable[[], object]) -> int:
    from torch.profiler import ProfilerActivity, profile

    with _silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        result = step()
    del result
    reset()
    held = highest = 0
    assert found.profiler is not None
    assert found.profiler.kineto_results is not None
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing on standard error: the profiler greets there, below Python."""
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)


def cache_bytes(device: torch.device) -> int:
    """Size of the largest cache: what a run leaves there, the next one may find."""
    if on_gpu(device):
        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 60 * 2**20))
    size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    text = size.read_text(encoding="ascii").strip() if size.is_file() else ""
    return int(text[:-1]) * 2**10 if text.endswith("K") and text[:-1].isdigit() else 32 * 2**20
