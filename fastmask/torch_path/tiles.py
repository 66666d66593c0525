"""Masks without whole rows or columns, over blocks and over single weights; one language after the other.

Products are whole, with zeros for what is dead, but for blocks of which few live: there each row (or column) of blocks
has a product of its live ones, gathered side by side. Of single weights of which few live, gradients are computed one
by one, each a dot product over the tokens.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from fastmask import bits
from fastmask.masks import FULL, Mask
from fastmask.torch_path.gemm import Tensors, add_sampled, by_onednn, cast, outer, products, samples
from fastmask.torch_path.split import Split, first_equals

# Gathering costs as much as this many rows of products do: it decides from which density on the product is whole.
GATHERING, GATHERING_ONEDNN = 16, 128
SCATTERING_ONEDNN = 400  # the same of dW, whose blocks are put back one block row at a time
# Density up to which sampling dW takes less time than all of the product, and putting the mask on it.
SAMPLED, SAMPLED_ONEDNN = 1 / 10, 1 / 20


class Tiles:
    """One mask over [N, K], and what its layers compute for the tokens of each language; methods as of `Units`."""

    def __init__(self, mask: Mask) -> None:
        self.N, self.K, (self.bn, self.bk), self.kind = mask.out_features, mask.in_features, mask.geometry, mask.kind
        self.words = mask.index.detach()
        self.density = [*(live / (self.N * self.K) for live in mask.extents.tolist()), 1.0]  # the last is that of FULL
        self.plans: dict[tuple[Hashable, ...], tuple[Split, bool, bool]] = {}
        self._places: dict[tuple[int, bool], list[Tensor]] = {}
        self._samples: dict[int, tuple[Tensor, Tensor]] = {}

    @cached_property
    def same_as(self) -> list[int]:
        return first_equals(list(self.words), self.whole)

    def whole(self, language: int) -> bool:
        return self.density[language] == 1

    def read(self, weight: Tensor, dtype: torch.dtype, languages: int) -> Tensor:
        return cast(weight, dtype)

    def forward(self, languages: Sequence[int], xs: Tensors, w: Tensor, outs: Tensors) -> None:
        self._multiply(languages, xs, w, outs, add=False, dim=1)

    def add_bias(self, y: Tensor, bias: Tensor, split: Split) -> None:
        y += bias

    def input_grad(self, languages: Sequence[int], dys: Tensors, w: Tensor, outs: Tensors, add: bool) -> None:
        self._multiply(languages, dys, w, outs, add, dim=0)

    def _multiply(
        self, languages: Sequence[int], given: Tensors, w: Tensor, outs: Tensors, add: bool, dim: int
    ) -> None:
        """Write (or add) the product of each row of blocks (`dim` 1), or of each column of them (`dim` 0)."""
        sizes = self.bn, self.bk
        for language, a, out in zip(languages, given, outs, strict=True):
            if self._is_whole(language, a):
                products([a], self._masked(w, language), None, [out], dim == 1, add)
                continue
            parts, places = _grouped(a, sizes[dim]), out.split(sizes[1 - dim], 1)
            lines = self._in_blocks(w).unbind(0 if dim else 2)
            for live, line, place in zip(self._live(language, dim == 0), lines, places, strict=True):
                if len(live):
                    own = line.index_select(dim, live).flatten(dim, dim + 1)
                    products([parts.index_select(1, live).flatten(1)], own, None, [place], dim == 1, add)
                elif not add:
                    place.zero_()

    def weight_grad(
        self, languages: Sequence[int], dys: Tensors, xs: Tensors, weight: Tensor, dtype: torch.dtype
    ) -> Tensor:
        only = languages[0] if len(languages) == 1 and dtype == xs[0].dtype else None
        if only is not None and not self._is_sampled(only, xs[0]) and self._is_whole(only, xs[0], SCATTERING_ONEDNN):
            grad = torch.empty_like(weight, memory_format=torch.contiguous_format)
            return self._without_dead(outer(dys[0], xs[0], grad), only)
        grad = weight.new_zeros(weight.shape, dtype=dtype)
        for language, dy, x in zip(languages, dys, xs, strict=True):
            if self._is_sampled(language, x):
                if language not in self._samples:
                    self._samples[language] = samples(self._keep(language))
                add_sampled(grad, self._samples[language], dy, x)
            elif self._is_whole(language, x, SCATTERING_ONEDNN):
                grad += self._without_dead(outer(dy, x), language)
            else:
                inputs, blocks = _grouped(x, self.bk), self._in_blocks(grad)
                for n, live in enumerate(self._live(language)):
                    if len(live):
                        part = outer(dy[:, n * self.bn : (n + 1) * self.bn], inputs.index_select(1, live).flatten(1))
                        blocks[n].index_add_(1, live, cast(part, dtype).view(self.bn, -1, self.bk))
        return grad

    def bias_grad(self, dy: Tensor, split: Split, dtype: torch.dtype) -> Tensor:
        return dy.sum((0, 1), dtype=dtype)

    def _is_whole(self, language: int, x: Tensor, of_onednn: int = GATHERING_ONEDNN) -> bool:
        """Whether the whole weight is multiplied, what is dead as zeros."""
        size, cost = min(self.bn, self.bk), of_onednn if by_onednn(x) else GATHERING
        return self.kind == "weights" or self.density[language] > size / (size + cost)

    def _is_sampled(self, language: int, x: Tensor) -> bool:
        most = SAMPLED_ONEDNN if by_onednn(x) else SAMPLED
        few = self.kind == "weights" and language != FULL and self.density[language] <= most
        return few and x.is_cpu and x.dtype in (torch.float32, torch.float64)

    def _live(self, language: int, of_columns: bool = False) -> list[Tensor]:
        """Of each row (or column) of a language's blocks the live ones; made once."""
        if (language, of_columns) not in self._places:
            keep = self._keep(language)
            self._places[language, of_columns] = [row.nonzero().flatten() for row in (keep.t() if of_columns else keep)]
        return self._places[language, of_columns]

    def _keep(self, language: int) -> Tensor:
        """Which blocks of a language live, bool [N / bn, K / bk]."""
        return bits.unpack(self.words[language], self.K // self.bk)

    def _in_blocks(self, weight: Tensor) -> Tensor:
        """The weight as [N / bn, bn, K / bk, bk]."""
        return _grouped(weight, self.bk).unflatten(0, (self.N // self.bn, self.bn))

    def _masked(self, w: Tensor, language: int) -> Tensor:
        if self.whole(language):
            return w
        return (self._in_blocks(w) * self._keep(language)[:, None, :, None]).flatten(2).flatten(0, 1)

    def _without_dead(self, weight: Tensor, language: int) -> Tensor:
        """Set what is dead of a weight [N, K] to zero, in place."""
        if not self.whole(language):
            self._in_blocks(weight).mul_(self._keep(language)[:, None, :, None])
        return weight


def _grouped(x: Tensor, size: int) -> Tensor:
    """[M, width] -> [M, width / size, size]."""
    return x.unflatten(1, (x.shape[1] // size, size))
