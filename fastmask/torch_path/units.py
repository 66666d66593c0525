"""Row and column masks: gather the live units of the weight, multiply compactly, scatter the gradient back.

*Packed* means that the masked side of the activation holds only live units, moved to the front of a buffer whose width
is that of the widest language in the batch; what is left over is zero. Heads and neurons travel packed from the
projection that makes them to the projection that consumes them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmask.torch_path.products import add_multiply, multiply, rows_at_once, temporary_product
from fastmask.torch_path.scratch import Scratch
from fastmask.torch_path.segments import FULL, Pieces, cast

__all__ = ["Columns", "Rows"]

_LIVE_WEIGHT, _LIVE_GRAD = Scratch(), Scratch()

LEAST_TO_TRANSPOSE = 4  # languages in a batch


class _Units:
    """Which units each language owns; `packed_width` is the width of the packed side, or None if it is not packed."""

    def __init__(self, indices: Tensor, counts: Tensor, unit: int, size: int, packed_width: int | None) -> None:
        self.indices = indices
        self.counts: list[int] = counts.tolist()
        self.unit, self.size, self.packed_width = unit, size, packed_width
        self.width = size if packed_width is None else packed_width
        self._of: dict[int, Tensor] = {}
        self._units: dict[int, Tensor] = {}
        self._places: dict[int, Tensor] = {}
        self._slices: dict[tuple[int, int], Tensor] = {}

    def live(self, language: int) -> int:
        """Live rows (or columns) of a language."""
        return self.size if language == FULL else self.counts[language]

    def whole(self, language: int) -> bool:
        """Whether all are live."""
        return self.live(language) == self.size

    def of(self, language: int) -> Tensor:
        """Their indices."""
        indices = self._of.get(language)
        if indices is None:
            indices = self._of[language] = self.indices[language, : self.counts[language]]
        return indices

    def units_of(self, language: int) -> Tensor:
        """Indices of their units."""
        units = self._units.get(language)
        if units is None:
            units = self._units[language] = self.of(language)[:: self.unit] // self.unit
        return units

    def places(self, language: int) -> Tensor:
        """For each unit its place among a language's live ones; for a dead one the place behind them."""
        places = self._places.get(language)
        if places is None:
            units = self.units_of(language)
            places = torch.full((self.size // self.unit,), len(units), device=units.device)
            places[units] = torch.arange(len(units), device=units.device)
            self._places[language] = places
        return places

    def live_rows(self, language: int, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Live rows [live, S] of a weight [size, S] whose rows are the masked side; or of a weight [live, S] all."""
        if self._gathers(language, weight.shape[0]):
            out = _LIVE_WEIGHT.take(self.live(language), weight.shape[1], weight)
            weight = torch.index_select(weight, 0, self.of(language), out=out)
        return cast(weight, dtype)

    def _gathers(self, language: int, rows: int) -> bool:
        """Whether live rows are still to be gathered from so many."""
        return rows != self.live(language)

    def live_rows_sliced(self, language: int, weight: Tensor, x: Tensor) -> Tensor | Sequence[Tensor]:
        """The transpose [S, live] of live rows, to multiply x [M, S] by: in parts of its rows."""
        live, S = self.live(language), weight.shape[1]
        n = -(-S // rows_at_once(x, S, live))
        if n == 1 or S % n or not weight.is_contiguous() or not self._gathers(language, weight.shape[0]):
            return self.live_rows(language, weight, x.dtype).t()
        # A row is n slices one after the other: gathering those costs no more than gathering rows.
        index = self._slices.get((language, n))
        if index is None:
            index = (self.of(language) * n + torch.arange(n, device=weight.device)[:, None]).flatten()
            self._slices[language, n] = index
        out = _LIVE_WEIGHT.take(n * live, S // n, weight)
        torch.index_select(weight.view(-1, S // n), 0, index, out=out)
        return [cast(part, x.dtype).t() for part in out.view(n, live, S // n)]

    def compact(self, language: int, activation: Tensor) -> Tensor:
        """The live part [M, live] of an activation [M, width] on the masked side."""
        if self.whole(language) or self.packed_width is not None:
            live = self.live(language)
            return activation if live == activation.shape[1] else activation[:, :live]
        return activation.index_select(1, self.of(language))

    def multiply_into(
        self, language: int, out: Tensor | None, a: Tensor, b: Tensor | Sequence[Tensor], bias: Tensor | None
    ) -> Tensor:
        """out[:, live] = a @ b (+ bias), zero elsewhere; `out` [M, width] is on the masked side."""
        live, in_place = self.live(language), self.whole(language) or self.packed_width is not None
        if in_place and live == self.width:
            return multiply(a, b, bias, out)
        if out is None:
            out = a.new_empty(a.shape[0], self.width)
        if in_place:
            multiply(a, b, bias, out[:, :live])
            out[:, live:] = 0
        else:
            out.zero_()
            out.index_copy_(1, self.of(language), multiply(a, b, bias))
        return out

    def _casts_all(self, languages: Sequence[int], weight: Tensor, dtype: torch.dtype) -> bool:
        """Whether casting the weight once for all languages takes less than casting the live part of each."""
        return weight.dtype != dtype and 2 * sum(map(self.live, languages)) > self.size


class Rows(_Units, Pieces):
    """Masks over whole rows: the output side is the masked one."""

    def __init__(self, indices: Tensor, counts: Tensor, unit: int, N: int, K: int, packed_width: int | None) -> None:
        super().__init__(indices, counts, unit, N, packed_width)
        self.in_width, self.out_width = K, self.width

    def laid_out(self, weight: Tensor, languages: Sequence[int], dtype: torch.dtype) -> Tensor:
        if len(languages) == 1 and weight.dtype != dtype:
            return self.live_rows(languages[0], weight, dtype)
        return cast(weight, dtype) if self._casts_all(languages, weight, dtype) else weight

    def gather_bias(self, language: int, bias: Tensor, dtype: torch.dtype) -> Tensor:
        """Live elements of a bias [N]."""
        return cast(bias if self.whole(language) else bias.index_select(0, self.of(language)), dtype)

    def forward(self, language: int, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        live_bias = None if bias is None else self.gather_bias(language, bias, x.dtype)
        return self.multiply_into(language, out, x, self.live_rows_sliced(language, weight, x), live_bias)

    def input_grad(self, language: int, dy: Tensor, weight: Tensor, out: Tensor | None) -> Tensor:
        return multiply(self.compact(language, dy), self.live_rows(language, weight, dy.dtype), None, out)

    def add_input_grad(self, language: int, dy: Tensor, weight: Tensor, out: Tensor) -> None:
        add_multiply(out, self.compact(language, dy), self.live_rows(language, weight, dy.dtype))

    def add_weight_grad(self, language: int, dy: Tensor, x: Tensor, grad: Tensor) -> None:
        part = cast(temporary_product(self.compact(language, dy).t(), x), grad.dtype)
        if self.whole(language):
            grad += part
        else:
            grad.index_add_(0, self.of(language), part)

    def weight_grad(self, language: int, dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        if self.whole(language):
            return multiply(dy.t(), x).to(weight.dtype)
        # One gather writes live and dead units alike: every dead one takes the zeros behind the live ones.
        live, (N, K) = self.live(language), weight.shape
        part = _LIVE_GRAD.take(live + self.unit, K, x)
        multiply(self.compact(language, dy).t(), x, out=part[:live])
        part[live:] = 0
        part = cast(part, weight.dtype).view(-1, self.unit * K)
        return part.index_select(0, self.places(language)).view(N, K)

    def bias_grad(self, language: int, dy: Tensor) -> Tensor:
        part = self.compact(language, dy).sum(0)
        return part if self.whole(language) else part.new_zeros(self.size).index_copy_(0, self.of(language), part)


class Columns(_Units, Pieces):
    """Masks over whole columns: the input side is the masked one."""

    def __init__(self, indices: Tensor, counts: Tensor, unit: int, N: int, K: int, packed_width: int | None) -> None:
        super().__init__(indices, counts, unit, K, packed_width)
        self.in_width, self.out_width = self.width, N

    def laid_out(self, weight: Tensor, languages: Sequence[int], dtype: torch.dtype) -> Tensor:
        if len(languages) == 1 and weight.dtype != dtype:
            return self.live_columns(languages[0], weight, dtype)
        weight = cast(weight, dtype) if self._casts_all(languages, weight, dtype) else weight
        # Single columns are gathered and added at a fraction of the time where each lies in one piece of memory.
        return weight.t().contiguous().t() if self.unit == 1 and len(languages) >= LEAST_TO_TRANSPOSE else weight

    def live_columns(self, language: int, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Live columns [N, live] of a weight [N, K]; or of a weight [N, live] all."""
        if not self._gathers(language, weight.shape[1]):
            return cast(weight, dtype)
        return self._columns(self.units_of(language), weight, dtype)

    def live_columns_split(self, language: int, weight: Tensor, x: Tensor) -> Tensor | Sequence[Tensor]:
        """The transpose [live, N] of live columns, to multiply x [M, live] by: in parts of its rows."""
        units, N = self.units_of(language), weight.shape[0]
        most = max(1, rows_at_once(x, self.live(language), N) // self.unit)
        if len(units) <= most:
            return self._columns(units, weight, x.dtype).t()
        memory = _LIVE_WEIGHT.take(self.live(language), N, weight)  # [live, N] only in size
        parts, first = [], 0
        for part in units.split(most):
            last = first + len(part) * self.unit
            out = memory[first:last].view(N, last - first)
            parts.append(self._columns(part, weight, x.dtype, out).t())
            first = last
        return parts

    def _columns(self, units: Tensor, weight: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        N = weight.shape[0]
        out = _LIVE_WEIGHT.take(N, len(units) * self.unit, weight) if out is None else out
        if self.unit == 1:  # half the time of index_select
            torch.gather(weight, 1, units.expand(N, -1), out=out)
        else:  # runs of columns are copied whole: a third of the time of copying them one by one
            grouped = (N, -1, self.unit)
            torch.index_select(weight.view(grouped), 1, units, out=out.view(grouped))
        return cast(out, dtype)

    def forward(self, language: int, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        live_bias = None if bias is None else cast(bias, x.dtype)
        live = self.compact(language, x)
        if not self._gathers(language, weight.shape[1]):
            b: Tensor | Sequence[Tensor] = cast(weight, x.dtype).t()
        elif _by_columns(weight):
            b = self.live_rows(language, weight.t(), x.dtype)
        else:
            b = self.live_columns_split(language, weight, live)
        return multiply(live, b, live_bias, out)

    def input_grad(self, language: int, dy: Tensor, weight: Tensor, out: Tensor | None) -> Tensor:
        if _by_columns(weight):
            b = self.live_rows_sliced(language, weight.t(), dy)
        else:
            b = self.live_columns(language, weight, dy.dtype)
        return self.multiply_into(language, out, dy, b, None)

    def weight_grad(self, language: int, dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        if self.whole(language):
            return multiply(dy.t(), x[:, : self.size]).to(weight.dtype)
        if self.unit == 1:  # gathering columns one by one is slower than adding them
            return super().weight_grad(language, dy, x, weight)
        live, unit, N = self.live(language), self.unit, dy.shape[1]
        part = _LIVE_GRAD.take(N, live + unit, x)
        multiply(dy.t(), self.compact(language, x), out=part[:, :live])
        part[:, live:] = 0
        part = cast(part, weight.dtype).view(N, -1, unit)
        return part.index_select(1, self.places(language)).view(N, self.size)

    def add_weight_grad(self, language: int, dy: Tensor, x: Tensor, grad: Tensor) -> None:
        live = self.compact(language, x)
        if not self.whole(language) and _by_columns(grad):
            grad.t().index_add_(0, self.of(language), cast(temporary_product(live.t(), dy), grad.dtype))
            return
        part = cast(temporary_product(dy.t(), live), grad.dtype)
        if self.whole(language):
            grad += part
        elif self.unit == 1:
            grad.index_add_(1, self.of(language), part)
        else:  # run by run, in a quarter of the time
            grouped = (part.shape[0], -1, self.unit)
            grad.view(grouped).index_add_(1, self.units_of(language), part.view(grouped))


def _by_columns(weight: Tensor) -> bool:
    """Whether `Columns.laid_out` has put columns in one piece each."""
    return weight.stride(0) == 1 and weight.shape[0] > 1
