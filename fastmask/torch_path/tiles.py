"""What masks without whole rows or columns share: languages come one after the other, and no mask gates a bias."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from fastmask.torch_path.gemm import cast
from fastmask.torch_path.split import Split

__all__ = ["Tiles"]


class Tiles(ABC):
    """One mask, and what its layers compute for the tokens of each language; methods as those of `Units`."""

    def read(self, weight: Tensor, dtype: torch.dtype, languages: int) -> Tensor:
        return cast(weight, dtype)

    def forward(self, languages: Sequence[int], xs: Sequence[Tensor], w: Tensor, outs: Sequence[Tensor]) -> None:
        for language, x, out in zip(languages, xs, outs, strict=True):
            self._forward(language, x, w, out)

    def add_bias(self, y: Tensor, bias: Tensor, split: Split) -> None:
        y += bias

    def input_grad(
        self, languages: Sequence[int], dys: Sequence[Tensor], w: Tensor, outs: Sequence[Tensor], add: bool
    ) -> None:
        for language, dy, out in zip(languages, dys, outs, strict=True):
            self._input_grad(language, dy, w, out, add)

    def weight_grad(
        self, languages: Sequence[int], dys: Sequence[Tensor], xs: Sequence[Tensor], weight: Tensor, dtype: torch.dtype
    ) -> Tensor:
        grad = weight.new_zeros(weight.shape, dtype=dtype)
        for language, dy, x in zip(languages, dys, xs, strict=True):
            self._add_weight_grad(language, dy, x, grad)
        return grad

    def bias_grad(self, dy: Tensor, split: Split, dtype: torch.dtype) -> Tensor:
        return dy.sum((0, 1), dtype=dtype)

    @abstractmethod
    def _forward(self, language: int, x: Tensor, w: Tensor, out: Tensor) -> None:
        """Write y [M, N] of one language's x [M, K] into `out`."""

    @abstractmethod
    def _input_grad(self, language: int, dy: Tensor, w: Tensor, out: Tensor, add: bool) -> None:
        """Write (or add) dx of one language's dy into `out`."""

    @abstractmethod
    def _add_weight_grad(self, language: int, dy: Tensor, x: Tensor, grad: Tensor) -> None:
        """Add one language's dW to `grad` [N, K]."""
