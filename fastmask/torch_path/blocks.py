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

    def __init__(self, runs: Tensor, starts: Tensor, block: tuple[int, int], N: int, K: int) -> None:
        self.runs = runs
        self.row_starts, self.column_starts = starts.tolist()
        self.bn, self.bk = block
        self.in_width, self.out_width = K, N

    def _runs(self, starts: list[int], language: int) -> list[list[int]]:
        runs: list[list[int]] = self.runs[starts[language] : starts[language + 1]].tolist()
        return runs

    def _row_strips(self, language: int) -> list[tuple[slice, slice]]:
        """(rows, columns) of each run of live blocks, one block row after the other."""
        if language == FULL:
            return [(slice(0, self.out_width), slice(0, self.in_width))]
        bn, bk, runs = self.bn, self.bk, self._runs(self.row_starts, language)
        return [(slice(n * bn, (n + 1) * bn), slice(first * bk, last * bk)) for n, first, last in runs]

    def _column_strips(self, language: int) -> list[tuple[slice, slice]]:
        """The same, one block column after the other."""
        if language == FULL:
            return [(slice(0, self.out_width), slice(0, self.in_width))]
        bn, bk, runs = self.bn, self.bk, self._runs(self.column_starts, language)
        return [(slice(first * bn, last * bn), slice(k * bk, (k + 1) * bk)) for k, first, last in runs]

    def forward(self, language: int, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        weight = weight.to(x.dtype)
        out = x.new_empty(x.shape[0], self.out_width) if out is None else out
        out.zero_() if bias is None else out.copy_(bias.to(x.dtype).expand_as(out))
        for rows, columns in self._row_strips(language):
            out[:, rows].addmm_(x[:, columns], weight[rows, columns].t())
        return out

    def input_grad(self, language: int, dy: Tensor, weight: Tensor, out: Tensor | None) -> Tensor:
        weight = weight.to(dy.dtype)
        out = dy.new_empty(dy.shape[0], self.in_width) if out is None else out
        out.zero_()
        for rows, columns in self._column_strips(language):
            out[:, columns].addmm_(dy[:, rows], weight[rows, columns])
        return out

    def add_weight_grad(self, language: int, dy: Tensor, x: Tensor, grad: Tensor) -> None:
        for rows, columns in self._row_strips(language):
            part = grad[rows, columns]
            if grad.dtype == x.dtype:
                part.addmm_(dy[:, rows].t(), x[:, columns])
            else:
                part += (dy[:, rows].t() @ x[:, columns]).to(grad.dtype)
