"""Which part of a parameter a language may change: the live slices of a masked weight, all of any other.

A `Slices` copies that part out, writes it back, and takes an SGD step on it. Whatever lies outside is never written, so
dead weights stay as they are to the last bit, even where a gradient that diverged holds NaN in their place.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from fastmask import bits
from fastmask.linear import MaskedLinear
from fastmask.masks import Mask

__all__ = ["Slices", "slices_of"]


class Slices:
    """The whole of a parameter; the base of what covers less of it."""

    def read(self, parameter: Tensor) -> Tensor:
        """A copy of the live part, compact."""
        return parameter.clone(memory_format=torch.preserve_format)

    def write(self, parameter: Tensor, live: Tensor) -> None:
        """Put what `read` returned back in place."""
        parameter.copy_(live)

    def step(self, parameter: Tensor, gradient: Tensor, rate: float) -> None:
        """`parameter -= rate * gradient` on the live part; both of the full shape."""
        parameter.sub_(gradient, alpha=rate)


class Rows(Slices):
    """Live rows, int64 [live], of a weight [N, K] or of its bias [N]."""

    def __init__(self, live: Tensor) -> None:
        self.live = live

    def read(self, parameter: Tensor) -> Tensor:
        return parameter.index_select(0, self.live)

    def write(self, parameter: Tensor, live: Tensor) -> None:
        parameter.index_copy_(0, self.live, live)

    def step(self, parameter: Tensor, gradient: Tensor, rate: float) -> None:
        parameter.index_add_(0, self.live, gradient.index_select(0, self.live), alpha=-rate)


class Columns(Slices):
    """Live columns, int64 [live], of a weight [N, K]; `unit` columns live and die together."""

    def __init__(self, live: Tensor, unit: int) -> None:
        self.units, self.unit = live[::unit] // unit, unit

    def read(self, parameter: Tensor) -> Tensor:
        # Columns one by one: `gather` takes half the time of `index_select`.
        if self.unit == 1:
            return parameter.gather(1, self.units.expand(len(parameter), -1))
        return parameter.unflatten(1, (-1, self.unit)).index_select(1, self.units)

    def write(self, parameter: Tensor, live: Tensor) -> None:
        if self.unit == 1:
            parameter.scatter_(1, self.units.expand(len(parameter), -1), live)
        else:
            parameter.unflatten(1, (-1, self.unit)).index_copy_(1, self.units, live)

    def step(self, parameter: Tensor, gradient: Tensor, rate: float) -> None:
        keep = torch.zeros(parameter.shape[1] // self.unit, dtype=torch.bool, device=parameter.device)
        keep.index_fill_(0, self.units, True)
        _step_where(keep.repeat_interleave(self.unit), parameter, gradient, rate)


class Blocks(Slices):
    """Live blocks (block row, block column), int64 [live] each, of a weight [N, K]; a block is `size` weights."""

    def __init__(self, rows: Tensor, columns: Tensor, size: tuple[int, int]) -> None:
        self.rows, self.columns, self.size = rows, columns, size

    def read(self, parameter: Tensor) -> Tensor:
        return self._by_block(parameter)[self.rows, :, self.columns]

    def write(self, parameter: Tensor, live: Tensor) -> None:
        self._by_block(parameter)[self.rows, :, self.columns] = live

    def step(self, parameter: Tensor, gradient: Tensor, rate: float) -> None:
        (N, K), (bn, bk) = parameter.shape, self.size
        keep = torch.zeros(N // bn, K // bk, dtype=torch.bool, device=parameter.device)
        keep[self.rows, self.columns] = True
        _step_where(keep.repeat_interleave(bn, 0).repeat_interleave(bk, 1), parameter, gradient, rate)

    def _by_block(self, parameter: Tensor) -> Tensor:
        """A view [N / bn, bn, K / bk, bk]."""
        return parameter.unflatten(1, (-1, self.size[1])).unflatten(0, (-1, self.size[0]))


class Weights(Slices):
    """Live weights of [N, K], as bits int32 [N, ceil(K / 32)]; flags would be eight times their size."""

    def __init__(self, words: Tensor, K: int) -> None:
        self.words, self.K = words, K

    def read(self, parameter: Tensor) -> Tensor:
        return parameter.reshape(-1).gather(0, self._places())

    def write(self, parameter: Tensor, live: Tensor) -> None:
        parameter.put_(self._places(), live)

    def step(self, parameter: Tensor, gradient: Tensor, rate: float) -> None:
        _step_where(bits.unpack(self.words, self.K), parameter, gradient, rate)

    def _places(self) -> Tensor:
        """Live places in the flattened weight: `masked_select` takes four times as long as finding and gathering."""
        return bits.unpack(self.words, self.K).flatten().nonzero().squeeze(1)


def slices_of(model: nn.Module, language: int) -> dict[Tensor, Slices]:
    """What language `language` (-1: the full network) may change of each parameter of `model` that has a mask.

    A parameter that also stands somewhere else in the model (tied weights) may change anywhere: it has no entry here,
    like all others that are not masked.
    """
    if language < 0:
        return {}
    places: Counter[Tensor] = Counter(parameter for _, parameter in model.named_parameters(remove_duplicate=False))
    slices: dict[Tensor, Slices] = {}
    for layer in model.modules():
        if not isinstance(layer, MaskedLinear):
            continue
        found = _slices_of_mask(layer.mask, language)
        if places[layer.weight] == 1:
            slices[layer.weight] = found
        if isinstance(found, Rows) and layer.bias is not None and places[layer.bias] == 1:
            slices[layer.bias] = found  # a row mask gates the bias with its row
    return slices


def _slices_of_mask(mask: Mask, language: int) -> Slices:
    if mask.kind == "weights":
        return Weights(mask.index[language], mask.in_features)
    if mask.kind == "blocks":
        first, last = mask.extents[0, language : language + 2].tolist()
        row, start, end = mask.index[first:last].unbind(1)
        lengths = end - start
        # Block j of a run that begins at `start` is in column start + j.
        before = torch.repeat_interleave(lengths.cumsum(0) - lengths - start, lengths)
        columns = torch.arange(len(before), device=mask.device) - before
        return Blocks(row.repeat_interleave(lengths), columns, (mask.geometry[0], mask.geometry[1]))
    live = mask.index[language, : int(mask.extents[language])]
    return Rows(live) if mask.kind == "rows" else Columns(live, mask.geometry[0])


def _step_where(keep: Tensor, parameter: Tensor, gradient: Tensor, rate: float) -> None:
    """The step where `keep`, broadcast to the parameter's shape, is true; subtracting +0 changes no bit elsewhere.

    A gradient's bits and all ones or zeros: 0 times NaN would not be 0, and `torch.where` takes three times as long.
    """
    kind = _INTEGERS[gradient.element_size()]
    masked = gradient.view(kind).bitwise_and(keep.to(kind).neg_()).view(gradient.dtype)
    parameter.sub_(masked, alpha=rate)


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
