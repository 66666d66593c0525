"""Block masks: one product for each row (or column) of blocks, of its live blocks gathered side by side.

Where so many blocks are live, or blocks are so small, that gathering costs more than it saves, the product is whole and
the dead blocks are zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from fastmask.torch_path.products import add_multiply, by_onednn, multiply, over_tokens, rows_at_once
from fastmask.torch_path.segments import FULL, Pieces

__all__ = ["Blocks"]

# Gathering costs as much as this many rows of products do: it decides from which density on the product is whole.
GATHERING, GATHERING_ONEDNN = 16, 128
SCATTERING_ONEDNN = 400  # the same of dW, whose blocks are put back one block row at a time


@dataclass(frozen=True)
class _Live:
    """The live blocks of one language; `keep` is bool [N / bn, K / bk]."""

    keep: Tensor

    @cached_property
    def density(self) -> float:
        return self.keep.float().mean().item()

    @cached_property
    def of_rows(self) -> list[Tensor]:
        """Of each block row its live block columns."""
        return [row.nonzero().flatten() for row in self.keep]

    @cached_property
    def of_columns(self) -> list[Tensor]:
        """Of each block column its live block rows."""
        return [column.nonzero().flatten() for column in self.keep.t()]


class Blocks(Pieces):
    """Masks over (bn, bk) blocks of a weight [N, K]; `keep` is bool [L, N / bn, K / bk]."""

    def __init__(self, keep: Tensor, block: tuple[int, int], N: int, K: int) -> None:
        self.live = [_Live(of_language) for of_language in keep]
        self.bn, self.bk = block
        self.in_width, self.out_width = K, N
        self.masks = list(keep)

    def whole(self, language: int) -> bool:
        return language == FULL or bool(self.live[language].keep.all())

    def forward(self, language: int, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        bias = None if bias is None else bias.to(x.dtype)
        if self._whole(language, x):
            return multiply(x, self._masked(language, weight).to(x.dtype).t(), bias, out)
        out = x.new_empty(x.shape[0], self.out_width) if out is None else out
        inputs, blocks = _grouped(x, self.bk), self._blocks(weight)
        for n, live in enumerate(self.live[language].of_rows):
            rows = slice(n * self.bn, (n + 1) * self.bn)
            of_bias = None if bias is None else bias[rows]
            for number, part in enumerate(_parts(live, x, self.bk, self.bn)):
                a = inputs.index_select(1, part).flatten(1)
                b = blocks[n].index_select(1, part).flatten(1).to(x.dtype).t()
                add_multiply(out[:, rows], a, b) if number else multiply(a, b, of_bias, out[:, rows])
            if not len(live):
                out[:, rows] = 0 if of_bias is None else of_bias
        return out

    def input_grad(self, language: int, dy: Tensor, weight: Tensor, out: Tensor | None) -> Tensor:
        if self._whole(language, dy):
            return multiply(dy, self._masked(language, weight).to(dy.dtype), None, out)
        out = dy.new_empty(dy.shape[0], self.in_width) if out is None else out
        upstream, blocks = _grouped(dy, self.bn), self._blocks(weight)
        for k, live in enumerate(self.live[language].of_columns):
            columns = slice(k * self.bk, (k + 1) * self.bk)
            for number, part in enumerate(_parts(live, dy, self.bn, self.bk)):
                a = upstream.index_select(1, part).flatten(1)
                b = blocks[:, :, k].index_select(0, part).flatten(0, 1).to(dy.dtype)
                add_multiply(out[:, columns], a, b) if number else multiply(a, b, None, out[:, columns])
            if not len(live):
                out[:, columns] = 0
        return out

    def add_weight_grad(self, language: int, dy: Tensor, x: Tensor, grad: Tensor) -> None:
        if self._whole(language, x, SCATTERING_ONEDNN):
            part = over_tokens(dy, x)
            grad += (part if language == FULL else self._without_dead(language, part)).to(grad.dtype)
            return
        inputs, blocks = _grouped(x, self.bk), self._blocks(grad)
        for n, live in enumerate(self.live[language].of_rows):
            if len(live):
                upstream = dy[:, n * self.bn : (n + 1) * self.bn]
                part = over_tokens(upstream, inputs.index_select(1, live).flatten(1))
                blocks[n].index_add_(1, live, part.to(grad.dtype).view(self.bn, -1, self.bk))

    def _whole(self, language: int, x: Tensor, of_onednn: int = GATHERING_ONEDNN) -> bool:
        """Whether the whole weight is multiplied, dead blocks as zeros."""
        if language == FULL:
            return True
        size, cost = min(self.bn, self.bk), of_onednn if by_onednn(x) else GATHERING
        return self.live[language].density > size / (size + cost)

    def _blocks(self, weight: Tensor) -> Tensor:
        """The weight as [N / bn, bn, K / bk, bk]."""
        return _grouped(weight, self.bk).unflatten(0, (self.out_width // self.bn, self.bn))

    def _masked(self, language: int, weight: Tensor) -> Tensor:
        return weight if language == FULL else self._without_dead(language, weight.clone())

    def _without_dead(self, language: int, weight: Tensor) -> Tensor:
        """Set the dead blocks of a weight [N, K] to zero, in place."""
        self._blocks(weight).mul_(self.live[language].keep[:, None, :, None])
        return weight


def _grouped(x: Tensor, size: int) -> Tensor:
    """[M, width] -> [M, width / size, size]."""
    return x.unflatten(1, (x.shape[1] // size, size))


def _parts(live: Tensor, x: Tensor, size: int, width: int) -> tuple[Tensor, ...]:
    """Live blocks of `size` inputs and `width` outputs in groups that one product takes at once."""
    if not len(live):
        return ()
    return live.split(max(1, rows_at_once(x, len(live) * size, width) // size))
