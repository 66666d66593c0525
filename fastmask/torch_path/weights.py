"""Arbitrary masks: no whole unit is dead, so the product stays dense; bits are unpacked for one language at a time."""

from __future__ import annotations

from functools import cached_property

from torch import Tensor

from fastmask import bits
from fastmask.masks import FULL, StoredMask
from fastmask.torch_path.gemm import combined, outer, products
from fastmask.torch_path.split import first_equals
from fastmask.torch_path.tiles import Tiles

__all__ = ["Weights"]


class Weights(Tiles):
    """Masks over single weights of [N, K], and what its layers compute."""

    def __init__(self, mask: StoredMask, shape: tuple[int, int]) -> None:
        self.words, self.K = mask.index.detach(), shape[1]

    @cached_property
    def same_as(self) -> list[int]:
        return first_equals(list(self.words), self.whole)

    def whole(self, language: int) -> bool:
        return language == FULL

    def _forward(self, language: int, x: Tensor, w: Tensor, out: Tensor) -> None:
        products([x], self._masked(language, w), None, [out])

    def _input_grad(self, language: int, dy: Tensor, w: Tensor, out: Tensor, add: bool) -> None:
        combined([dy], self._masked(language, w), None, [out], add)

    def _add_weight_grad(self, language: int, dy: Tensor, x: Tensor, grad: Tensor) -> None:
        grad += self._masked(language, outer(dy, x))

    def _masked(self, language: int, weight: Tensor) -> Tensor:
        return weight if language == FULL else weight * bits.unpack(self.words[language], self.K)
