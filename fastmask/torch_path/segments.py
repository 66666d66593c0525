"""Splitting a mixed-language batch into one piece for each language, and running a mask kind over the pieces."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["Pieces", "backward", "forward", "segments"]

FULL = -1  # the language id of the full, unmasked network


class Pieces(ABC):
    """What one mask kind computes for one language's tokens; M tokens, K_in and N_out the (maybe packed) widths."""

    in_width: int
    out_width: int

    @abstractmethod
    def forward(self, language: int, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Write y [M, N_out] for x [M, K_in] into `out`, every element of it."""

    @abstractmethod
    def input_grad(self, language: int, dy: Tensor, weight: Tensor, out: Tensor) -> None:
        """Write dx [M, K_in] for dy [M, N_out] into `out`, every element of it."""

    @abstractmethod
    def add_weight_grad(self, language: int, dy: Tensor, x: Tensor, grad: Tensor) -> None:
        """Add this language's dW to the live part of `grad` [N, K]."""

    def weight_grad(self, language: int, dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The dW [N, K] of a batch of one language, in the weight's dtype; overridden where one pass less will do."""
        grad = torch.zeros_like(weight, memory_format=torch.contiguous_format)
        self.add_weight_grad(language, dy, x, grad)
        return grad

    def add_bias_grad(self, language: int, dy: Tensor, grad: Tensor) -> None:
        """Add this language's db to `grad` [N]; only row masks gate the bias."""
        grad += dy.sum(0).to(grad.dtype)


def segments(language_ids: list[int]) -> Iterator[tuple[int, slice | list[int]]]:
    """Yield (language, where its examples are): a slice where they lie side by side, else their positions."""
    positions: dict[int, list[int]] = {}
    for position, language in enumerate(language_ids):
        positions.setdefault(language, []).append(position)
    for language, where in positions.items():
        first, last = where[0], where[-1] + 1
        yield language, (slice(first, last) if last - first == len(where) else where)


def _take(x: Tensor, where: slice | list[int]) -> Tensor:
    """The tokens [M, width] of some examples of x [B, T, width]: a view of a slice, a copy of scattered examples."""
    part = x[where] if isinstance(where, slice) else x.index_select(0, torch.tensor(where, device=x.device))
    return part.reshape(part.shape[0] * part.shape[1], part.shape[2])


class _Target:
    """Where a piece goes: straight into `out` [B, T, width], or through a buffer if its examples are scattered."""

    def __init__(self, out: Tensor, where: slice | list[int]) -> None:
        self.out, self.where = out, where
        self.part = out[where] if isinstance(where, slice) else out.new_empty(len(where), *out.shape[1:])
        self.tokens = self.part.view(self.part.shape[0] * out.shape[1], out.shape[2])

    def done(self) -> None:
        if not isinstance(self.where, slice):
            self.out.index_copy_(0, torch.tensor(self.where, device=self.out.device), self.part)


def forward(pieces: Pieces, x: Tensor, weight: Tensor, bias: Tensor | None, language_ids: list[int]) -> Tensor:
    """Run x [B, T, K_in] through the masked weight, one language after the other -> [B, T, N_out]."""
    y = x.new_empty(*x.shape[:2], pieces.out_width)
    for language, where in segments(language_ids):
        target = _Target(y, where)
        pieces.forward(language, _take(x, where), weight, bias, target.tokens)
        target.done()
    return y


def backward(
    pieces: Pieces, dy: Tensor, x: Tensor, weight: Tensor, language_ids: list[int], needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `forward`: (dx, dW, db), each None unless `needs` asks for it.

    dW is one buffer that every language adds its live part to. Half-precision weights are summed in float32 when
    several languages add to them.
    """
    parts = list(segments(language_ids))
    several = len(parts) > 1
    sum_dtype = torch.float32 if several and weight.dtype in (torch.bfloat16, torch.float16) else weight.dtype
    dx = x.new_empty(x.shape) if needs[0] else None
    dw = None
    if needs[1] and len(parts) == 1:
        language, where = parts[0]
        dw = pieces.weight_grad(language, _take(dy, where), _take(x, where), weight)
    elif needs[1]:
        dw = torch.zeros(weight.shape, dtype=sum_dtype, device=weight.device)
    db = torch.zeros(weight.shape[0], dtype=sum_dtype, device=weight.device) if needs[2] else None
    for language, where in parts:
        dy_part = _take(dy, where)
        if dx is not None:
            target = _Target(dx, where)
            pieces.input_grad(language, dy_part, weight, target.tokens)
            target.done()
        if dw is not None and several:
            pieces.add_weight_grad(language, dy_part, _take(x, where), dw)
        if db is not None:
            pieces.add_bias_grad(language, dy_part, db)
    return dx, None if dw is None else dw.to(weight.dtype), None if db is None else db.to(weight.dtype)
