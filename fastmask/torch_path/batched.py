"""Packed row and column masks when every language has few tokens: all languages in one batched product.

One language after the other, a small batch spends more time on calls than on arithmetic. Here the live rows (or
columns) of all languages are gathered at once, the examples are laid out [G, M, width] (G languages of this batch, M
tokens of the largest), and each of forward, dX and dW is one `bmm`. Slots that a language does not fill are zero in the
weight, so they add nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastmask.torch_path.columns import Columns
from fastmask.torch_path.rows import Rows
from fastmask.torch_path.segments import Grads, Needs, Split, dtype_of_sums

__all__ = ["backward", "forward"]


def forward(
    layers: Sequence[Rows | Columns],
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    split: Split,
) -> tuple[list[Tensor], Sequence[Tensor]]:
    """Each layer's y; nothing is kept for `backward`."""
    return [
        _Layer(layer, weight, split).forward(x, bias)
        for layer, weight, bias in zip(layers, weights, biases, strict=True)
    ], []


def backward(
    layers: Sequence[Rows | Columns],
    dys: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    split: Split,
    needs: Needs,
    kept: Sequence[Tensor],
) -> Grads:
    """Gradients of `forward`."""
    found = [
        _Layer(layer, weight, split).backward(dy, x, (needs.x, needs.weights[g], needs.biases[g]))
        for g, (layer, weight, dy) in enumerate(zip(layers, weights, dys, strict=True))
    ]
    parts_of_dx = [dx for dx, _, _ in found if dx is not None]
    dx = functools.reduce(torch.add, parts_of_dx) if parts_of_dx else None
    return dx, [dw for _, dw, _ in found], [db for _, _, db in found]


class _Groups:
    """The examples of a batch as one row of `most` slots for each language; spare slots repeat example 0."""

    def __init__(self, split: Split, device: torch.device) -> None:
        where = split.positions
        self.count = len(where)
        self.most = max(len(positions) for positions in where.values())
        order = [position for positions in where.values() for position in positions]
        # Sorted, in equal shares: the batch is laid out as needed already.
        self.in_place = order == list(range(len(order))) and len(order) == self.most * len(where)
        if not self.in_place:
            slots, spare, source = [0] * len(order), [], []
            for row, positions in enumerate(where.values()):
                for column in range(self.most):
                    slot = row * self.most + column
                    if column < len(positions):
                        slots[positions[column]] = slot
                    else:
                        spare.append(slot)
                    source.append(positions[column] if column < len(positions) else 0)
            self.slots, self.spare, self.source = (torch.tensor(t, device=device) for t in (slots, spare, source))

    def spread(self, x: Tensor, spare_zero: bool = False) -> Tensor:
        """[B, T, width] -> [G, most * T, width]."""
        if not self.in_place:
            x = x.index_select(0, self.source)
            if spare_zero and len(self.spare):
                x.index_fill_(0, self.spare, 0)
        return x.reshape(self.count, self.most * x.shape[1], x.shape[2])

    def collect(self, y: Tensor, tokens: int) -> Tensor:
        """[G, most * T, width] -> [B, T, width]."""
        y = y.reshape(self.count * self.most, tokens, y.shape[2])
        return y if self.in_place else y.index_select(0, self.slots)


class _Layer:
    """One packed layer for one batch; call `forward`, or `backward` in an object of its own."""

    def __init__(self, pieces: Rows | Columns, weight: Tensor, split: Split) -> None:
        self.pieces, self.weight = pieces, weight
        self.groups = split.once(_Groups, weight.device)
        self.counts = [pieces.live(language) for language in split.positions]
        self.live = max(self.counts)
        self.index = pieces.live_units.side_by_side(tuple(split.positions))  # [G * live]

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """[B, T, in] -> [B, T, out], the masked side packed."""
        if isinstance(self.pieces, Rows):
            xs, live_bias = self.groups.spread(x), None
            if bias is not None:
                live_bias = bias.index_select(0, self.index).view(-1, 1, self.live).to(x.dtype)
                self._clear(live_bias, 2)
            y = _multiply(xs, self._live_rows(x.dtype).transpose(1, 2), live_bias)
            return self._widened(y, x.shape[1])
        xs = self.groups.spread(x[..., : self.live])
        y = _multiply(xs, self._live_columns(x.dtype), None if bias is None else bias.to(x.dtype))
        return self.groups.collect(y, x.shape[1])

    def backward(
        self, dy: Tensor, x: Tensor, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dx, dW, db), each None unless `needs` asks for it."""
        of_rows, T, dtype = isinstance(self.pieces, Rows), x.shape[1], self.weight.dtype
        sum_dtype = dtype_of_sums(self.weight)
        dys = self.groups.spread(dy[..., : self.live] if of_rows else dy, spare_zero=True)
        dx = dw = db = None
        if needs[0] and of_rows:
            dx = self.groups.collect(torch.bmm(dys, self._live_rows(dy.dtype)), T)
        elif needs[0]:
            dx = self._widened(torch.bmm(dys, self._live_columns(dy.dtype).transpose(1, 2)), T)
        if needs[1]:
            dw = torch.zeros(self.weight.shape, dtype=sum_dtype, device=self.weight.device)
            xs = self.groups.spread(x if of_rows else x[..., : self.live])
            part = torch.bmm(dys.transpose(1, 2), xs).to(sum_dtype)
            self._clear(part, 1 if of_rows else 2)
            if of_rows:
                dw.index_add_(0, self.index, part.flatten(0, 1))
            else:
                dw.index_add_(1, self.index, part.transpose(0, 1).flatten(1, 2))
            dw = dw.to(dtype)
        if needs[2] and of_rows:
            db = torch.zeros(self.weight.shape[0], dtype=sum_dtype, device=self.weight.device)
            part = dys.sum(1).to(sum_dtype)
            self._clear(part, 1)
            db = db.index_add_(0, self.index, part.flatten()).to(dtype)
        elif needs[2]:
            db = dy.sum((0, 1)).to(dtype)
        return dx, dw, db

    def _live_rows(self, dtype: torch.dtype) -> Tensor:
        """[G, live, K], zero behind a language's own rows."""
        rows = self.weight.index_select(0, self.index).to(dtype).view(-1, self.live, self.weight.shape[1])
        self._clear(rows, 1)
        return rows

    def _live_columns(self, dtype: torch.dtype) -> Tensor:
        """[G, live, N], zero behind a language's own columns; a view of columns that were gathered side by side."""
        columns = self.weight.index_select(1, self.index).to(dtype).view(self.weight.shape[0], -1, self.live)
        columns = columns.permute(1, 2, 0)
        self._clear(columns, 1)
        return columns

    def _clear(self, tensor: Tensor, dim: int) -> None:
        """Zero the slots of `tensor` [G, ...] that a language does not fill along `dim`."""
        for row, count in enumerate(self.counts):
            if count < self.live:
                tensor[row].narrow(dim - 1, count, self.live - count).zero_()

    def _widened(self, y: Tensor, tokens: int) -> Tensor:
        """[G, M, live] -> [B, T, packed width], zero behind the live slots."""
        y = self.groups.collect(y, tokens)
        missing = self.pieces.width - self.live
        return torch.nn.functional.pad(y, (0, missing)) if missing else y


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.bmm(x, weight) if bias is None else torch.baddbmm(bias, x, weight)
