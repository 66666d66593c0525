"""Masks over whole rows or whole columns of a weight: live rows are gathered, multiplied, and their gradients added.

Columns are rows of the transposed weight, so both are written once here, for rows of w [size, S]: the weight, or its
transpose. *Packed* means that the masked side of an activation holds only live units, moved to the front of a buffer as
wide as the widest language of the batch; what is left over is zero. Heads and neurons travel packed from the projection
that makes them to the projection that consumes them.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from fastmask.masks import StoredMask
from fastmask.torch_path.gemm import add_outer, cast, combined, products
from fastmask.torch_path.split import Split, first_equals

__all__ = ["Units"]

LEAST_TO_TRANSPOSE = 4  # languages in a batch


class Units:
    """Tables of one mask over rows or columns, and what its layers compute for M tokens of one language."""

    def __init__(self, mask: StoredMask, shape: tuple[int, int], packed: bool) -> None:
        self.of_rows, self.packed, self.unit = mask.kind == "rows", packed, mask.geometry[0]
        self.size, self.other = shape if self.of_rows else (shape[1], shape[0])
        self.index, self.counts = mask.index.detach(), mask.extents.detach()
        self.live: list[int] = [*self.counts.tolist(), self.size]  # of each language, and of `FULL`
        self._indices: list[Tensor | None] = [
            None if n == self.size else self.index[language, :n] for language, n in enumerate(self.live[:-1])
        ] + [None]

    @cached_property
    def same_as(self) -> list[int]:
        """As `first_equals`."""
        masks = [self.index[language, :n] for language, n in enumerate(self.live[:-1])]
        return first_equals(masks, self.whole)

    def whole(self, language: int) -> bool:
        """Whether a language owns all of the weight."""
        return self._indices[language] is None

    @cached_property
    def slots(self) -> Tensor:
        """What each place of the masked side holds for each language, `FULL` last: int64 [L + 1, size].

        `size` for what is dead. Packed, the masked side has only as many of the places as the batch needs.
        """
        places = torch.arange(self.size, device=self.index.device)
        held = torch.nn.functional.pad(self.index, (0, self.size - self.index.shape[1]))
        slots = torch.where(places < self.counts[:, None], held, self.size)
        if not self.packed:
            everything = torch.full((len(slots), self.size + 1), self.size, device=places.device)
            slots = everything.scatter_(1, slots, slots)[:, : self.size]
        return torch.cat([slots, places[None]])

    # ---- what `layers` asks of every mask kind

    def read(self, weight: Tensor, dtype: torch.dtype, languages: int) -> Tensor:
        """The weight [N, K] as the products of a batch of so many languages read it: w [size, S] in `dtype`."""
        w = cast(weight if self.of_rows else weight.t(), dtype)
        # Single columns are gathered and added at a fraction of the time where each lies in one piece of memory.
        return w.contiguous() if not self.of_rows and self.unit == 1 and languages >= LEAST_TO_TRANSPOSE else w

    def weight_of(self, w: Tensor) -> Tensor:
        """A gradient [N, K] of one that is stored as `read` stores weights."""
        return w if self.of_rows else w.t().contiguous()

    def forward(self, language: int, x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Write y [M, N or packed width] of x [M, K or packed width] into `out`."""
        if self.of_rows:
            self._onto(language, x, w, bias, out)
        else:
            combined(self._live(language, x), w, self._indices[language], out, bias=bias)

    def input_grad(self, language: int, dy: Tensor, w: Tensor, out: Tensor, add: bool) -> None:
        """Write (or add) dx of dy into `out`; shapes as in `forward`."""
        if self.of_rows:
            combined(self._live(language, dy), w, self._indices[language], out, add)
        elif not add:
            self._onto(language, dy, w, None, out)
        else:
            part = torch.empty_like(out)
            self._onto(language, dy, w, None, part)
            out += part

    def add_weight_grad(self, language: int, dy: Tensor, x: Tensor, grad: Tensor, fresh: bool) -> None:
        """Add dW to a gradient that is stored as `read` stores weights; all of it is written if it is `fresh`."""
        masked, other = (dy, x) if self.of_rows else (x, dy)
        add_outer(grad, self._indices[language], self._live(language, masked), other, fresh)

    def bias_grad(self, dy: Tensor, split: Split, dtype: torch.dtype) -> Tensor:
        """The db [N] of dy [B, T, N or packed width], summed in `dtype`: a row mask gates the bias with its row."""
        if not self.of_rows or all(self.whole(language) for language, _, _ in split.parts):
            return dy.sum((0, 1), dtype=dtype)
        sums = dy.sum(1, dtype=dtype)
        slots = self.slots[split.ids, : dy.shape[2]]
        grad = torch.zeros(self.size + 1, dtype=dtype, device=dy.device).index_add_(0, slots.flatten(), sums.flatten())
        return grad[: self.size].clone()

    # ----

    def _live(self, language: int, activation: Tensor) -> Tensor:
        """The live part [M, live] of an activation [M, width] on the masked side."""
        index = self._indices[language]
        if self.packed or index is None:
            return activation[:, : self.live[language]]
        return activation.index_select(1, index)

    def _onto(self, language: int, a: Tensor, w: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Write products with the live rows into their places of `out` [M, width], and zero elsewhere."""
        live, index = self.live[language], self._indices[language]
        if self.packed or index is None:
            products(a, w, index, bias, out[:, :live])
            if live < out.shape[1]:
                out[:, live:] = 0
        else:
            part = out.new_empty(out.shape[0], live)
            products(a, w, index, bias, part)
            out.zero_().index_copy_(1, index, part)
