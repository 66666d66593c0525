"""Row and column masks: gather the live units of the weight, multiply compactly, scatter the gradient back.

*Packed* means that the masked side of the activation holds only live units, moved to the front of a buffer whose width
is that of the widest language in the batch; what is left over is zero. Heads and neurons travel packed from the
projection that makes them to the projection that consumes them.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from fastmask.torch_path.segments import FULL, Pieces

__all__ = ["Columns", "Rows", "cast", "multiply"]


MOST_VIEWS = 256  # of scratch memory, one for each size that was asked for


class _Scratch(threading.local):
    """A buffer that every call takes in turn, one for each thread: fresh memory costs more than what is copied into it.

    The kernel clears each page of it at the first touch, and glibc gives large blocks back as soon as they are free.
    What is kept is as large as the largest live part of one weight.
    """

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.views: dict[tuple[int, int, torch.dtype], Tensor] = {}  # making one anew costs several calls

    def take(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """An uninitialised matrix of the dtype of `like`; what was taken before is overwritten."""
        if not like.is_cpu:
            return like.new_empty(rows, columns)  # other devices have allocators that keep memory
        key = (rows, columns, like.dtype)
        view = self.views.get(key)
        if view is None:
            size = rows * columns * like.element_size()
            if len(self.memory) < size or len(self.views) >= MOST_VIEWS:
                self.views.clear()
            if len(self.memory) < size:
                self.memory = torch.empty(size, dtype=torch.uint8)
            view = self.views[key] = self.memory[:size].view(like.dtype).view(rows, columns)
        return view


_LIVE_WEIGHT, _LIVE_GRAD = _Scratch(), _Scratch()


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

    def live(self, language: int) -> int:
        """Live rows (or columns) of a language."""
        return self.size if language == FULL else self.counts[language]

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

    def compact(self, language: int, activation: Tensor) -> Tensor:
        """The live part [M, live] of an activation [M, width] on the masked side."""
        if language == FULL or self.packed_width is not None:
            live = self.live(language)
            return activation if live == activation.shape[1] else activation[:, :live]
        return activation.index_select(1, self.of(language))

    def multiply_into(self, language: int, out: Tensor | None, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        """out[:, live] = a @ b (+ bias), zero elsewhere; `out` [M, width] is on the masked side."""
        live, in_place = self.live(language), language == FULL or self.packed_width is not None
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


class Rows(_Units, Pieces):
    """Masks over whole rows: the output side is the masked one."""

    def __init__(self, indices: Tensor, counts: Tensor, unit: int, N: int, K: int, packed_width: int | None) -> None:
        super().__init__(indices, counts, unit, N, packed_width)
        self.in_width, self.out_width = K, self.width

    def gather(self, language: int, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Live rows [live, K] of a weight [N, K]."""
        if language != FULL:
            out = _LIVE_WEIGHT.take(self.live(language), weight.shape[1], weight)
            weight = torch.index_select(weight, 0, self.of(language), out=out)
        return cast(weight, dtype)

    def gather_bias(self, language: int, bias: Tensor, dtype: torch.dtype) -> Tensor:
        """Live elements of a bias [N]."""
        return cast(bias if language == FULL else bias.index_select(0, self.of(language)), dtype)

    def forward(self, language: int, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        live_bias = None if bias is None else self.gather_bias(language, bias, x.dtype)
        return self.multiply_into(language, out, x, self.gather(language, weight, x.dtype).t(), live_bias)

    def input_grad(self, language: int, dy: Tensor, weight: Tensor, out: Tensor | None) -> Tensor:
        return multiply(self.compact(language, dy), self.gather(language, weight, dy.dtype), None, out)

    def add_input_grad(self, language: int, dy: Tensor, weight: Tensor, out: Tensor) -> None:
        out.addmm_(self.compact(language, dy), self.gather(language, weight, dy.dtype))

    def add_weight_grad(self, language: int, dy: Tensor, x: Tensor, grad: Tensor) -> None:
        out = _LIVE_GRAD.take(self.live(language), x.shape[1], x)
        part = cast(torch.mm(self.compact(language, dy).t(), x, out=out), grad.dtype)
        if language == FULL:
            grad += part
        else:
            grad.index_add_(0, self.of(language), part)

    def weight_grad(self, language: int, dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        if language == FULL:
            return (dy.t() @ x).to(weight.dtype)
        # One gather writes live and dead units alike: every dead one takes the zeros behind the live ones.
        live, (N, K) = self.live(language), weight.shape
        part = _LIVE_GRAD.take(live + self.unit, K, x)
        torch.mm(self.compact(language, dy).t(), x, out=part[:live])
        part[live:] = 0
        part = cast(part, weight.dtype).view(-1, self.unit * K)
        return part.index_select(0, self.places(language)).view(N, K)

    def bias_grad(self, language: int, dy: Tensor) -> Tensor:
        part = self.compact(language, dy).sum(0)
        return part if language == FULL else part.new_zeros(self.size).index_copy_(0, self.of(language), part)


class Columns(_Units, Pieces):
    """Masks over whole columns: the input side is the masked one."""

    def __init__(self, indices: Tensor, counts: Tensor, unit: int, N: int, K: int, packed_width: int | None) -> None:
        super().__init__(indices, counts, unit, K, packed_width)
        self.in_width, self.out_width = self.width, N

    def gather(self, language: int, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Live columns [N, live] of a weight [N, K]."""
        if language != FULL:
            # Runs of columns are copied whole: a third of the time of copying them one by one.
            units = self.units_of(language)
            out = _LIVE_WEIGHT.take(weight.shape[0], self.live(language), weight)
            if self.unit == 1:  # half the time of index_select
                torch.gather(weight, 1, units.expand(weight.shape[0], -1), out=out)
            else:
                grouped = (weight.shape[0], -1, self.unit)
                torch.index_select(weight.view(grouped), 1, units, out=out.view(grouped))
            weight = out
        return cast(weight, dtype)

    def forward(self, language: int, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        live_bias = None if bias is None else cast(bias, x.dtype)
        return multiply(self.compact(language, x), self.gather(language, weight, x.dtype).t(), live_bias, out)

    def input_grad(self, language: int, dy: Tensor, weight: Tensor, out: Tensor | None) -> Tensor:
        return self.multiply_into(language, out, dy, self.gather(language, weight, dy.dtype), None)

    def weight_grad(self, language: int, dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        if language == FULL:
            return (dy.t() @ x[:, : self.size]).to(weight.dtype)
        if self.unit == 1:  # gathering columns one by one is slower than adding them
            return super().weight_grad(language, dy, x, weight)
        live, unit, N = self.live(language), self.unit, dy.shape[1]
        part = _LIVE_GRAD.take(N, live + unit, x)
        torch.mm(dy.t(), self.compact(language, x), out=part[:, :live])
        part[:, live:] = 0
        part = cast(part, weight.dtype).view(N, -1, unit)
        return part.index_select(1, self.places(language)).view(N, self.size)

    def add_weight_grad(self, language: int, dy: Tensor, x: Tensor, grad: Tensor) -> None:
        out = _LIVE_GRAD.take(dy.shape[1], self.live(language), x)
        part = cast(torch.mm(dy.t(), self.compact(language, x), out=out), grad.dtype)
        if language == FULL:
            grad += part
        else:
            grad.index_add_(1, self.of(language), part)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype; `Tensor.to` takes its time even where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def multiply(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)
