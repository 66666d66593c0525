"""Block masks: one product for each row (or column) of blocks, of its live blocks gathered side by side.

Where so many blocks are live, or blocks are so small, that gathering costs more than it saves, the product is whole and
the dead blocks are zeros.
"""

from __future__ import annotations

from functools import cached_property

from torch import Tensor

from fastmask.masks import FULL, StoredMask, live_blocks
from fastmask.torch_path.gemm import by_onednn, cast, combined, outer, products
from fastmask.torch_path.split import first_equals
from fastmask.torch_path.tiles import Tiles

__all__ = ["Blocks"]

# Gathering costs as much as this many rows of products do: it decides from which density on the product is whole.
GATHERING, GATHERING_ONEDNN = 16, 128
SCATTERING_ONEDNN = 400  # the same of dW, whose blocks are put back one block row at a time


class Blocks(Tiles):
    """Masks over (bn, bk) blocks of a weight [N, K], and what its layers compute."""

    def __init__(self, mask: StoredMask, shape: tuple[int, int]) -> None:
        self.bn, self.bk = mask.geometry
        self.N, self.K = shape
        self.keep = live_blocks(mask.index.detach(), mask.extents, mask.geometry, shape)  # bool [L, N / bn, K / bk]
        self.density: list[float] = [*self.keep.float().mean((1, 2)).tolist(), 1.0]
        self._rows: dict[int, list[Tensor]] = {}
        self._columns: dict[int, list[Tensor]] = {}

    @cached_property
    def same_as(self) -> list[int]:
        return first_equals(list(self.keep), self.whole)

    def whole(self, language: int) -> bool:
        return self.density[language] == 1

    def _forward(self, language: int, x: Tensor, w: Tensor, out: Tensor) -> None:
        if self._is_whole(language, x):
            products([x], self._masked(language, w), None, [out])
            return
        inputs, blocks = _grouped(x, self.bk), self._blocks(w)
        for n, live in enumerate(_places(self._rows, language, self.keep)):
            rows = slice(n * self.bn, (n + 1) * self.bn)
            if len(live):
                w_live = blocks[n].index_select(1, live).flatten(1)
                products([inputs.index_select(1, live).flatten(1)], w_live, None, [out[:, rows]])
            else:
                out[:, rows] = 0

    def _input_grad(self, language: int, dy: Tensor, w: Tensor, out: Tensor, add: bool) -> None:
        if self._is_whole(language, dy):
            combined([dy], self._masked(language, w), None, [out], add)
            return
        upstream, blocks = _grouped(dy, self.bn), self._blocks(w)
        for k, live in enumerate(_places(self._columns, language, self.keep.transpose(1, 2))):
            columns = slice(k * self.bk, (k + 1) * self.bk)
            if len(live):
                w_live = blocks[:, :, k].index_select(0, live).flatten(0, 1)
                combined([upstream.index_select(1, live).flatten(1)], w_live, None, [out[:, columns]], add)
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


def _grouped(x: Tensor, size: int) -> Tensor:
    """[M, width] -> [M, width / size, size]."""
    return x.unflatten(1, (x.shape[1] // size, size))


def _places(made: dict[int, list[Tensor]], language: int, keep: Tensor) -> list[Tensor]:
    """Of each row of a language's blocks the live ones; made once."""
    if language not in made:
        keep = keep.new_ones(keep.shape[1:]) if language == FULL else keep[language]
        made[language] = [row.nonzero().flatten() for row in keep]
    return made[language]
