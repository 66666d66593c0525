"""Arbitrary masks: no whole unit is dead, so the product stays dense; bits are unpacked for one language at a time."""

from __future__ import annotations

from collections.abc import Sequence
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

    def forward(self, languages: Sequence[int], xs: Sequence[Tensor], w: Tensor, outs: Sequence[Tensor]) -> None:
        for language, x, out in zip(languages, xs, outs, strict=True):
            products([x], self._masked(language, w), None, [out])

    def add_bias(self, y: Tensor, bias: Tensor, split: Split) -> None:
        y += bias

    def input_grad(
        self, languages: Sequence[int], dys: Sequence[Tensor], w: Tensor, outs: Sequence[Tensor], add: bool
    ) -> None:
        for language, dy, out in zip(languages, dys, outs, strict=True):
            combined([dy], self._masked(language, w), None, [out], add)

    def weight_grad(
        self, languages: Sequence[int], dys: Sequence[Tensor], xs: Sequence[Tensor], weight: Tensor, dtype: torch.dtype
    ) -> Tensor:
        grad = weight.new_empty(weight.shape, dtype=dtype)
        for number, (language, dy, x) in enumerate(zip(languages, dys, xs, strict=True)):
            part = self._masked(language, outer(dy, x))
            grad.add_(part) if number else grad.copy_(part)
        return grad

    def bias_grad(self, dy: Tensor, split: Split, dtype: torch.dtype) -> Tensor:
        return dy.sum((0, 1), dtype=dtype)

    def _masked(self, language: int, weight: Tensor) -> Tensor:
        return weight if language == FULL else weight * bits.unpack(self.words[language], self.K)
