"""Masks over whole columns of a weight: gather the live columns, multiply compactly, scatter the gradient back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmask.torch_path.live_units import LiveUnits
from fastmask.torch_path.products import multiply, over_tokens, rows_at_once
from fastmask.torch_path.segments import Pieces, cast
from fastmask.torch_path.units import LIVE_GRAD, LIVE_WEIGHT, Units, first_columns

__all__ = ["Columns"]

LEAST_TO_TRANSPOSE = 4  # languages in a batch


class Columns(Units, Pieces):
    """Masks over whole columns: the input side is the masked one."""

    def __init__(self, live_units: LiveUnits, N: int, packed_width: int | None) -> None:
        super().__init__(live_units, packed_width)
        self.in_width, self.out_width = self.width, N

    def laid_out(self, weight: Tensor, languages: Sequence[int], x: Tensor) -> Tensor:
        if len(languages) == 1 and weight.dtype != x.dtype:
            return self.live_columns(languages[0], weight, x)
        weight = cast(weight, x.dtype) if self.casts_all(languages, weight, x) else weight
        # Single columns are gathered and added at a fraction of the time where each lies in one piece of memory.
        return weight.t().contiguous().t() if self.unit == 1 and len(languages) >= LEAST_TO_TRANSPOSE else weight

    def live_columns(self, language: int, weight: Tensor, x: Tensor) -> Tensor:
        """Live columns [N, room] of a weight [N, K], in the dtype of x; a weight [N, room] stays as it is."""
        room = self.room(language, x)
        if weight.shape[1] == room:
            return cast(weight, x.dtype)
        return cast(self._columns(language, room, 0, room, weight), x.dtype)

    def live_columns_split(self, language: int, weight: Tensor, x: Tensor) -> Tensor | Sequence[Tensor]:
        """The transpose [room, N] of live columns, to multiply x [M, room] by: in parts of its rows."""
        room, N = self.room(language, x), weight.shape[0]
        most = max(1, rows_at_once(x, room, N) // self.unit) * self.unit
        if room <= most:
            return self.live_columns(language, weight, x).t()
        memory = LIVE_WEIGHT.take(room, N, weight)  # [room, N] only in size
        parts = []
        for first in range(0, room, most):
            last = min(first + most, room)
            out = memory[first:last].view(N, last - first)
            parts.append(cast(self._columns(language, room, first, last, weight, out), x.dtype).t())
        return parts

    def _columns(
        self, language: int, room: int, first: int, last: int, weight: Tensor, out: Tensor | None = None
    ) -> Tensor:
        """Of the live columns those from `first` to before `last`, [N, last - first]."""
        N, live = weight.shape[0], self.live(language)
        out = LIVE_WEIGHT.take(N, last - first, weight) if out is None else out
        if self.unit == 1:  # half the time of index_select
            torch.gather(weight, 1, self.live_units.gathered(language, room)[first:last].expand(N, -1), out=out)
            if last > live:
                out[:, max(live - first, 0) :] = 0
        else:  # runs of columns are copied whole: a third of the time of copying them one by one
            grouped, units = (
                (N, -1, self.unit),
                self.live_units.units_of(language)[first // self.unit : last // self.unit],
            )
            torch.index_select(weight.view(grouped), 1, units, out=out.view(grouped))
        return out

    def forward(self, language: int, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        live_bias = None if bias is None else cast(bias, x.dtype)
        live = self.compact(language, x)
        if _by_columns(weight):
            b: Tensor | Sequence[Tensor] = self.live_rows(language, weight.t(), x)
        elif weight.shape[1] == live.shape[1]:
            b = cast(weight, x.dtype).t()
        else:
            b = self.live_columns_split(language, weight, x)
        return multiply(live, b, live_bias, out)

    def input_grad(self, language: int, dy: Tensor, weight: Tensor, out: Tensor | None) -> Tensor:
        if _by_columns(weight):
            b = self.live_rows_sliced(language, weight.t(), dy)
        else:
            b = self.live_columns(language, weight, dy)
        return self.multiply_into(language, out, dy, b, None)

    def weight_grad(self, language: int, dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        if self.whole(language):
            return cast(over_tokens(dy, x[:, : self.size], dy.new_empty(weight.shape)), weight.dtype)
        if self.unit == 1:  # gathering columns one by one is slower than adding them
            return super().weight_grad(language, dy, x, weight)
        live, unit, N = self.live(language), self.unit, dy.shape[1]
        part = LIVE_GRAD.take(N, live + unit, x)
        over_tokens(dy, self.compact(language, x), part[:, :live])
        part[:, live:] = 0
        part = cast(part, weight.dtype).view(N, -1, unit)
        return part.index_select(1, self.live_units.places(language)).view(N, self.size)

    def summed_weight_grad(self, parts: Sequence[tuple[int, Tensor, Tensor]], weight: Tensor, read: Tensor) -> Tensor:
        if not _by_columns(read) or not self.sums_at_once(parts, weight.shape[0]):
            return super().summed_weight_grad(parts, weight, read)
        given = [(language, self.own(language, x), dy) for language, dy, x in parts]
        return cast(self.sum_at_once(given, weight.shape[0]).t().contiguous(), weight.dtype)

    def add_weight_grad(self, language: int, dy: Tensor, x: Tensor, grad: Tensor) -> None:
        if not self.whole(language) and _by_columns(grad):
            part = over_tokens(self.own(language, x), dy)
            grad.t().index_add_(0, self.live_units.of(language), cast(part, grad.dtype))
            return
        part = cast(first_columns(over_tokens(dy, self.compact(language, x)), self.live(language)), grad.dtype)
        if self.whole(language):
            grad += part
        elif self.unit == 1:
            grad.index_add_(1, self.live_units.of(language), part)
        else:  # run by run, in a quarter of the time
            grouped = (part.shape[0], -1, self.unit)
            grad.view(grouped).index_add_(1, self.live_units.units_of(language), part.view(grouped))


def _by_columns(weight: Tensor) -> bool:
    """Whether `Columns.laid_out` has put columns in one piece each."""
    return weight.stride(0) == 1 and weight.shape[0] > 1
