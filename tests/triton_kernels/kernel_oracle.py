"""What the kernel tests share: the device, and comparison with float64."""

from __future__ import annotations

import pytest
import torch
from fastmask_kernels.interpreter import interpreter_problem
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter takes seconds where a GPU takes none: there a few combinations of parameters run, here all of them.
ON_GPU = DEVICE == "cuda"
# For tests that launch kernels.
launches_kernels = pytest.mark.skipif(interpreter_problem() is not None, reason=str(interpreter_problem()))


def assert_close(name: str, result: Tensor, truth: Tensor, plain: Tensor) -> None:
    """`result` may be at most twice as far from the float64 `truth` as plain PyTorch in the same dtype is."""
    assert result.shape == truth.shape, f"{name}: shape {tuple(result.shape)}, expected {tuple(truth.shape)}"
    assert result.dtype == plain.dtype, f"{name}: dtype {result.dtype}, expected {plain.dtype}"
    assert truth.dtype == torch.float64, f"{name}: the truth must be float64, not {truth.dtype}"
    if truth.numel() == 0:
        return
    # The norm of all errors, not the worst one: the worst of a few numbers is itself a matter of luck. Where plain
    # PyTorch happens to be exact, half a rounding of every element is still allowed.
    error = (result.double() - truth).norm()
    half_rounding = torch.finfo(plain.dtype).eps / 2 * truth.norm()
    allowed = 2 * torch.maximum((plain.double() - truth).norm(), half_rounding)
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"
