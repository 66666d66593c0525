"""Masks without whole rows or columns, over blocks and over single weights; one language after the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from fastmask import bits
from fastmask.masks import FULL, StoredMask
from fastmask.torch_path.gemm import add_sampled, by_onednn, cast, outer, products, samples
from fastmask.torch_path.split import Split, first_equals

__all__ = ["Blocks", "Weights"]

# Gathering costs as much as this many rows of products do: it decides from which density on the product is whole.
GATHERING, GATHERING_ONEDNN = 16, 128
SCATTERING_ONEDNN = 400  # the same of dW, whose blocks are put back one block row at a time
# Density up to which sampling dW takes less time than all of the product, and putting the mask on it.
SAMPLED, SAMPLED_ONEDNN = 1 / 10, 1 / 20


class _Tiles(ABC):
    """One mask over [N, K], and what its layers compute for the tokens of each language; methods as of `Units`.

    words: the mask as it is stored. density: of each language, and of `FULL`.
    """

    def __init__(self, mask: StoredMask, shape: tuple[int, int]) -> None:
        self.N, self.K = shape
        self.words = mask.index.detach()
        self.density = [*(live / (self.N * self.K) for live in mask.extents.tolist()), 1.0]

    @cached_property
    def same_as(self) -> list[int]:
        return first_equals(list(self.words), self.whole)

    def whole(self, language: int) -> bool:
        return self.density[language] == 1

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


class Blocks(_Tiles):
    """Blocks of (bn, bk): a product for each row (or column) of blocks, of its live blocks gathered side by side.

    Where so many blocks are live, or blocks are so small, that gathering costs more than it saves, the product is whole
    and the dead blocks are zeros.
    """

    def __init__(self, mask: StoredMask, shape: tuple[int, int]) -> None:
        super().__init__(mask, shape)
        self.bn, self.bk = mask.geometry
        self.keep = bits.unpack(self.words, self.K // self.bk)  # bool [L, N / bn, K / bk]
        self._rows: dict[int, list[Tensor]] = {}
        self._columns: dict[int, list[Tensor]] = {}

    def _forward(self, language: int, x: Tensor, w: Tensor, out: Tensor) -> None:
        if self._is_whole(language, x):
            products([x], self._masked(language, w), None, [out], transposed=True)
            return
        inputs, blocks = _grouped(x, self.bk), self._blocks(w)
        for n, live in enumerate(_places(self._rows, language, self.keep)):
            rows = slice(n * self.bn, (n + 1) * self.bn)
            if len(live):
                w_live = blocks[n].index_select(1, live).flatten(1)
                products([inputs.index_select(1, live).flatten(1)], w_live, None, [out[:, rows]], transposed=True)
            else:
                out[:, rows] = 0

    def _input_grad(self, language: int, dy: Tensor, w: Tensor, out: Tensor, add: bool) -> None:
        if self._is_whole(language, dy):
            products([dy], self._masked(language, w), None, [out], add=add)
            return
        upstream, blocks = _grouped(dy, self.bn), self._blocks(w)
        for k, live in enumerate(_places(self._columns, language, self.keep.transpose(1, 2))):
            columns = slice(k * self.bk, (k + 1) * self.bk)
            if len(live):
                w_live = blocks[:, :, k].index_select(0, live).flatten(0, 1)
                products([upstream.index_select(1, live).flatten(1)], w_live, None, [out[:, columns]], add=add)
            elif not add:
                out[:, columns] = 0

    def _add_weight_grad(self, language: int, dy: Tensor, x: Tensor, grad: Tensor) -> None:
        if self._is_whole(language, x, SCATTERING_ONEDNN):
            part = outer(dy, x)
            grad += part if self.whole(language) else self._without_dead(language, part)
            return
        inputs, blocks = _grouped(x, self.bk), self._blocks(grad)
        for n, live in enumerate(_places(self._rows, language, self.keep)):
            if len(live):
                part = outer(dy[:, n * self.bn : (n + 1) * self.bn], inputs.index_select(1, live).flatten(1))
                blocks[n].index_add_(1, live, cast(part, grad.dtype).view(self.bn, -1, self.bk))

    def _is_whole(self, language: int, x: Tensor, of_onednn: int = GATHERING_ONEDNN) -> bool:
        """Whether the whole weight is multiplied, dead blocks as zeros."""
        size, cost = min(self.bn, self.bk), of_onednn if by_onednn(x) else GATHERING
        return self.density[language] > size / (size + cost)

    def _blocks(self, weight: Tensor) -> Tensor:
        """The weight as [N / bn, bn, K / bk, bk]."""
        return _grouped(weight, self.bk).unflatten(0, (self.N // self.bn, self.bn))

    def _masked(self, language: int, weight: Tensor) -> Tensor:
        return weight if self.whole(language) else self._without_dead(language, weight.clone())

    def _without_dead(self, language: int, weight: Tensor) -> Tensor:
        """Set the dead blocks of a weight [N, K] to zero, in place."""
        self._blocks(weight).mul_(self.keep[language][:, None, :, None])
        return weight


class Weights(_Tiles):
    """Single weights: no whole unit is dead, so products stay dense, and bits are unpacked for one language at a time.

    Where few weights live, their gradients are computed one by one, each a dot product over the tokens.
    """

    def __init__(self, mask: StoredMask, shape: tuple[int, int]) -> None:
        super().__init__(mask, shape)
        self._samples: dict[int, tuple[Tensor, Tensor]] = {}

    def whole(self, language: int) -> bool:
        return language == FULL

    def _forward(self, language: int, x: Tensor, w: Tensor, out: Tensor) -> None:
        products([x], self._masked(language, w), None, [out], transposed=True)

    def _input_grad(self, language: int, dy: Tensor, w: Tensor, out: Tensor, add: bool) -> None:
        products([dy], self._masked(language, w), None, [out], add=add)

    def weight_grad(
        self, languages: Sequence[int], dys: Sequence[Tensor], xs: Sequence[Tensor], weight: Tensor, dtype: torch.dtype
    ) -> Tensor:
        if len(languages) != 1 or dtype != xs[0].dtype or self._is_sampled(languages[0], xs[0]):
            return super().weight_grad(languages, dys, xs, weight, dtype)
        grad = outer(dys[0], xs[0], torch.empty_like(weight, memory_format=torch.contiguous_format))
        return grad if languages[0] == FULL else grad.mul_(self._keep(languages[0]))

    def _add_weight_grad(self, language: int, dy: Tensor, x: Tensor, grad: Tensor) -> None:
        if self._is_sampled(language, x):
            if language not in self._samples:
                self._samples[language] = samples(self._keep(language))
            add_sampled(grad, self._samples[language], dy, x)
        else:
            grad += self._masked(language, outer(dy, x))

    def _is_sampled(self, language: int, x: Tensor) -> bool:
        most = SAMPLED_ONEDNN if by_onednn(x) else SAMPLED
        few = language != FULL and self.density[language] <= most
        return few and x.is_cpu and x.dtype in (torch.float32, torch.float64)

    def _keep(self, language: int) -> Tensor:
        return bits.unpack(self.words[language], self.K)

    def _masked(self, language: int, weight: Tensor) -> Tensor:
        return weight if language == FULL else weight * self._keep(language)


def _grouped(x: Tensor, size: int) -> Tensor:
    """[M, width] -> [M, width / size, size]."""
    return x.unflatten(1, (x.shape[1] // size, size))


def _places(made: dict[int, list[Tensor]], language: int, keep: Tensor) -> list[Tensor]:
    """Of each row of a language's blocks the live ones; made once."""
    if language not in made:
        keep = keep.new_ones(keep.shape[1:]) if language == FULL else keep[language]
        made[language] = [row.nonzero().flatten() for row in keep]
    return made[language]
