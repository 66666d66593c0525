"""`Mask`: which part of one weight each of L languages owns.

Dimension letters, here and everywhere: L languages, B examples, T tokens, N out_features, K in_features.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmask import bits
from fastmask.kept import never_written

KINDS = ("rows", "columns", "blocks", "weights")
FULL = -1  # the language id of the full, unmasked network
UNPACKED = -1  # the packed width of a layer that is not packed
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # that read the bits of a floating-point number, by bytes


def checked_id(number: int, n_languages: int) -> int:
    """The id of one of so many languages, or `FULL`; a ValueError for any other number."""
    if not FULL <= number < n_languages:
        known = f"0 to {n_languages - 1}, or -1 for the full network" if n_languages else "-1: no subnetworks attached"
        raise ValueError(f"language id {number} is out of range: expected {known}")
    return number


class Mask:
    """The masks of L languages over one weight [N, K]; immutable.

    Build one with `Mask.rows`, `Mask.columns`, `Mask.blocks` or `Mask.weights`. A language may own
    nothing, or everything: empty and full masks are valid.

    Attributes:
        kind: "rows", "columns", "blocks" or "weights".
        n_languages, out_features, in_features: L, N, K.
        geometry: size of a unit that lives and dies as one: (rows,) or (columns,), (bn, bk) of a block, (1, 1).
        index, extents: what the kernels read; their meaning depends on the kind:
            rows, columns: the live rows int64 [L, most], ascending, padded with 0; how many, int64 [L].
            blocks, weights: a bit for each block, int32 [L, N / bn, ceil(K / bk / 32)], bit k % 32 of word k // 32
            (`fastmask.bits`); live weights, int64 [L].
    """

    def __init__(
        self, kind: str, shape: tuple[int, ...], geometry: tuple[int, ...], index: Tensor, extents: Tensor
    ) -> None:
        self.kind = kind
        self.n_languages, self.out_features, self.in_features = shape
        self.geometry = geometry
        self.index, self.extents = never_written(_lasting(index)), _lasting(extents)

    # ---- constructors

    @classmethod
    def rows(cls, keep: Tensor, in_features: int) -> Mask:
        """Whole output units: `keep` bool [L, N]. A dead row gives exactly 0, its bias included."""
        keep = _checked(keep, 2, "keep [languages, out_features]")
        return cls._of_units("rows", keep, (*keep.shape, _positive(in_features, "in_features")))

    @classmethod
    def columns(cls, keep: Tensor, out_features: int) -> Mask:
        """Whole input units: `keep` bool [L, K]. A dead input does not count and gets no gradient."""
        keep = _checked(keep, 2, "keep [languages, in_features]")
        return cls._of_units("columns", keep, (keep.shape[0], _positive(out_features, "out_features"), keep.shape[1]))

    @classmethod
    def blocks(cls, keep: Tensor, block: Sequence[int]) -> Mask:
        """Blocks of (bn, bk) weights: `keep` bool [L, N / bn, K / bk]."""
        keep = _checked(keep, 3, "keep [languages, out_features / bn, in_features / bk]")
        if len(block) != 2:
            raise ValueError(f"block must be (bn, bk), given {block!r}")
        return cls._of_blocks("blocks", keep, _positive(block[0], "block[0]"), _positive(block[1], "block[1]"))

    @classmethod
    def weights(cls, keep: Tensor) -> Mask:
        """Any pattern: `keep` bool [L, N, K], stored as one bit a weight."""
        return cls._of_blocks("weights", _checked(keep, 3, "keep [languages, out_features, in_features]"), 1, 1)

    @classmethod
    def _of_units(cls, kind: str, keep: Tensor, shape: tuple[int, ...]) -> Mask:
        # Heads are runs of head_dim rows: knowing it, columns are copied in runs instead of one by one.
        changes = (keep[:, 1:] != keep[:, :-1]).any(0).nonzero().flatten() + 1
        unit, counts = math.gcd(keep.shape[1], *changes.tolist()), keep.sum(1)
        # A stable descending sort of the flags puts the live indices first, in ascending order.
        order = keep.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        padding = torch.arange(max(1, int(counts.max())), device=keep.device) >= counts[:, None]
        index = order[:, : padding.shape[1]].masked_fill(padding, 0).contiguous()
        return cls(kind, shape, (unit,), index, counts)

    @classmethod
    def _of_blocks(cls, kind: str, keep: Tensor, bn: int, bk: int) -> Mask:
        L, rows, columns = keep.shape
        live = keep.sum((1, 2)) * (bn * bk)
        return cls(kind, (L, rows * bn, columns * bk), (bn, bk), bits.pack(keep), live)

    # ---- properties

    @property
    def live(self) -> Tensor:
        """How many weights each language owns, int64 [L]."""
        of_unit = {"rows": self.in_features, "columns": self.out_features}.get(self.kind)
        return self.extents if of_unit is None else self.extents * of_unit

    @property
    def density(self) -> Tensor:
        """Share of the N x K weights each language owns, float32 [L]."""
        return self.live.float() / (self.out_features * self.in_features)

    @property
    def device(self) -> torch.device:
        return self.extents.device

    @property
    def nbytes(self) -> int:
        """Bytes of the stored mask, all languages together."""
        return self.index.nbytes + self.extents.nbytes

    def live_counts(self) -> list[int]:
        """Live rows (or columns) of each language; row and column masks only."""
        return self.extents.tolist()

    def flags(self) -> Tensor:
        """What `Mask.rows` or `Mask.columns` was given: bool [L, N] or [L, K]."""
        size = self.out_features if self.kind == "rows" else self.in_features
        places = torch.arange(self.index.shape[1], device=self.device)
        held = torch.where(places < self.extents[:, None], self.index, size)
        flags = torch.zeros(self.n_languages, size + 1, dtype=torch.bool, device=self.device)
        return flags.scatter_(1, held, True)[:, :size]

    def to_dense(self) -> Tensor:
        """The mask as bool [L, N, K], whatever its kind."""
        L, N, K = self.n_languages, self.out_features, self.in_features
        if self.kind in ("blocks", "weights"):
            bn, bk = self.geometry
            cells = bits.unpack(self.index, K // bk)
            return cells if self.kind == "weights" else cells.repeat_interleave(bn, 1).repeat_interleave(bk, 2)
        return (self.flags()[:, :, None] if self.kind == "rows" else self.flags()[:, None]).expand(L, N, K)

    def _checked_id(self, language: int) -> int:
        if not 0 <= operator.index(language) < self.n_languages:
            raise ValueError(f"language id {language} is out of range: expected 0 to {self.n_languages - 1}")
        return operator.index(language)

    def select(self, languages: Iterable[int]) -> Mask:
        """A new mask of the languages with these ids, in this order; an id may come more than once.

        Raises:
            ValueError: no id, or one out of range.
            TypeError: an id that is no integer.
        """
        ids = [self._checked_id(language) for language in languages]
        if not ids:
            raise ValueError("expected at least one language id, given none")
        return Mask._joined([self], ids)

    @classmethod
    def _joined(cls, masks: Sequence[Mask], ids: Sequence[int]) -> Mask:
        """The languages `ids`, counted through all masks."""
        first = masks[0]
        rows = torch.tensor(ids, device=first.device)
        extents = torch.cat([mask.extents for mask in masks])[rows]
        width = max(1, int(extents.max())) if first.kind in ("rows", "columns") else first.index.shape[-1]
        index = [torch.nn.functional.pad(mask.index, (0, width - mask.index.shape[-1])) for mask in masks]
        # Runs of a common divisor describe the languages of all masks.
        geometry = tuple(math.gcd(*units) for units in zip(*(mask.geometry for mask in masks), strict=True))
        shape = (len(ids), first.out_features, first.in_features)
        return cls(first.kind, shape, geometry, torch.cat(index).index_select(0, rows), extents)

    def transposed(self) -> Mask:
        """The same of the transposed weight, [K, N]; not of blocks."""
        keep = self.to_dense().transpose(1, 2)
        if self.kind == "rows":
            return Mask.columns(keep[:, 0], self.in_features)
        return Mask.rows(keep[:, :, 0], self.out_features) if self.kind == "columns" else Mask.weights(keep)

    def replaced(self, language: int, keep: Tensor) -> Mask:
        """A new mask in which one language owns something else; what the others own is as it was.

        Args:
            language: the language's id, 0..L-1.
            keep: bool, one language's part of what the constructor takes: [N] for rows, [K] for columns,
                [N / bn, K / bk] for blocks, [N, K] for weights.

        Raises:
            ValueError: an id out of range, or another shape.
            TypeError: not a bool tensor.
        """
        ids = list(range(self.n_languages))
        ids[self._checked_id(language)] = self.n_languages
        N, K, bn, bk = self.out_features, self.in_features, self.geometry[0], self.geometry[-1]
        shape = {"rows": (N,), "columns": (K,), "blocks": (N // bn, K // bk), "weights": (N, K)}[self.kind]
        rest = {"rows": (K,), "columns": (N,), "blocks": ((bn, bk),), "weights": ()}[self.kind]
        what = f"keep {list(shape)} of a mask of {self.kind}"
        keep = _checked(keep, len(shape), what).to(self.device)
        if tuple(keep.shape) != shape:
            raise ValueError(f"expected {what}, given shape {tuple(keep.shape)}")
        return Mask._joined([self, getattr(Mask, self.kind)(keep[None], *rest)], ids)

    def to(self, device: torch.device | str) -> Mask:
        """The same mask on `device`."""
        shape = (self.n_languages, self.out_features, self.in_features)
        return Mask(self.kind, shape, self.geometry, self.index.to(device), self.extents.to(device))

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without the tables that products keep with the stored tensors."""
        tensors = {name: value.detach() for name, value in vars(self).items() if isinstance(value, Tensor)}
        return {**vars(self), **tensors}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        never_written(self.index)

    def __repr__(self) -> str:
        density = ", ".join(f"{d:.2f}" for d in self.density.tolist()[:8]) + (", ..." if self.n_languages > 8 else "")
        return (
            f"Mask.{self.kind}({self.n_languages} languages, {self.out_features} x {self.in_features}, "
            f"unit {self.geometry}, density [{density}])"
        )


def _checked(keep: Tensor, ndim: int, what: str) -> Tensor:
    if not isinstance(keep, Tensor):
        raise TypeError(f"expected {what} as a bool tensor, given {type(keep).__name__}")
    if keep.dtype != torch.bool:
        raise TypeError(f"expected {what} of dtype torch.bool, given {keep.dtype}; write keep.bool() if that is meant")
    if keep.ndim != ndim or 0 in keep.shape:
        raise ValueError(f"expected {what} with every size >= 1, given shape {tuple(keep.shape)}")
    if keep.is_meta:
        raise ValueError(f"expected {what} with values, given a tensor on the meta device, which has none")
    return keep.detach()


def _lasting(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if it was made in inference mode: training could not use it."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


def _positive(value: int, name: str) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, given {value!r}")
    return value
