"""Masks over whole rows or whole columns of a weight: live rows are gathered, multiplied, and their gradients added.

Columns are rows of the transposed weight, so both are written once here, for rows of w [size, S]: the weight, or its
transpose. What *packed* means is said by `layers.Layers`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cached_property
from itertools import pairwise
from math import prod

import torch
from torch import Tensor

from fastmask.masks import FULL, INTEGERS, Mask
from fastmask.torch_path import packing
from fastmask.torch_path.gemm import Live, Tensors, add_outer, by_onednn, cast, compiles, products
from fastmask.torch_path.onednn import padded
from fastmask.torch_path.split import Split, first_equals

LEAST_TO_TRANSPOSE = 4  # languages in a batch: single columns are gathered faster if each lies in one piece of memory
MOST_GATHERED = 2**19  # weights of several languages, which should still be in the cache when they are multiplied
MOST_MULTIPLIED = 2**23  # the same of languages that are multiplied in one call
MOST_FILLED = 9 / 8  # of the live rows, where languages are filled up to equally many: it takes less time up to there


class Units:
    """Tables of one mask over rows or columns, and what its layers compute for the tokens of each language.

    A batch's languages are a tuple of ids, in the order of their activations; only one of them may own all of the
    weight (`Split.merged`), which is called `FULL` then.
    """

    def __init__(self, mask: Mask, packed: bool) -> None:
        self.of_rows, self.packed, self.unit = mask.kind == "rows", packed, mask.geometry[0]
        self.size, self.other = mask.out_features, mask.in_features
        if not self.of_rows:
            self.size, self.other = self.other, self.size
        self.index, self.counts = mask.index.detach(), mask.extents.detach()
        self.live: list[int] = [*self.counts.tolist(), self.size]  # of each language, and of `FULL`
        self.plans: dict[tuple[Hashable, ...], tuple[Split, bool, bool]] = {}
        self._grouped: tuple[Hashable, list[tuple[slice, Live | None]]] | None = None

    @cached_property
    def same_as(self) -> list[int]:
        """As `first_equals`."""
        masks = [self.index[language, :n] for language, n in enumerate(self.live[:-1])]
        return first_equals(masks, self.whole)

    def whole(self, language: int) -> bool:
        """Whether a language owns all of the weight."""
        return self.live[language] == self.size

    @cached_property
    def slots(self) -> Tensor:
        """As `packing.slots`."""
        return packing.slots(self.index, self.counts, self.size, self.packed)

    # ---- what `layers` asks of every mask kind

    def read(self, weight: Tensor, dtype: torch.dtype, languages: int) -> Tensor:
        """A weight [N, K] as the products of a batch of so many languages read it: w [size, S] in `dtype`."""
        w = cast(weight, dtype) if self.of_rows else cast(weight, dtype).t()
        return w.contiguous() if self._transposes(languages) else w

    def _transposes(self, languages: int) -> bool:
        return not self.of_rows and self.unit == 1 and languages >= LEAST_TO_TRANSPOSE

    def forward(self, languages: Sequence[int], xs: Tensors, w: Tensor, outs: Tensors) -> None:
        """Write each language's y [M, N or packed width] of its x [M, K or packed width], without the bias."""
        (self._onto if self.of_rows else self._from)(languages, xs, w, outs)

    def add_bias(self, y: Tensor, bias: Tensor, split: Split) -> None:
        """Add the bias [N] to y [B, T, N or packed width] of all languages: a row mask gates it with its row."""
        if self.of_rows and split.present != (FULL,):
            bias = torch.nn.functional.pad(bias, (0, 1))[self.slots[split.ids, None, : y.shape[2]]]
        y += bias

    def input_grad(self, languages: Sequence[int], dys: Tensors, w: Tensor, outs: Tensors, add: bool) -> None:
        """Write (or add) each language's dx of its dy; shapes as in `forward`."""
        if self.of_rows:
            self._from(languages, dys, w, outs, add)
        elif not add:
            self._onto(languages, dys, w, outs)
        else:
            parts = [torch.empty_like(out) for out in outs]
            self._onto(languages, dys, w, parts)
            torch._foreach_add_(list(outs), parts)

    def weight_grad(
        self, languages: Sequence[int], dys: Tensors, xs: Tensors, weight: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """The dW [N, K] of all languages, summed in `dtype`."""
        if tuple(languages) == (FULL,):  # that of a dense layer, whichever side the mask is on
            grad = torch.empty_like(weight, dtype=dtype)
            add_outer(grad, None, dys, xs, fresh=True)
            return grad
        masked, others = (dys, xs) if self.of_rows else (xs, dys)
        if self._transposes(len(languages)):
            grad = weight.new_empty(self.size, self.other, dtype=dtype)
        else:
            grad = torch.empty_like(weight if self.of_rows else weight.t(), dtype=dtype)
        for number, (group, live) in enumerate(self._groups(languages, dys)):
            narrow = self._narrow(languages[group], masked[group], live)
            add_outer(grad, live, narrow, others[group], fresh=number == 0)
        return grad if self.of_rows else grad.t().contiguous()

    def bias_grad(self, dy: Tensor, split: Split, dtype: torch.dtype) -> Tensor:
        """The db [N] of dy [B, T, N or packed width], summed in `dtype`."""
        if split.present == (FULL,):
            if dy.dtype == torch.bfloat16:  # added up in float32 all the same, but not copied to it
                return cast(dy.sum((0, 1)), dtype)
            return dy.sum((0, 1), dtype=dtype)
        if not self.of_rows:
            return dy.sum((0, 1), dtype=dtype)
        sums, slots = dy.sum(1, dtype=dtype), self.slots[split.ids, : dy.shape[2]]
        grad = torch.zeros(self.size + 1, dtype=dtype, device=dy.device).index_add_(0, slots.flatten(), sums.flatten())
        return grad[: self.size].clone()

    # ---- gates: between `enter` and `leave` every language is the full network

    def enter(self, given: Tensor, split: Split) -> Tensor:
        """An activation's masked side as the whole weight takes it: [B, T, width] -> [B, T, size], dead units zero."""
        if self.packed:
            return packing.enter(given, self.slots[split.ids], self.size)
        opened = self._open(given.dtype)[split.ids, None]
        return (given.resolve_neg().view(opened.dtype) & opened).view(given.dtype)

    def leave(self, wide: Tensor, split: Split, width: int) -> Tensor:
        """Undo `enter`: [B, T, size] -> [B, T, width], zero at what is dead; `wide` may be overwritten."""
        if self.packed:
            return packing.leave(wide, self.slots[split.ids], width)
        opened = self._open(wide.dtype)[split.ids, None]
        wide.view(opened.dtype).bitwise_and_(opened)
        return wide

    def _open(self, dtype: torch.dtype) -> Tensor:
        """All bits of what lives, none of what is dead [L + 1, size]: even NaN becomes zero, and no gate is cheaper."""
        return self._live_bits.to(INTEGERS[dtype.itemsize])

    @cached_property
    def _live_bits(self) -> Tensor:
        return -(self.slots < self.size).to(torch.int16)

    # ---- which languages are multiplied together

    def _groups(self, languages: Sequence[int], activations: Tensors) -> list[tuple[slice, Live | None]]:
        """Languages whose live rows are gathered at once, and those rows; None for all of the weight's.

        `activations` are those of each language.
        """
        rounds = bool(activations) and compiles(activations[0])
        alone = rounds or not activations or by_onednn(activations[0])
        alike = [not alone and len(left) == len(right) for left, right in pairwise(activations)]
        key, made = (tuple(languages), tuple(alike), rounds), self._grouped  # which another thread may change meanwhile
        if made is None or made[0] != key:
            most = max([self.live[language] for language in languages if not self.whole(language)], default=0)
            groups: list[tuple[slice, Live | None]] = []
            first = 0
            for end in range(1, len(languages) + 1):
                if end == len(languages) or not self._at_once(languages[first : end + 1], all(alike[first:end]), most):
                    live = self._live_rows(languages[first:end], all(alike[first : end - 1]), rounds, most)
                    groups.append((slice(first, end), live))
                    first = end
            made = self._grouped = key, groups
        return made[1]

    def _at_once(self, languages: Sequence[int], alike: bool, most: int) -> bool:
        """Whether to gather the rows of all of these, which may be `alike` in their numbers of tokens."""
        if any(self.whole(language) for language in languages):
            return False
        counts = [self.live[language] for language in languages]
        if sum(counts) * self.other <= MOST_GATHERED:
            return True
        few = most * len(counts) * self.other <= MOST_MULTIPLIED or len(counts) <= torch.get_num_threads()
        return alike and few and _can_be_filled(counts, most)

    def _live_rows(self, languages: Sequence[int], alike: bool, rounds: bool, most: int) -> Live | None:
        """The rows of some languages.

        Filled up to the `most` that one of the batch has where they are alike, and as far as `padded` says if `rounds`.
        """
        if self.whole(languages[0]):
            return None
        counts = [self.live[language] for language in languages]
        if alike and len(counts) > 1 and _can_be_filled(counts, most):
            return Live(self.index[list(languages), :most].flatten(), [most] * len(counts), counts)
        filled = [min(padded(n), most) for n in counts] if rounds else counts
        rows = [self.index[language, :n] for language, n in zip(languages, filled, strict=True)]
        return Live(torch.cat(rows), filled, counts if rounds else None)

    def _narrow(self, languages: Sequence[int], activations: Tensors, live: Live | None) -> Tensors:
        """The part [M, n] of each language's activation [M, width] on the masked side that its rows belong to."""
        if live is None:
            return activations
        if self.packed:
            return list(map(_left, activations, live.counts))
        narrow = _side_by_side(activations, live.counts)
        for language, activation, out in zip(languages, activations, narrow, strict=True):
            torch.index_select(activation, 1, self.index[language, : out.shape[1]], out=out)
        if live.own is not None:  # what stands for no unit of theirs is unit 0, which may be dead and hold NaN
            _clear_right(narrow, live.own)
        return narrow

    def _from(
        self, languages: Sequence[int], activations: Tensors, w: Tensor, outs: Tensors, add: bool = False
    ) -> None:
        """Write (or add) combinations of live rows."""
        for group, live in self._groups(languages, activations):
            products(self._narrow(languages[group], activations[group], live), w, live, outs[group], add=add)

    def _onto(self, languages: Sequence[int], activations: Tensors, w: Tensor, outs: Tensors) -> None:
        """Write products with live rows into their places of each out [M, width], and zero elsewhere."""
        for group, live in self._groups(languages, activations):
            if live is None:
                products(activations[group], w, None, outs[group], transposed=True)
            elif self.packed:
                products(activations[group], w, live, list(map(_left, outs[group], live.counts)), transposed=True)
                _clear_right(outs[group], live.counts)
            else:
                places = _side_by_side(activations[group], live.counts)
                products(activations[group], w, live, places, transposed=True)
                for language, place, out in zip(languages[group], places, outs[group], strict=True):
                    n = self.live[language]
                    out.zero_().index_copy_(1, self.index[language, :n], place[:, :n])


def _can_be_filled(counts: Sequence[int], most: int) -> bool:
    return most * len(counts) <= MOST_FILLED * sum(counts)


def _left(matrix: Tensor, width: int) -> Tensor:
    return matrix if matrix.shape[1] == width else matrix[:, :width]


def _clear_right(matrices: Tensors, widths: Sequence[int]) -> None:
    """Set what lies behind so many columns to zero."""
    for matrix, n in zip(matrices, widths, strict=True):
        if n < matrix.shape[1]:
            matrix[:, n:] = 0


def _side_by_side(like: Tensors, widths: Sequence[int]) -> list[Tensor]:
    """Uninitialised matrices, one after the other in memory: as long as those given, and so wide."""
    shapes = [(len(matrix), width) for matrix, width in zip(like, widths, strict=True)]
    parts = like[0].new_empty(sum(map(prod, shapes))).split_with_sizes([*map(prod, shapes)])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
