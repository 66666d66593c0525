"""Nothing is timed before it is right: comparison with float64 by the rule of the tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["check_all", "check_baseline", "check_close"]


def check_close(name: str, ours: Tensor, truth: Tensor, plain: Tensor) -> None:
    """`ours` may be at most twice as far from the float64 `truth` as plain PyTorch in the same dtype is.

    Raises:
        RuntimeError: it is farther, or has another shape or dtype.
    """
    if ours.shape != truth.shape or ours.dtype != plain.dtype:
        raise RuntimeError(f"{name}: {ours.dtype} {tuple(ours.shape)}, expected {plain.dtype} {tuple(truth.shape)}")
    error = (ours.double() - truth).norm()
    half_rounding = torch.finfo(plain.dtype).eps / 2 * truth.norm()
    allowed = 2 * torch.maximum((plain.double() - truth).norm(), half_rounding)
    if not error <= allowed:  # NaN is not
        raise RuntimeError(f"{name} is wrong: error {error:.3e}, allowed {allowed:.3e}: nothing is timed")


def check_all(
    what: str, names: Sequence[str], ours: Sequence[Tensor], truth: Sequence[Tensor], plain: Sequence[Tensor]
) -> None:
    """`check_close` for each of several results."""
    for name, found, exact, reference in zip(names, ours, truth, plain, strict=True):
        check_close(f"{what}: {name}", found, exact, reference)


def check_baseline(name: str, results: Sequence[Tensor], truth: Sequence[Tensor]) -> None:
    """See that a rival computes what it stands for; half precision may round where it likes.

    Raises:
        RuntimeError: a result is more than 5% off.
    """
    for found, exact in zip(results, truth, strict=True):
        if not (found.double() - exact).norm() <= 0.05 * exact.norm():
            raise RuntimeError(f"the baseline {name} is wrong: nothing is timed against it")
