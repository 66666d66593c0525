"""Block masks: one small GEMM for each run of live blocks, on strided views of the weight; dead blocks are never read.

The forward pass and dW walk the runs of each block row, dX those of each block column, so that every output strip is
written by as few and as deep products as the mask allows.
"""

from __future__ import annotations

from torch import Tensor

from fastmask.torch_path.segments import FULL, Pieces

__all__ = ["Blocks"]


class Blocks(Pieces):
    """Masks over (bn, bk) blocks of a weight [N, K]."""

    def __init__(self, layout: list[Tensor], block: tuple[int, int], N: int, K: int) -> None:
        self.row_runs, row_offsets, self.column_runs, column_offsets = layout
        self.row_offsets: list[int] = row_offsets.tolist()
        self.column_offsets: list[int] = column_offsets.tolist()
        self.bn, self.bk = block
        self.in_width, self.out_width = K, N

    def _row_strips(self, language: int) -> list[tuple[slice, slice]]:
        """(rows, columns) of each run of live blocks, one block row after the other."""
        if language == FULL:
            return [(slice(0, self.out_width), slice(0, self.in_width))]
        runs = self.row_runs[self.row_offsets[language] : self.row_offsets[language + 1]].tolist()
        return [(slice(r * self.bn, (r + 1) * self.bn), slice(a * self.bk, b * self.bk)) for r, a, b in runs]

    def _column_strips(self, language: int) -> list[tuple[slice, slice]]:
        """The same, one block column after the other."""
        if language == FULL:
            return [(slice(0, self.out_width), slice(0, self.in_width))]
        runs = self.column_runs[self.column_offsets[language] : self.column_offsets[language + 1]].tolist()
        return [(slice(a * self.bn, b * self.bn), slice(c * self.bk, (c + 1) * self.bk)) for c, a, b in runs]

    def forward(self, language: int, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        weight = weight.to(x.dtype)
        out.zero_() if bias is None else out.copy_(bias.to(x.dtype).expand_as(out))
        for rows, columns in self._row_strips(language):
            out[:, rows].addmm_(x[:, columns], weight[rows, columns].t())

    def input_grad(self, language: int, dy: Tensor, weight: Tensor, out: Tensor) -> None:
        weight = weight.to(dy.dtype)
        out.zero_()
        for rows, columns in self._column_strips(language):
            out[:, columns].addmm_(dy[:, rows], weight[rows, columns])

    def add_weight_grad(self, language: int, dy: Tensor, x: Tensor, grad: Tensor) -> None:
        for rows, columns in self._row_strips(language):
            part = grad[rows, columns]
            if grad.dtype == x.dtype:
                part.addmm_(dy[:, rows].t(), x[:, columns])
            else:
                part += (dy[:, rows].t() @ x[:, columns]).to(grad.dtype)
