"""A kernel to record, and what a short script about it needs."""

from __future__ import annotations

import json

import torch
import triton
import triton.language as tl
from fastmask_kernels.recorder import Recorder

__all__ = ["Recorder", "json", "launch", "scale", "torch", "triton"]


@triton.jit
def scale(x, y, width, odd, one, FLAG: tl.constexpr, BLOCK: tl.constexpr):
    """Nothing that is ever compiled."""
    tl.store(x + tl.arange(0, BLOCK), width + odd + one)


def launch(x: torch.Tensor) -> None:
    """From another module than the script."""
    scale[(1,)](x, None, 48, 7, 1, FLAG=True, BLOCK=64)
