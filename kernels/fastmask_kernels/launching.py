"""How every kernel is launched: on the device of its tensors, whichever device is current.

Triton's binder looks at each of a launch's 30 to 50 arguments, every time, for the variant of the kernel that fits;
and our own checks look at them before. For the same kernel, numbers, dtypes and device both always find the same, but
for one thing: Triton has variants for pointers that are multiples of 16, and for others. So what was found once is kept
(`prepared`), and a launch whose pointers all are multiples of 16 goes straight to its variant (`Prepared`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from operator import attrgetter, itemgetter, methodcaller
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from triton.runtime import driver as drivers

__all__ = ["Prepared", "described", "described_masks", "forget", "launch", "prepared"]

T = TypeVar("T")

_MOST = 4096  # batches may come in any number of shapes
_found: dict[Hashable, Any] = {}
_address, _description = methodcaller("data_ptr"), attrgetter("_fastmask_described")


def launch(kernel: Any, grid: tuple[int, ...], on: Tensor, *arguments: Any, **options: Any) -> Any:
    """`kernel[grid](*arguments, **options)` on the device of `on`; what it returns, the variant that was launched.

    Triton compiles and launches for the current device, and a kernel there cannot read another device's memory: a model
    whose layers lie on several devices (`device_map="auto"`) never says which is current.
    """
    with torch.cuda.device_of(on):
        return kernel[grid](*arguments, **options)


class Prepared:
    """A launch of which everything is decided but where its tensors lie.

    Args:
        kernel: its arguments are tensors, then numbers, then constexprs.
        grid: of one to three dimensions.
        places: which of the tensors of a call is each of the kernel's, two or more; one may be there several times.
        numbers: the arguments behind the tensors.
        options: constexprs, `num_warps` and `num_stages`.
    """

    __slots__ = ("_compiled", "_driver", "_grid", "_kernel", "_numbers", "_options", "_placed", "_rest")

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], places: Sequence[int], *numbers: int, **options: Any
    ) -> None:
        self._kernel, self._grid, self._numbers, self._options = kernel, grid, numbers, options
        self._placed = itemgetter(*places)
        self._compiled: Any = None
        self._driver: Any = None
        self._rest: tuple[Any, ...] = ()

    def __call__(self, *tensors: Tensor) -> None:
        """Launch on the device of the first; their number, dtypes and device must be those of the first call."""
        pointers = [*map(_address, tensors)]
        bits = 0
        for pointer in pointers:
            bits |= pointer
        compiled = self._compiled
        if compiled is None or bits % 16 or _watched():
            arguments = (*self._placed(tensors), *self._numbers)
            found = launch(self._kernel, self._grid, tensors[0], *arguments, **self._options)
            if bits % 16 == 0 and found is not None:  # Triton's interpreter returns nothing
                behind = self._kernel.arg_names[len(arguments) :]
                self._rest = (*self._numbers, *(self._options[name] for name in behind))
                self._grid = (*self._grid, 1, 1)[:3]
                self._compiled, self._driver = found, drivers.active
            return
        driver = self._driver
        device = driver.get_current_device()
        if tensors[0].is_cuda and tensors[0].get_device() != device:
            with torch.cuda.device_of(tensors[0]):
                self(*tensors)
            return
        stream = driver.get_current_stream(device)
        compiled.run(
            *self._grid, stream, compiled.function, compiled.packed_metadata, None, None, None,
            *self._placed(pointers), *self._rest,
        )  # fmt: skip


def _watched() -> bool:
    """Whether a profiler asks for every launch: it is told by Triton's own way only."""
    runtime = triton.knobs.runtime
    before, after = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(before, "calls", before) or getattr(after, "calls", after))


def described(*tensors: Tensor) -> tuple[Hashable, ...]:
    """All that checks and choices may look at."""
    return tuple([(t.dtype, t.shape, t.stride(), t.get_device(), t.data_ptr() % 16) for t in tensors])


def described_masks(*tensors: Tensor) -> tuple[Hashable, ...]:
    """`described` of masks' tensors, each of which never changes: kept with them."""
    try:
        return tuple(map(_description, tensors))
    except AttributeError:
        for tensor in tensors:
            tensor._fastmask_described = described(tensor)  # type: ignore[attr-defined]
        return described_masks(*tensors)


def prepared(key: Hashable, make: Callable[[], T]) -> T:
    """What `make` makes of arguments that are described by `key`; kept, but not under Triton's interpreter."""
    found: T | None = _found.get(key)
    if found is None:
        found = make()
        if not triton.knobs.runtime.interpret:
            if len(_found) >= _MOST:
                forget()
            _found[key] = found
    return found


def forget() -> None:
    """Decide anew: block sizes were measured, or another driver launches."""
    _found.clear()
