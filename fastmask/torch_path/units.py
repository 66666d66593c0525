"""What masks over whole rows and over whole columns of a weight share: gathering what is live, and summing gradients.

*Packed* means that the masked side of the activation holds only live units, moved to the front of a buffer whose width
is that of the widest language in the batch; what is left over is zero. Heads and neurons travel packed from the
projection that makes them to the projection that consumes them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from fastmask.torch_path.live_units import LiveUnits
from fastmask.torch_path.products import by_onednn, multiply, over_tokens, padded, rows_at_once
from fastmask.torch_path.scratch import Scratch
from fastmask.torch_path.segments import HALF, cast

__all__ = ["LIVE_GRAD", "LIVE_WEIGHT", "Units", "first_columns"]

LIVE_WEIGHT, LIVE_GRAD = Scratch(), Scratch()

MOST_SUMMED = 2**24  # elements of all languages' dW together: they exist at once


class Units:
    """One masked weight in one packed width; `packed_width` is None if the masked side is not packed."""

    def __init__(self, live_units: LiveUnits, packed_width: int | None) -> None:
        self.live_units, self.packed_width = live_units, packed_width
        self.unit, self.size = live_units.unit, live_units.size
        self.masks: Sequence[Tensor] = [live_units.of(language) for language in range(len(live_units.counts))]
        self.width = self.size if packed_width is None else packed_width

    def live(self, language: int) -> int:
        """Live rows (or columns) of a language."""
        return self.live_units.live(language)

    def whole(self, language: int) -> bool:
        """Whether all are live."""
        return self.live_units.live(language) == self.size

    def room(self, language: int, x: Tensor) -> int:
        """Rows (or columns) that are multiplied with x: the live ones and, for a `padded` size, zeros behind them."""
        live = self.live(language)
        if self.unit > 1 or self.packed_width is None or not by_onednn(x):
            return live  # there are only so many numbers of heads
        room = min(padded(live), self.width)
        return room if room < self.size else live

    def live_rows(self, language: int, weight: Tensor, x: Tensor) -> Tensor:
        """Live rows [room, S] of a weight [size, S] whose rows are the masked side, in the dtype of x.

        A weight [room, S] is what this has returned before, and stays as it is.
        """
        live, room = self.live(language), self.room(language, x)
        if weight.shape[0] != room:
            out = LIVE_WEIGHT.take(room, weight.shape[1], weight)
            weight = torch.index_select(weight, 0, self.live_units.gathered(language, room), out=out)
            if room > live:
                weight[live:] = 0
        return cast(weight, x.dtype)

    def live_rows_sliced(self, language: int, weight: Tensor, x: Tensor) -> Tensor | Sequence[Tensor]:
        """The transpose [S, room] of live rows, to multiply x [M, S] by: in parts of its rows."""
        live, room, S = self.live(language), self.room(language, x), weight.shape[1]
        n = -(-S // rows_at_once(x, S, room))
        if n == 1 or S % n or not weight.is_contiguous() or weight.shape[0] == room:
            return self.live_rows(language, weight, x).t()
        # A row is n slices one after the other: gathering those costs no more than gathering rows.
        index = self.live_units.sliced(language, room, n)
        out = LIVE_WEIGHT.take(n * room, S // n, weight)
        torch.index_select(weight.view(-1, S // n), 0, index, out=out)
        parts = out.view(n, room, S // n)
        if room > live:
            parts[:, live:] = 0
        return [cast(part, x.dtype).t() for part in parts]

    def compact(self, language: int, activation: Tensor) -> Tensor:
        """The live part [M, room] of an activation [M, width] on the masked side, behind it what meets only zeros."""
        if self.whole(language) or self.packed_width is not None:
            return first_columns(activation, self.room(language, activation))
        return activation.index_select(1, self.live_units.of(language))

    def multiply_into(
        self, language: int, out: Tensor | None, a: Tensor, b: Tensor | Sequence[Tensor], bias: Tensor | None
    ) -> Tensor:
        """out[:, live] = a @ b (+ bias), zero elsewhere; `out` [M, width] is on the masked side."""
        room, in_place = self.room(language, a), self.whole(language) or self.packed_width is not None
        if in_place and room == self.width:
            return multiply(a, b, bias, out)
        if out is None:
            out = a.new_empty(a.shape[0], self.width)
        if in_place:
            multiply(a, b, bias, out[:, :room])
            out[:, room:] = 0
        else:
            out.zero_()
            out.index_copy_(1, self.live_units.of(language), multiply(a, b, bias))
        return out

    def own(self, language: int, activation: Tensor) -> Tensor:
        """What is live [M, live] of an activation [M, width], and nothing else."""
        return first_columns(self.compact(language, activation), self.live(language))

    def sums_at_once(self, parts: Sequence[tuple[int, Tensor, Tensor]], width: int) -> bool:
        """Whether `sum_at_once` takes less than adding one language's part after the other.

        In float32 it takes as long, and twice the memory.
        """
        if not parts or parts[0][2].dtype not in HALF or not parts[0][2].is_cpu:
            return False
        return width * sum(self.live(language) for language, _, _ in parts) <= MOST_SUMMED

    def sum_at_once(self, parts: Sequence[tuple[int, Tensor, Tensor]], width: int) -> Tensor:
        """The sum [size, width] of the products of (language, a [M, live], b [M, width]), each at its live units.

        All products exist at once, one below the other, in half precision. The sums are made in float32, each element
        of the result being written once.
        """
        languages = tuple(language for language, _, _ in parts)
        ends = list(itertools.accumulate(map(self.live, languages)))
        products = LIVE_GRAD.take(ends[-1], width, parts[0][1])
        for end, (language, a, b) in zip(ends, parts, strict=True):
            over_tokens(a, b, products[end - self.live(language) : end])
        which, first = self.live_units.owners(languages)
        by_unit = products.view(-1, self.unit * width)
        grad: Tensor = embedding_bag(which, by_unit, first, mode="sum", include_last_offset=True)
        return grad.view(self.size, width)

    def casts_all(self, languages: Sequence[int], weight: Tensor, x: Tensor) -> bool:
        """Whether casting the weight once for all languages takes less than casting the live part of each."""
        return weight.dtype != x.dtype and 2 * sum(map(self.live, languages)) > self.size


def first_columns(x: Tensor, columns: int) -> Tensor:
    """The first columns of a matrix; making a view takes its time even where it is the whole."""
    return x if x.shape[1] == columns else x[:, :columns]
