"""Splitting a mixed-language batch into one piece for each language, and what a mask kind computes for a piece."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

__all__ = ["FULL", "HALF", "Grads", "Needs", "Pieces", "Split", "Target", "cast", "dtype_of_sums", "take"]

FULL = -1  # the language id of the full, unmasked network
HALF = (torch.bfloat16, torch.float16)

Made = TypeVar("Made")

Grads = tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]  # dx, and of each layer dW and db


class Needs(NamedTuple):
    """Which gradients are needed: of the input, and of each layer's weight and bias."""

    x: bool
    weights: Sequence[bool]
    biases: Sequence[bool]


class Pieces(ABC):
    """What one mask kind computes for one language's tokens; M tokens, K_in and N_out the (maybe packed) widths."""

    in_width: int
    out_width: int
    masks: Sequence[Tensor]  # what says which weights a language owns, by language; equal for equal masks

    @cached_property
    def same_as(self) -> list[int]:
        """For each language the first one with an equal mask, `FULL` for one that owns everything; last for `FULL`."""
        firsts: dict[bytes, int] = {}
        digests = [mask.cpu().numpy().tobytes() for mask in self.masks]
        found = [firsts.setdefault(digest, language) for language, digest in enumerate(digests)]
        return [FULL if self.whole(language) else language for language in found] + [FULL]

    @abstractmethod
    def whole(self, language: int) -> bool:
        """Whether a language owns every weight."""

    def laid_out(self, weight: Tensor, languages: Sequence[int], x: Tensor) -> Tensor:
        """The weight as products with x read it best in a batch of these languages.

        The same numbers, maybe cast or in another order; what is cast may be the live part of the only language.
        `forward` and `input_grad` take it in place of the weight.
        """
        return cast(weight, x.dtype)

    @abstractmethod
    def forward(self, language: int, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        """Return y [M, N_out] of x [M, K_in], written into `out` if given, every element of it."""

    @abstractmethod
    def input_grad(self, language: int, dy: Tensor, weight: Tensor, out: Tensor | None) -> Tensor:
        """Return dx [M, K_in] of dy [M, N_out], written into `out` if given, every element of it."""

    def add_input_grad(self, language: int, dy: Tensor, weight: Tensor, out: Tensor) -> None:
        """Add dx to `out`; overridden where the product itself can add."""
        out += self.input_grad(language, dy, weight, None)

    @abstractmethod
    def add_weight_grad(self, language: int, dy: Tensor, x: Tensor, grad: Tensor) -> None:
        """Add this language's dW to the live part of `grad` [N, K]."""

    def summed_weight_grad(self, parts: Sequence[tuple[int, Tensor, Tensor]], weight: Tensor, read: Tensor) -> Tensor:
        """The dW [N, K] of a mixed batch, in the weight's dtype.

        `parts` are (language, dy, x) of each language, `read` what `laid_out` has returned. Half-precision weights are
        summed in float32.
        """
        grad = torch.zeros_like(read, dtype=dtype_of_sums(weight))  # in the order of what is read
        for language, dy, x in parts:
            self.add_weight_grad(language, dy, x, grad)
        return cast(grad, weight.dtype).contiguous()

    def weight_grad(self, language: int, dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The dW [N, K] of a batch of one language, in the weight's dtype; overridden where one pass less will do."""
        grad = torch.zeros_like(weight, memory_format=torch.contiguous_format)
        self.add_weight_grad(language, dy, x, grad)
        return grad

    def add_bias_grad(self, language: int, dy: Tensor, grad: Tensor) -> None:
        """Add this language's db to `grad` [N]; only row masks gate the bias."""
        grad += dy.sum(0)


class Split:
    """Where the examples of each language are in a batch.

    Attributes:
        positions: of each language that occurs its examples, ascending; languages in order of their first example.
        parts: each language and where its examples are, as a slice where they lie side by side, else as positions.
        languages: of each example.
        size: B.
    """

    def __init__(self, language_ids: list[int]) -> None:
        self.languages = language_ids
        self.size = len(language_ids)
        self.positions: dict[int, list[int]] = {}
        for position, language in enumerate(language_ids):
            self.positions.setdefault(language, []).append(position)
        self.parts: list[tuple[int, slice | list[int]]] = []
        for language, where in self.positions.items():
            first, last = where[0], where[-1] + 1
            self.parts.append((language, slice(first, last) if last - first == len(where) else where))
        self._merged: dict[tuple[tuple[int, ...], ...], Split] = {}
        self._made: dict[tuple[Callable[..., Any], torch.device], Any] = {}

    def once(self, make: Callable[[Split, torch.device], Made], device: torch.device) -> Made:
        """What `make` makes of this split: made for the first layer of a pass, and handed to all."""
        key = (make, device)
        if key not in self._made:
            self._made[key] = make(self, device)
        made: Made = self._made[key]
        return made

    def merged(self, layers: Sequence[Pieces]) -> Split:
        """The same examples, with languages whose masks are equal in all of these layers as one.

        Where languages agree (a mask that all share, a layer that none prunes), one product takes the tokens of all.
        """
        masks = {language: tuple([layer.same_as[language] for layer in layers]) for language in self.positions}
        if len(set(masks.values())) == len(masks):
            return self
        key = tuple(masks.values())
        if key not in self._merged:
            firsts: dict[tuple[int, ...], int] = {}
            for language, mask in masks.items():
                firsts.setdefault(mask, FULL if set(mask) == {FULL} else language)
            self._merged[key] = Split([firsts[masks[language]] for language in self.languages])
        return self._merged[key]

    @classmethod
    def of(cls, language_ids: Tensor, n_languages: int) -> Split:
        """The split of ids int64 [B].

        Ids that an attached model made for one pass (`models.routing`) keep theirs for the next layer.

        Raises:
            ValueError: an id that is not -1 to n_languages - 1.
        """
        of_one_pass: dict[str, Split] | None = getattr(language_ids, "_fastmask_of_one_pass", None)
        if of_one_pass is not None and "split" in of_one_pass:
            return of_one_pass["split"]
        ids: list[int] = language_ids.tolist()
        for position, language in enumerate(ids):
            if not FULL <= language < n_languages:
                raise ValueError(
                    f"language_ids[{position}] is {language}; expected 0 to {n_languages - 1}, "
                    "or -1 for the full network"
                )
        split = cls(ids)
        if of_one_pass is not None:
            of_one_pass["split"] = split
        return split


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype; `Tensor.to` takes its time even where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def dtype_of_sums(weight: Tensor) -> torch.dtype:
    """What the languages of a batch add up in."""
    return torch.float32 if weight.dtype in HALF else weight.dtype


def take(x: Tensor, where: slice | list[int]) -> Tensor:
    """The tokens [M, width] of some examples of x [B, T, width]: a view of a slice, a copy of scattered examples."""
    if isinstance(where, list):
        part = x.index_select(0, torch.tensor(where, device=x.device))
    else:
        part = x if where.stop - where.start == x.shape[0] else x[where]
    return part.reshape(part.shape[0] * part.shape[1], part.shape[2])


class Target:
    """Where a piece goes: straight into `out` [B, T, width], or through a buffer if its examples are scattered."""

    def __init__(self, out: Tensor, where: slice | list[int]) -> None:
        self.out, self.where = out, where
        if isinstance(where, list):
            self.part = out.new_empty(len(where), *out.shape[1:])
        else:
            self.part = out if where.stop - where.start == out.shape[0] else out[where]
        self.tokens = self.part.view(self.part.shape[0] * out.shape[1], out.shape[2])

    def done(self) -> None:
        if not isinstance(self.where, slice):
            self.out.index_copy_(0, torch.tensor(self.where, device=self.out.device), self.part)
