"""Arbitrary masks: no whole unit is dead, so the product stays dense; bits are unpacked for one language at a time."""

from __future__ import annotations

from torch import Tensor

from fastmask import bits
from fastmask.torch_path.products import multiply, over_tokens
from fastmask.torch_path.segments import FULL, Pieces

__all__ = ["Weights"]


class Weights(Pieces):
    """Masks over single weights of [N, K]."""

    def __init__(self, words: Tensor, N: int, K: int) -> None:
        self.words = words
        self.in_width, self.out_width = K, N
        self.masks = list(words)

    def whole(self, language: int) -> bool:
        return language == FULL

    def _keep(self, language: int) -> Tensor:
        return bits.unpack(self.words[language], self.in_width)

    def _masked(self, language: int, weight: Tensor) -> Tensor:
        return weight if language == FULL else weight * self._keep(language)

    def forward(self, language: int, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        live_bias = None if bias is None else bias.to(x.dtype)
        return multiply(x, self._masked(language, weight).to(x.dtype).t(), live_bias, out)

    def input_grad(self, language: int, dy: Tensor, weight: Tensor, out: Tensor | None) -> Tensor:
        return multiply(dy, self._masked(language, weight).to(dy.dtype), None, out)

    def add_weight_grad(self, language: int, dy: Tensor, x: Tensor, grad: Tensor) -> None:
        grad += self.weight_grad(language, dy, x, grad)

    def weight_grad(self, language: int, dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        part = over_tokens(dy, x, dy.new_empty(weight.shape))
        if language != FULL:
            part *= self._keep(language)
        return part.to(weight.dtype)
