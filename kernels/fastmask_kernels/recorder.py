"""What a forward or backward pass would run on a GPU, seen without one: every Triton launch, every torch operation.

Tensors are on PyTorch's "meta" device, which has shapes and strides but no memory, so nothing is computed and a layer
of any size takes milliseconds. Launches go through Triton's own path, binder included, up to the driver, which is a
stub: a `Variant` is what Triton would have compiled. Whatever waits for the device (`.item()`, `.tolist()`) has no
value to return and raises, as nothing in a pass may.

    with Recorder("sm_90") as recorder:
        layer(x, ids)
    print(len(recorder.launches), len(recorder.operations))
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType, SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction
from triton.runtime import driver as drivers

from fastmask_kernels import chips, interpreter, launching
from fastmask_kernels.chips import CHIPS

__all__ = ["DEVICE", "Launch", "Operation", "Recorder", "Variant"]

DEVICE = "meta"
# Of those that are not views: they make or describe tensors and leave the memory alone.
_NO_KERNEL = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh", "set_")


@dataclass(frozen=True)
class Variant:
    """One kernel as Triton would compile it for one chip: `source` is its ASTSource."""

    kernel: str
    source: Any
    num_warps: int
    num_stages: int
    chip: str

    @property
    def key(self) -> tuple[Any, ...]:
        """Everything that makes another binary."""
        source = self.source
        parts = (source.signature, source.constants, source.attrs)
        return (self.kernel, *(str(part) for part in parts), self.num_warps, self.num_stages, self.chip)

    @property
    def constexprs(self) -> dict[str, Any]:
        """The values of what the kernel declares as `tl.constexpr`: flags, block sizes, the precision of products."""
        parameters = self.source.fn.params
        found = ((parameters[path[0]], value) for path, value in self.source.constants.items())
        return {parameter.name: value for parameter, value in found if parameter.is_constexpr}

    @property
    def unhinted(self) -> list[str]:
        """Numbers that would be known as multiples of 16 if they were."""
        source, parameters = self.source, self.source.fn.params
        return [
            parameter.name
            for parameter in parameters
            if source.signature[parameter.name] == "i32"
            and not parameter.do_not_specialize
            and not source.attrs.get((parameter.num,))
        ]

    def __str__(self) -> str:
        known = self.constexprs
        parts = [name.lower() for name, value in known.items() if value is True]
        if "G" in known:
            parts.insert(0, f"{known['G']} weights")
        if self.unhinted:
            parts.append(f"{len(self.unhinted)} odd sizes")
        return ", ".join([self.kernel.removesuffix("_kernel"), *parts])


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel, in the "forward" or the "backward" phase.

    `callers` are the modules of the Python functions that led to it, innermost first, without torch's and Triton's own.
    """

    variant: Variant
    grid: tuple[int, int, int]
    phase: str
    callers: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.variant.kernel


@dataclass(frozen=True)
class Operation:
    """One torch operation that runs on the device: at least one kernel, or a copy."""

    name: str
    phase: str
    callers: tuple[str, ...]


class Recorder(TorchDispatchMode):
    """Inside of `with`, records what runs on `DEVICE`; one at a time in a process, and not under Triton's interpreter.

    Triton's own launch path ends at a driver that launches nothing.

    Args:
        chip: whose block sizes are chosen; a key of `chips.CHIPS`.

    Attributes:
        launches, operations: what ran, in order; `events` holds both together.
    """

    def __init__(self, chip: str = "sm_90") -> None:
        super().__init__()
        if interpreting := triton.knobs.runtime.interpret:
            raise RuntimeError(f"the recorder needs Triton's launch path; TRITON_INTERPRET is {interpreting}")
        self.chip, self.device = chip, DEVICE
        self.events: list[Launch | Operation] = []
        target = CHIPS[chip]
        self._device = f"recorded {chip}"  # Triton keeps what it compiled by device
        self._driver = SimpleNamespace(
            get_current_target=lambda: GPUTarget(target.backend, target.arch, target.warp_size),
            get_current_device=lambda: self._device,
            get_current_stream=lambda device: 0,
        )
        self._seen: set[JITFunction[Any]] = set()
        self._before: list[tuple[Any, str, Any]] = []

    @property
    def launches(self) -> list[Launch]:
        return [event for event in self.events if isinstance(event, Launch)]

    @property
    def operations(self) -> list[Operation]:
        return [event for event in self.events if isinstance(event, Operation)]

    def __enter__(self) -> Recorder:
        for owner, name, value in (
            (drivers, "_active", self._driver),
            (triton.compiler, "compile", self._compile),
            (chips, "stand_in", self.chip),
            (interpreter, "recorded_device", self.device),
            (torch, "is_autocast_enabled", _is_autocast_enabled),
        ):
            self._before.append((owner, name, getattr(owner, name)))
            setattr(owner, name, value)
        launching.forget()
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        while self._before:
            setattr(*self._before.pop())
        launching.forget()
        for kernel in self._seen:
            kernel.device_caches.pop(self._device, None)
            kernel.compile = triton.compiler.compile
        self._seen.clear()

    # ---- Triton

    def _compile(self, source: Any, target: Any, options: dict[str, Any]) -> Any:
        """In the place of `triton.compile`: a kernel that is not there."""
        self._seen.add(source.fn)
        variant = Variant(source.fn.__name__, source, options["num_warps"], options["num_stages"], self.chip)
        run = self._runner(variant)
        return SimpleNamespace(run=run, launch_metadata=lambda *_: None, function=None, packed_metadata=None)

    def _runner(self, variant: Variant) -> Callable[..., None]:
        """What is called, with the grid first, for each launch of a variant."""

        def run(x: int, y: int, z: int, *_: Any) -> None:
            self.events.append(Launch(variant, (x, y, z), _phase(), _callers(sys._getframe(1))))

        return run

    # ---- torch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _runs_on_device(func, args, kwargs or {}, result):
            name = str(func).removeprefix("aten.")
            self.events.append(Operation(name, _phase(), _callers(sys._getframe(1))))
        return result


def _phase() -> str:
    """Which pass it is: autograd's engine runs the backward one."""
    return "forward" if torch._C._current_graph_task_id() == -1 else "backward"


def _is_autocast_enabled(device_type: str | None = None, ask: Any = torch.is_autocast_enabled) -> bool:
    """Autocast knows no meta device, and raises."""
    return device_type != DEVICE and (ask() if device_type is None else ask(device_type))


def _runs_on_device(func: Any, args: Any, kwargs: Any, result: Any) -> bool:
    name = func._schema.name.split("::")[1]
    if func.is_view or name in _NO_KERNEL or name.startswith(("_unsafe_view", "_reshape_alias")):
        return False
    touched = _tensors(result) if not func._schema.is_mutable else _tensors((args, kwargs, result))
    return any(tensor.device.type == DEVICE and tensor.numel() > 0 for tensor in touched) or name.startswith("_assert")


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _callers(frame: FrameType | None) -> tuple[str, ...]:
    found: list[str] = []
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        own = module == __name__ or module.split(".")[0] in ("torch", "triton")
        if not own and (not found or found[-1] != module):
            found.append(module)
        frame = frame.f_back
    return tuple(found)
