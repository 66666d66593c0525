"""Arbitrary masks: no whole unit is dead, so the product stays dense; bits are unpacked for one language at a time.

Where few weights live, their gradients are computed one by one, each a dot product over the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from fastmask import bits
from fastmask.masks import FULL, StoredMask
from fastmask.torch_path.gemm import add_sampled, by_onednn, combined, outer, products, samples
from fastmask.torch_path.split import first_equals
from fastmask.torch_path.tiles import Tiles

__all__ = ["Weights"]

# Density up to which sampling dW takes less time than all of the product, and putting the mask on it.
SAMPLED, SAMPLED_ONEDNN = 1 / 10, 1 / 20


class Weights(Tiles):
    """Masks over single weights of [N, K], and what its layers compute."""

    def __init__(self, mask: StoredMask, shape: tuple[int, int]) -> None:
        self.words, self.K = mask.index.detach(), shape[1]
        self.density: list[float] = (mask.extents / (shape[0] * shape[1])).tolist()
        self._samples: dict[int, tuple[Tensor, Tensor]] = {}

    @cached_property
    def same_as(self) -> list[int]:
        return first_equals(list(self.words), self.whole)

    def whole(self, language: int) -> bool:
        return language == FULL

    def _forward(self, language: int, x: Tensor, w: Tensor, out: Tensor) -> None:
        products([x], self._masked(language, w), None, [out])

    def _input_grad(self, language: int, dy: Tensor, w: Tensor, out: Tensor, add: bool) -> None:
        combined([dy], self._masked(language, w), None, [out], add)

    def weight_grad(
        self, languages: Sequence[int], dys: Sequence[Tensor], xs: Sequence[Tensor], weight: Tensor, dtype: torch.dtype
    ) -> Tensor:
        if len(languages) != 1 or dtype != xs[0].dtype or self._is_sampled(languages[0], xs[0]):
            return super().weight_grad(languages, dys, xs, weight, dtype)
        grad = outer(dys[0], xs[0], torch.empty_like(weight, memory_format=torch.contiguous_format))
        return grad if languages[0] == FULL else grad.mul_(bits.unpack(self.words[languages[0]], self.K))

    def _add_weight_grad(self, language: int, dy: Tensor, x: Tensor, grad: Tensor) -> None:
        if self._is_sampled(language, x):
            if language not in self._samples:
                self._samples[language] = samples(bits.unpack(self.words[language], self.K))
            add_sampled(grad, self._samples[language], dy, x)
        else:
            grad += self._masked(language, outer(dy, x))

    def _is_sampled(self, language: int, x: Tensor) -> bool:
        most = SAMPLED_ONEDNN if by_onednn(x) else SAMPLED
        few = language != FULL and self.density[language] <= most
        return few and x.is_cpu and x.dtype in (torch.float32, torch.float64)

    def _masked(self, language: int, weight: Tensor) -> Tensor:
        return weight if language == FULL else weight * bits.unpack(self.words[language], self.K)
