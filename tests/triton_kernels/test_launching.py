"""Kernels run on the device of their tensors."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import fastmask_kernels
import torch
from fastmask_kernels.launching import launch


class Kernel:
    """Says which device is current when it is launched."""

    def __init__(self, current: list[int]) -> None:
        self.current, self.launches = current, []

    def __getitem__(self, grid):  # type: ignore[no-untyped-def]
        return lambda *arguments, **options: self.launches.append((grid, arguments, options, self.current[0]))


def test_the_tensors_device_is_current_during_a_launch(current: list[int]) -> None:
    """A kernel is launched on the device of its tensors."""
    kernel = Kernel(current)
    on_second = SimpleNamespace(is_cuda=True, get_device=lambda: 1)
    launch(kernel, (2,), on_second, "x", SIZE=3)
    assert kernel.launches == [((2,), ("x",), {"SIZE": 3}, 1)]
    assert current == [0]
    launch(kernel, (1,), torch.ones(1))
    assert kernel.launches[1][3] == 0


def test_every_launch_goes_this_way() -> None:
    """Every launch sets the device of its tensors."""
    folder = Path(fastmask_kernels.__file__).parent
    direct = {
        path.name: re.findall(r"\w+_kernel\[", path.read_text())
        for path in folder.glob("*.py")
        if path.name not in ("launching.py", "interpreter.py")
    }
    assert not any(direct.values()), direct
