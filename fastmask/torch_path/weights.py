"""Arbitrary masks: no whole unit is dead, so the product stays dense; bits are unpacked for one language at a time."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from fastmask import bits
from fastmask.masks import StoredMask
from fastmask.torch_path.gemm import cast, combined, outer, products
from fastmask.torch_path.split import FULL, Split, first_equals

__all__ = ["Weights"]


class Weights:
    """Masks over single weights of [N, K], and what its layers compute; methods as those of `Units`."""

    def __init__(self, mask: StoredMask, shape: tuple[int, int]) -> None:
        self.words, self.K = mask.index.detach(), shape[1]

    @cached_property
    def same_as(self) -> list[int]:
        return first_equals(list(self.words), self.whole)

    def whole(self, language: int) -> bool:
        return language == FULL

    def read(self, weight: Tensor, dtype: torch.dtype, languages: int) -> Tensor:
        return cast(weight, dtype)

    def weight_of(self, w: Tensor) -> Tensor:
        return w

    def forward(self, language: int, x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor) -> None:
        products(x, self._masked(language, w), None, bias, out)

    def input_grad(self, language: int, dy: Tensor, w: Tensor, out: Tensor, add: bool) -> None:
        combined(dy, self._masked(language, w), None, out, add)

    def add_weight_grad(self, language: int, dy: Tensor, x: Tensor, grad: Tensor, fresh: bool) -> None:
        part = self._masked(language, outer(dy, x))
        grad.copy_(part) if fresh else grad.add_(part)

    def bias_grad(self, dy: Tensor, split: Split, dtype: torch.dtype) -> Tensor:
        return dy.sum((0, 1), dtype=dtype)

    def _masked(self, language: int, weight: Tensor) -> Tensor:
        return weight if language == FULL else weight * bits.unpack(self.words[language], self.K)
