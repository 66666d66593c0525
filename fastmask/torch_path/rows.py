"""Masks over whole rows of a weight: gather the live rows, multiply compactly, scatter the gradient back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastmask.torch_path.live_units import LiveUnits
from fastmask.torch_path.products import add_multiply, multiply, over_tokens
from fastmask.torch_path.segments import Pieces, cast
from fastmask.torch_path.units import LIVE_GRAD, Units

__all__ = ["Rows"]


class Rows(Units, Pieces):
    """Masks over whole rows: the output side is the masked one."""

    def __init__(self, live_units: LiveUnits, K: int, packed_width: int | None) -> None:
        super().__init__(live_units, packed_width)
        self.in_width, self.out_width = K, self.width

    def laid_out(self, weight: Tensor, languages: Sequence[int], x: Tensor) -> Tensor:
        if len(languages) == 1 and weight.dtype != x.dtype:
            return self.live_rows(languages[0], weight, x)
        return cast(weight, x.dtype) if self.casts_all(languages, weight, x) else weight

    def gather_bias(self, language: int, bias: Tensor, x: Tensor) -> Tensor:
        """Live elements [room] of a bias [N], in the dtype of x."""
        if self.whole(language):
            return cast(bias, x.dtype)
        live, room = self.live(language), self.room(language, x)
        bias = bias.index_select(0, self.live_units.gathered(language, room))
        if room > live:
            bias[live:] = 0
        return cast(bias, x.dtype)

    def forward(self, language: int, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        live_bias = None if bias is None else self.gather_bias(language, bias, x)
        return self.multiply_into(language, out, x, self.live_rows_sliced(language, weight, x), live_bias)

    def input_grad(self, language: int, dy: Tensor, weight: Tensor, out: Tensor | None) -> Tensor:
        return multiply(self.compact(language, dy), self.live_rows(language, weight, dy), None, out)

    def add_input_grad(self, language: int, dy: Tensor, weight: Tensor, out: Tensor) -> None:
        add_multiply(out, self.compact(language, dy), self.live_rows(language, weight, dy))

    def add_weight_grad(self, language: int, dy: Tensor, x: Tensor, grad: Tensor) -> None:
        part = cast(over_tokens(self.own(language, dy), x), grad.dtype)
        if self.whole(language):
            grad += part
        else:
            grad.index_add_(0, self.live_units.of(language), part)

    def weight_grad(self, language: int, dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        if self.whole(language):
            return cast(over_tokens(dy, x, dy.new_empty(weight.shape)), weight.dtype)
        # One gather writes live and dead units alike: every dead one takes the zeros behind the live ones.
        live, (N, K) = self.live(language), weight.shape
        part = LIVE_GRAD.take(live + self.unit, K, x)
        over_tokens(self.own(language, dy), x, part[:live])
        part[live:] = 0
        part = cast(part, weight.dtype).view(-1, self.unit * K)
        return part.index_select(0, self.live_units.places(language)).view(N, K)

    def summed_weight_grad(self, parts: Sequence[tuple[int, Tensor, Tensor]], weight: Tensor, read: Tensor) -> Tensor:
        if not self.sums_at_once(parts, weight.shape[1]):
            return super().summed_weight_grad(parts, weight, read)
        given = [(language, self.own(language, dy), x) for language, dy, x in parts]
        return cast(self.sum_at_once(given, weight.shape[1]), weight.dtype)

    def add_bias_grad(self, language: int, dy: Tensor, grad: Tensor) -> None:
        part = self.own(language, dy).sum(0)
        if self.whole(language):
            grad += part
        else:
            grad.index_add_(0, self.live_units.of(language), cast(part, grad.dtype))
