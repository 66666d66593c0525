"""How every kernel is launched: on the device of its tensors, whichever device is current."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["launch"]


def launch(kernel: Any, grid: tuple[int, ...], on: Tensor, *arguments: Any, **options: Any) -> None:
    """`kernel[grid](*arguments, **options)` on the device of `on`.

    Triton compiles and launches for the current device, and a kernel there cannot read another device's memory: a model
    whose layers lie on several devices (`device_map="auto"`) never says which is current.
    """
    with torch.cuda.device_of(on):
        kernel[grid](*arguments, **options)
